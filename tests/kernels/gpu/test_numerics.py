"""Every operator on the device against float64: all dtypes, odd shapes, the extremes of float16."""

import pytest
import torch
import torch.nn.functional as F
from xrk.kernels import dispatch

from xrk import kernels

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of the largest value. The projections of half-precision maps are in half precision on a GPU.
BOUND = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 2e-5, torch.float64: 1e-11}
SIZES = [(1, 1), (1, 37), (29, 1), (31, 16), (40, 64)]
LARGEST = torch.finfo(torch.float16).max
SMALLEST = 2.0**-24

# In float64 the reference runs where Triton's kernels are meant, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:.*compute in float32:UserWarning")


def check(actual, expected, bound, what=""):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        error = float((a.double().cpu() - e).abs().max() / e.abs().max().clamp(min=1e-30))
        assert error < bound, f"{what}: error {error:.1e} of the largest value, NaN in {int(a.isnan().sum())} values"


def test_it_has_a_kernel(operator, device):
    # group_norm is two operators of torch.
    for name in [operator] if operator in dispatch.ops() else [f"{operator}_summarise", f"{operator}_apply"]:
        taken = dispatch.path_of(name, device)
        assert taken.path != "reference", taken.why


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(operator, dtype, device, make_calls):
    for seed in (0, 1):
        call = make_calls(device, dtype, 5, 13, seed=seed)[operator]
        check(call(), call.expected(), BOUND[dtype])


