"""`xrk.plan`: the budget, the errors, what is printed; and a plan run again, cancelled, and given the wrong thing."""

import copy
import gc
import itertools
import re

import pytest
import torch
from torch import nn

import xrk
from xrk.errors import InputError, InputTypeError, MemoryBudgetError
from xrk.models import DnCNN
from xrk.runtime.graph import RowLocal, Summarise
from xrk.runtime.planner import make_plan


def small(depth=4, features=8):
    torch.manual_seed(0)
    return DnCNN(features=features, depth=depth, batch_norm=True).eval()


class Normed(nn.Sequential):
    """Two chained norms: three segments, two maps between them."""

    def __init__(self):
        torch.manual_seed(1)
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(8, 8, 3, padding=1), nn.InstanceNorm2d(8), nn.Conv2d(8, 1, 3, padding=1))
        self.eval()


def test_a_budget_gives_smaller_bands_and_the_same_result():
    network, x = small(depth=8, features=16), torch.randn(1, 1, 128, 256)
    with torch.inference_mode():
        expected = network(x)
    free = xrk.plan(network, (128, 256))
    half = (free.parts["backend's first calls"] + free.peak_bytes) // 2
    tight = xrk.plan(network, (128, 256), memory=half)
    assert tight.peak_bytes <= half < free.peak_bytes
    assert tight.band < free.band
    for plan in (free, tight):
        torch.testing.assert_close(plan.run(x), expected, atol=1e-5, rtol=0)


def test_a_budget_that_is_too_small_names_the_smallest_that_works():
    network = Normed()
    with pytest.raises(MemoryBudgetError, match=r"memory='1MiB' is 1.0 MiB, but the smallest plan") as caught:
        xrk.plan(network, (64, 64), memory="1MiB")
    smallest = int(re.search(r"memory=(\d+)\.$", str(caught.value))[1])
    assert xrk.plan(network, (64, 64), memory=smallest).peak_bytes <= smallest
    with pytest.raises(MemoryBudgetError):
        xrk.plan(network, (64, 64), memory=smallest - 1)


def test_memory_of_a_row_local_network_does_not_grow_with_the_image_but_for_its_output():
    short, tall = (make_plan(small(), (1, 1, rows, 64), band=8) for rows in (256, 1024))
    assert short.parts["line buffers"] == tall.parts["line buffers"]
    assert tall.parts["output"] == 4 * short.parts["output"]


def test_maps_between_segments_are_kept_or_made_again():
    network, x = Normed(), torch.randn(1, 1, 128, 256) + 3
    kept = xrk.plan(network, (128, 256))
    assert kept.arithmetic == 1.0
    assert len(kept._passes) == 3
    lowest = make_plan(network, (1, 1, 128, 256), band=1)  # no plan that keeps them is smaller
    smaller = xrk.plan(network, (128, 256), memory=lowest.peak_bytes - lowest.parts["maps kept whole"] // 2)
    assert smaller.arithmetic > 1.0
    assert f"arithmetic {smaller.arithmetic:.2f}x" in str(smaller)
    torch.testing.assert_close(smaller.run(x), kept.run(x), atol=1e-5, rtol=1e-5)


def test_every_row_of_every_node_is_computed_once():
    plan = make_plan(small(), (1, 1, 61, 40), band=7)
    done = {}
    for step in plan._passes[0].steps:
        assert step.r0 == done.get(step.node, 0)
        done[step.node] = step.r1
    assert all(rows == node.output.rows for node, rows in done.items())
    assert plan.arithmetic == 1.0


def test_a_plan_says_what_it_will_do():
    text = str(xrk.plan(Normed(), (64, 96), memory="200 MiB"))
    for part in (
        "plan for 1 x 1 x 64 x 96, float32, on cpu", "3 segments", "arithmetic 1.00x", "summarises aten::group_norm",
        "kept whole: 1 x 8 x 64 x 96", "prepared weights:", "of 200.0 MiB allowed", "checked against",
    ):  # fmt: skip
        assert part in text, text


def test_the_same_plan_gives_the_same_bits_and_leaves_input_and_module_alone():
    network, x = Normed(), torch.randn(1, 1, 40, 56)
    before, kept = copy.deepcopy(network.state_dict()), x.clone()
    plan = xrk.plan(network, (40, 56))
    first = plan.run(x)
    assert torch.equal(first, plan.run(x))
    assert torch.equal(first, xrk.plan(network, (40, 56)).run(x))
    assert torch.equal(x, kept)
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())


