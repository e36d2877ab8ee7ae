"""Runs the passes of a plan: memory is taken at the start of a pass, and no row is made twice."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from xrk.runtime.graph import Graph, RowLocal, Value
from xrk.runtime.rows import layout
from xrk.runtime.schedule import Pass, Store

__all__ = ["execute"]


def execute(
    graph: Graph,
    passes: Sequence[Pass],
    x: torch.Tensor,
    progress: Callable[[int, int], Any] | None = None,
) -> list[torch.Tensor]:
    """The outputs of the graph for ``x``, in the order of `Graph.outputs`.

    ``progress`` is called with (steps done, steps) about a hundred times; what it raises ends the run. Everything is
    allocated here and freed on the way out, whichever way that is.
    """
    held: dict[Value, Any] = {graph.input: _explicit(x)}
    for node in graph.nodes:
        held.update((v, v.constant) for v in node.inputs if v.constant is not None)
    held.update((v, v.constant) for v in graph.outputs if v.constant is not None)
    total = sum(len(p.steps) for p in passes)
    every = max(1, total // 100)
    done = 0
    outputs = set(graph.outputs)
    for p in passes:
        for node in p.segment.before:
            held[node.output] = node.run([held[v] for v in node.inputs])
        done = _run_pass(p, held, outputs, done, total, every, progress)
        for v in p.segment.last_use:
            held.pop(v, None)
    # A network that hands its input on gives a tensor of its own, as a caller expects of a run.
    return [x.clone() if v is graph.input else held[v] for v in graph.outputs]


def _run_pass(
    p: Pass,
    held: dict[Value, Any],
    outputs: set[Value],
    done: int,
    total: int,
    every: int,
    progress: Callable[[int, int], Any] | None,
) -> int:
    device = next(t.device for t in held.values() if isinstance(t, torch.Tensor))
    made = set(p.segment.whole)
    stores: list[_Memory] = []
    # One block for all line buffers: freed bands between many small ones would leave holes in the heap.
    block, at = torch.empty(p.line_bytes, dtype=torch.uint8, device=device), 0
    for store in p.stores:
        if store.kind == "whole" and store.value in made:
            v = store.value
            # An output goes to the caller, who expects a contiguous tensor.
            plain = v in outputs
            held[v] = torch.empty(v.shape, dtype=v.dtype, device=device) if plain else held.get(store.over)
            if held[v] is None:
                held[v] = layout(v, v.rows, device)
        memory = held.get(store.value)
        if store.kind in ("line", "ring"):
            memory = layout(store.value, store.capacity, device, block[at : at + store.bytes])
            at += store.reserved
        stores.append(_KINDS[store.kind](store, memory, device))
    states = {node: node.operator.begin() for node in p.segment.summaries}
    fixed: dict[Any, list[Any]] = {}
    for node in (*p.segment.nodes, *p.segment.summaries):
        whole = node.whole_inputs if isinstance(node, RowLocal) else ()
        fixed[node] = [held.get(v) if v.row_axis is None or i in whole else None for i, v in enumerate(node.inputs)]
    for step in p.steps:
        node = step.node
        rows = fixed[node].copy()
        for i, k, a, b in step.reads:
            rows[i] = stores[k].read(a, b) if b > a else None
        if step.store < 0:
            states[node] = node.operator.summarise(rows, step.r0, step.r1, states[node])
        else:
            stores[step.store].take(node, step.r0, step.r1, rows, step.keep)
        for k in step.drops:
            stores[k].drop()
        done += 1
        if progress is not None and (done % every == 0 or done == total):
            progress(done, total)
    for node, state in states.items():
        held[node.output] = node.operator.finish(state)
    return done


def _explicit(x: torch.Tensor) -> torch.Tensor:
    """A one-channel map with the strides of channels-last: both layouts fit it, and operators would pick the other."""
    if x.ndim == 4 and x.shape[:2] == (1, 1) and x.is_contiguous():
        h, w = x.shape[2:]
        return x.as_strided(x.shape, (h * w, 1, w, 1))
    return x


class _Memory:
    """The rows of one value during a pass."""

    def __init__(self, store: Store, memory: torch.Tensor | None, device: torch.device) -> None:
        self.axis, self.border, self.rows = store.value.row_axis, store.border, store.value.rows
        self.value, self.device, self.memory = store.value, device, memory

    def read(self, a: int, b: int) -> torch.Tensor:
        raise NotImplementedError

    def take(self, node: RowLocal, r0: int, r1: int, rows: list[Any], keep: int) -> None:
        """Computes rows [r0, r1) into here."""
        raise NotImplementedError

    def drop(self) -> None:
        """The band will not be read again."""


class _Band(_Memory):
    """The last step's own tensor."""

    first = 0
    tensor: torch.Tensor | None = None

    def read(self, a: int, b: int) -> torch.Tensor:
        t, first = self.tensor, self.first
        if a == first and b - a == t.shape[self.axis]:
            return t
        return t.narrow(self.axis, a - first, b - a)

    def take(self, node: RowLocal, r0: int, r1: int, rows: list[Any], keep: int) -> None:
        y = node.compute(r0, r1, rows, None)
        if node.reads_in_place:
            y = layout(self.value, r1 - r0, self.device).copy_(y)
        self.tensor, self.first = y, r0

    def drop(self) -> None:
        self.tensor = None


