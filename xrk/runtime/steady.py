"""Bands that are like each other: on a GPU they are recorded once and played again, a launch for a whole band.

From band to band a segment takes the same steps. What differs is where its rows lie in memory, and that comes round
again: a line buffer moves its kept rows to the same place for every band, a ring is back where it was after some. Only
whole maps go on. So for a recording they are replaced by a window of fixed memory: rows that are read are copied into
it before, rows that were made are copied out of it after.

A band is recorded when each of its steps has run before, for the first run of a kernel may compile it. What cannot be
recorded runs as it is: bands with a summary, or with an operator that depends on where in the image its rows are.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from xrk.runtime.graph import Apply, RowLocal, Value
from xrk.runtime.nodes_convolution import Convolution, TransposedConvolution, UpsampledConvolution
from xrk.runtime.nodes_global import GroupNorm
from xrk.runtime.nodes_interpolation import NearestUpsampling
from xrk.runtime.nodes_pooling import Pooling
from xrk.runtime.nodes_shape import Concatenation, PixelShuffle, PixelUnshuffle, Slice
from xrk.runtime.rows import Regrouped, Rowwise, layout
from xrk.runtime.schedule import Pass, Step, Store
from xrk.runtime.stores import Rows

__all__ = ["CudaRecorder", "Record", "Recording", "Steady", "bands", "window_bytes"]

MOST = 16  # recordings of one pass


class Recording(Protocol):
    def replay(self) -> None:
        """Runs what was recorded again, on the same memory."""


Record = Callable[[Callable[[], Any]], Recording]
"""Takes down what a function launches, on the GPU without running it."""


class CudaRecorder:
    """Records `torch.cuda.CUDAGraph`s. They share their memory: nothing that a band makes is read by the next."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Any]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            run()
        return graph


def bands(p: Pass) -> list[Sequence[Step]]:
    """The steps of a pass, cut behind each step of the node that is last of all."""
    made, start = [], 0
    for i, step in enumerate(p.steps, start=1):
        if step.node is p.steps[-1].node:
            made.append(p.steps[start:i])
            start = i
    return made


def window_bytes(p: Pass) -> int:
    """Bytes of the windows on whole maps, for the largest band."""
    largest: dict[int, int] = {}
    for steps in bands(p):
        for k, (a, b) in _windows(steps, p.stores).items():
            largest[k] = max(largest.get(k, 0), p.stores[k].value.bytes_of(b - a))
    return sum(largest.values())


def _windows(steps: Sequence[Step], stores: Sequence[Store]) -> dict[int, tuple[int, int]]:
    """The rows of each whole map that a band reads or makes."""
    found: dict[int, tuple[int, int]] = {}
    for step in steps:
        for k, a, b in (*((k, a, b) for _, k, a, b in step.reads), (step.store, step.r0, step.r1)):
            if k >= 0 and b > a and stores[k].kind == "whole":
                a, b = max(a, 0), min(b, stores[k].value.rows)
                low, high = found.get(k, (a, b))
                found[k] = min(low, a), max(high, b)
    return found


def _phase(node: Any, r0: int, r1: int) -> Any:
    """What of its place in the image a node's work depends on; None where that is all of it, or not known."""
    rows = r1 - r0
    if isinstance(node, Rowwise | Convolution | PixelUnshuffle | Slice):
        return rows
    if isinstance(node, Apply):
        return rows if isinstance(node.operator, GroupNorm) else None
    if isinstance(node, NearestUpsampling):
        return r0 % node.factor[0], rows
    if isinstance(node, PixelShuffle):
        return r0 % node.factor, rows
    if isinstance(node, UpsampledConvolution):
        return r0 % 2, rows
    if isinstance(node, Regrouped):
        return r0 * node.span % node.inputs[0].span, rows
    if isinstance(node, TransposedConvolution):
        return r0 - node.need(0, r0, r1)[0] * node.stride[0], rows, r1 == node.output.rows
    if isinstance(node, Pooling):
        a, b = node.window.of(r0, r1)
        outside = (max(0, -a), max(0, b - node.inputs[0].rows))
        return None if node.kind == "avg" and (any(node.padding) or node.ceil_mode) else (rows, *outside)
    if isinstance(node, Concatenation):
        parts = [rows if part is None else _phase(part, r0, r1) for part in node.parts]
        return None if None in parts else tuple(parts)
    return None


