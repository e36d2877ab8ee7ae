"""Deformable convolutions in bands: offsets that the network makes, as far as the other end of the image."""

import pytest
import torch
from fixed_networks import seeded
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import Exactness
from torch import nn

from xrk import kernels
from xrk.errors import InputError, MemoryBudgetError
from xrk.models import EDVRSTF, SwinSTF
from xrk.models.stf_window import OneImage, pack
from xrk.planning import plan as make_user_plan
from xrk.runtime.planner import make_plan


class Deforming(nn.Module):
    """Offsets of ``reach`` pixels and more, made of the image; the result goes on through an ordinary convolution."""

    def __init__(self, channels=4, groups=2, kernel=(3, 3), stride=1, padding=1, dilation=1, reach=1.0, masked=True):
        super().__init__()
        taps = kernel[0] * kernel[1]
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        size = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
        self.moves = nn.Conv2d(channels, groups * taps * 2, **size)
        self.masks = nn.Conv2d(channels, groups * taps, **size) if masked else None
        self.weight = nn.Parameter(torch.randn(channels, channels // 2, *kernel) / 4)
        self.last = nn.Conv2d(channels, 1, 3, padding=1)
        self.reach, self.numbers = reach, (stride, padding, dilation)

    def forward(self, x):
        y = self.first(x).contiguous(memory_format=torch.channels_last)
        mask = None if self.masks is None else torch.sigmoid(self.masks(y))
        moved = kernels.deform_conv2d(y, self.reach * self.moves(y), self.weight, None, mask, *self.numbers)
        return self.last(torch.relu(moved))


@settings(max_examples=40)
@given(
    size=st.tuples(st.integers(7, 60), st.integers(5, 40)),
    band=st.integers(1, 20),
    reach=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    shape=st.sampled_from([((3, 3), 1, 1, 1), ((3, 3), 2, 1, 1), ((3, 3), 1, 2, 2), ((2, 3), 1, 1, 1)]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
@example(size=(10, 26), band=1, reach=1e4, shape=((2, 3), 1, 1, 1), masked=False, seed=23)
def test_offsets_however_far(size, band, reach, shape, masked, seed):
    kernel, stride, padding, dilation = shape
    options = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "masked": masked}
    module = seeded(lambda: Deforming(reach=reach, **options), seed)
    x = torch.randn((1, 1, *size), generator=torch.Generator().manual_seed(seed))
    exact = Exactness(module, x)
    distance = exact.distance(make_plan(module, tuple(x.shape), band=band).run(x))
    # Rounding in the layer before is an offset's rounding times the reach: a thousandth of a pixel at the farthest.
    assert distance <= max(exact.allowed, 4e-7 * reach * exact.scale)


def test_a_map_that_is_cut_short_shows(monkeypatch):
    """The offsets of the test above reach far beyond a band: with its own rows alone the result is another."""
    from xrk.runtime import nodes_deformable

    module = seeded(lambda: Deforming(reach=30.0))
    x = torch.randn((1, 1, 48, 20), generator=torch.Generator().manual_seed(1))
    exact = Exactness(module, x)
    plan = make_plan(module, tuple(x.shape), band=8)
    whole = nodes_deformable.deform_rows

    def cut(x, offset, *rest):
        rows = slice(max(0, rest[-1] - 4), rest[-1] + offset.shape[2] + 4)
        window = torch.zeros_like(x)
        window[:, :, rows] = x[:, :, rows]
        return whole(window, offset, *rest)

    monkeypatch.setattr(nodes_deformable, "deform_rows", cut)
    assert exact.distance(plan.run(x)) > 100 * exact.allowed


def test_the_image_itself_is_deformed():
    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.moves = nn.Conv2d(2, 18, 3, padding=1)
            self.weight = nn.Parameter(torch.randn(3, 2, 3, 3))

        def forward(self, x):
            moves = 5 * self.moves(x)
            return kernels.deform_conv2d(x.contiguous(memory_format=torch.channels_last), moves, self.weight, padding=1)

    module = seeded(Moved)
    x = torch.randn((1, 2, 33, 21), generator=torch.Generator().manual_seed(2))
    exact = Exactness(module, x)
    for band in (1, 7, 40):
        assert exact.distance(make_plan(module, tuple(x.shape), band=band).run(x)) <= exact.allowed


def test_only_known_weights():
    class Weights(nn.Module):
        def forward(self, x):
            weight = x.mean((2, 3), keepdim=True).expand(1, 1, 3, 3)
            offset = torch.zeros(1, 18, *x.shape[2:])
            return kernels.deform_conv2d(x.contiguous(memory_format=torch.channels_last), offset, weight, padding=1)

    with pytest.raises(InputError, match="deform_conv2d"):
        make_plan(Weights().eval(), (1, 1, 32, 32))


# --- EDVR-STF ---------------------------------------------------------------------------------------------------------


def edvr(reach):
    """A small one whose alignment moves by ``reach`` pixels and more."""
    config = {"width": 16, "deformable_groups": 4, "extraction_blocks": 1, "reconstruction_blocks": 2, "tail": 8}
    network = EDVRSTF(**config)
    for name, tensor in network.state_dict().items():
        if "conv_offset" in name:
            tensor.normal_(0, reach if name.endswith("bias") else 0.1)
    return network


def window(height, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, 1, height, width, generator=g), torch.rand(1, 2, 1, 4 * height, 4 * width, generator=g)


@pytest.mark.parametrize("size", [(16, 24), (44, 12)])
def test_a_window_as_one_image_is_the_network(size):
    network = seeded(lambda: edvr(1.0))
    lq, hq = window(*size)
    with torch.no_grad():
        expected, found = network(lq, hq), OneImage(network)(pack(lq, hq))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_edvr_stf_in_bands():
    network = seeded(lambda: edvr(20.0))
    module, image = OneImage(network), pack(*window(24, 16))
    exact = Exactness(module, image)
    for band in (1, 6, 64):
        plan = make_plan(module, tuple(image.shape), band=band)
        y = plan.run(image)
        assert exact.distance(y) <= exact.allowed
        counts = [torch.round(t.double() / exact.scale * 32767) for t in (y, exact.whole)]
        assert (counts[0] - counts[1]).abs().max() <= 1


def test_edvr_stf_within_a_budget():
    network = seeded(lambda: edvr(5.0))
    lq, hq = window(64, 48)
    free = make_user_plan(network, (64, 48), memory="4GiB")
    with pytest.raises(MemoryBudgetError) as refused:
        make_user_plan(network, (64, 48), memory="1MiB")
    tight = make_user_plan(network, (64, 48), memory=refused.value.smallest)
    assert tight.peak_bytes <= refused.value.smallest < free.peak_bytes
    y, z = (p.run(pack(lq, hq)) for p in (free, tight))
    with torch.no_grad():
        expected = network(lq, hq)
    scale = expected.abs().max()
    for found in (y, z):
        assert (found - expected).abs().max() <= 1e-5 * scale


# --- Swin-STF ---------------------------------------------------------------------------------------------------------


def swin(**changes):
    config = {"width": 12, "window": (5, 4, 4), "heads": 3, "depths": (2, 1), "hidden": 20, "tail": 4} | changes
    network = SwinSTF(**config)
    for name, tensor in network.state_dict().items():
        if "bias_table" in name:
            tensor.normal_()
        elif "conv_offset" in name:
            tensor.normal_(0, 10.0 if name.endswith("bias") else 0.1)
    return network


SWINS = {
    "windows that fit": ({}, (16, 24)),
    "windows that do not": ({}, (14, 9)),
    "odd windows": ({"window": (5, 5, 3)}, (23, 16)),
    "aligned": ({"align": True, "deformable_groups": 3, "extraction_blocks": 1}, (12, 20)),
    "projected": ({"features": 8}, (9, 12)),
}


@pytest.mark.parametrize("name", SWINS)
def test_swin_stf_in_strips_of_windows(name):
    changes, size = SWINS[name]
    network = seeded(lambda: swin(**changes))
    lq, hq = window(*size)
    with torch.no_grad():
        expected, found = network(lq, hq), OneImage(network)(pack(lq, hq))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    module, image = OneImage(network), pack(lq, hq)
    exact = Exactness(module, image)
    for band in (1, 7, 64):
        assert exact.distance(make_plan(module, tuple(image.shape), band=band).run(image)) <= exact.allowed


def test_windows_of_fewer_frames_are_refused():
    with pytest.raises(InputError, match="fewer than the 5 frames"):
        make_user_plan(seeded(lambda: swin(window=(2, 4, 4))), (16, 16))
