"""Memory that runs out in the middle of a run: lower bands from there on, nothing made twice, the same result."""

import gc
import logging
import re

import pytest
import torch
from fixed_networks import GroupNormUNet, seeded
from networks import Exactness
from test_plan import Normed, small

from xrk.errors import MemoryBudgetError
from xrk.models.resnet18_unet import ResNet18UNet
from xrk.runtime.executor import execute
from xrk.runtime.graph import RowLocal, Summarise
from xrk.runtime.planner import make_plan
from xrk.runtime.streaming import Stream

NETWORKS = {
    "row-local": (lambda: small(depth=6), (70, 40)),
    "u-net": (lambda: ResNet18UNet(width=8, decoder_channels=(16, 16, 8, 8, 8)), (128, 64)),
    "norms": (Normed, (61, 40)),
    "norms and gates": (lambda: GroupNormUNet(4), (75, 61)),
}


def is_map(thing):
    return type(thing) is torch.Tensor and thing.layout is torch.strided and thing.ndim == 4 and thing.shape[2] > 3


class Allocator:
    """Counts the calls of every node's work and raises at those named; the caller's error by default."""

    def __init__(self, plan, monkeypatch, fails, error=None):
        self.calls, self.fails, self.rows = 0, fails, {}
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        for node in plan._graph.nodes:
            if isinstance(node, RowLocal):
                monkeypatch.setattr(node, "compute", self._counted(node, node.compute))
            elif isinstance(node, Summarise):
                monkeypatch.setattr(node.operator, "summarise", self._summarised(node, node.operator.summarise))

    def _count(self, node, r0, r1):
        self.calls += 1
        if self.fails(self.calls):
            raise self.error
        assert self.rows.get(node, 0) == r0, f"{node.label}: rows from {r0}, where {self.rows.get(node, 0)} were made"
        self.rows[node] = r1

    def _counted(self, node, compute):
        def run(r0, r1, rows, out):
            self._count(node, r0, r1)
            return compute(r0, r1, rows, out)

        return run

    def _summarised(self, node, summarise):
        def run(rows, r0, r1, state):
            self._count(node, r0, r1)
            return summarise(rows, r0, r1, state)

        return run


def prepared(name, band=16):
    make, size = NETWORKS[name]
    module = seeded(make)
    x = torch.randn((1, 1, *size), generator=torch.Generator().manual_seed(7))
    return module, x, make_plan(module, tuple(x.shape), band=band)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_rest_runs_in_lower_bands(name, monkeypatch, caplog):
    module, x, plan = prepared(name)
    exact, undisturbed = Exactness(module, x), plan.run(x)
    steps = sum(len(p.steps) for p in plan._passes)
    for when in range(1, steps, max(1, steps // 6)):
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "xrk"):
            caplog.clear()
            allocator = Allocator(plan, patch, lambda call, when=when: call in (when, when + 7))
            seen = [(0, 0)]
            y = plan.run(x, progress=lambda done, total: seen.__setitem__(0, (done, total)))  # noqa: B023
        # Every row of every node was made once: `Allocator` looks at the order.
        assert all(rows == (n.output if isinstance(n, RowLocal) else n.inputs[0]).rows
                   for n, rows in allocator.rows.items())  # fmt: skip
        assert exact.distance(y) <= exact.allowed
        assert len(plan.shrunk) == 1 + (when + 7 < allocator.calls), plan.shrunk
        # The lowest map of the U-Net has a segment of its own, of 10 rows.
        assert re.search("bands of (8 rows instead of 16|5 rows instead of 10)", plan.shrunk[0])
        assert len(caplog.records) == 1
        assert "Tried to allocate" in caplog.text
        assert seen[0][0] == seen[0][1] > 0
    assert torch.equal(plan.run(x), undisturbed)
    assert plan.shrunk == []


def test_the_same_failure_gives_the_same_bits(monkeypatch):
    _, x, plan = prepared("norms and gates")
    found = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            Allocator(plan, patch, lambda call: call == 40)
            found.append(plan.run(x))
    assert torch.equal(*found)


def test_memory_that_is_gone_before_the_first_row(monkeypatch):
    module, x, plan = prepared("row-local")
    empty, calls = torch.empty, []

    def failing(*args, **options):
        if options.get("dtype") is torch.uint8:
            calls.append(args[0])
            if len(calls) < 3:
                raise torch.OutOfMemoryError("no block")
        return empty(*args, **options)

    monkeypatch.setattr("xrk.runtime.executor.torch.empty", failing)
    y = plan.run(x)
    assert calls == sorted(calls, reverse=True)
    assert Exactness(module, x).distance(y) <= Exactness(module, x).allowed
    assert len(plan.shrunk) == 2


def test_the_smallest_band_gives_one_clear_error_and_keeps_nothing(monkeypatch):
    _, x, plan = prepared("norms")
    expected = plan.run(x)
    gc.collect()
    there = [t for t in gc.get_objects() if is_map(t)]  # other tests' too; held, so that no address comes again
    for when in (3, 25):
        with monkeypatch.context() as patch:
            Allocator(plan, patch, lambda call, when=when: call >= when)
            with pytest.raises(MemoryBudgetError, match=r"bands of one row, the lowest.*Tried to allocate") as caught:
                plan.run(x)
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
        gc.collect()
        known = {id(t) for t in there}
        assert [t.shape for t in gc.get_objects() if is_map(t) and id(t) not in known] == []
        assert len(plan.shrunk) == 4  # 8, 4, 2, 1
        assert torch.equal(plan.run(x), expected)


def test_an_operator_on_whole_maps_cannot_shrink(monkeypatch):
    x = torch.randn(1, 2, 14, 11)

    class Sorting(torch.nn.Module):
        def forward(self, x):
            return torch.sort(x, dim=2)[0] + 1

    plan = make_plan(Sorting().eval(), x.shape, unknown="whole", band=3)
    node = plan._passes[0].segment.before[0]

    def run(tensors):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(node, "run", run)
    with pytest.raises(MemoryBudgetError, match="aten::sort, which sees whole maps"):
        plan.run(x)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), MemoryError("host")])
def test_other_errors_are_left_alone(error, monkeypatch):
    _, x, plan = prepared("row-local")
    Allocator(plan, monkeypatch, lambda call: call == 9, error)
    with pytest.raises(type(error), match=str(error)):
        plan.run(x)
    assert plan.shrunk == []


def test_the_executor_alone_reports_nothing():
    _, x, plan = prepared("row-local")
    with torch.inference_mode():
        assert torch.equal(execute(plan._graph, plan._passes, x)[0], plan.run(x))


@pytest.mark.parametrize("name", ["row-local", "norms"])
def test_a_stream_goes_on_where_it_was(name, monkeypatch):
    module, x, _ = prepared(name)
    plan = make_plan(module, tuple(x.shape), band=16, streamed=True)
    assert plan.streamed
    exact, steps = Exactness(module, x), sum(len(p.steps) for p in plan._passes)
    for when in range(2, steps, max(1, steps // 5)):
        out = torch.full(x.shape, torch.nan)

        def write(row, rows, out=out):
            assert out[0, 0, row : row + len(rows)].isnan().all()
            out[0, 0, row : row + len(rows)] = rows

        with monkeypatch.context() as patch:
            Allocator(plan, patch, lambda call, when=when: call == when)
            plan.stream(Stream(lambda a, b: x[0, 0, a:b], write, x.device))
        assert len(plan.shrunk) == 1
        assert exact.distance(out) <= exact.allowed
