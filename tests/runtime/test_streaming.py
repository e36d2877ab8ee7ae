"""A plan that reads rows and hands rows on gives the bits of one that holds both images."""

import numpy as np
import pytest
import torch
from torch import nn

from xrk.loading import load
from xrk.runtime import frames
from xrk.runtime.frames import FrameRunner
from xrk.runtime.planner import make_plan
from xrk.runtime.streaming import Stream
from xrk.runtime.whole import run_whole


class Chain(nn.Sequential):
    def __init__(self, channels=4):
        super().__init__(
            nn.Conv2d(1, channels, 3, padding=1, padding_mode="reflect"),
            nn.ReLU(),
            nn.Conv2d(channels, 1, 5, padding=2),
        )


class Skip(nn.Module):
    """The input is read at the top and again, much later, at the end; a normalisation cuts the network in two."""

    def __init__(self):
        super().__init__()
        self.down, self.norm = nn.Conv2d(1, 4, 4, 2, 1), nn.GroupNorm(2, 4)
        self.up = nn.ConvTranspose2d(4, 1, 2, 2)

    def forward(self, x):
        return x + self.up(torch.relu(self.norm(self.down(x))))


class Lift(nn.Module):
    def forward(self, x):
        return x + 0.0625


class Twice(nn.Module):
    """Two outputs: nothing that can be handed on."""

    def forward(self, x):
        return x, x * 2


NETWORKS = {"chain": Chain, "skip": Skip, "lift": Lift}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


def streamed(plan, x):
    out = torch.full(x.shape[2:], float("nan"))
    asked = []

    def read(a, b):
        asked.append((a, b))
        return x[0, 0, a:b].clone()

    def write(row, rows):
        assert torch.isnan(out[row : row + len(rows)]).all()
        out[row : row + len(rows)] = rows

    plan.stream(Stream(read, write, torch.device("cpu")))
    return out, asked


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", [(96, 40), (2, 64), (50, 34)], ids=str)
@pytest.mark.parametrize("band", [None, 7, 1])
def test_the_same_bits(name, shape, band):
    network, x = NETWORKS[name]().eval(), torch.rand(1, 1, *shape)
    plan = make_plan(network, x.shape, band=band, streamed=True)
    assert plan.streamed
    out, asked = streamed(plan, x)
    torch.testing.assert_close(out, make_plan(network, x.shape, band=band).run(x)[0, 0], rtol=0, atol=0)
    passes = sum(1 for a, _ in asked if a == 0)
    assert [b for _, b in asked] == sorted(b for _, b in asked) or passes > 1
    assert passes == (2 if name == "skip" else 1)
    assert sum(b - a for a, b in asked) == passes * shape[0]


def test_the_lag_is_what_is_read_ahead():
    x = torch.rand(1, 1, 200, 16)
    plan = make_plan(Chain().eval(), x.shape, band=8, streamed=True)
    read, most = 0, 0

    def take(row, rows):
        nonlocal most
        most = max(most, read - row)

    def give(a, b):
        nonlocal read
        read = b
        return x[0, 0, a:b]

    plan.stream(Stream(give, take, torch.device("cpu")))
    assert most == plan.lag < 30


def test_what_is_held_does_not_grow_with_the_height():
    network = Chain().eval()
    peaks = [make_plan(network, (1, 1, rows, 512), band=16, streamed=True) for rows in (512, 8192)]
    grown = peaks[1].peak_bytes - peaks[0].peak_bytes
    steps = peaks[1].parts["order of steps"] - peaks[0].parts["order of steps"]
    assert grown <= steps + 4096
    assert "output" not in peaks[1].parts


@pytest.mark.parametrize(
    "module", [Twice(), nn.Conv2d(1, 1, 2), nn.Conv2d(1, 2, 1)], ids=["two", "smaller", "channels"]
)
def test_networks_that_cannot_be_streamed_have_a_plan_all_the_same(module):
    assert not make_plan(module.eval(), (1, 1, 20, 20), streamed=True).streamed


@pytest.mark.parametrize("shape", [(37, 45), (1, 1), (64, 32), (3, 90)], ids=str)
@pytest.mark.parametrize("rows", [16, 256])
def test_frames_of_any_size(shape, rows, monkeypatch):
    """Padding, cropping and groups of rows: the shipped network on its padded size is the oracle."""
    monkeypatch.setattr(frames, "ROWS", rows)
    network = load("resnet18-unet")
    multiple = network.card.size_multiple
    x = torch.rand(shape)
    out = np.full(shape, np.nan, np.float32)

    def write(where, part):
        assert where.start % rows == 0 and (where.stop - where.start == rows or where.stop == shape[0])
        out[where] = part.numpy()

    runner = FrameRunner(network.module, shape, size_multiple=multiple)
    assert runner.plan.streamed
    runner.run(lambda a, b: x[a:b], write)
    expected = run_whole(network.module, x[None, None], multiple)[0, 0].numpy()
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
