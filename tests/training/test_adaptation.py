"""Adaptation to noisy frames: it learns without a clean image, goes on after a kill, and says what it found."""

import hashlib
import io
import json

import numpy as np
import pytest
import torch

import xrk
from xrk.errors import CheckpointFileError, DeviceError, ImageFileError, InputError, InputTypeError
from xrk.loading import Model
from xrk.metrics import psnr
from xrk.models import BlindSpot, Card
from xrk.noise import NoiseModel
from xrk.simulate import Detector, blur
from xrk.training import adaptation_run, blindspot_net
from xrk.training.adaptation import adapt, lagged

GAIN = 8.0


def frames(count=3, size=96, spread=0.0):
    """Noisy frames of a few smooth discs, and what they are without noise."""
    rows, columns = np.mgrid[:size, :size] / size
    signal = 0.9 - 0.4 * ((rows - 0.4) ** 2 + (columns - 0.5) ** 2 < 0.08) - 0.25 * (np.abs(rows - columns) < 0.1)
    signal = blur(signal.astype(np.float32), 1.0)
    detector = Detector(GAIN, 0, 0, light_spread=spread)
    noisy = [detector.expose(signal, 60, seed) for seed in range(count)]
    return np.clip(np.rint(np.stack(noisy)), 0, 65535).astype(np.uint16), GAIN * 60 * signal


OPTIONS = {"features": 4, "patch": 64, "batch": 2, "noise": NoiseModel(GAIN), "rate": 3e-3}


def test_it_learns_without_a_clean_image(tmp_path):
    noisy, clean = frames()
    told = []
    model = adapt(noisy, steps=120, out=tmp_path / "mine.safetensors", progress=lambda *a: told.append(a), **OPTIONS)
    assert told[-1] == (120, 120)
    y = xrk.enhance(noisy[0], model, noise=OPTIONS["noise"])
    assert psnr(y, clean, 480) > psnr(noisy[0], clean, 480) + 3
    training = model.card.training
    assert training["data_sha256"] == hashlib.sha256(noisy.tobytes()).hexdigest()
    assert training["spot"] == 1
    loaded = xrk.load(tmp_path / "mine.safetensors")
    assert np.array_equal(loaded.enhance(noisy[0], noise=OPTIONS["noise"]), y)
    assert loaded.card.training == json.loads(json.dumps(training))
    assert loaded.card.sha256 == model.card.sha256
    again = adapt(noisy, steps=120, **OPTIONS)
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], tensor)
    further = adapt(noisy, model, steps=2, **OPTIONS | {"features": None})
    assert further.card.config == model.card.config


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(adaptation_run, "VALIDATE_EVERY", 2)
    noisy, _ = frames(2, 64)
    whole = adapt(noisy, steps=6, **OPTIONS)

    def killed(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(noisy, steps=6, run=tmp_path, progress=killed, **OPTIONS)
    split = adapt(noisy, steps=6, run=tmp_path, **OPTIONS)
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(split.module.state_dict()[name], tensor)
    with pytest.raises(InputError, match=r"begun with other frames, seed; delete that folder"):
        adapt(noisy[::-1], steps=6, run=tmp_path, seed=1, **OPTIONS)
    told = []
    further = adapt(noisy, steps=8, run=tmp_path, progress=lambda *a: told.append(a), **OPTIONS)
    assert told == [(7, 8), (8, 8)] and further.card.training["steps"] == 8
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    for content in (whole[: len(whole) // 2], b"junk", b"", _pickled({"facts": "old"})):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(CheckpointFileError, match=r"checkpoint\.pt is damaged.* delete .* to begin anew"):
            adapt(noisy, steps=6, run=tmp_path, **OPTIONS)


def test_nothing_better_leaves_what_it_began_from(tmp_path):
    """One step at a rate that is far too high: worse than the start, which is kept, and that is said."""
    noisy, _ = frames(2, 64)
    options = OPTIONS | {"features": None, "rate": 0.3}
    start = adapt(noisy, steps=30, **OPTIONS)
    told = []
    model = adapt(noisy, start, steps=1, run=tmp_path, say=told.append, **options)
    for name, tensor in start.module.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], tensor)
    training = model.card.training
    assert training["kept_step"] == 0 and training["loss"] == training["loss_before"]
    seen = adaptation_run.Run(model.module, None, NoiseModel(GAIN).stabilise(noisy), 64, 2, 0.3, 0, None, {})
    with torch.no_grad():
        loss = float(blindspot_net.surprise(start.module, seen._patches(np.random.default_rng(1), 8)))
    assert training["loss"] == pytest.approx(loss, rel=1e-5)
    assert any("No check was better than what it began from" in sentence for sentence in told)
    again = adapt(noisy, start, steps=1, run=tmp_path, **options)  # done already: the same, from the run's folder
    assert again.card.training["kept_step"] == 0
    other = adapt(noisy, steps=1, **OPTIONS)
    with pytest.raises(InputError, match="begun with other model"):  # neither has a file or a sha256
        adapt(noisy, other, steps=1, run=tmp_path, **options)
    begun = start.card.training
    assert begun["kept_step"] > 0 and begun["loss"] < begun["loss_before"]


def test_the_callers_random_numbers_stay():
    noisy, _ = frames(2, 32)
    before = torch.get_rng_state()
    adapt(noisy, steps=1, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), before)


