"""How `xrk.enhance` runs the network: band by band within a budget, and never another result for it."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import xrk
from xrk.errors import InputError, MemoryBudgetError
from xrk.loading import Model
from xrk.models import Card
from xrk.runtime import frames


def model(module, **card):
    return Model(Card(**{"name": "stand-in", "architecture": "dncnn", **card}), module.eval())


def frame(height, width, seed=0):
    rng = np.random.default_rng(seed)
    level = 2000 + 1500 * np.add.outer(np.sin(np.arange(height) / 17), np.cos(np.arange(width) / 23))
    return (1.5 * rng.poisson(np.clip(level, 1, None) / 1.5) + 100).astype(np.uint16)


class Half(nn.Module):
    """Half the resolution, as the original ResNet18-UNet gives it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 4, 2, 1)

    def forward(self, x):
        return torch.tanh(self.conv(x))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (70, 45), (33, 200), (300, 64)])
def test_bands_give_what_the_whole_frame_gives(height, width):
    image = frame(height, width)
    bands = xrk.enhance(image).astype(int)
    whole = xrk.enhance(image, runtime="whole").astype(int)
    assert np.abs(bands - whole).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(30, 41), (530, 64)])
def test_half_resolution_in_bands(height, width):
    torch.manual_seed(1)
    half = model(Half(), domain="symmetric", size_multiple=32, output_scale=0.5)
    image = frame(height, width)
    bands = xrk.enhance(image, half, levels=(0, 8000)).astype(int)
    whole = xrk.enhance(image, half, levels=(0, 8000), runtime="whole").astype(int)
    assert np.abs(bands - whole).max() <= 1


def test_the_budget_changes_the_plan_and_not_the_result():
    image = frame(500, 700)
    roomy, first = xrk.enhance(image, report=True)
    least = smallest(image)
    tight, second = xrk.enhance(image, memory=least, report=True)
    rows = [int(re.match(r"bands of (\d+) rows", r.plan)[1]) for r in (first, second)]
    assert rows[1] < rows[0]
    assert np.abs(roomy.astype(int) - tight).max() <= 1
    assert xrk.enhance(image, memory=least).tobytes() == tight.tobytes()


def smallest(image):
    with pytest.raises(MemoryBudgetError, match=r"expected at least memory=\d+ \([\d.]+ MiB\)") as refused:
        xrk.enhance(image, memory="1MiB")
    return refused.value.smallest


def test_a_budget_below_the_smallest_plan_is_refused():
    image = frame(64, 64)
    least = smallest(image)
    xrk.enhance(image, memory=least)
    with pytest.raises(MemoryBudgetError):
        xrk.enhance(image, memory=least - 1)


class Sorts(nn.Module):
    def forward(self, x):
        return x + 0 * torch.sort(x, dim=-1).values


def test_an_unknown_operator_runs_whole_and_the_report_says_so():
    image = frame(20, 30)
    y, report = xrk.enhance(image, model(Sorts()), levels=(0, 8000), report=True)
    np.testing.assert_array_equal(y, image)
    assert report.plan.startswith("whole image, for it cannot be planned: ")
    assert "sort" in report.plan
    with pytest.raises(InputError, match="sort"):
        xrk.enhance(image, model(Sorts()), levels=(0, 8000), memory="1GiB")


def test_whole_frames_and_a_budget_do_not_go_together():
    with pytest.raises(MemoryBudgetError, match=r'runtime="whole" keeps to no budget'):
        xrk.enhance(frame(20, 30), memory="1GiB", runtime="whole")
    with pytest.raises(InputError, match='runtime=\'tiles\'; expected "bands" or "whole"'):
        xrk.enhance(frame(20, 30), runtime="tiles")


def test_a_loop_plans_once_and_sees_changed_weights(monkeypatch):
    made = []
    monkeypatch.setattr(frames, "make_plan", lambda *a, make=frames.make_plan, **k: made.append(a) or make(*a, **k))
    network = nn.Conv2d(1, 1, 1)
    network.weight.data.fill_(1.0)
    network.bias.data.zero_()
    same, image = model(network), frame(20, 30)
    for _ in range(3):
        np.testing.assert_array_equal(xrk.enhance(image, same, levels=(0, 8000)), image)
    assert len(made) == 1
    network.bias.data.fill_(0.125)
    np.testing.assert_array_equal(xrk.enhance(image, same, levels=(0, 8000)), image + 1000)
    xrk.enhance(image[:10], same, levels=(0, 8000))
    assert len(made) == 3
