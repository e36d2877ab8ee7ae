"""What `fusion` joins is exact, and is joined where it should be."""

import pytest
import torch
import torch.nn.functional as F
from networks import Exactness
from torch import nn

from xrk.errors import MemoryBudgetError
from xrk.runtime import fusion
from xrk.runtime.capture import capture
from xrk.runtime.fusion import fuse, make_twice
from xrk.runtime.nodes_convolution import Convolution, UpsampledConvolution
from xrk.runtime.planner import make_plan


class Decoder(nn.Module):
    """act(norm(conv(cat(up(x), skips)))) with x and the skips made from the image."""

    def __init__(self, channels=8, skips=(5,), outputs=8, first=True, mode="nearest", **convolution):
        super().__init__()
        self.down = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.skips = nn.ModuleList(nn.Conv2d(1, skip, 3, padding=1) for skip in skips)
        self.first, self.mode = first, mode
        options = {"kernel_size": 3, "padding": 1, **convolution}
        self.conv = nn.Sequential(
            nn.Conv2d(channels + sum(skips), outputs, **options), nn.BatchNorm2d(outputs), nn.ReLU()
        )
        self.last = nn.Conv2d(outputs, 2, 3, padding=1)

    def forward(self, x):
        maps = [skip(x) for skip in self.skips]
        up = F.interpolate(self.down(x), scale_factor=2.0, mode=self.mode)
        maps = [up, *maps] if self.first else [*maps, up]
        return self.last(self.conv(torch.cat(maps, 1) if len(maps) > 1 else up))


def seeded(**options):
    torch.manual_seed(3)
    module = Decoder(**options)
    module.conv[1].running_mean.normal_(0, 0.3)
    module.conv[1].running_var.uniform_(0.5, 2.0)
    return module.eval().requires_grad_(False)


def image(height, width):
    return torch.randn((1, 1, height, width), generator=torch.Generator().manual_seed(4)) + 1


def fused(module, shape, dtype=torch.float32):
    graph = capture(module, shape, dtype, torch.device("cpu"), "refuse")
    fuse(graph)
    return graph


def doubled(graph):
    return [node for node in graph.nodes if isinstance(node, UpsampledConvolution)]