@pytest.mark.parametrize("size", SIZES)
def test_odd_shapes(operator, size, device, make_calls):
    for dtype, channels in ((torch.float16, 45), (torch.float32, 96)):
        channels = 5 * (channels // 5) if operator == "group_norm" else channels
        call = make_calls(device, dtype, *size, channels=channels)[operator]
        check(call(), call.expected(), BOUND[dtype], f"{dtype}, {channels} channels")


@pytest.mark.parametrize("size", [(300, 500), (513, 255)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("states", [1, 16, 17])
def test_an_image_of_many_lines(size, dtype, states, device):
    """Against the C++ path in float64, which is held against the definition elsewhere."""
    if device == "cpu":
        size = (30, 50)
    generator = torch.Generator().manual_seed(states)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    channels, rank = 96, 6
    x = normal(1, *size, channels).to(dtype)
    # What the device is given is what the float64 reference is given: rounded once, here.
    weights = [
        (normal(4, rank + 2 * states, channels) / channels**0.5).float(),
        (normal(4, channels, rank) / rank**0.5).float(),
        (normal(4, channels) / 2 - 3).float(),
        (torch.log(torch.arange(1, states + 1)) + normal(4 * channels, states) / 10).float(),
        normal(4 * channels).float(),
    ]
    expected = kernels.selective_scan_2d(x.double(), *(w.double() for w in weights))
    actual = kernels.selective_scan_2d(x.to(device), *(w.to(device) for w in weights))
    check((actual,), (expected,), BOUND[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_long_sequence(dtype, device):
    length, channels, states = (200_000 if device == "cuda" else 2_000), 64, 16
    generator = torch.Generator().manual_seed(0)
    u, delta, z = (torch.randn(1, length, channels, generator=generator).to(dtype).transpose(1, 2) for _ in range(3))
    B, C = (torch.randn(1, states, length, generator=generator).to(dtype) for _ in range(2))
    A = -torch.exp(torch.log(torch.arange(1, states + 1)) + torch.randn(channels, states, generator=generator) / 10)
    D, bias = torch.randn(channels, generator=generator), torch.randn(channels, generator=generator) / 2 - 3
    order = torch.randperm(length, generator=generator)
    for where in (None, order):
        inputs = [u, delta, A, B, C, D, z, bias]

        def run(inputs, where=where):
            return kernels.selective_scan(*inputs, True, True, where)

        expected = run([t.double() for t in inputs])
        actual = run([t.to(device) for t in inputs], None if where is None else where.to(device))
        check(actual, expected, BOUND[dtype])


def rows_of_extremes(channels):
    """Rows (rows, channels) of float16: constant, alternating, tiny, a small spread on a large mean, mixed."""
    base = torch.linspace(-1, 1, channels, dtype=torch.float64)
    signs = torch.ones(channels, dtype=torch.float64)
    signs[::2] = -1
    rows = [
        LARGEST * torch.ones_like(signs),
        LARGEST * signs,
        SMALLEST * signs,
        SMALLEST * torch.arange(channels),
        60000 + 512 * base,
        -2000 + 2 * signs,
        torch.where(torch.arange(channels) % 7 == 0, LARGEST * signs, SMALLEST),
        torch.zeros_like(signs),
    ]
    return torch.stack(rows).half()


def check_extremes(actual, expected, bound=5e-3):
    """No NaN; what float16 holds is there within `bound` of the largest such value or the step of its smallest ones."""
    assert not bool(actual.isnan().any())
    actual, expected = actual.double().cpu(), expected.cpu()
    limited = expected.clamp(-LARGEST, LARGEST)
    error = float((actual.clamp(-LARGEST, LARGEST) - limited).abs().max())
    assert error <= bound * float(limited.abs().max()) + SMALLEST
    fits = expected.abs() < 0.99 * LARGEST
    assert bool(actual[fits].isfinite().all())


def test_layer_norm_at_the_extremes(device):
    x = rows_of_extremes(96)
    for gate in (None, x.flip(0)):
        expected = F.layer_norm(x.double(), (96,))
        expected = expected if gate is None else expected * F.silu(gate.double())
        actual = kernels.layer_norm(x.to(device), gate=None if gate is None else gate.to(device))
        for a, e in zip(actual, expected, strict=True):  # each row by its own scale
            check_extremes(a, e)


def test_group_norm_at_the_extremes(device):
    for row in rows_of_extremes(64):
        x = row.reshape(1, 4, 4, 4).contiguous(memory_format=torch.channels_last)
        expected = F.silu(F.group_norm(x.double(), 2))
        check_extremes(kernels.group_norm(x.to(device), 2, activation="silu"), expected)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("scale", [1.0, -0.05])
@pytest.mark.parametrize("dense", [False, True])
def test_convolutions_at_the_extremes(dense, scale, activation, device):
    x = rows_of_extremes(64).reshape(1, 8, 8, 8).contiguous(memory_format=torch.channels_last)
    weight = torch.full((8, 8 if dense else 1, 3, 3), scale, dtype=torch.float16)
    expected = F.conv2d(x.double(), weight.double(), padding=1, groups=1 if dense else 8)
    if dense:
        actual = kernels.conv2d(x.to(device), weight.to(device), padding=1, activation=activation)
    else:
        actual = kernels.depthwise_conv2d(x.to(device), weight.to(device), activation=activation)
    check_extremes(actual, F.silu(expected) if activation else expected)


@pytest.mark.parametrize("bias", [-20.0, 0.0, 20.0])
def test_ss2d_at_the_extremes(bias, device):
    """Time steps from 2e-9 to 20, decays from 1 to far below what float32 holds, maps at float16's ends."""
    channels, states, rank = 24, 16, 2
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows = rows_of_extremes(channels)
    x = rows[torch.randint(0, len(rows), (1, 9, 11), generator=generator)]
    weights = [
        normal(4, rank + 2 * states, channels) * 2e-6,
        normal(4, channels, rank),
        torch.full((4, channels), bias),
        torch.linspace(-6, 8, states).repeat(4 * channels, 1),
        normal(4 * channels) / 4,
    ]
    expected = kernels.selective_scan_2d(x.double(), *(w.double() for w in weights))
    actual = kernels.selective_scan_2d(x.to(device), *(w.to(device) for w in weights))
    check_extremes(actual, expected)


def test_selective_scan_at_the_extremes(device):
    channels, states, length = 8, 16, 64
    u = rows_of_extremes(length).reshape(1, 8, length)
    delta = torch.linspace(-30, 30, length).half().expand(1, channels, length).contiguous()
    A = -torch.exp(torch.linspace(-6, 8, states)).repeat(channels, 1)
    B, C = (torch.linspace(-0.1, 0.1, states).half()[None, :, None].expand(1, states, length) for _ in range(2))
    inputs = [u, delta, A, B, C]
    expected = kernels.selective_scan(*(t.double() for t in inputs), delta_softplus=True)
    check_extremes(kernels.selective_scan(*(t.to(device) for t in inputs), delta_softplus=True), expected)
