"""deform_conv2d: the C++ path and the reference against loops over the definition, and what torch's tracing does."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from xrk.kernels.deformable.deform_conv2d import deform_conv2d_reference, deform_rows

from xrk import _native, kernels

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}

# x's shape, outputs, groups, deformable groups, kernel, stride, padding, dilation
CASES = [
    ((1, 1, 1, 1), 1, 1, 1, (1, 1), 1, 0, 1),
    ((2, 6, 7, 5), 4, 1, 3, (3, 3), 1, 1, 1),
    ((1, 16, 6, 9), 35, 1, 2, (3, 3), 1, 1, 1),
    ((1, 12, 8, 7), 6, 3, 2, (3, 2), 2, 2, 2),
    ((2, 20, 5, 3), 40, 4, 1, (1, 3), 1, 2, 1),
    ((1, 9, 4, 4), 9, 9, 9, (2, 2), 3, 1, 1),
]


@pytest.fixture(params=_native.supported_simd())
def simd(request):
    before = _native.simd()
    _native.set_simd(request.param)
    yield request.param
    _native.set_simd(before)


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


def arguments(case, dtype=torch.float32, reach=2.0, seed=0):
    """x, offset, weight, bias, mask; and stride, padding, dilation."""
    (batch, channels, height, width), outputs, groups, dgroups, kernel, stride, padding, dilation = case
    g = torch.Generator().manual_seed(seed)
    ho, wo = (
        (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip((height, width), kernel, strict=True)
    )

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    taps = math.prod(kernel)
    x = channels_last(normal(batch, channels, height, width))
    # As a network makes them: parts of one map.
    both = channels_last(normal(batch, dgroups * 3 * taps, ho, wo))
    offset, mask = reach * both[:, : dgroups * 2 * taps], torch.sigmoid(both[:, dgroups * 2 * taps :])
    weight = normal(outputs, channels // groups, *kernel) / (channels // groups * taps) ** 0.5
    return (x, offset, weight, normal(outputs), mask), (stride, padding, dilation)


def definition(x, offset, weight, bias, mask, stride, padding, dilation):
    """Pixel by pixel and tap by tap, in float64."""
    x, offset, weight = (t.double().numpy() for t in (x, offset, weight))
    batch, channels, height, width = x.shape
    outputs, inputs, kh, kw = weight.shape
    groups, taps = channels // inputs, kh * kw
    dgroups = offset.shape[1] // (2 * taps)
    out = np.zeros((batch, outputs, *offset.shape[2:]))
    out += 0 if bias is None else bias.double().numpy()[:, None, None]
    for b, i, j in np.ndindex(batch, *offset.shape[2:]):
        column = np.zeros((channels, taps))
        for c in range(channels):
            g = c // (channels // dgroups)
            for k in range(taps):
                y = i * stride - padding + k // kw * dilation + offset[b, g * 2 * taps + 2 * k, i, j]
                z = j * stride - padding + k % kw * dilation + offset[b, g * 2 * taps + 2 * k + 1, i, j]
                if math.isnan(y + z):
                    column[c, k] = math.nan
                    continue
                # Only pixels nearer than 1 have a share.
                for row in range(max(0, math.ceil(y - 1)), min(height - 1, math.floor(y + 1)) + 1):
                    for at in range(max(0, math.ceil(z - 1)), min(width - 1, math.floor(z + 1)) + 1):
                        share = max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(z - at))
                        column[c, k] += share * x[b, c, row, at]
                if mask is not None:
                    column[c, k] *= float(mask[b, g * taps + k, i, j])
        for o in range(outputs):
            first = o // (outputs // groups) * inputs
            out[b, o, i, j] += (weight[o].reshape(inputs, taps) * column[first : first + inputs]).sum()
    return torch.from_numpy(out)


def assert_close(actual, expected, dtype):
    assert actual.dtype == dtype and actual.shape == expected.shape
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert (actual.double() - expected).abs().max() <= TOLERANCE[dtype] * max(1.0, expected.abs().max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_path_equals_the_definition(case):
    before = _native.simd()
    for dtype in TOLERANCE:
        (x, offset, weight, bias, mask), numbers = arguments(case, dtype)
        for b, m in ((bias, mask), (None, None)):
            expected = definition(x, offset, weight, b, m, *numbers)
            assert_close(deform_conv2d_reference(x, offset, weight, b, m, *numbers), expected, dtype)
            try:
                for path in _native.supported_simd():
                    _native.set_simd(path)
                    assert_close(kernels.deform_conv2d(x, offset, weight, b, m, *numbers), expected, dtype)
            finally:
                _native.set_simd(before)


def test_without_offsets_it_is_a_convolution(simd):
    x = channels_last(torch.randn(2, 24, 33, 21))
    weight, bias = torch.randn(70, 24, 3, 3) / 15, torch.randn(70)
    out = kernels.deform_conv2d(x, torch.zeros(2, 4 * 18, 33, 21), weight, bias, padding=1)
    assert_close(out, F.conv2d(x.double(), weight.double(), bias.double(), padding=1), torch.float32)


def test_positions_far_outside_and_those_that_are_no_number(simd):
    (x, offset, weight, bias, mask), numbers = arguments(((1, 8, 6, 7), 5, 1, 2, (3, 3), 1, 1, 1))
    offset[0, :, 0, 0] = 1e30
    offset[0, :, 1, 1] = -math.inf
    offset[0, 5, 2, 2] = math.nan
    offset[0, :, 3] = offset[0, :, 3].round()  # on pixels, the last rows and columns among them
    out = kernels.deform_conv2d(x, offset, weight, bias, mask, *numbers)
    assert torch.equal(out[0, :, 0, 0], bias) and torch.equal(out[0, :, 1, 1], bias)
    unknown = torch.isnan(out)
    assert unknown[0, :, 2, 2].all() and unknown.sum() == 5
    reference = deform_conv2d_reference(x, offset, weight, bias, mask, *numbers)
    expected = definition(x, offset.clamp(-1e6, 1e6), weight, bias, mask, *numbers)
    for y in (out, reference):
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5, equal_nan=True)


def test_a_pixel_that_is_no_number_reaches_only_what_takes_it(simd):
    (x, offset, weight, _, mask), numbers = arguments(((1, 8, 6, 7), 5, 1, 1, (3, 3), 1, 1, 1))
    x[0, :, 0, 0] = math.nan
    offset.zero_()
    for function in (kernels.deform_conv2d, deform_conv2d_reference):
        unknown = torch.isnan(function(x, offset + 8, weight, None, mask, *numbers))
        assert not unknown.any()
        assert torch.isnan(function(x, offset, weight, None, mask, *numbers))[0, 0, :2, :2].all()


def test_the_number_of_threads_changes_nothing(simd):
    (x, offset, weight, bias, mask), numbers = arguments(((2, 32, 41, 37), 33, 1, 4, (3, 3), 1, 1, 1))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(kernels.deform_conv2d(x, offset, weight, bias, mask, *numbers))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_band_gives_the_bits_of_the_whole(simd):
    """Positions are counted from the tap, not from the map's first row."""
    (x, offset, weight, bias, mask), numbers = arguments(((1, 16, 60, 11), 8, 1, 2, (3, 3), 1, 1, 1), reach=0.5)
    offset = offset.clamp(-2, 2)
    whole = kernels.deform_conv2d(x, offset, weight, bias, mask, *numbers)
    band = slice(30, 50)
    part = kernels.deform_conv2d(x[:, :, band], offset[:, :, band], weight, bias, mask[:, :, band], *numbers)
    assert torch.equal(part[:, :, 4:-4], whole[:, :, 34:46])


