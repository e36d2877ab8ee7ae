"""What a module becomes, and what is refused with which words."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from xrk.errors import InputError, InputTypeError
from xrk.models import DnCNN, ResNet18UNet
from xrk.runtime.capture import capture
from xrk.runtime.fusion import fuse
from xrk.runtime.planner import make_plan

CPU = torch.device("cpu")


class Function(nn.Module):
    """A function as a module in eval mode."""

    def __init__(self, function, *parts):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)
        self.eval()

    def forward(self, x):
        return self.function(x, *self.parts)


def graph_of(module, shape=(1, 1, 64, 96), unknown="refuse"):
    return capture(module.eval(), shape, torch.float32, CPU, unknown)


def labels(graph):
    return [node.label.removeprefix("aten::") for node in graph.nodes]


def test_a_network_is_taken_down_at_the_highest_level():
    graph = graph_of(DnCNN(depth=4, batch_norm=True))
    assert labels(graph) == [
        "conv2d", "relu", "conv2d", "batch_norm", "relu", "conv2d", "batch_norm", "relu", "conv2d", "sub"
    ]  # fmt: skip
    assert [v.shape for v in graph.outputs] == [(1, 1, 64, 96)]
    assert graph.nodes[-1].inputs[0] is graph.input


def test_norms_sums_and_activations_go_into_convolutions():
    graph = graph_of(ResNet18UNet(width=4, decoder_channels=(8, 8, 4, 4, 4)))
    assert labels(graph).count("conv2d") == 31
    fuse(graph)
    # Two up-samplings of 8 and more channels are gone into the convolutions behind them. What is left: one pooling, two
    # concatenations, one up-sampling that nothing is appended to.
    rest = ["max_pool2d"] + ["cat"] * 2 + ["upsample_nearest2d"]
    assert sorted(labels(graph)) == sorted(["conv2d"] * 29 + ["doubled aten::conv2d"] * 2 + rest)
    residuals = [node for node in graph.nodes if len(node.inputs) > 1 and node.label == "aten::conv2d"]
    assert len(residuals) == 8
    assert all(node.activation == "relu" for node in residuals)


def test_sizes_are_numbers_and_constants_are_known():
    def network(x):
        rows = torch.linspace(0, 1, x.shape[-2], device=x.device).view(1, 1, -1, 1)
        return x * rows if x.shape[-1] % 2 == 0 else x

    graph = graph_of(Function(network))
    assert labels(graph) == ["mul"]
    assert graph.nodes[0].inputs[1].constant.shape == (1, 1, 64, 1)
    assert labels(graph_of(Function(network), (1, 1, 64, 95))) == []


def test_work_in_place_is_taken_down_as_the_plain_operator():
    def network(x):
        y = x + 1
        y.relu_().mul_(2)
        y += x
        return y

    graph = graph_of(Function(network))
    assert labels(graph) == ["add", "relu", "mul", "add"]
    x = torch.randn(1, 1, 9, 8)
    assert torch.equal(make_plan(Function(network), (1, 1, 9, 8), band=2).run(x), network(x.clone()))


def test_a_write_through_another_view_is_refused():
    def network(x):
        y = x + 1
        y[:, :, 2:].relu_()
        return y * 2

    with pytest.raises(InputError, match="written to through another view"):
        graph_of(Function(network))


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (lambda x: torch.fft.fft2(x).real, "aten::_fft_c2c"),
        (lambda x: torch.sort(x, dim=2)[0], "aten::sort"),
        (lambda x: x.cumsum(2), "aten::cumsum"),
        (lambda x: F.dropout(x, training=True), "dropout"),
        (lambda x: x.flatten(1).softmax(1), r"aten::softmax \(in it aten::_softmax\)"),
        (lambda x: x.view(1, -1, 128).sin(), "aten::view"),
    ],
)
def test_an_unknown_operator_is_refused_by_name(network, name):
    with pytest.raises(InputError, match=f'({name}).*unknown="whole"'):
        graph_of(Function(network))


@pytest.mark.parametrize("network", [lambda x: torch.sort(x, dim=2)[0], lambda x: torch.fft.fft2(x * 2).real + x])
def test_an_unknown_operator_runs_whole_where_the_caller_says_so(network):
    x = torch.randn(1, 2, 14, 11)
    plan = make_plan(Function(network), x.shape, unknown="whole", band=3)
    torch.testing.assert_close(plan.run(x), network(x))


def test_decisions_by_value_are_refused():
    with pytest.raises(InputError, match="reads a number that it computes"):
        graph_of(Function(lambda x: x if x.mean() > 0 else -x))


def test_a_network_that_returns_something_else_is_refused():
    with pytest.raises(InputTypeError, match="returns a str"):
        graph_of(Function(lambda x: (x, "text")))


def test_several_outputs_come_back_as_the_module_gives_them():
    network = Function(lambda x: {"a": x * 2, "b": [x.mean((2, 3)), x.relu()]})
    x = torch.randn(1, 3, 12, 8)
    found, expected = make_plan(network, x.shape, band=4).run(x), network(x)
    assert list(found) == ["a", "b"]
    torch.testing.assert_close(found["a"], expected["a"])
    torch.testing.assert_close(found["b"], expected["b"])


def test_capture_loads_no_compiler():
    code = (
        "import sys, torch; from xrk.models import DnCNN; from xrk.runtime.planner import make_plan;"
        "make_plan(DnCNN(depth=3).eval(), (1, 1, 16, 16)).run(torch.rand(1, 1, 16, 16));"
        "print([m for m in ('sympy', 'torch._dynamo') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
