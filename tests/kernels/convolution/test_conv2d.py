"""conv2d with its epilogue against float64, batch norm folded into it, and what torch's tracing does with it."""

import pytest
import torch
import torch.nn.functional as F
from xrk.kernels import dispatch, launch
from xrk.kernels.convolution.conv2d import ACTIVATIONS, conv2d_reference

from xrk import kernels

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# (B, C, H, W), weight, stride, padding, dilation, groups
CASES = [
    ((1, 1, 1, 1), (3, 1, 1, 1), 1, 0, 1, 1),
    ((2, 1, 7, 13), (8, 1, 3, 3), 1, 1, 1, 1),
    ((1, 8, 9, 5), (1, 8, 3, 3), 1, 1, 1, 1),
    ((2, 12, 11, 17), (20, 6, 3, 3), 2, 1, 1, 2),
    ((1, 6, 13, 7), (5, 6, 5, 3), 1, 4, 2, 1),
]


def arguments(case, dtype=torch.float32, seed=0):
    shape, kernel, stride, padding, dilation, groups = case
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    x = normal(*shape).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = (normal(*kernel) / 8).to(dtype), normal(kernel[0]).to(dtype)
    numbers = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    y = F.conv2d(x.double(), weight.double(), bias.double(), **numbers)
    residual = normal(*y.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    return (x, weight, bias, residual), numbers, y


def activated(y, activation):
    if activation is None:
        return y
    if activation == "leaky_relu":
        return F.leaky_relu(y, 0.1)
    return torch.sigmoid(y) if activation == "sigmoid" else getattr(F, activation)(y)


def assert_close(actual, expected, dtype):
    assert actual.dtype == dtype and actual.shape == expected.shape
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert (actual.double() - expected).abs().max() <= TOLERANCE[dtype] * max(1.0, expected.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_path_equals_the_definition(case, dtype):
    (x, weight, bias, residual), numbers, y = arguments(case, dtype)
    before = [t.clone() for t in (x, weight, bias, residual)]
    for activation in ACTIVATIONS:
        for add_first in (False, True):
            after = residual.double()
            expected = activated(y + after, activation) if add_first else activated(y, activation) + after
            more = {**numbers, "activation": activation, "negative_slope": 0.1, "add_first": add_first}
            assert_close(kernels.conv2d(x, weight, bias, residual, **more), expected, dtype)
            assert_close(conv2d_reference(x, weight, bias, residual, **more), expected, dtype)
    plain = y - bias.double()[:, None, None]
    assert_close(kernels.conv2d(x, weight, **numbers), plain, dtype)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, bias, residual), strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_summaries_are_those_of_the_output(dtype):
    (x, weight, bias, residual), numbers, _ = arguments(CASES[1], dtype)
    more = {**numbers, "activation": "silu"}
    y, state = kernels.conv2d(x, weight, bias, residual, **more, summaries=4)
    assert torch.equal(y, kernels.conv2d(x, weight, bias, residual, **more))
    assert torch.equal(state, kernels.group_norm_summarise(y, 4))
    normal = kernels.group_norm_apply(y, state, activation="silu")
    assert torch.equal(normal, kernels.group_norm(y, 4, activation="silu"))


def test_the_table_gives_triton_few_channels_only():
    same = (1, 1, 1, 1)
    for inputs, outputs, dtype in [(1, 64, "float32"), (64, 1, "float16"), (48, 48, "bfloat16"), (1, 1, "float32")]:
        assert launch.conv2d_in_triton(inputs, outputs, (3, 3), same, dtype)
    for inputs, outputs, dtype in [(48, 48, "float32"), (49, 48, "float16"), (1, 65, "float16"), (1, 8, "float64")]:
        assert not launch.conv2d_in_triton(inputs, outputs, (3, 3), same, dtype)
    assert launch.conv2d_in_triton(8, 8, (1, 1), (1, 0, 1, 1), "float16")
    for kernel, numbers in [((3, 3), (2, 1, 1, 1)), ((3, 3), (1, 0, 1, 1)), ((5, 5), (1, 2, 1, 1)), ((3, 1), same)]:
        assert not launch.conv2d_in_triton(8, 8, kernel, numbers, "float16")
    assert launch.conv2d_pair_in_triton((48, 16, 48), "float16")
    assert not launch.conv2d_pair_in_triton((48, 16, 48), "float32")
    assert not launch.conv2d_pair_in_triton((48, 64, 48), "float16")


def test_folded_batch_norm_equals_both():
    (x, weight, bias, _), numbers, _ = arguments(CASES[3], torch.float64)
    norm = torch.nn.BatchNorm2d(20).double().eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.2, 2.0)
    statistics = (norm.running_mean, norm.running_var)
    for b in (bias, None):
        w, c = kernels.fold_batch_norm(weight, b, *statistics, norm.weight.data, norm.bias.data, norm.eps)
        expected = norm(F.conv2d(x, weight, b, **numbers)).detach()
        assert_close(kernels.conv2d(x, w, c, **numbers), expected, torch.float64)
    w, c = kernels.fold_batch_norm(weight.float(), None, *statistics)
    assert w.dtype == c.dtype == torch.float32
    with pytest.raises(ValueError, match=r"mean has shape \(19,\); expected \(20,\)"):
        kernels.fold_batch_norm(weight, bias, torch.zeros(19), torch.ones(20))
    with pytest.raises(TypeError, match="var is a NoneType"):
        kernels.fold_batch_norm(weight, bias, torch.zeros(20), None)


