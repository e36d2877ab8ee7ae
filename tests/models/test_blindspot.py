"""The blind-spot network against the original's output, against turning the image, and against its own promise."""

import copy
import zlib

import numpy as np
import pytest
import torch

import xrk
from xrk.models import BlindSpot
from xrk.models.blindspot import NoiseLine


def formula(name, shape):
    """The stored pairs' weights of one Keras tensor, `name` being layer.kernel or layer.bias."""
    size = int(np.prod(shape))
    wave = np.sin(0.6180339887498949 * np.arange(1, size + 1) + zlib.crc32(name.encode()) % 9973)
    return (1.2 * wave / np.sqrt(size / shape[-1]) if name.endswith("kernel") else 0.1 * wave).reshape(shape)


def published():
    network = BlindSpot().eval()
    for name, tensor in network.state_dict().items():
        layer, kind = name.split(".")
        if kind == "bias":
            tensor.copy_(torch.from_numpy(formula(f"{layer}.bias", tuple(tensor.shape))))
        else:
            kernel = formula(f"{layer}.kernel", tuple(tensor.permute(2, 3, 1, 0).shape))
            tensor.copy_(torch.from_numpy(kernel).permute(3, 2, 0, 1))
    return network


def small(rotations=(0, 1, 2, 3), **options):
    torch.manual_seed(4)
    return BlindSpot(rotations=rotations, features=3, **options).eval().requires_grad_(False)


