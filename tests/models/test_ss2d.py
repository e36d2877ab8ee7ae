"""SS2D against its definition, written out step by step in float64, and at the extremes of what it may meet."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from xrk.errors import InputError, InputTypeError
from xrk.models.ss2d import SS2D


def visits(height, width):
    """Row-major positions in the order in which each of the four directions visits them."""
    rows = [r * width + c for r in range(height) for c in range(width)]
    columns = [r * width + c for c in range(width) for r in range(height)]
    return [rows, columns, rows[::-1], columns[::-1]]


def by_definition(module, x, orders=None):
    """SS2D of one image after another, one pixel after another, in float64."""
    w = {name: tensor.detach().double() for name, tensor in module.state_dict().items()}
    x = x.double()
    inner = w["out_norm.weight"].numel()
    projected = x @ w["in_proj.weight"].T
    z = projected[..., inner:]
    u = F.conv2d(projected[..., :inner].permute(0, 3, 1, 2), w["conv2d.weight"], w.get("conv2d.bias"), 1, 1, 1, inner)
    u = u * torch.sigmoid(u)
    batch, _, height, width = u.shape
    rank, states = w["dt_projs_weight"].shape[2], w["A_logs"].shape[1]
    total = torch.zeros(batch, height * width, inner, dtype=torch.float64)
    for b in range(batch):
        pixels = u[b].permute(1, 2, 0).reshape(-1, inner)
        for k, order in enumerate(visits(height, width) if orders is None else orders):
            A = -torch.exp(w["A_logs"].reshape(-1, inner, states)[k])
            skip = w["Ds"].reshape(-1, inner)[k]
            h = torch.zeros(inner, states, dtype=torch.float64)
            for p in order:
                v = w["x_proj_weight"][k] @ pixels[p]
                dt = w["dt_projs_weight"][k] @ v[:rank] + w["dt_projs_bias"][k]
                dt = torch.logaddexp(dt, torch.zeros_like(dt))[:, None]
                h = torch.exp(dt * A) * h + dt * v[rank : rank + states] * pixels[p][:, None]
                total[b, p] += h @ v[rank + states :] + skip * pixels[p]
    centred = total - total.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
    normed = (normed * w["out_norm.weight"] + w["out_norm.bias"]).reshape(batch, height, width, inner)
    if z.shape[-1]:
        normed = normed * z * torch.sigmoid(z)
    return normed @ w["out_proj.weight"].T


def error(module, x, orders=None, order=None):
    """Largest error against the definition, relative to the largest value."""
    expected = by_definition(module, x, orders)
    with torch.inference_mode():
        y = module(x) if order is None else module(x, order)
    assert y.shape == x.shape and y.dtype == x.dtype
    # A norm over few channels may leave nothing at all of a pixel.
    return float((y.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-2))


def test_agrees_with_the_original_module(shared_data, give_formula_weights):
    pair = np.load(shared_data / "fixtures" / "ss2d_48.npz")
    with torch.inference_mode():
        y = give_formula_weights(SS2D(48, 16, 1.5))(torch.from_numpy(pair["x"])).numpy()
    assert np.abs(y - pair["y"]).max() <= 1e-5 * np.abs(pair["y"]).max()


@settings(max_examples=20)
@given(
    st.integers(1, 2),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(2, 19),
    st.integers(1, 5),
    st.sampled_from([1.0, 1.2, 2.0]),
    st.booleans(),
    st.booleans(),
)
def test_equals_its_definition(batch, height, width, channels, states, expand, gate, conv_bias):
    torch.manual_seed(channels)
    module = SS2D(channels, states, expand, gate=gate, conv_bias=conv_bias).double()
    x = torch.randn(batch, height, width, channels, dtype=torch.float64)
    assert error(module, x) < 1e-9
    assert error(module.float(), x.float()) < 2e-4  # a norm over few channels can divide by almost nothing


def test_the_sizes_follow_the_papers():
    shapes = {name: tuple(tensor.shape) for name, tensor in SS2D(180, 16, 1.2).state_dict().items()}
    assert shapes == {
        "in_proj.weight": (432, 180),
        "conv2d.weight": (216, 1, 3, 3),
        "conv2d.bias": (216,),
        "x_proj_weight": (4, 44, 216),
        "dt_projs_weight": (4, 216, 12),
        "dt_projs_bias": (4, 216),
        "A_logs": (864, 16),
        "Ds": (864,),
        "out_norm.weight": (216,),
        "out_norm.bias": (216,),
        "out_proj.weight": (180, 216),
    }
    noz = {name: tuple(t.shape) for name, t in SS2D(96, 1, 1.0, gate=False, conv_bias=False).state_dict().items()}
    assert noz["in_proj.weight"] == (96, 96) and "conv2d.bias" not in noz
    assert (noz["x_proj_weight"], noz["dt_projs_weight"]) == ((4, 8, 96), (4, 96, 6))


def test_training_starts_from_the_papers_decays_and_steps():
    module = SS2D(12, 5, 2.0)
    assert torch.allclose(-torch.exp(module.A_logs), -torch.arange(1.0, 6.0).expand(96, 5))
    steps = F.softplus(module.dt_projs_bias)
    assert steps.min() >= 1e-3 * (1 - 1e-5) and steps.max() <= 0.1 * (1 + 1e-5)
    assert torch.equal(module.Ds, torch.ones(96))


# --- other orders ---------------------------------------------------------------------------------------------------


def test_the_raster_is_one_of_the_orders():
    torch.manual_seed(0)
    raster = SS2D(6, 4)
    ordered = SS2D(6, 4, order=torch.tensor(visits(5, 7)))
    ordered.load_state_dict(raster.state_dict())
    x = torch.randn(2, 5, 7, 6)
    assert torch.allclose(ordered(x), raster(x), rtol=1e-4, atol=1e-6)


def test_a_scan_goes_where_its_permutation_says():
    torch.manual_seed(1)
    order = torch.randperm(20)
    module = SS2D(5, 3, order=order)
    assert module.x_proj_weight.shape[0] == 1
    x = torch.randn(2, 4, 5, 5)
    assert error(module.double(), x.double(), [order.tolist()]) < 1e-9
    assert error(module.float(), x, [order.tolist()]) < 1e-4


def test_every_image_may_have_its_own_order():
    torch.manual_seed(2)
    module = SS2D(4, 2, scans=2).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    orders = torch.stack([torch.stack([torch.randperm(12) for _ in range(2)]) for _ in range(2)])
    y = module(x, orders)
    for i in range(2):
        expected = by_definition(module, x[i : i + 1], orders[i].tolist())
        assert torch.allclose(y[i : i + 1], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("order", "kind", "said"),
    [
        ([0, 1, 2, 2], InputError, r"each position from 0 to 3 once; this one is no permutation"),
        ([0, 1, 2, 4], InputError, r"each position from 0 to 3 once"),
        ([-1, 0, 1, 2], InputError, r"each position from 0 to 3 once"),
        ([[0, 1], [1, 1]], InputError, r"each position from 0 to 1 once"),
        ([], InputError, r"has shape \(positions\).*got \(0,\)"),
        (torch.zeros(1, 1, 1, 1, dtype=torch.int64), InputError, r"got \(1, 1, 1, 1\)"),
        ([0.0, 1.0], InputTypeError, r"tensor of integers, got one of float"),
        ([True, False], InputTypeError, r"got one of bool"),
        ("snake", InputTypeError, r'"raster" or a tensor of integers, got \'snake\''),
        (None, InputTypeError, r"got None"),
    ],
)
def test_an_order_that_is_none_is_refused(order, kind, said):
    with pytest.raises(kind, match=said):
        SS2D(4, 2, order=order)


def test_an_order_must_go_with_the_image_and_the_weights():
    with pytest.raises(InputError, match=r"visits 6 positions; an image of 2 x 2 pixels has 4"):
        SS2D(4, 2, order=torch.arange(6))(torch.zeros(1, 2, 2, 4))
    with pytest.raises(InputError, match=r"holds 1 permutations; this SS2D has weights for 4 scans"):
        SS2D(4, 2)(torch.zeros(1, 2, 2, 4), torch.arange(4))
    with pytest.raises(InputError, match=r"holds 1 permutations; this SS2D has weights for 2 scans"):
        SS2D(4, 2, order=torch.arange(4), scans=2)
    with pytest.raises(InputError, match=r"weights for 1 scans; pass their order"):
        SS2D(4, 2, scans=1)(torch.zeros(1, 2, 2, 4))


# --- extremes -------------------------------------------------------------------------------------------------------

# The error against float64, relative to the largest value; half-precision maps are rounded five times on the way.
SINGLE, HALF = 1e-4, 2e-2


def extreme(name):
    """A module and an input in which one thing is at its end."""
    torch.manual_seed(3)
    module = SS2D(16, 8, 1.5).requires_grad_(False)
    x = torch.randn(1, 24, 20, 16)
    match name:
        case "steps of 1e-9":
            module.dt_projs_bias.fill_(-20.0)
            module.dt_projs_weight.mul_(0.01)
        case "steps of 50":
            module.dt_projs_bias.fill_(50.0)
        case "decay of nothing":
            module.A_logs.fill_(-15.0)
        case "decay of everything":
            module.A_logs.fill_(12.0)
        case "dark":
            x = torch.zeros_like(x)
            module.out_norm.bias.fill_(0.5)
            module.in_proj.weight[24:].add_(1.0)
        case "bright":
            x = x + 300.0
        case "constant":
            x = torch.full_like(x, 3.0)
        case "one pixel wide":
            x = x[:, :, :1]
        case "one pixel high":
            x = x[:, :1]
        case "one pixel":
            x = x[:, :1, :1]
    return module, x


EXTREMES = [
    "steps of 1e-9",
    "steps of 50",
    "decay of nothing",
    "decay of everything",
    "bright",
    "constant",
    "one pixel wide",
    "one pixel high",
    "one pixel",
]


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, SINGLE), (torch.float16, HALF)])
def test_extremes_stay_finite_and_near_float64(name, dtype, allowed):
    module, x = extreme(name)
    assert error(module.to(dtype), x.to(dtype)) < allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_dark_image_gives_exactly_nothing(dtype):
    """Zero in, zero out: the gate of zero closes, whatever the scan's bias makes of the dark."""
    module, x = extreme("dark")
    y = module.to(dtype)(x.to(dtype))
    assert torch.equal(y, torch.zeros_like(y))


def test_half_precision_leaves_the_scans_weights_in_float32():
    module = SS2D(8, 4).half()
    scans = {"x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"}
    assert {name for name, tensor in module.state_dict().items() if tensor.dtype == torch.float32} == scans
    assert {tensor.dtype for tensor in module.double().state_dict().values()} == {torch.float64}
    assert {tensor.dtype for tensor in module.bfloat16().float().state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("order", [None, torch.arange(11, -1, -1).expand(4, 12)])
def test_under_autocast_the_scans_stay_exact(order):
    torch.manual_seed(0)
    module, x = SS2D(8, 2), torch.randn(1, 3, 4, 8)
    expected = module(x, order)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, order)
        y.sum().backward()
    assert float((y.float() - expected).detach().abs().max()) < 0.02 * float(expected.detach().abs().max())
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in module.parameters())
