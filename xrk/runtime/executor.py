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
            over = None if store.over is None else _bytes(held[store.over])
            held[v] = torch.empty(v.shape, dtype=v.dtype, device=device) if plain else layout(v, v.rows, device, over)
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
        stable = True
        for i, k, a, b in step.reads:
            rows[i] = stores[k].read(a, b) if b > a else None
            stable = stable and stores[k].stable
        if step.store < 0:
            states[node] = node.operator.summarise(rows, step.r0, step.r1, states[node])
        else:
            stores[step.store].take(node, step.r0, step.r1, rows, step.keep, stable)
        for k in step.drops:
            stores[k].drop()
        done += 1
        if progress is not None and (done % every == 0 or done == total):
            progress(done, total)
    for node, state in states.items():
        held[node.output] = node.operator.finish(state)
    return done


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _explicit(x: torch.Tensor) -> torch.Tensor:
    """A one-channel map with the strides of channels-last: both layouts fit it, and operators would pick the other."""
    if x.ndim == 4 and x.shape[:2] == (1, 1) and x.is_contiguous():
        h, w = x.shape[2:]
        return x.as_strided(x.shape, (h * w, 1, w, 1))
    return x


class _Memory:
    """The rows of one value during a pass; `stable` memory is not written to again as long as anyone reads it."""

    stable = False

    def __init__(self, store: Store, memory: torch.Tensor | None, device: torch.device) -> None:
        self.border, self.rows = store.border, store.value.rows
        self.value, self.device, self.memory = store.value, device, memory

    def read(self, a: int, b: int) -> torch.Tensor:
        raise NotImplementedError

    def take(self, node: RowLocal, r0: int, r1: int, rows: list[Any], keep: int, stable: bool) -> None:
        """Computes rows [r0, r1) into here."""
        raise NotImplementedError

    def drop(self) -> None:
        """The band will not be read again."""


class _Band(_Memory):
    """The last step's own tensor."""

    stable = True
    first = end = 0
    tensor: torch.Tensor | None = None

    def read(self, a: int, b: int) -> torch.Tensor:
        t, first = self.tensor, self.first
        return t if (a, b) == (first, self.end) else self.value.part(t, a - first, b - first)

    def take(self, node: RowLocal, r0: int, r1: int, rows: list[Any], keep: int, stable: bool) -> None:
        y = node.compute(r0, r1, rows, None)
        if node.reads_in_place and not (stable and y.untyped_storage().nbytes() == y.nbytes):
            y = layout(self.value, r1 - r0, self.device).copy_(y)
        self.tensor, self.first, self.end = y, r0, r1

    def drop(self) -> None:
        self.tensor = None


class _Line(_Memory):
    """One block of memory; what is still needed moves to its beginning when it is full."""

    def __init__(self, store: Store, memory: torch.Tensor | None, device: torch.device) -> None:
        super().__init__(store, memory, device)
        self.capacity = store.capacity
        self.first = self.end = -store.border

    def read(self, a: int, b: int) -> torch.Tensor:
        return self.value.part(self.memory, a - self.first, b - self.first)

    def take(self, node: RowLocal, r0: int, r1: int, rows: list[Any], keep: int, stable: bool) -> None:
        end = r1 if r1 < self.rows else r1 + self.border
        if end - self.first > self.capacity:
            self._move(keep)
        if r0 == 0 and self.border:
            self.value.part(self.memory, 0, self.border).zero_()
        place = self.value.part(self.memory, r0 - self.first, r1 - self.first)
        if node.writes_out:
            node.compute(r0, r1, rows, place)
        else:
            place.copy_(node.compute(r0, r1, rows, None))
        if end > r1:
            self.value.part(self.memory, r1 - self.first, end - self.first).zero_()
        self.end = end

    def _move(self, keep: int) -> None:
        count, by = self.end - keep, keep - self.first
        if count > 0 and by > 0:
            kept = self.value.part(self.memory, by, by + count)
            self.value.part(self.memory, 0, count).copy_(kept if by >= count else kept.clone())
        self.first = keep


class _Ring(_Memory):
    """One block of memory, written round and round; row r lies at (r + border) modulo its length."""

    def __init__(self, store: Store, memory: torch.Tensor | None, device: torch.device) -> None:
        super().__init__(store, memory, device)
        self.capacity = store.capacity

    def _parts(self, a: int, b: int) -> list[torch.Tensor]:
        at, count = (a + self.border) % self.capacity, b - a
        if at + count <= self.capacity:
            return [self.value.part(self.memory, at, at + count)]
        ahead = self.capacity - at
        return [self.value.part(self.memory, at, self.capacity), self.value.part(self.memory, 0, count - ahead)]

    def read(self, a: int, b: int) -> torch.Tensor:
        parts = self._parts(a, b)
        if len(parts) == 1:
            return parts[0]
        joined = layout(self.value, b - a, self.device)
        axis, ahead = self.value.row_axis, parts[0].shape[self.value.row_axis]
        joined.narrow(axis, 0, ahead).copy_(parts[0])
        joined.narrow(axis, ahead, joined.shape[axis] - ahead).copy_(parts[1])
        return joined

    def take(self, node: RowLocal, r0: int, r1: int, rows: list[Any], keep: int, stable: bool) -> None:
        if r0 == 0 and self.border:
            self._parts(-self.border, 0)[0].zero_()
        parts = self._parts(r0, r1)
        if len(parts) == 1 and node.writes_out:
            node.compute(r0, r1, rows, parts[0])
        else:
            y, at, axis = node.compute(r0, r1, rows, None), 0, self.value.row_axis
            for part in parts:
                part.copy_(y.narrow(axis, at, part.shape[axis]))
                at += part.shape[axis]
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
            return self.value.part(self.memory, a, b)
        inside = self.value.part(self.memory, max(a, 0), min(b, self.rows))
        return F.pad(inside, (0, 0, max(0, -a), max(0, b - self.rows)))

    def take(self, node: RowLocal, r0: int, r1: int, rows: list[Any], keep: int, stable: bool) -> None:
        place = self.value.part(self.memory, r0, r1)
        # What it reads may be what is written over.
        if node.writes_out and self.over is None:
            node.compute(r0, r1, rows, place)
        else:
            place.copy_(node.compute(r0, r1, rows, None))


_KINDS = {"band": _Band, "line": _Line, "ring": _Ring, "whole": _Whole}