def _pickled(entries):
    file = io.BytesIO()
    torch.save(entries, file)
    return file.getvalue()


def test_a_diverged_run_is_no_model(tmp_path):
    noisy, _ = frames(2, 64)
    with pytest.raises(InputError, match="The training diverged: after 3 steps the loss is nan"):
        adapt(noisy, steps=3, run=tmp_path / "run", out=tmp_path / "o.safetensors", **OPTIONS | {"rate": 1e9})
    assert list(tmp_path.iterdir()) == []


def test_the_uncalibrated_loss_is_the_published_one():
    network = BlindSpot(features=4)
    noisy = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mean, std = network(noisy).double().numpy().swapaxes(0, 1)
        found = float(blindspot_net.uncalibrated(network, noisy))
    variance = std**2 + 1e-3
    assert found == pytest.approx(np.mean((noisy[:, 0].numpy() - mean) ** 2 / variance + np.log(variance)), rel=1e-5)


def test_uncalibrated(tmp_path):
    noisy, clean = frames()
    options = OPTIONS | {"noise": None}
    model = adapt(noisy, steps=75, loss="uncalibrated", out=tmp_path / "mine.safetensors", **options)
    assert model.card.domain == "unit" and model.card.noise == "fit" and model.card.config["noise"] is None
    assert model.card.training["loss_function"] == "uncalibrated"
    y, report = xrk.enhance(noisy[0], model, report=True)  # the noise is fitted to the network's mean
    assert psnr(y, clean, 480) > psnr(noisy[0], clean, 480) + 3
    assert report.frames[0].noise["gain"] == pytest.approx(GAIN, rel=0.5)
    loaded = xrk.load(tmp_path / "mine.safetensors")
    assert np.array_equal(loaded.enhance(noisy[0]), y)
    further = adapt(noisy, loaded, steps=1, **options | {"features": None})
    assert further.card.config.items() >= model.card.config.items()
    assert further.card.training["loss_function"] == "uncalibrated"
    scaled = adapt((noisy / 65535).astype(np.float32), loss="uncalibrated", steps=1, **options)
    assert scaled.card.config["unit"] == pytest.approx(model.card.config["unit"], rel=0.1)


@pytest.mark.parametrize("noise", [None, "poisson-gaussian"])
def test_published_networks_go_on(noise, monkeypatch):
    """Networks that see normalised counts as they are: a Keras file of either kind is one."""
    monkeypatch.setattr(adaptation_run, "VALIDATE_EVERY", 4)  # a deviation that falls below the noise costs much, once
    noisy, _ = frames()
    torch.manual_seed(0)
    network = BlindSpot(features=4, rotations=(3, 3, 3, 3), noise=noise)
    blindspot_net.initialise(network)
    network.loc.bias.data.fill_(0.2)
    network.std.bias.data.fill_(0.5)
    config = {"features": 4, "rotations": [3], "noise": noise}
    start = Model(Card("published", "blindspot", config=config, noise="fit", size_multiple=32), network)
    model = adapt(noisy, start, steps=20, **OPTIONS | {"features": None, "levels": (0, 1000), "rate": 1e-3})
    assert model.card.training["loss_function"] == ("calibrated" if noise else "uncalibrated")
    assert model.card.training["levels"] == [0.0, 1000.0] and model.card.noise == "fit"
    loss = blindspot_net.surprise if noise else blindspot_net.uncalibrated
    seen = torch.from_numpy(noisy[:, None].astype(np.float32) / 1000)
    with torch.no_grad():
        before, after = loss(network, seen), loss(model.module, seen)
    assert after < before - 0.2, (before, after)
    assert xrk.enhance(noisy[0], model, levels=(0, 1000)).shape == noisy[0].shape


def test_the_keras_file_goes_on(shared_data):
    pytest.importorskip("h5py")
    noisy, _ = frames(2, 32)
    published = xrk.load(shared_data / "fixtures" / "sspg_keras2.9_weights.hdf5")
    model = adapt(noisy, published, steps=1, spot=1, **OPTIONS | {"features": None, "batch": 1})
    assert model.card.training["loss_function"] == "uncalibrated" and model.card.config["rotations"] == [3]
    assert model.card.training["begun_from"].startswith("sspg_keras2.9_weights, sha256")
    assert xrk.enhance(noisy[0], model).shape == noisy[0].shape