SHAPES = {
    "alone": {"skips": ()},
    "skip": {},
    "skip before": {"first": False},
    "two skips": {"skips": (3, 4)},
    "no bias": {"bias": False},
    "one channel": {"channels": 1, "outputs": 1, "skips": (1,)},
    "many channels": {"channels": 33, "outputs": 40, "skips": (17,)},
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_convolution_of_a_doubled_map(name, monkeypatch):
    """Against the float64 module, for odd halves, bands that begin and end at odd rows, and a map of two rows."""
    monkeypatch.setattr(fusion, "DOUBLED_CHANNELS", 1)
    module = seeded(**SHAPES[name])
    for height, width, bands in ((46, 34, (1, 2, 5, 16, 64)), (2, 2, (1, 2)), (6, 70, (3,))):
        x = image(height, width)
        exact = Exactness(module, x)
        for band in bands:
            plan = make_plan(module, tuple(x.shape), band=band)
            assert len(doubled(plan._graph)) == 1
            y = plan.run(x)
            assert exact.distance(y) <= exact.allowed
            assert torch.equal(plan.run(x), y)


@pytest.mark.parametrize("band", [1, 3, 8])
@pytest.mark.parametrize("row", [None, 0, -1], ids=["", "top", "bottom"])
@pytest.mark.parametrize("map_", [0, 1], ids=["small map", "skip"])
def test_one_row_of_context_fewer_is_wrong(band, row, map_, monkeypatch):
    """Each row of the window is one that the result depends on, with bands of an even and of an odd height."""
    module, x = seeded(), image(24, 18)
    plan = make_plan(module, tuple(x.shape), band=band)
    (node,) = doubled(plan._graph)

    def compute(r0, r1, rows, out, original=node.compute):
        inside = r0 > 2 if row == 0 else r1 < node.output.rows - 2
        if row is not None and inside:
            rows = [t.clone() for t in rows]
            rows[map_][:, :, row] = 0
        return original(r0, r1, rows, out)

    monkeypatch.setattr(node, "compute", compute)
    error = (plan.run(x) - module(x)).abs().max().item()
    assert (error < 1e-5) if row is None else (error > 1e-3)


def test_float64():
    module, x = seeded().double(), image(20, 14).double()
    plan = make_plan(module, tuple(x.shape), band=6)
    assert len(doubled(plan._graph)) == 1
    torch.testing.assert_close(plan.run(x), module(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 4},
        {"outputs": 4},
        {"mode": "bilinear"},
        {"padding_mode": "reflect"},
        {"kernel_size": 5, "padding": 2},
        {"dilation": 2, "padding": 2},
        {"stride": 2},
        {"padding": 0},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The default behavior for interpolate")
def test_what_is_left_as_it_is(options):
    module, x = seeded(**options), image(24, 20)
    exact = Exactness(module, x)
    plan = make_plan(module, tuple(x.shape), band=5)
    assert not doubled(plan._graph)
    assert exact.distance(plan.run(x)) <= exact.allowed


def test_a_doubled_map_that_others_read_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.conv = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            y = F.interpolate(self.down(x), scale_factor=2.0)
            return self.conv(y) + y

    module, x = Twice().eval().requires_grad_(False), image(16, 16)
    plan = make_plan(module, tuple(x.shape))
    assert not doubled(plan._graph)
    torch.testing.assert_close(plan.run(x), module(x), rtol=0, atol=1e-5)


def test_it_saves_products_and_rows():
    module = seeded(channels=32, skips=(), outputs=16)
    graph = fused(module, (1, 1, 64, 64))
    (node,) = doubled(graph)
    assert node.work == 64 * 16 * 32 * 4
    assert sum(isinstance(n, Convolution) for n in graph.nodes) == 2
    assert (node.need(0, 0, 4), node.need(0, 3, 7), node.need(0, 60, 64)) == ((-1, 3), (1, 4), (29, 33))


class Around(nn.Module):
    """A skip around the whole network, made of the image by a norm, a padding and a convolution."""

    def __init__(self, channels=4):
        super().__init__()
        self.norm, self.first = nn.BatchNorm2d(1), nn.Conv2d(1, channels, 3, padding=1, padding_mode="reflect")
        self.down = nn.Conv2d(channels, 64, 3, stride=4, padding=1)
        self.low = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(4)))
        self.last = nn.Conv2d(64 + channels, 1, 3, padding=1)

    def forward(self, x):
        skip = F.gelu(self.first(self.norm(x)))
        y = F.interpolate(self.low(self.down(skip)), scale_factor=4.0)
        return self.last(torch.cat([y, skip], 1))


def test_a_skip_around_the_network_is_made_twice_where_memory_is_short():
    torch.manual_seed(5)
    module, x = Around().eval().requires_grad_(False), image(192, 48)
    module.norm.running_var.fill_(2.0)
    exact = Exactness(module, x)
    plain = make_plan(module, tuple(x.shape))
    with pytest.raises(MemoryBudgetError) as caught:
        make_plan(module, tuple(x.shape), memory="1MiB")
    small = make_plan(module, tuple(x.shape), memory=caught.value.smallest)
    assert plain.arithmetic == 1.0 < small.arithmetic < 1.02
    assert len(small._graph.nodes) == len(plain._graph.nodes) + 4
    assert exact.distance(small.run(x)) <= exact.allowed
    kept = [sum(p.line_bytes for p in plan._passes) for plan in (plain, small)]
    assert kept[1] < kept[0]


def test_what_costs_much_or_is_soon_read_is_made_once():
    module = Around(channels=32).eval()
    assert not make_twice(fused(module, (1, 1, 64, 64)))
    assert not make_twice(fused(seeded(), (1, 1, 64, 64)))
    residual = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)).eval()
    assert not make_twice(fused(residual, (1, 1, 64, 64)))
