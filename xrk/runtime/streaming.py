"""Running a plan from rows that are read to rows that are handed on, so that neither image is ever held whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from xrk.errors import MemoryBudgetError
from xrk.runtime.graph import Graph, Plain, RowLocal, Value
from xrk.runtime.rows import layout
from xrk.runtime.schedule import Pass, Store
from xrk.runtime.stores import Rows

__all__ = ["Pulled", "Pushed", "Stream", "Window", "can_stream", "lag", "window"]


@dataclass(frozen=True)
class Stream:
    """Where a run's input comes from and where its output goes.

    Attributes:
        read: (first, end) -> those rows of the input, (end - first, W), of its dtype and device. Each pass over the
            image asks for every row once, from the top down; where memory ran out, for some of them again.
        write: takes (first row, rows (n, W)) of the output, every row once and from the top down, for it to keep.
        device: where the rows lie.
    """

    read: Callable[[int, int], torch.Tensor]
    write: Callable[[int, torch.Tensor], None]
    device: torch.device


@dataclass(frozen=True)
class Window:
    """What a pass keeps of the input's rows.

    Attributes:
        lowest: for each read of the input in turn the lowest row that it or a later one needs.
        capacity: the most rows from there to the last one that was read.
    """

    lowest: tuple[int, ...]
    capacity: int


def can_stream(graph: Graph) -> bool:
    """Whether the input is one frame read from the top down, and the output one that nothing else depends on."""
    source = graph.input
    if len(graph.outputs) != 1:
        return False
    made = graph.outputs[0]
    if source.shape != made.shape or not all(v.shape[:2] == (1, 1) and v.row_axis == 2 for v in (source, made)):
        return False
    if not isinstance(made.producer, RowLocal) or graph.consumers().get(made):
        return False
    for node in graph.nodes:
        whole = node.whole_inputs if isinstance(node, RowLocal) else ()
        if any(v is source and (isinstance(node, Plain) or i in whole) for i, v in enumerate(node.inputs)):
            return False
    return True


def _reads(p: Pass, source: Value) -> list[list[tuple[int, int]]]:
    """For each step of a pass the rows of the input that it reads, clipped to the image."""
    index = next((store.index for store in p.stores if store.value is source), None)
    found = []
    for step in p.steps:
        here = [(max(a, 0), min(b, source.rows)) for _, k, a, b in step.reads if k == index]
        found.append([(a, b) for a, b in here if b > a])
    return found


def window(p: Pass, source: Value) -> Window:
    """What a pass keeps of the input."""
    reads = [read for step in _reads(p, source) for read in step]
    lowest = list(accumulate((a for a, _ in reversed(reads)), min))[::-1]
    ends = accumulate((b for _, b in reads), max)
    return Window(tuple(lowest), max((end - low for low, end in zip(lowest, ends, strict=True)), default=0))


def lag(passes: Sequence[Pass], graph: Graph) -> int:
    """The most rows that the input is read ahead of the first row of the output that is yet to be handed on."""
    p, made = passes[-1], graph.outputs[0]
    most = end = 0
    for step, reads in zip(p.steps, _reads(p, graph.input), strict=True):
        end = max([end, *(b for _, b in reads)])
        if step.store >= 0 and p.stores[step.store].value is made:
            most = max(most, end - step.r0)
    return most


class Pulled(Rows):
    """The rows of a streamed input that some step has yet to read, in one block of memory."""

    def __init__(self, store: Store, kept: Window, stream: Stream) -> None:
        super().__init__(store, layout(store.value, kept.capacity, stream.device), stream.device)
        self.lowest, self.capacity, self.stream = iter(kept.lowest), kept.capacity, stream
        self.first = self.end = min(kept.lowest, default=0)

    def read(self, a: int, b: int) -> torch.Tensor:
        inside = max(a, 0), min(b, self.rows)
        if inside[1] > inside[0]:
            lowest = next(self.lowest)
            if inside[1] > self.end:
                self._pull(inside[1], lowest)
        held = self.value.part(self.memory, inside[0] - self.first, inside[1] - self.first)
        return held if (a, b) == inside else F.pad(held, (0, 0, inside[0] - a, b - inside[1]))

    def _pull(self, end: int, lowest: int) -> None:
        if end - self.first > self.capacity:
            by = min(lowest, self.end) - self.first
            count = self.end - self.first - by
            if count > 0 and by > 0:
                kept = self.value.part(self.memory, by, by + count)
                self.value.part(self.memory, 0, count).copy_(kept if by >= count else kept.clone())
            self.first += by
        if lowest > self.end:  # rows that nobody needs are passed over
            self.stream.read(self.end, lowest)
            self.first = self.end = lowest
        place = self.value.part(self.memory, self.end - self.first, end - self.first)
        place[0, 0].copy_(self.stream.read(self.end, end))
        self.end = end


class Pushed(Rows):
    """A streamed output: its rows are handed on as they are made."""

    def __init__(self, store: Store, stream: Stream) -> None:
        super().__init__(store, None, stream.device)
        self.stream = stream

    def take(self, node: RowLocal, r0: int, r1: int, rows: list[Any], keep: int, stable: bool) -> None:
        y = node.compute(r0, r1, rows, None)
        if node.reads_in_place:  # what it is a view of is written over before the receiver is done with it
            y = y.clone()
        try:
            self.stream.write(r0, y[0, 0])
        except torch.OutOfMemoryError as error:  # these rows may be on their way: they cannot be made again
            raise MemoryBudgetError(f"Memory ran out where rows of the result are handed on: {error}") from None