def _signature(steps: Sequence[Step], stores: Sequence[Rows]) -> tuple | None:
    """What a band does to which memory; None where it cannot be recorded. The stores go on as if it had run."""
    made: list[Any] = []
    live: set[int] = set()
    for step in steps:
        phase = _phase(step.node, step.r0, step.r1) if isinstance(step.node, RowLocal) else None
        if phase is None or any(b > a and stores[k].stable and k not in live for _, k, a, b in step.reads):
            return None
        reads = tuple((i, k, *stores[k].place(a, b)) if b > a else i for i, k, a, b in step.reads)
        made.append((step.node, phase, reads, step.store, stores[step.store].advance(step.r0, step.r1, step.keep)))
        if stores[step.store].stable:
            live.add(step.store)
        live.difference_update(step.drops)
    return None if live else tuple(made)


class Steady:
    """Runs the bands of a pass, those that are alike from a recording.

    Args:
        p: the pass.
        stores: what holds its rows.
        run: runs a step.
        record: takes down a band.
    """

    def __init__(
        self,
        p: Pass,
        stores: Sequence[Rows],
        run: Callable[[Step], None],
        record: Record,
        device: torch.device,
    ) -> None:
        self.p, self.stores, self.run_step, self.record, self.device = p, stores, run, record, device
        self.seen: set[tuple] = set()  # steps, but for where their rows are
        self.recordings: dict[tuple, Recording] = {}
        self.windows: dict[int, torch.Tensor] = {}
        self.played = 0

    def run(self, steps: Sequence[Step]) -> Iterator[Step]:
        """Runs a band, and gives each step that is done: one by one, or all at once from a recording."""
        windows = _windows(steps, self.p.stores)
        after = [copy.copy(rows) for rows in self.stores]
        for k, (a, _) in windows.items():
            after[k].first = a
        key = _signature(steps, after)
        kinds = {
            (node, phase, *(b - a for _, _, a, b in s.reads))
            for (node, phase, *_), s in zip(key or (), steps, strict=False)
        }
        fresh = key not in self.recordings and (not kinds <= self.seen or len(self.recordings) >= MOST)
        if key is None or fresh:
            self.seen |= kinds
            for step in steps:
                self.run_step(step)
                yield step
            return
        before = [copy.copy(rows) for rows in self.stores]
        made = {step.store: min(s.r0 for s in steps if s.store == step.store) for step in steps}
        try:
            for k, (a, b) in windows.items():
                window = self._window(k, b - a)
                ready = made.get(k, b)
                if ready > a:
                    self._part(k, window, 0, ready - a).copy_(self._part(k, before[k].memory, a, ready))
                self.stores[k].memory, self.stores[k].first = window, a
            if key not in self.recordings:
                self.recordings[key] = self.record(lambda: [self.run_step(step) for step in steps])
            self.recordings[key].replay()
        finally:
            for rows, was in zip(self.stores, before, strict=True):
                vars(rows).update(vars(was))
        for k in windows.keys() & made.keys():
            a, b = windows[k]
            self._part(k, self.stores[k].memory, made[k], b).copy_(self._part(k, self.windows[k], made[k] - a, b - a))
        for k, rows in enumerate(self.stores):
            if k not in windows:
                vars(rows).update(vars(after[k]))
        self.played += 1
        yield from steps

    def _window(self, k: int, rows: int) -> torch.Tensor:
        if k not in self.windows:
            value = self.p.stores[k].value
            most = max(b - a for s in bands(self.p) for j, (a, b) in _windows(s, self.p.stores).items() if j == k)
            self.windows[k] = layout(value, most, self.device)
        return self.windows[k]

    def _part(self, k: int, tensor: torch.Tensor, a: int, b: int) -> torch.Tensor:
        value: Value = self.p.stores[k].value
        return value.part(tensor, a, b)
