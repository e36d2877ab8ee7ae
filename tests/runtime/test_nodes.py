"""Every node alone, in bands, with exactly the rows that it asks for; and with one row fewer."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from interpreter import interpret
from network_steps import Step
from networks import Case, cases, check

from xrk.runtime.capture import capture

drawn = settings(max_examples=60, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def node_by_node(module, shape, band):
    graph = capture(module, shape, torch.float32, torch.device("cpu"), "refuse")
    _prepare(graph, band)
    return lambda x: interpret(graph, x, band)


def _prepare(graph, band):
    for node in graph.nodes:
        node.heights = {band: 1}
        node.prepare()


@drawn
@given(cases(bands=2))
def test_row_local_nodes(case):
    assume(check(case, node_by_node))


@drawn
@given(cases(row_global=True, bands=2))
def test_nodes_that_look_at_the_whole_image(case):
    assume(check(case, node_by_node))


CONTEXT = {
    "convolution": Step("convolution", inputs=2, outputs=3, kernel=3, padding=1),
    "strided": Step("convolution", inputs=2, outputs=3, kernel=7, padding=3, stride=2),
    "dilated": Step("convolution", inputs=2, outputs=3, kernel=3, padding=2, dilation=2),
    "reflect": Step("convolution", inputs=2, outputs=3, kernel=3, padding=1, padding_mode="reflect"),
    "replicate": Step("pad and convolve", inputs=2, outputs=3, kernel=3, pad=(1, 1, 1, 1), mode="replicate"),
    "depthwise": Step("convolution", inputs=2, outputs=2, kernel=5, padding=2, groups=2),
    "transposed": Step("transposed convolution", inputs=2, outputs=3, kernel=4, stride=2, padding=1),
    "max pool": Step("max pool", kernel_size=3, stride=2, padding=1),
    "average pool": Step("average pool", kernel_size=3, stride=1, padding=1),
    "bilinear": Step("resize", scale_factor=2.0, mode="bilinear", align_corners=False),
    "bilinear corners": Step("resize", scale_factor=1.5, mode="bilinear", align_corners=True),
    "bicubic": Step("resize", scale_factor=2.0, mode="bicubic", align_corners=False),
}


@pytest.mark.parametrize("name", CONTEXT)
@pytest.mark.parametrize("side", ["top", "bottom"])
def test_one_row_of_context_fewer_fails(name, side):
    """What a network would see whose halo is a row too small: the outermost row that a band asks for is not there."""
    case = Case([CONTEXT[name]], channels=2, size=(24, 10), bands=(8,), offset=0.0, seed=3)
    assert check(case, node_by_node) == 1

    def spoilt(module, shape, band):
        graph = capture(module, shape, torch.float32, torch.device("cpu"), "refuse")
        _prepare(graph, band)
        return lambda x: interpret(graph, x, band, missing=side)

    with pytest.raises(AssertionError, match="from the float64 module at"):
        check(case, spoilt)