# inductor itself uses what torch has deprecated
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_traced_as_one_operator():
    (x, weight, bias, residual), _, _ = arguments(((2, 6, 8, 7), (6, 6, 3, 3), 1, 1, 1, 1))
    for given in [
        (x, weight, bias, residual, 1, 1, 1, 1, "silu", 0.01, True),
        (x, weight, None, None, 2, 0, 1, 1, None, 0.01, False),
    ]:
        torch.library.opcheck(torch.ops.xrk.conv2d.default, given)

    torch.library.opcheck(
        torch.ops.xrk.conv2d_summarised.default, (x, weight, bias, None, 1, 1, 1, 1, "silu", 0.01, False, 3)
    )

    class Block(torch.nn.Module):
        def forward(self, x):
            return kernels.conv2d(x * 2, weight, bias, x, padding=1, activation="relu") + 1

    block = Block()
    expected = block(x)
    dims = {2: torch.export.Dim("h", min=3), 3: torch.export.Dim("w", min=3)}
    program = torch.export.export(block, (x,), dynamic_shapes=(dims,))
    assert [str(n.target) for n in program.graph.nodes].count("xrk.conv2d.default") == 1
    smaller = x[:, :, :3, :4].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(program.module()(smaller), block(smaller))
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), expected)


X = torch.zeros(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
W = torch.zeros(8, 4, 3, 3)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": None}, TypeError, "x is a NoneType"),
        ({"x": X.contiguous()}, ValueError, r"memory_format=torch\.channels_last"),
        ({"weight": W[0]}, ValueError, r"weight has shape \(4, 3, 3\); expected \(O, I, K, L\)"),
        ({"weight": W[:, :3]}, ValueError, r"weight has shape \(8, 3, 3, 3\); expected \(O, 4, K, L\)"),
        ({"weight": W.half()}, TypeError, "weight has dtype float16; expected float32"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \(4,\); expected \(8,\)"),
        ({"padding": 0, "dilation": 3}, ValueError, r"x has shape \(2, 4, 5, 6\); expected a map of the kernel's size"),
        ({"stride": 0}, ValueError, "stride is 0; expected 1 or more"),
        ({"padding": -1}, ValueError, "padding is -1; expected 0 or more"),
        ({"padding": "same"}, TypeError, "padding is a str; expected an int"),
        ({"groups": 3}, ValueError, "groups is 3; expected a divisor of x's channels, 4"),
        ({"residual": X}, ValueError, r"residual has shape \(2, 4, 5, 6\); expected the output's, \(2, 8, 5, 6\)"),
        ({"residual": torch.zeros(2, 8, 5, 6)}, ValueError, "residual has shape .* and strides"),
        ({"summaries": 3}, ValueError, "summaries is 3; expected a divisor of the output's channels, 8"),
        ({"summaries": True}, TypeError, "summaries is a bool; expected an int or None"),
        ({"activation": "tanh"}, ValueError, "activation is 'tanh'; expected one of 'relu'"),
    ],
)
def test_bad_arguments(changes, error, words):
    with pytest.raises(error, match=words):
        kernels.conv2d(**{"x": X, "weight": W, "padding": 1, **changes})


def test_torch_does_it_on_purpose():
    assert dispatch.path_of("conv2d", "cpu").path == "torch"


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_sum_below_the_range_of_float16_becomes_0_not_nan(activation):
    x = torch.full((1, 8, 4, 4), 60000.0, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    weight = torch.full((4, 8, 3, 3), -1.0, dtype=torch.float16)
    assert not kernels.conv2d(x, weight, padding=1, activation=activation).any()