def test_any_strides_of_offsets_and_float32_beside_half():
    (x, offset, weight, bias, mask), numbers = arguments(((1, 16, 9, 8), 8, 1, 2, (3, 3), 1, 1, 1), torch.float16)
    expected = definition(x, offset, weight, bias, mask, *numbers)
    others = (offset.float().contiguous(), weight.float(), bias.float(), mask.float().contiguous())
    assert_close(kernels.deform_conv2d(x, *others, *numbers), expected, torch.float16)


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
def test_its_gradients_are_those_of_the_reference(case):
    (*tensors, mask), numbers = arguments(case, torch.float64)

    def gradients(function, mask):
        own = [t.clone().requires_grad_() for t in (*tensors, mask) if t is not None]
        y = function(*own, *([] if mask is not None else [None]), *numbers)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
        return [t.grad for t in own]

    for m in (mask, None):
        found, expected = gradients(kernels.deform_conv2d, m), gradients(deform_conv2d_reference, m)
        for actual, there in zip(found, expected, strict=True):
            assert (actual - there).abs().max() < 1e-12 * max(1.0, there.abs().max())


def test_the_reference_has_the_gradients_of_its_values():
    (x, offset, weight, bias, mask), numbers = arguments(((1, 2, 3, 3), 2, 1, 1, (2, 2), 1, 0, 1), torch.float64)
    inputs = [t.clone().requires_grad_() for t in (x, offset, weight, bias, mask)]
    assert torch.autograd.gradcheck(lambda *t: deform_conv2d_reference(*t, *numbers), inputs)


