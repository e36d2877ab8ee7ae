"""conv2d_pair against conv2d twice and float64, and what torch's tracing does with it."""

import pytest
import torch
import torch.nn.functional as F
from xrk.kernels.convolution.conv2d_pair import conv2d_pair_reference

from xrk import kernels

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def arguments(dtype=torch.float32, shape=(2, 5, 7, 9), between=6, outputs=3):
    g = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    def map_of(*size):
        return normal(*size).to(dtype).contiguous(memory_format=torch.channels_last)

    weight1, weight2 = (normal(between, shape[1], 3, 3) / 7).to(dtype), (normal(outputs, between, 3, 3) / 7).to(dtype)
    bias1, bias2 = normal(between).to(dtype), normal(outputs).to(dtype)
    return map_of(*shape), weight1, bias1, weight2, bias2, map_of(shape[0], outputs, *shape[2:])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_path_equals_the_definition(dtype):
    given = arguments(dtype)
    x, weight1, bias1, weight2, bias2, residual = (tensor.double() for tensor in given)
    between = F.silu(F.conv2d(x, weight1, bias1, padding=1)).to(dtype).double()
    y = F.conv2d(between, weight2, bias2, padding=1)
    for function in (kernels.conv2d_pair, conv2d_pair_reference):
        for add_first, expected in ((True, F.leaky_relu(y + residual, 0.1)), (False, F.leaky_relu(y, 0.1) + residual)):
            out = function(*given, "silu", "leaky_relu", 0.1, add_first)
            assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
            assert (out.double() - expected).abs().max() <= TOLERANCE[dtype] * max(1.0, expected.abs().max())
    plain = kernels.conv2d_pair(given[0], given[1], None, given[3], None)
    once = kernels.conv2d(given[0], given[1], padding=1, activation="relu")
    assert torch.equal(plain, kernels.conv2d(once, given[3], padding=1))


# inductor itself uses what torch has deprecated
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_traced_as_one_operator():
    x, weight1, bias1, weight2, bias2, residual = arguments()
    for given in [
        (x, weight1, bias1, weight2, bias2, residual, "relu", None, 0.01, True),
        (x, weight1, None, weight2, None, None, None, "gelu", 0.01, False),
    ]:
        torch.library.opcheck(torch.ops.xrk.conv2d_pair.default, given)

    class Block(torch.nn.Module):
        def forward(self, x):
            return kernels.conv2d_pair(x * 2, weight1, bias1, weight2, bias2) + 1

    block = Block()
    program = torch.export.export(block, (x,), dynamic_shapes=({2: torch.export.Dim("h"), 3: torch.export.Dim("w")},))
    assert [str(n.target) for n in program.graph.nodes].count("xrk.conv2d_pair.default") == 1
    smaller = x[:, :, :3, :4].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(program.module()(smaller), block(smaller))


X = torch.zeros(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
W = torch.zeros(8, 4, 3, 3)
V = torch.zeros(3, 8, 3, 3)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": X.contiguous()}, ValueError, r"memory_format=torch\.channels_last"),
        ({"weight1": W[:, :3]}, ValueError, r"weight1 has shape \(8, 3, 3, 3\); expected \(M, 4, 3, 3\)"),
        ({"weight1": None}, TypeError, "weight1 is a NoneType"),
        ({"weight2": W}, ValueError, r"weight2 has shape \(8, 4, 3, 3\); expected \(O, 8, 3, 3\)"),
        ({"weight2": V.half()}, TypeError, "weight2 has dtype float16; expected float32"),
        ({"bias2": torch.zeros(4)}, ValueError, r"bias2 has shape \(4,\); expected \(3,\)"),
        ({"residual": X}, ValueError, r"residual has shape \(2, 4, 5, 6\); expected the output's, \(2, 3, 5, 6\)"),
        ({"activation2": "tanh"}, ValueError, "activation2 is 'tanh'; expected one of 'relu'"),
    ],
)
def test_bad_arguments(changes, error, words):
    with pytest.raises(error, match=words):
        kernels.conv2d_pair(**{"x": X, "weight1": W, "bias1": None, "weight2": V, "bias2": None, **changes})
