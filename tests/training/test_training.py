"""The recipe: data that says what it claims, a run that learns, stops, goes on and ends the same."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

import xrk
from xrk.models.resnet18_unet import ResNet18UNet
from xrk.noise import NoiseModel
from xrk.training import blindspot_net, data, denoise, lxie_net, resnet18_unet
from xrk.training.optimizer import Muon, orthogonalise


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    path = tmp_path_factory.mktemp("pool") / "pool.npy"
    data.build_pool(path, 3, size=96, workers=1)
    return path


def test_pool_holds_the_scenes_it_names(pool):
    stored = np.load(pool)
    assert stored.shape == (3, 96, 96)
    expected = data.clean_signal(1_000_001, 96)
    np.testing.assert_allclose(stored[1] / data.POOL_SCALE, np.clip(expected, 0, None), atol=1.1 / data.POOL_SCALE)


def test_patches_have_unit_noise(pool):
    patches = data.Patches(pool, 64, seed=0)
    noisy, target, weight = patches.batch(24)
    assert noisy.shape == target.shape == weight.shape == (24, 1, 64, 64)
    assert noisy.dtype == target.dtype == np.float32
    deviation = np.median((noisy - target).std((1, 2, 3)))
    assert deviation == pytest.approx(1, abs=0.06)
    assert np.abs(np.median((noisy - target).mean((1, 2, 3)))) < 0.05
    np.testing.assert_allclose(weight.mean((1, 2, 3)), 1, rtol=1e-4)


def test_white_patches_and_those_of_real_frames(pool):
    noisy, target, _ = data.Patches(pool, 64, seed=1, white=True).batch(12)
    noise = noisy - target
    for axis in (2, 3):
        pairs = (np.delete(noise, 0, axis) * np.delete(noise, -1, axis)).mean((1, 2, 3)) / noise.var((1, 2, 3))
        assert np.abs(pairs).max() < 0.08
    frames = np.full((2, 70, 80), 5.0, np.float32)
    noisy, target, _ = data.Patches(pool, 64, seed=1, white=True, frames=frames).batch(40)
    real = (noisy == 5).all((1, 2, 3))
    assert 2 <= real.sum() <= 20 and np.isnan(target[real]).all() and np.isfinite(target[~real]).all()


class _Says(torch.nn.Module):
    """Stands for a blind network: it says what it is told to."""

    def __init__(self, mean, std):
        super().__init__()
        self.said, self.std = torch.nn.Parameter(torch.stack([mean, std], dim=1)), True

    def noise(self, mean):
        return torch.ones_like(mean)

    def forward(self, noisy):
        return self.said


def test_a_patch_weighs_as_little_as_the_network_expects_to_be_wrong_there():
    rng = np.random.default_rng(0)
    mean, std, y = rng.uniform(5, 50, (3, 8, 8)), rng.uniform(0, 2, (3, 8, 8)), rng.uniform(5, 50, (3, 1, 8, 8))
    says = _Says(torch.from_numpy(mean), torch.from_numpy(std))
    loss = blindspot_net.loss(says, torch.from_numpy(y), None, None)
    loss.backward()
    terms, slopes = [], []
    for m, s, seen in zip(mean, std, y[:, 0], strict=True):
        k, v = m**2 / (m**2).mean(), s**2 + 1
        scale = (k * s**2 / v).mean() + blindspot_net.FLOOR
        terms.append((k * ((seen - m) ** 2 / v + np.log(v))).mean() / scale)
        slopes.append(k * 2 * (m - seen) / v / scale / m.size / len(mean))
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-12)
    np.testing.assert_allclose(says.said.grad[:, 0].numpy(), slopes, rtol=1e-9)  # the weights have no slope


def test_a_blind_network_never_sees_a_clean_image(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = blindspot_net.build({**blindspot_net.CONFIG, "features": 4})
    blindspot_net.initialise(network)
    x = 5 + torch.randn(2, 1, 64, 64)
    nothing = torch.full_like(x, torch.nan)
    assert torch.isfinite(blindspot_net.loss(network, x, nothing, nothing))
    mean = network(x)[:, :1].detach()
    assert (mean - 5).std() < 0.7  # it starts as the mean of four neighbours
    seeing = blindspot_net.build({**blindspot_net.CONFIG, "features": 4, "spot": 0})
    assert torch.isnan(blindspot_net.loss(seeing, x, nothing, nothing))
    tifffile.imwrite(tmp_path / "a.tif", np.random.default_rng(0).poisson(400, (64, 64)).astype(np.uint16))
    frames, told = denoise.real_frames(tmp_path, network)
    assert frames.shape == (1, 64, 64) and told["shape"] == [1, 64, 64]
    assert frames.std() == pytest.approx(1, abs=0.1)
    for folder, module, problem in (
        (tmp_path / "none", network, "no TIFF"), (tmp_path, seeing, "learns from noise"),
    ):  # fmt: skip
        with pytest.raises(xrk.errors.InputError, match=problem):
            denoise.real_frames(folder, module)


def test_patches_go_on_where_they_were(pool):
    first = data.Patches(pool, 32, seed=5)
    first.batch(2)
    state = first.state()
    second = data.Patches(pool, 32, seed=99)
    second.restore(state)
    for a, b in zip(first.batch(2), second.batch(2), strict=True):
        np.testing.assert_array_equal(a, b)


def test_closed_form_target_is_near_the_exact_one():
    mean = np.geomspace(0.5, 2000, 50)
    exact = NoiseModel(1.0, 0.0, 1.0).expected_stabilised(mean)
    assert np.abs(data.expected_anscombe(mean + 1.0) - exact).max() < 0.03


def arguments(**changes):
    values = {
        "steps": 6, "cooldown": 2, "scenes": 3, "batch": 2, "size": 32, "optimizer": "muon", "lr": 0.02, "seed": 0,
        "log": 3, "save": 3, "device": "cpu", "start": None, "model": "resnet18-unet",
        "frames": None, "warmup": 200,
    }  # fmt: skip
    return denoise.argparse.Namespace(**values | changes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"model": "lxie-net", "width": 4, "depths": [1, 1], "d_state": 2}, {"model": "blindspot", "features": 4}],
    ids=["resnet18-unet", "lxie-net", "blindspot"],
)
def test_a_killed_run_ends_like_one_that_was_not(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(
        denoise, "build_pool", lambda path, *a, **k: path.exists() or data.build_pool(path, 3, 192, workers=1)
    )
    denoise.train(tmp_path / "whole", arguments(**changes))
    whole = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    # Killed after step 3: start again from the checkpoint that was there then.
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "pool.npy").symlink_to(tmp_path / "whole" / "pool.npy")
    rate = denoise.learning_rate

    class Killed(Exception):
        pass

    def kill(step, *rest):
        if step == 4:
            raise Killed
        return rate(step, *rest)

    monkeypatch.setattr(denoise, "learning_rate", kill)
    with pytest.raises(Killed):
        denoise.train(tmp_path / "killed", arguments(**changes))
    monkeypatch.setattr(denoise, "learning_rate", rate)
    denoise.train(tmp_path / "killed", arguments(**changes))
    resumed = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert (
        resumed["model"] == changes.get("model", "resnet18-unet")
        and changes.items()
        <= {
            **resumed["config"],
            "model": resumed["model"],
        }.items()
    )
    for name, value in whole["average"].items():
        torch.testing.assert_close(resumed["average"][name], value, rtol=1e-4, atol=1e-6)


def test_a_run_begins_from_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(denoise, "build_pool", lambda path, *a, **k: data.build_pool(path, 3, 192, workers=1))
    shipped = Path(xrk.__file__).parent / "weights" / "resnet18-unet.safetensors"
    denoise.train(tmp_path, arguments(start=shipped, steps=1, lr=0.0))
    begun = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["network"]
    network = ResNet18UNet(**resnet18_unet.CONFIG)
    network.load_state_dict(begun)
    x = torch.randn(1, 1, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = xrk.load("resnet18-unet").module(x)
        torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-4)


def test_a_grown_network_computes_the_same_and_then_learns():
    torch.manual_seed(3)
    small = ResNet18UNet(width=3, decoder_channels=(5, 4, 6, 3, 4), full_resolution_skip=2, batch_norm=False)
    large = ResNet18UNet(
        width=4, decoder_channels=(7, 4, 9, 5, 6), full_resolution_skip=5, batch_norm=False, input_blocks=2
    )
    resnet18_unet.initialise(small)
    resnet18_unet.initialise(large)
    resnet18_unet.grow(large, small.state_dict())
    x = torch.randn(1, 1, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(large(x), small(x), rtol=0, atol=1e-5)
    large(x).square().mean().backward()
    listening = large.decoder.blocks[4].conv1[0].weight.grad[:4]  # of the old outputs
    assert all(listening[:, n].abs().sum() > 0 for n in range(listening.shape[1]))
    with pytest.raises(ValueError, match=r"does not fit into the network's"):
        resnet18_unet.grow(small, large.state_dict())


def test_network_starts_as_identity_and_ignores_the_level():
    torch.manual_seed(0)
    network = ResNet18UNet(**resnet18_unet.CONFIG).eval()
    resnet18_unet.initialise(network)
    x = 3 * torch.randn(1, 1, 64, 64)
    with torch.inference_mode():
        y = network(x)
        assert (y - x).std() < 0.5 * x.std()
        torch.testing.assert_close(network(x + 100) - 100, y, rtol=0, atol=1e-3)


def test_an_lxie_net_starts_as_identity_and_ignores_the_level():
    torch.manual_seed(0)
    network = lxie_net.build(lxie_net.CONFIG).eval()
    lxie_net.initialise(network)
    x = 3 * torch.randn(1, 1, 64, 72)
    with torch.inference_mode():
        y = network(x)
        assert (y - x).std() < 0.5 * x.std()
        torch.testing.assert_close(network(x + 100) - 100, y, rtol=0, atol=1e-3)


def test_muon_moves_products_and_adamw_the_rest_of_an_lxie_net():
    network = lxie_net.build(lxie_net.CONFIG)
    moved = {name for name, p in network.named_parameters() if lxie_net.is_matrix(name, p)}
    for name, p in network.named_parameters():
        stack = any(part in name for part in ("x_proj", "dt_projs", "A_logs", "Ds", "self_attention.conv2d", "norm"))
        assert (name in moved) == (p.ndim >= 2 and min(p.shape[0], p[0].numel()) > 8 and not stack), name


def test_the_command_takes_the_sizes_of_its_network(monkeypatch):
    seen = []
    monkeypatch.setattr(denoise, "train", lambda run, arguments: seen.append(arguments))
    denoise.main(["--run", "somewhere", "--model", "lxie-net", "--depths", "1", "2", "--d-state", "4"])
    denoise.main(["--run", "somewhere", "--width", "12"])
    assert (seen[0].depths, seen[0].d_state, seen[1].width) == ([1, 2], 4, 12)
    with pytest.raises(SystemExit):
        denoise.main(["--run", "somewhere", "--depths", "1", "2"])


def test_learning_rate():
    rates = [denoise.learning_rate(step, 1000, 300) for step in range(1000)]
    assert rates[0] < 0.01
    assert rates[500] == 1.0
    assert rates[-1] < 0.01
    assert all(b <= a for a, b in pairwise(rates[700:]))


def test_orthogonalise():
    torch.manual_seed(0)
    for shape in ((8, 40), (40, 8), (16, 16)):
        singular = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert singular.min() > 0.3
        assert singular.max() < 1.3


def test_muon_descends():
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    goal = torch.randn(8, 4, 3, 3)
    optimizer = Muon([kernel], lr=0.2, weight_decay=0.0)
    before = ((kernel - goal) ** 2).mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        ((kernel - goal) ** 2).mean().backward()
        optimizer.step()
    assert ((kernel - goal) ** 2).mean().item() < 0.2 * before