class _Line(_Memory):
    """One block of memory; what is still needed moves to its beginning when it is full."""

    def __init__(self, store: Store, memory: torch.Tensor | None, device: torch.device) -> None:
        super().__init__(store, memory, device)
        self.capacity = store.capacity
        self.first = self.end = -store.border

    def read(self, a: int, b: int) -> torch.Tensor:
        return self.memory.narrow(self.axis, a - self.first, b - a)

    def take(self, node: RowLocal, r0: int, r1: int, rows: list[Any], keep: int) -> None:
        end = r1 if r1 < self.rows else r1 + self.border
        if end - self.first > self.capacity:
            self._move(keep)
        if r0 == 0 and self.border:
            self.memory.narrow(self.axis, 0, self.border).zero_()
        place = self.memory.narrow(self.axis, r0 - self.first, r1 - r0)
        if node.writes_out:
            node.compute(r0, r1, rows, place)
        else:
            place.copy_(node.compute(r0, r1, rows, None))
        if end > r1:
            self.memory.narrow(self.axis, r1 - self.first, end - r1).zero_()
        self.end = end

    def _move(self, keep: int) -> None:
        count, by = self.end - keep, keep - self.first
        if count > 0 and by > 0:
            kept = self.memory.narrow(self.axis, by, count)
            self.memory.narrow(self.axis, 0, count).copy_(kept if by >= count else kept.clone())
        self.first = keep


class _Ring(_Memory):
    """One block of memory, written round and round; row r lies at (r + border) modulo its length."""

    def __init__(self, store: Store, memory: torch.Tensor | None, device: torch.device) -> None:
        super().__init__(store, memory, device)
        self.capacity = store.capacity

    def _parts(self, a: int, b: int) -> list[torch.Tensor]:
        at, count = (a + self.border) % self.capacity, b - a
        if at + count <= self.capacity:
            return [self.memory.narrow(self.axis, at, count)]
        ahead = self.capacity - at
        return [self.memory.narrow(self.axis, at, ahead), self.memory.narrow(self.axis, 0, count - ahead)]

    def read(self, a: int, b: int) -> torch.Tensor:
        parts = self._parts(a, b)
        if len(parts) == 1:
            return parts[0]
        joined = layout(self.value, b - a, self.device)
        ahead = parts[0].shape[self.axis]
        joined.narrow(self.axis, 0, ahead).copy_(parts[0])
        joined.narrow(self.axis, ahead, b - a - ahead).copy_(parts[1])
        return joined

    def take(self, node: RowLocal, r0: int, r1: int, rows: list[Any], keep: int) -> None:
        if r0 == 0 and self.border:
            self._parts(-self.border, 0)[0].zero_()
        parts = self._parts(r0, r1)
        if len(parts) == 1 and node.writes_out:
            node.compute(r0, r1, rows, parts[0])
        else:
            y, at = node.compute(r0, r1, rows, None), 0
            for part in parts:
                part.copy_(y.narrow(self.axis, at, part.shape[self.axis]))
                at += part.shape[self.axis]
        if r1 == self.rows and self.border:
            for part in self._parts(r1, r1 + self.border):
                part.zero_()


class _Whole(_Memory):
    """All rows."""

    def __init__(self, store: Store, memory: torch.Tensor | None, device: torch.device) -> None:
        super().__init__(store, memory, device)
        self.over = store.over

    def read(self, a: int, b: int) -> torch.Tensor:
        if a >= 0 and b <= self.rows:
            return self.memory.narrow(self.axis, a, b - a)
        inside = self.memory.narrow(self.axis, max(a, 0), min(b, self.rows) - max(a, 0))
        return F.pad(inside, (0, 0, max(0, -a), max(0, b - self.rows)))

    def take(self, node: RowLocal, r0: int, r1: int, rows: list[Any], keep: int) -> None:
        place = self.memory.narrow(self.axis, r0, r1 - r0)
        # What it reads may be what is written over.
        if node.writes_out and self.over is None:
            node.compute(r0, r1, rows, place)
        else:
            place.copy_(node.compute(r0, r1, rows, None))


_KINDS = {"band": _Band, "line": _Line, "ring": _Ring, "whole": _Whole}