def test_traced_as_one_operator():
    (x, offset, weight, bias, mask), numbers = arguments(CASES[1])
    op = torch.ops.xrk.deform_conv2d.default
    torch.library.opcheck(op, (x, offset, mask, weight, bias, *numbers))
    learning = (t.clone().requires_grad_() for t in (x, offset, mask, weight, bias))
    torch.library.opcheck(op, (*learning, *numbers))


X = channels_last(torch.zeros(2, 4, 5, 6))
OFFSET, MASK = torch.zeros(2, 36, 5, 6), torch.zeros(2, 18, 5, 6)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": 1}, TypeError, "x is a int; expected a torch tensor"),
        ({"x": X.long()}, TypeError, "x has dtype int64"),
        ({"x": X[0]}, ValueError, r"x has shape \(4, 5, 6\); expected \(B, C, H, W\)"),
        ({"x": X.contiguous()}, ValueError, r"memory_format=torch\.channels_last"),
        ({"weight": torch.zeros(8, 3, 3, 3)}, ValueError, r"weight has shape \(8, 3, 3, 3\); expected \(O, 4 / groups"),
        ({"weight": torch.zeros(7, 2, 3, 3)}, ValueError, "O a multiple of groups"),
        ({"weight": torch.zeros(8, 4, 3)}, ValueError, r"weight has shape \(8, 4, 3\)"),
        ({"weight": None}, TypeError, "weight is a NoneType"),
        ({"weight": torch.zeros(8, 4, 3, 3).half()}, TypeError, "weight has dtype float16; expected float32"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias has shape \(5,\); expected \(8,\)"),
        ({"offset": OFFSET[:, :35]}, ValueError, r"offset has shape .*; expected \(2, G \* 18, 5, 6\), G a divisor"),
        ({"offset": torch.zeros(2, 54, 5, 6)}, ValueError, "G a divisor of 4"),
        ({"offset": OFFSET[:, :, :4]}, ValueError, r"offset has shape \(2, 36, 4, 6\)"),
        ({"offset": None}, TypeError, "offset is a NoneType"),
        ({"offset": OFFSET.double()}, TypeError, "offset has dtype float64"),
        ({"offset": OFFSET.to("meta")}, ValueError, "offset is on meta; expected x's device"),
        ({"mask": MASK[:, :9]}, ValueError, r"mask has shape .*; expected \(2, 18, 5, 6\)"),
        ({"stride": 0}, ValueError, "stride is 0; expected 1 or more"),
        ({"padding": -1}, ValueError, "padding is -1; expected 0 or more"),
        ({"dilation": (1, 1)}, TypeError, "dilation is a tuple; expected an int"),
        ({"dilation": 9}, ValueError, "no smaller than a kernel"),
    ],
)
def test_bad_arguments(changes, error, words):
    good = {"x": X, "offset": OFFSET, "weight": torch.zeros(8, 4, 3, 3), "mask": MASK, "padding": 1}
    with pytest.raises(error, match=words):
        kernels.deform_conv2d(**{**good, **changes})


@pytest.mark.parametrize("case", CASES)
def test_some_rows_are_those_of_the_whole(simd, case):
    """Bit for bit, of the whole map and of a window that holds what they look at."""
    (x, offset, weight, bias, mask), numbers = arguments(case, reach=1.0)
    whole = kernels.deform_conv2d(x, offset, weight, bias, mask, *numbers)
    stride, _, _ = numbers
    for a in range(0, whole.shape[2], 3):
        rows = slice(a, a + 2)
        of = (offset[:, :, rows], mask[:, :, rows], weight, bias, *numbers)
        assert torch.equal(deform_rows(x, *of, a * stride), whole[:, :, rows])
        above = max(0, a * stride - 9)
        window = channels_last(x[:, :, above : a * stride + 18])
        assert torch.equal(deform_rows(window, *of, a * stride - above), whole[:, :, rows])
    last = whole.shape[2] - 1
    part = deform_conv2d_reference(x, offset[:, :, last:], weight, bias, mask[:, :, last:], *numbers, last * stride)
    expected = deform_conv2d_reference(x, offset, weight, bias, mask, *numbers)[:, :, last:]
    torch.testing.assert_close(part, expected)