def test_correlation_is_measured_and_hides_more():
    white, _ = frames(4, 128)
    spread, _ = frames(4, 128, spread=0.5)
    model = NoiseModel(GAIN)
    seen = [np.stack([model.stabilise(f, np.float32) for f in stack]) for stack in (white, spread)]
    assert np.abs(lagged(seen[0])).max() < 0.03
    assert min(lagged(seen[1])) > 0.2
    adapted = adapt(spread, steps=1, **OPTIONS)
    assert adapted.card.config["spot"] == 2
    assert adapted.card.training["lag_one_correlation"]["rows"] > 0.2


@pytest.mark.parametrize(
    ("change", "options", "error", "problem"),
    [
        (lambda f: f[:1], {}, InputError, "two or more"),
        (lambda f: f[0], {}, InputError, r"shape \(64, 64\)"),
        (lambda f: [f[0], f[1, :40]], {}, InputError, "one size"),
        (lambda f: [f[0], f[1].astype(np.int32)], {}, InputTypeError, "different dtypes"),
        (lambda f: np.full_like(f, 7), {"noise": None}, InputError, "constant"),
        (lambda f: np.stack([np.full_like(f[0], 7), np.full_like(f[0], 9)]), {}, InputError, "constant"),
        (lambda f: f.astype(complex), {}, InputTypeError, "complex"),
        (lambda f: f * np.nan, {}, InputError, "not finite"),
        (lambda f: f, {"model": "resnet18-unet", "features": None}, InputError, "expected a blind-spot network"),
        (lambda f: f, {"spot": 0}, InputError, "spot=0"),
        (lambda f: f, {"spot": 17}, InputError, "spot=17; expected a whole number, 1 to 16"),
        (lambda f: f, {"steps": 0}, InputError, "steps=0"),
        (lambda f: f, {"steps": 2.5}, InputTypeError, "steps=2.5; expected a whole number"),
        (lambda f: f, {"steps": True}, InputTypeError, "steps=True"),
        (lambda f: f, {"patience": 0}, InputError, "patience=0"),
        (lambda f: f, {"batch": 0}, InputError, "batch=0"),
        (lambda f: f, {"seed": -1}, InputError, "seed=-1"),
        (lambda f: f, {"seed": 1 << 64}, InputError, "seed=1844"),
        (lambda f: f, {"features": 0}, InputError, "features=0"),
        (lambda f: f, {"features": -3}, InputError, "features=-3"),
        (lambda f: f, {"patch": 33}, InputError, "patch=33; expected a multiple of 32"),
        (lambda f: f, {"patch": 0}, InputError, "patch=0"),
        (lambda f: f, {"patch": -5}, InputError, "patch=-5"),
        (lambda f: f, {"rate": -1}, InputError, "rate is -1"),
        (lambda f: f, {"rate": float("nan")}, InputError, "rate is nan"),
        (lambda f: f, {"rate": "fast"}, InputTypeError, "rate is 'fast'"),
        (lambda f: f, {"noise": "off"}, InputTypeError, "noise is 'off'"),
        (lambda f: f, {"noise": (8, 0, 0)}, InputTypeError, "noise is"),
        (lambda f: f, {"loss": "mse"}, InputError, "loss='mse'"),
        (lambda f: f, {"loss": "uncalibrated", "features": None}, InputError, "made for the calibrated loss"),
        (lambda f: f, {"loss": "uncalibrated", "levels": (5, 1)}, InputError, "black < white"),
        (lambda f: f.astype(np.float32), {"loss": "uncalibrated"}, InputError, "needs levels"),
        (lambda f: f, {"device": "cuda:99"}, DeviceError, "is not here"),
        (lambda f: f, {"device": "foo"}, DeviceError, "no device that xrk can use"),
        (lambda f: f, {"progress": 5}, InputTypeError, "progress=5"),
        (lambda f: f, {"run": __file__}, InputError, "is a file; name another"),
        (lambda f: f, {"run": 5}, InputTypeError, "run is a int"),
        (lambda f: f, {"out": 5}, InputTypeError, "out is a int"),
        (lambda f: np.ma.MaskedArray(f, f > f.mean()), {}, InputError, "masked"),
        (lambda f: [f[0], np.ma.MaskedArray(f[1], f[1] > f.mean())], {}, InputError, "masked"),
        (lambda f: f, {"out": "/nowhere/at/all.safetensors"}, ImageFileError, "nowhere"),
    ],
)
def test_bad_input(change, options, error, problem):
    with pytest.raises(error, match=problem):
        adapt(change(frames(2, 64)[0]), **{"steps": 1} | OPTIONS | options)
