"""Work in place and shared memory: what is captured equals the module, or is refused."""

import pytest
import torch
from test_capture import Function
from torch import nn
from torch.nn import functional as F

from xrk.errors import InputError
from xrk.runtime import planner
from xrk.runtime.planner import make_plan


def compared(function, size=(16, 20), unknown="refuse"):
    """Whether the plan gives what the module gives, an earlier comparison of theirs left out of it."""
    module, x = Function(function), torch.randn(1, 2, *size, generator=torch.Generator().manual_seed(3))
    kept = x.clone()
    plan = make_plan(module, x.shape, unknown=unknown, band=3)
    found = plan.run(x)
    assert torch.equal(x, kept)
    found, expected = ([y] if isinstance(y, torch.Tensor) else list(y) for y in (found, module(x.clone())))
    for y, z in zip(found, expected, strict=True):
        assert y.dtype == z.dtype
        torch.testing.assert_close(y, z)


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """A comparison on a small image may find what these tests are about, or may not: it sees 16 x 16 pixels."""
    monkeypatch.setattr(planner, "_check", lambda *arguments: "")


VIEWS = {
    "columns": lambda y: y[..., 3:5],
    "narrow": lambda y: y.narrow(2, 3, 4),
    "split": lambda y: y.split(5, 2)[1],
    "unsafe_split": lambda y: torch.unsafe_split(y, 5, 2)[1],
    "channels": lambda y: y[:, 1:2],
    "unbind": lambda y: y.unbind(1)[0],
    "detach": lambda y: y.detach(),
    "data": lambda y: y.data,
    "permute": lambda y: y.permute(0, 2, 3, 1),
    "einsum": lambda y: torch.einsum("bchw->bhwc", y),
    "channel shuffle of one": lambda y: F.channel_shuffle(y, 1),
    "dropout of maps": lambda y: F.dropout2d(y, training=False),
    "to": lambda y: y.to(torch.float32),
    # A copy where the image is not channels-last, as it is not in a plan's oracle; memory of the map where it is.
    "contiguous": lambda y: y.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_base_is_not_returned_after_a_write_to_a_view(name):
    def network(x):
        y = x + 0
        VIEWS[name](y).mul_(2)
        return y

    with pytest.raises(InputError, match="returns a tensor that was written to through another view"):
        compared(network)


def between(x):
    y = x + 0
    y[:, :, :9].mul_(2)
    return y[:, :, 4:]


def earlier(x):
    y = x + 0
    later = y[:, :, 4:]
    y[:, :, :9].mul_(2)
    return later


def beside(x):
    y = x + 0
    z = y[:, :, 3:]
    z.mul_(2)
    return z, y


def own_input(x):
    x[:, :, 2:].mul_(2)
    return x


def small(x):
    s = x.mean((2, 3), keepdim=True)
    s.view(1, -1).mul_(2)
    return x * s


def permuted(x):
    p = (x + 0).permute(0, 2, 3, 1)
    q = p.contiguous()
    q.mul_(2)
    return p + q


@pytest.mark.parametrize("network", [between, earlier, beside, own_input, small, permuted])
def test_nor_read(network):
    with pytest.raises(InputError, match="written to through another view"):
        compared(network)


def same_object(x):
    y = x + 1
    z = y
    z += x
    return y


def cloned(x):
    y = x.clone()
    y.relu_()
    return x + y, y


def half(x):
    y = x.half()
    y += x
    return y, y.float() * 3


def whole_input(x):
    x.relu_()
    return x


def view_alone(x):
    y = x[:, :, 2:]
    y.mul_(2)
    return y


def outputs_of_one_memory(x):
    y = x + 1
    return y, y[:, :, 3:], y.view(1, 2, -1), x, x[..., 2:]


def own_tensor(x):
    table = torch.ones(1, 1, *x.shape[2:])
    table[:, :, 3:5] = 4
    table += 1
    return x * table


@pytest.mark.parametrize(
    "network", [same_object, cloned, half, whole_input, view_alone, outputs_of_one_memory, own_tensor]
)
def test_what_is_allowed_is_exact(network):
    compared(network)


def test_a_tensor_of_its_own_that_the_image_is_added_to_is_refused():
    def network(x):
        total = torch.zeros(x.shape)
        total += x
        return total * x

    with pytest.raises(InputError, match=r"into a tensor of its own in place \(aten::add_\).* a \+ b for a \+= b"):
        compared(network)


def test_a_known_tensor_is_not_written_to_once_it_was_read():
    def network(x):
        table = torch.ones(1, 1, *x.shape[2:])
        y = x * table
        table[..., 3:5] = 4
        return y

    with pytest.raises(InputError, match="that it has computed with before"):
        compared(network)


def test_a_module_that_writes_to_its_buffer_is_refused_and_left_as_it_is():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    module = Counting().eval()
    with pytest.raises(InputError, match="keeps no state"):
        make_plan(module, (1, 1, 8, 8))
    assert module.calls == 0


def test_another_shape_in_place_is_refused():
    def network(x):
        y = x + 1
        y.unsqueeze_(0)
        return y.squeeze(0)

    with pytest.raises(InputError, match=r"makes \(1, 1, 2, 16, 20\) of \(1, 2, 16, 20\) in place"):
        compared(network)


def view_outlives(x):
    """The map that a view was made of ends, and another is made in its memory, before the view is read."""
    y = torch.sin(x * 1.5)
    view = y.unfold(3, 20, 20)[..., 0, :]
    return torch.cumsum(y.cos() + torch.cumsum(y, 2), 2) + view


@pytest.mark.parametrize(
    "network", [view_outlives, lambda x: torch.cumsum(torch.cumsum(x * 2, 2).sin(), 2)], ids=["view", "layout"]
)
def test_maps_are_made_in_the_memory_of_none_that_a_whole_operator_has_to_do_with(network):
    compared(network, unknown="whole")


def test_strides_are_nothing_to_go_by():
    with pytest.raises(InputError, match="as_strided, whose result depends on the layout"):
        compared(lambda x: (x + 1).as_strided((1, 2, 4, 4), (640, 320, 20, 1)), unknown="whole")
