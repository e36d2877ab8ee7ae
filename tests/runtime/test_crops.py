"""Slices of a fixed size, which leave nothing of the small image that a plan is checked on."""

import pytest
import torch
from test_capture import Function, graph_of
from torch import nn

from xrk.errors import InputError
from xrk.runtime import planner
from xrk.runtime.planner import make_plan

CROPS = {
    "rows": (lambda x, net: net(x)[:, :, 100:-100], (1000, 64)),
    "fewer rows": (lambda x, net: net(x)[:, :, 9:-9], (1000, 64)),
    "columns": (lambda x, net: net(x)[..., 100:-100], (64, 300)),
    "beside the image": (lambda x, net: (x, net(x)[..., 100:]), (24, 130)),
    "exchanged": (lambda x, net: torch.cat([x[:, :, 100:], net(x)[:, :, :100]], 2), (301, 20)),
    "of a small map": (lambda x, net: nn.functional.avg_pool2d(net(x), 4)[:, :, 30:-30], (400, 40)),
    "from the end": (lambda x, net: net(x)[:, :, -50:].narrow(3, 40, 20), (200, 70)),
}


@pytest.mark.parametrize("name", CROPS)
def test_crops_are_exact_and_checked(name):
    function, size = CROPS[name]
    torch.manual_seed(2)
    module, x = Function(function, nn.Conv2d(1, 1, 3, padding=1)), torch.rand(1, 1, *size)
    plan = make_plan(module, x.shape, band=16)
    rows, columns = (int(word) for word in plan.checked.removeprefix("checked against the module on ").split(" x "))
    assert rows * columns <= planner.CHECKED
    with torch.inference_mode():
        found, expected = plan.run(x), module(x)
    for y, z in zip(*(t if isinstance(t, tuple) else (t,) for t in (found, expected)), strict=True):
        torch.testing.assert_close(y, z, atol=1e-6, rtol=1e-6)


def test_a_crop_hides_nothing_from_the_check():
    calls = [0]

    def stateful(x):
        calls[0] += 1
        return x[:, :, 100:-100] * calls[0]

    with pytest.raises(InputError, match="does not give what the module gives"):
        make_plan(Function(stateful), (1, 1, 1001, 16))


def test_a_network_of_a_few_rows_is_not_checked_on_the_whole_image():
    module = Function(
        lambda x, net: net(x)[:, :, :2] + net(x).mean((2, 3), keepdim=True), nn.Conv2d(1, 1, 3, padding=1)
    )
    assert planner._stride(graph_of(module, (1, 1, 4096, 32))) == 1
    assert make_plan(module, (1, 1, 4096, 32)).checked == "checked against the module on 16 x 16"


def test_the_stride_is_that_of_the_coarsest_map():
    layers = [nn.Conv2d(1, 2, 3, 2, 1), nn.MaxPool2d(2), nn.Upsample(scale_factor=4), nn.Conv2d(2, 2, 2, 2)]
    graph = graph_of(nn.Sequential(*layers).eval(), (1, 1, 403, 64))
    assert planner._stride(graph) == 4
    assert planner._stride(graph_of(Function(lambda x: x.transpose(2, 3) + 1), (1, 1, 1000, 64))) == 1
