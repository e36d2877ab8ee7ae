"""depthwise_conv2d: the C++ path and the reference against float64, and what torch's tracing does with it."""

import pytest
import torch
import torch.nn.functional as F
from xrk.kernels import dispatch
from xrk.kernels.convolution.depthwise_conv2d import depthwise_conv2d_reference

from xrk import _native, kernels

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
SHAPES = [(1, 1, 1, 1), (1, 5, 7, 1), (2, 16, 1, 9), (1, 17, 11, 13), (2, 96, 5, 37), (1, 40, 23, 70), (1, 3, 2, 2)]


@pytest.fixture(params=_native.supported_simd())
def simd(request):
    before = _native.simd()
    _native.set_simd(request.param)
    yield request.param
    _native.set_simd(before)


def arguments(shape, kernel=3, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(shape[1], 1, kernel, kernel, generator=g, dtype=torch.float64).to(dtype)
    bias = torch.randn(shape[1], generator=g, dtype=torch.float64).to(dtype)
    return x, weight, bias


def exact(x, weight, bias, dilation, activation):
    """The definition, through torch's own operators, in float64."""
    bias = None if bias is None else bias.double()
    padding = weight.shape[-1] // 2 * dilation
    y = F.conv2d(x.double(), weight.double(), bias, padding=padding, dilation=dilation, groups=x.shape[1])
    return F.silu(y) if activation else y


def assert_close(actual, expected, dtype):
    assert actual.dtype == dtype and actual.shape == expected.shape
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert (actual.double() - expected).abs().max() <= TOLERANCE[dtype] * max(1.0, expected.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_equals_the_definition(simd, shape, dtype):
    for kernel in (3, 5):
        x, weight, bias = arguments(shape, kernel, dtype)
        for dilation, b, activation in [(1, bias, "silu"), (2, bias, None), (2, None, "silu")]:
            expected = exact(x, weight, b, dilation, activation)
            assert_close(kernels.depthwise_conv2d(x, weight, b, dilation, activation), expected, dtype)
            assert_close(depthwise_conv2d_reference(x, weight, b, dilation, activation), expected, dtype)


def test_maps_wider_than_a_tile(simd):
    # 192 KiB of ring hold 5 rows of about 70 pixels of 128 channels.
    x, weight, bias = arguments((1, 128, 9, 333), 3)
    assert_close(kernels.depthwise_conv2d(x, weight, bias, 2, "silu"), exact(x, weight, bias, 2, "silu"), x.dtype)


def test_the_number_of_threads_changes_nothing(simd):
    x, weight, bias = arguments((3, 24, 41, 67), 5)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(kernels.depthwise_conv2d(x, weight, bias, 1, "silu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_bands_of_rows_are_taken_as_they_lie(simd):
    x, weight, bias = arguments((1, 20, 31, 17), 3)
    whole = kernels.depthwise_conv2d(x, weight, bias, 1, "silu")
    band = kernels.depthwise_conv2d(x[:, :, 9:22], weight, bias, 1, "silu")
    assert torch.equal(band[:, :, 1:-1], whole[:, :, 10:21])


def test_float32_parameters_beside_half_maps():
    x, weight, bias = arguments((1, 20, 9, 8), 3, torch.float16)
    weight = weight.float() + 1e-4
    out = kernels.depthwise_conv2d(x, weight, bias.float(), 1, "silu")
    assert_close(out, exact(x, weight, bias, 1, "silu"), torch.float16)


@pytest.mark.parametrize(
    ("kernel", "dilation", "activation"), [(3, 1, "silu"), (3, 2, None), (5, 1, None), (5, 2, "silu")]
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_its_gradients_are_those_of_the_definition(kernel, dilation, activation, dtype, bound, with_bias):
    given = arguments((2, 5, 6, 7), kernel, torch.float64)[: 3 if with_bias else 2]

    def gradients(function, dtype):
        own = [t.to(dtype).requires_grad_() for t in given]
        y = function(*own, *([] if with_bias else [None]), dilation, activation)
        (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).reshape(y.shape)).sum().backward()
        return [t.grad for t in own]

    found = gradients(kernels.depthwise_conv2d, dtype)
    for actual, expected in zip(found, gradients(exact, torch.float64), strict=True):
        assert actual.dtype == dtype and (actual - expected).abs().max() < bound * expected.abs().max()


# inductor itself uses what torch has deprecated
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_traced_as_one_operator():
    x, weight, bias = arguments((2, 12, 6, 5))
    torch.library.opcheck(torch.ops.xrk.depthwise_conv2d.default, (x, weight, bias, 2, "silu"))
    torch.library.opcheck(torch.ops.xrk.depthwise_conv2d.default, (x[:1, :, :1, :1], weight, None, 1, None))
    learning = (t.clone().requires_grad_() for t in (x, weight, bias))
    torch.library.opcheck(torch.ops.xrk.depthwise_conv2d.default, (*learning, 2, "silu"))

    class Block(torch.nn.Module):
        def forward(self, x):
            return kernels.depthwise_conv2d(x * 2, weight, bias, 1, "silu") + 1

    block = Block()
    expected = block(x)
    dims = {2: torch.export.Dim("h", min=2), 3: torch.export.Dim("w", min=2)}
    program = torch.export.export(block, (x,), dynamic_shapes=(dims,))
    assert [str(n.target) for n in program.graph.nodes].count("xrk.depthwise_conv2d.default") == 1
    torch.testing.assert_close(program.module()(x), expected)
    smaller = x[:, :, :3, :4].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(program.module()(smaller), block(smaller))
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), expected)


X = torch.zeros(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": 1}, TypeError, "x is a int; expected a torch tensor"),
        ({"x": X.long()}, TypeError, "x has dtype int64"),
        ({"x": X[0]}, ValueError, r"x has shape \(4, 5, 6\); expected \(B, C, H, W\)"),
        ({"x": X[:, :, :0]}, ValueError, "expected at least 1 in each dimension"),
        ({"x": X.contiguous()}, ValueError, r"x has shape .* and strides .*memory_format=torch\.channels_last"),
        ({"weight": torch.zeros(4, 1, 7, 7)}, ValueError, r"weight has shape .*; expected \(4, 1, 3, 3\) or"),
        ({"weight": torch.zeros(4, 4, 3, 3)}, ValueError, r"weight has shape \(4, 4, 3, 3\)"),
        ({"weight": torch.zeros(4, 3, 3)}, ValueError, r"weight has shape \(4, 3, 3\)"),
        ({"weight": None}, TypeError, "weight is a NoneType"),
        ({"weight": torch.zeros(4, 1, 3, 3).half()}, TypeError, "weight has dtype float16; expected float32"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias has shape \(5,\); expected \(4,\)"),
        ({"weight": torch.zeros(4, 1, 3, 3, device="meta")}, ValueError, "weight is on meta; expected x's device"),
        ({"dilation": 3}, ValueError, "dilation is 3; expected one of 1, 2"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu'; expected one of 'silu', None"),
    ],
)
def test_bad_arguments(changes, error, words):
    good = {"x": X, "weight": torch.zeros(4, 1, 3, 3), "bias": torch.zeros(4), "dilation": 1, "activation": None}
    with pytest.raises(error, match=words):
        kernels.depthwise_conv2d(**{**good, **changes})


def test_the_reference_takes_over_with_a_warning(monkeypatch):
    x, weight, bias = arguments((1, 6, 5, 4))
    monkeypatch.delattr(_native, "depthwise_conv2d")
    dispatch.forget()
    try:
        with pytest.warns(dispatch.FallbackWarning, match=r"xrk\.kernels\.depthwise_conv2d runs as its slow reference"):
            out = kernels.depthwise_conv2d(x, weight, bias, 1, "silu")
        assert torch.equal(out, depthwise_conv2d_reference(x, weight, bias, 1, "silu"))
    finally:
        dispatch.forget()