def test_a_cancelled_run_leaves_nothing_and_the_next_one_works():
    plan, x = xrk.plan(Normed(), (96, 64)), torch.randn(1, 1, 96, 64)
    expected = plan.run(x)

    def cancel(done, total):
        assert 0 < done <= total
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.run(x, progress=cancel)
    gc.collect()
    assert not [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (1, 8, 96, 64)]
    seen = []
    assert torch.equal(plan.run(x, progress=lambda done, total: seen.append((done, total))), expected)
    assert seen[-1][0] == seen[-1][1]


def test_what_a_plan_cannot_run_on():
    plan = xrk.plan(small(), (32, 32))
    with pytest.raises(InputError, match=r"is for the shape \(1, 1, 32, 32\), got \(1, 1, 32, 33\)"):
        plan.run(torch.rand(1, 1, 32, 33))
    with pytest.raises(InputError, match="float32 on cpu, got float64"):
        plan.run(torch.rand(1, 1, 32, 32, dtype=torch.float64))
    with pytest.raises(InputTypeError, match="ndarray; expected a torch tensor"):
        plan.run(torch.rand(1, 1, 32, 32).numpy())


def test_what_cannot_be_planned():
    with pytest.raises(InputError, match="training mode"):
        xrk.plan(small().train(), (32, 32))
    with pytest.raises(InputError, match=r"cannot take an input of shape \(1, 1, 33, 32\)"):
        xrk.plan(xrk.load("resnet18-unet").module, (33, 32))
    with pytest.raises(InputTypeError, match="The model is a int"):
        xrk.plan(3, (32, 32))
    for shape in (32, (32,), (0, 32), (-5, 5), (10.5, 3), (True, 5), "55", b"55", (2, 1, 32, 32), "ab"):
        with pytest.raises(InputError, match="expected"):
            xrk.plan(small(), shape)
    with pytest.raises(InputError, match=r"shape=\(-5, 5\)"):
        xrk.plan("resnet18-unet", (-5, 5))
    with pytest.raises(InputError, match='expected "refuse" or "whole"'):
        xrk.plan(small(), (32, 32), unknown="skip")


def test_a_network_with_a_state_of_its_own_is_found_out():
    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    with pytest.raises(InputError, match="does not give what the module gives"):
        xrk.plan(Counting().eval(), (32, 32))


def test_float64_and_names():
    x = torch.randn(1, 1, 24, 20, dtype=torch.float64)
    network = Normed().double()
    torch.testing.assert_close(xrk.plan(network, (24, 20)).run(x), network(x), atol=1e-12, rtol=0)
    plan = xrk.plan("resnet18-unet", (33, 32))  # a frame's size, padded as `enhance` pads it
    assert plan.shape == (1, 1, 64, 32)
    module = xrk.load("resnet18-unet").module
    x = torch.randn(1, 1, 64, 32)
    torch.testing.assert_close(plan.run(x), module(x), atol=2e-5, rtol=0)


@pytest.mark.parametrize("missing", [0, 1])
def test_one_row_of_context_fewer_is_wrong(missing, monkeypatch):
    """Rows beyond a band's edge are what makes it exact: each node's window loses its last row, filled with zeros."""
    network, x = small(), torch.randn(1, 1, 48, 40)
    plan = make_plan(network, (1, 1, 48, 40), band=8)
    for node in plan._graph.nodes:
        if not isinstance(node, RowLocal) or node.border == 0:
            continue

        def compute(r0, r1, rows, out, node=node, original=node.compute):
            if missing and r1 < node.output.rows:
                rows = [rows[0].clone(), *rows[1:]]
                rows[0][:, :, -missing:] = 0
            return original(r0, r1, rows, out)

        monkeypatch.setattr(node, "compute", compute)
    with torch.inference_mode():
        error = (plan.run(x) - network(x)).abs().max().item()
    assert (error > 1e-3) if missing else (error < 1e-5)


def test_summaries_see_every_row_once():
    plan = make_plan(Normed(), (1, 1, 50, 32), band=6)
    for p in plan._passes[:2]:
        rows = [(s.r0, s.r1) for s in p.steps if isinstance(s.node, Summarise)]
        assert (rows[0][0], rows[-1][1]) == (0, 50)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(rows))