def test_size_and_parity(shared_data):
    network = published()
    assert sum(p.numel() for p in network.parameters()) == 1_265_858
    pair = np.load(shared_data / "fixtures" / "sspg_tf1.15.5.npz")
    with torch.inference_mode():
        y = network(torch.from_numpy(pair["x"]).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    for channel, name in enumerate(("loc", "std")):
        assert np.abs(y[..., channel : channel + 1] - pair[name]).max() <= 1e-5 * np.abs(pair[name]).max()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rotation", [1, 2, 3])
def test_turning_the_kernels_is_turning_the_image(rotation, residual):
    network, x = small(residual=residual), torch.rand(2, 1, 64, 96)
    turned = torch.rot90(network.branch(torch.rot90(x, rotation, (2, 3)), 0), -rotation, (2, 3))
    torch.testing.assert_close(network.branch(x, rotation), turned, rtol=0, atol=1e-6)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("spot", [1, 2, 3])
@pytest.mark.parametrize("rotation", [0, 1, 2, 3])
def test_a_branch_sees_one_side_only(rotation, spot, residual):
    network = small((rotation,), spot=spot, residual=residual).double()
    x = torch.rand(1, 1, 64, 64, dtype=torch.float64)
    row, column = 33, 29
    changed = x.clone()
    changed[..., row, column] += 1
    moved = (network(changed) - network(x)).abs().sum((0, 1)) > 0
    rows, columns = torch.nonzero(moved, as_tuple=True)
    ahead = {0: rows - row, 1: column - columns, 2: row - rows, 3: columns - column}[rotation]
    assert len(ahead)
    assert ahead.min() == spot


def test_all_rotations_leave_the_spot_blind():
    network = small(spot=2).double()
    x = torch.rand(1, 1, 64, 64, dtype=torch.float64)
    changed = x.clone()
    changed[..., 30:33, 40:43] = torch.rand(3, 3, dtype=torch.float64)
    difference = (network(changed) - network(x)).abs()
    assert difference[..., 31, 41].max() == 0
    assert difference[..., 31, 43].max() > 0


@pytest.mark.parametrize("spot", [1, 2])
@pytest.mark.parametrize("row", [0, 1, 2, 17, 30, 31])
def test_borders_are_blind_too(row, spot):
    network = small(spot=spot, residual=True).double()
    x = torch.rand(1, 1, 32, 32, dtype=torch.float64)
    for column in (0, 1, 3, 31):
        changed = x.clone()
        around = tuple(slice(max(n - spot + 1, 0), n + spot) for n in (row, column))
        changed[0, 0][around] += 3 * torch.rand_like(changed[0, 0][around])
        assert (network(changed) - network(x))[..., row, column].abs().max() <= 1e-13


@pytest.mark.parametrize(("spot", "residual"), [(1, False), (1, True), (2, True), (3, True)])
@pytest.mark.parametrize("size", [(37, 45), (33, 64), (3, 50)])
def test_sizes_that_are_no_multiples_are_blind_too(size, spot, residual):
    """Whatever makes the sides long enough for the poolings must not show a pixel its own noise."""
    network = small(spot=spot, residual=residual).double()
    x = torch.rand(1, 1, *size, dtype=torch.float64)
    y = network(x)
    assert y.shape == (1, 2, *size)
    rng = np.random.default_rng(spot)
    borders = [(size[0] - 1 - k, size[1] - 1 - k) for k in range(min(3, *size))]
    inside = [tuple(int(rng.integers(side)) for side in size) for _ in range(3)]
    for row, column in borders + inside:
        changed = x.clone()
        around = tuple(slice(max(n - spot + 1, 0), n + spot) for n in (row, column))
        changed[0, 0][around] += 3 * torch.rand_like(changed[0, 0][around])
        moved = (network(changed) - y).abs()
        assert moved[..., row, column].max() <= 1e-13, (row, column)
        assert moved.max() > 1e-9


def test_other_sizes_have_true_borders_where_a_branch_looks():
    """A branch that looks down sees the image end where it ends, as one that looks up sees it begin."""
    network = small().double()
    x = torch.rand(1, 1, 37, 64, dtype=torch.float64)
    torch.testing.assert_close(network.branch(x.flip(2), 2)[:, :, -20:], network_mirrored(network, x)[:, :, -20:])


def network_mirrored(network, x):
    """The branch that looks down, of the mirrored image, by mirroring kernels and the upward branch's result."""
    mirrored = copy.deepcopy(network)
    for name, parameter in mirrored.named_parameters():
        if "_conv" in name and parameter.ndim == 4:
            parameter.data = parameter.data.flip(3)  # turned by 180 degrees and mirrored up and down
    return mirrored.branch(x, 0).flip(2)


@pytest.mark.parametrize("spot", [0, 1, 2])
def test_a_residual_network_commutes_with_the_level(spot):
    network = small(spot=spot, residual=True, noise="unit").double()
    x = torch.rand(1, 1, 64, 96, dtype=torch.float64)
    difference = network(x + 7) - network(x)
    torch.testing.assert_close(difference[:, :1], torch.full_like(x, 7))
    assert spot == 0 or difference[:, 1].abs().max() <= 1e-12


def test_without_a_spot_the_pixel_counts():
    network = small(spot=0, residual=True, noise="unit")
    assert network.std is None and network.noise is None
    network.loc.weight.zero_(), network.loc.bias.zero_()
    x = torch.rand(1, 1, 32, 64)
    torch.testing.assert_close(network(x), x)


def test_equal_branches_are_run_once():
    whole, folded = small(), small((3, 3, 3, 3))
    state = whole.state_dict()
    kernel = state.pop("conv1x1_1.weight")
    folded.load_state_dict(state | {"conv1x1_1.weight": kernel.view(24, 4, 6, 1, 1).sum(1)})
    x = torch.rand(1, 1, 32, 64)
    branch = whole.branch(x, 3)
    y = torch.nn.functional.leaky_relu(whole.conv1x1_1(torch.cat([branch] * 4, 1)), 0.1)
    y = torch.nn.functional.leaky_relu(whole.conv1x1_2(y), 0.1)
    torch.testing.assert_close(folded(x), torch.cat([whole.loc(y), whole.std(y)], 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rotations", "residual"), [((0, 1, 2, 3), False), ((3,), False), ((0, 1, 2, 3), True)])
def test_it_streams(rotations, residual):
    network = small(rotations, residual=residual)
    size = (150, 90) if residual else (160, 96)
    x = torch.rand(1, 1, *size)
    plan = xrk.plan(network, size, memory=int(1.02 * smallest(network, size)))
    whole = copy.deepcopy(network).double()(x.double())
    assert (plan.run(x) - whole).abs().max() <= 1e-5 * whole.abs().max()


def smallest(network, size):
    with pytest.raises(xrk.errors.MemoryBudgetError) as refused:
        xrk.plan(network, size, memory="1MiB")
    return refused.value.smallest


def test_learnt_noise():
    mean = np.array([-1.0, 0.5, 2.0])
    slope = np.log1p(np.exp(0.5 - 4)) + 1e-3
    for kind, expected in (
        ("poisson", np.maximum(mean, 1e-3) * slope),
        ("gaussian", np.full(3, (np.log1p(np.exp(0.25 - 4)) + 1e-3) ** 2)),
        ("poisson-gaussian", np.maximum(np.maximum(mean, 1e-3) * slope + 0.25, 1e-3)),
    ):
        line = NoiseLine(kind)
        with torch.no_grad():
            for parameter, value in ((line.a, 0.5), (line.b, 0.25)):
                if parameter is not None:
                    parameter.fill_(value)
            np.testing.assert_allclose(line(torch.from_numpy(mean)).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"rotations": ()}, "rotations is"),
        ({"rotations": (0, 4)}, "quarter turns"),
        ({"spot": -1}, "spot is -1"),
        ({"noise": "salt"}, "noise is 'salt'"),
    ],
)
def test_bad_arguments(options, problem):
    with pytest.raises(ValueError, match=problem):
        BlindSpot(features=2, **options)
