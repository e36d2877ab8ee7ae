"""Running a plan from rows that are read to rows that are handed on, so that neither image is ever held whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from xrk.runtime.graph import Graph, Plain, RowLocal, Value
from xrk.runtime.schedule import Pass

__all__ = ["Stream", "Window", "can_stream", "lag", "window"]


@dataclass(frozen=True)
class Stream:
    """Where a run's input comes from and where its output goes.

    Attributes:
        read: (first, end) -> those rows of the input, (end - first, W), of its dtype and device. Each pass over the
            image asks for every row once, from the top down.
        write: takes (first row, rows (n, W)) of the output, every row once and from the top down, for it to keep.
    """

    read: Callable[[int, int], torch.Tensor]
    write: Callable[[int, torch.Tensor], None]


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
