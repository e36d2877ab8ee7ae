"""SS2D on the CPU: against the definition in float64, against the public implementation's output, and its phases."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from xrk.kernels.scan import reference

from xrk import _native, kernels

# One pixel, one row, one column, primes, wide and tall; channels below, at and across the widths of vectors.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (1, 1, 1, 5, 3, 2),
    (1, 1, 11, 8, 16, 1),
    (1, 11, 1, 9, 1, 3),
    (2, 5, 13, 17, 4, 2),
    (1, 13, 5, 33, 16, 6),
    (1, 3, 4, 12, 64, 9),
]


@pytest.fixture(params=_native.supported_simd())
def path(request):
    before = _native.simd()
    _native.set_simd(request.param)
    yield request.param
    _native.set_simd(before)


def error(actual, expected):
    assert actual.shape == expected.shape
    return float((actual.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 3e-6)])
def test_it_is_the_definition(make_ss2d, path, shape, dtype, bound):
    inputs = make_ss2d(*shape)
    expected = reference.selective_scan_2d_reference(*inputs)
    actual = kernels.selective_scan_2d(*(tensor.to(dtype) for tensor in inputs))
    assert actual.dtype == dtype and actual.is_contiguous()
    assert error(actual, expected) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_is_rounded_once_on_the_way_out(make_ss2d, path, dtype, bound):
    x, *weights = make_ss2d(2, 6, 7, 20, 16, 2)
    weights = [tensor.float() for tensor in weights]
    x = x.to(dtype)
    actual = kernels.selective_scan_2d(x, *weights)
    assert actual.dtype == dtype
    expected = reference.selective_scan_2d_reference(x.double(), *(w.double() for w in weights))
    assert error(actual, expected) < bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_directions_are_whole_until_the_last(make_ss2d, path, dtype):
    """Two directions that cancel, each beyond what a half holds, leave the other two to the last bit but one."""
    x, *weights = (tensor.float() for tensor in make_ss2d(1, 5, 9, 19, 3, 2))
    x = x.to(dtype)
    weights[-1] = torch.tensor([1e5, 0.5, -1e5, 0.25]).repeat_interleave(19)
    expected = reference.selective_scan_2d_reference(x.double(), *(w.double() for w in weights))
    actual = kernels.selective_scan_2d(x, *weights)
    torch.testing.assert_close(actual.double(), expected, rtol=torch.finfo(dtype).eps, atol=0.05)


def test_the_native_map_has_a_dtype_of_its_own(make_ss2d):
    x, *weights = (tensor.float().numpy() for tensor in make_ss2d(1, 2, 3, 4, 1, 1))
    with pytest.raises(TypeError, match=r"x has dtype int32; expected float16, uint16 \(for bfloat16\), float32"):
        _native.selective_scan_2d(x.astype(np.int32), *weights, x.copy())
    with pytest.raises(TypeError, match="out has dtype float32; expected x's, float16"):
        _native.selective_scan_2d(x.astype(np.float16), *weights, x.copy())


@pytest.mark.parametrize("path", ["native", "reference", "triton"])
def test_the_public_module_is_reproduced(shared_data, public_module_error, interpreted, path):
    if path == "triton":
        interpreted("scan/interpreted_scans.py", "public_module", shared_data / "fixtures" / "ss2d_48.npz")
        return
    scan = kernels.selective_scan_2d if path == "native" else reference.selective_scan_2d_reference
    assert public_module_error(scan) < 1e-5


def test_bytes_do_not_depend_on_threads(make_ss2d):
    # Large enough that three threads are given work, with lines cut by their shares of the projection.
    inputs = [tensor.numpy() for tensor in make_ss2d(1, 67, 141, 40, 16, 3, torch.float32)]
    outs = []
    for threads in (1, 2, 3, 7):
        outs.append(np.full(inputs[0].shape, np.nan, np.float32))
        _native.selective_scan_2d(*inputs, outs[-1], threads)
    assert all(out.tobytes() == outs[0].tobytes() for out in outs)


def test_an_image_larger_than_one_piece(make_ss2d):
    # 16384 pixels are projected at a time: the state goes on from one piece into the next.
    x, *weights = make_ss2d(1, 3, 6000, 2, 1, 1)
    expected = sum_of_phases(x, weights, [x.shape[1]])
    assert error(kernels.selective_scan_2d(x, *weights), expected) < 1e-12


def one_direction(x, weights, k):
    """Direction k as a scan of a sequence with that order."""
    batch, height, width, channels = x.shape
    x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds = weights
    rank, states = dt_projs_weight.shape[2], A_logs.shape[1]
    flat = x.reshape(batch, -1, channels)
    low, b, c = (flat @ x_proj_weight[k].T).split([rank, states, states], -1)
    pixels = torch.arange(height * width).reshape(1, height, width)
    part = slice(k * channels, (k + 1) * channels)
    y = kernels.selective_scan(
        flat.transpose(1, 2),
        (low @ dt_projs_weight[k].T).transpose(1, 2),
        -torch.exp(A_logs[part]),
        b.transpose(1, 2),
        c.transpose(1, 2),
        Ds[part],
        delta_bias=dt_projs_bias[k],
        delta_softplus=True,
        order=reference.lines_of(pixels, k).reshape(-1),
    )
    return y.transpose(1, 2).reshape(x.shape)


def sum_of_phases(x, weights, heights):
    """SS2D from its phases, in bands of these heights: a sweep down for summaries, one down and one up for values."""
    *parameters, Ds = weights
    bands = list(torch.split(x, heights, 1))
    out = torch.zeros_like(x)
    outs = list(torch.split(out, heights, 1))
    A = -torch.exp(parameters[-1].reshape(4, x.shape[3], -1))
    for k in range(4):
        summaries = [kernels.summarise_lines(band, *parameters, k) for band in bands]
        # The order in which the direction visits the bands.
        visited = list(range(len(bands)))[:: 1 if k < 2 else -1]
        if k % 2 == 0:
            sums, ends = (torch.cat([summaries[i][j] for i in visited], 1) for j in (0, 1))
            starts, _ = kernels.carry_lines(sums, ends, parameters[-1], k)
            starts = starts.split([bands[i].shape[1] for i in visited], 1)
        else:
            sums, ends = summaries[visited[0]]
            for i in visited[1:]:
                ends = torch.exp(summaries[i][0][..., None] * A[k]) * ends + summaries[i][1]
                sums = sums + summaries[i][0]
            state, _ = kernels.carry_lines(sums, ends, parameters[-1], k)
        for place, i in enumerate(visited):
            target = outs[i].contiguous()
            start = starts[place] if k % 2 == 0 else state
            state = kernels.scan_lines(bands[i], *parameters, Ds, k, start, target)
            outs[i].copy_(target)
    return out


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3, 9]), st.sampled_from([1, 2, 5]), st.integers(0, 9))
def test_four_scans_of_one_direction_add_up(make_ss2d, height, width, channels, states, seed):
    x, *weights = make_ss2d(2, height, width, channels, states, 2, seed=seed)
    expected = sum(one_direction(x, weights, k) for k in range(4))
    assert error(kernels.selective_scan_2d(x, *weights), expected) < 1e-12


@settings(max_examples=20)
@given(st.lists(st.integers(1, 4), min_size=4, max_size=6), st.integers(1, 9), st.integers(0, 9))
def test_phases_band_by_band_are_the_whole(make_ss2d, heights, width, seed):
    x, *weights = make_ss2d(1, sum(heights), width, 9, 3, 2, seed=seed)
    assert error(sum_of_phases(x, weights, heights), kernels.selective_scan_2d(x, *weights)) < 1e-12


@pytest.mark.parametrize("direction", range(4))
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
def test_phases_are_their_references(make_ss2d, path, direction, dtype, bound):
    # 120 columns decay far below the cut of the summaries.
    x, *weights = make_ss2d(2, 7, 120, 19, 5, 2)
    parameters = weights[:-1]
    low = [tensor.to(dtype) for tensor in (x, *weights)]
    sums, ends = kernels.summarise_lines(*low[:-1], direction)
    expected_sums, expected_ends = reference.summarise_lines_reference(x, *parameters, direction)
    assert error(sums, expected_sums) < bound and error(ends, expected_ends) < bound
    starts, _ = kernels.carry_lines(expected_sums, expected_ends, parameters[-1], direction)
    out, expected = torch.ones_like(x), torch.ones_like(x)
    low_out = out.to(dtype)
    state = kernels.scan_lines(*low, direction, starts.to(dtype), low_out)
    expected_state = reference.scan_lines_reference(x, *weights, direction, starts, expected)
    assert error(low_out, expected) < bound and error(state, expected_state) < bound


def test_it_is_an_operator_of_torch(make_ss2d):
    inputs = make_ss2d(1, 3, 4, 5, 2, 1, torch.float32)
    torch.library.opcheck(torch.ops.xrk.selective_scan_2d.default, tuple(inputs))


class Block(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(w, requires_grad=False) for w in weights])

    def forward(self, x):
        return kernels.selective_scan_2d(x * 2, *self.weights) + 1


def test_it_is_exported_for_any_size_and_compiled(make_ss2d):
    x, *weights = make_ss2d(1, 4, 6, 5, 2, 1, torch.float32)
    block = Block(weights)
    sizes = {"x": {1: torch.export.Dim("H", min=2), 2: torch.export.Dim("W", min=2)}}
    exported = torch.export.export(block, (x,), dynamic_shapes=sizes).module()
    other = make_ss2d(1, 7, 3, 5, 2, 1, torch.float32, seed=1)[0]
    assert torch.equal(exported(other), block(other))
    assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


BAD = {
    "rank of x": (0, lambda t: t[0], ValueError, r"x has shape \(3, 4, 5\); expected \(B, H, W, D\)"),
    "dtype of x": (0, lambda t: t.int(), TypeError, "x has dtype int32"),
    "no pixel": (0, lambda t: t[:, :0], ValueError, "expected at least 1"),
    "no tensor": (0, lambda t: t.numpy(), TypeError, "x is a ndarray"),
    "no weight": (1, lambda t: None, TypeError, "x_proj_weight is a NoneType; expected a torch tensor"),
    "no bias": (3, lambda t: None, TypeError, "dt_projs_bias is a NoneType; expected a torch tensor"),
    "no skip": (5, lambda t: None, TypeError, "Ds is a NoneType; expected a torch tensor"),
    "strides of x": (0, lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), ValueError, "last dimension contig"),
    "x_proj_weight": (1, lambda t: t[:, :-1], ValueError, r"x_proj_weight has shape \(4, 4, 5\); expected \(4, 5, 5\)"),
    "rank of dt": (2, lambda t: t[..., :0], ValueError, "R 1 to 256"),
    "dt_projs_bias": (3, lambda t: t[:3], ValueError, r"dt_projs_bias has shape \(3, 5\); expected \(4, 5\)"),
    "states": (4, lambda t: t[:, :1].repeat(1, 65), ValueError, "N 1 to 64"),
    "no states": (4, lambda t: t[:, :0], ValueError, "N 1 to 64"),
    "dtype of A_logs": (4, lambda t: t.double(), TypeError, "A_logs has dtype float64"),
    "Ds": (5, lambda t: t[1:], ValueError, r"Ds has shape \(19,\); expected \(20,\)"),
    "device": (5, lambda t: t.to("meta"), ValueError, "Ds is on meta"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_named(make_ss2d, what):
    inputs = make_ss2d(1, 3, 4, 5, 2, 1, torch.float32)
    place, spoil, kind, message = BAD[what]
    inputs[place] = spoil(inputs[place])
    with pytest.raises(kind, match=message):
        kernels.selective_scan_2d(*inputs)


def test_bad_phases_are_named(make_ss2d):
    x, *weights = make_ss2d(1, 3, 4, 5, 2, 1, torch.float32)
    with pytest.raises(ValueError, match="direction is 4"):
        kernels.summarise_lines(x, *weights[:-1], 4)
    starts = torch.zeros(1, 3, 5, 2)
    with pytest.raises(ValueError, match=r"starts has shape \(1, 2, 5, 2\); expected \(1, 3, 5, 2\)"):
        kernels.scan_lines(x, *weights, 0, starts[:, 1:], torch.zeros_like(x))
    with pytest.raises(TypeError, match="out has dtype float64; expected float32"):
        kernels.scan_lines(x, *weights, 0, starts, torch.zeros_like(x).double())
    with pytest.raises(TypeError, match="ends is a NoneType"):
        kernels.carry_lines(torch.zeros(1, 3, 5), None, weights[3], 0)
    with pytest.raises(ValueError, match="A_logs has shape"):
        kernels.carry_lines(torch.zeros(1, 3, 5), starts, weights[3][1:], 0)
