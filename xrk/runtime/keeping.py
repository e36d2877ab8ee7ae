"""Which maps are held between the segments of a plan, and which are made again from them.

What a later segment needs of an earlier one can be held, which costs bytes, or made again from what is held, which
costs products: of a state-space block its input is held, and the projections that are twice as wide are made again.
The cheapest choice at the end of each segment is a minimum cut.
"""

from collections import deque
from typing import Any

from xrk.runtime.graph import Apply, Graph, Node, Plain, RowLocal, Value
from xrk.runtime.segments import Segment, cut

__all__ = ["made_again"]

NEVER = 1 << 62


def made_again(graph: Graph, products: int) -> frozenset[Value]:
    """The values that later segments make again, where a byte held is worth so many ``products``."""
    segments = cut(graph)
    runs_in: dict[Node, int] = {}
    for i, segment in enumerate(segments):
        runs_in.update((node, i) for node in (*segment.before, *segment.nodes, *segment.summaries))
    whole = _read_whole(graph)
    kept: set[Value] = set()
    again: set[Value] = set()
    held = {graph.input}  # when a segment begins
    for i, segment in enumerate(segments[:-1]):
        here = _available(segment, held)
        later = [n for n in graph.nodes if runs_in.get(n, -1) > i and not isinstance(n, Plain)]
        needed = {v for n in later for v in n.inputs if v.row_axis is not None and runs_in.get(v.producer, i + 1) <= i}
        free = {graph.input} | {v for v in whole if runs_in.get(v.producer, i + 1) <= i}
        chosen, made = _Choice(free, here, products).cheapest(needed)
        kept |= chosen
        again |= made
        held = free | chosen
    return frozenset(again - kept)


def _read_whole(graph: Graph) -> set[Value]:
    """What is held in any case: made or read by operators that run once, read out of order, or given to the caller."""
    found = set(graph.outputs)
    for node in graph.nodes:
        if isinstance(node, Plain):
            found.add(node.output)
        for i, v in enumerate(node.inputs):
            if isinstance(node, Plain) or (isinstance(node, RowLocal) and i in node.whole_inputs):
                found.add(v)
    return {v for v in found if v.row_axis is not None}


def _available(segment: Segment, held: set[Value]) -> set[Value]:
    """What exists, row by row, while a segment runs: what is held, what it makes, and what it makes again for that."""
    found = {n.output for n in segment.nodes} | held
    waiting = [v for n in (*segment.nodes, *segment.summaries) for v in n.inputs if v.row_axis is not None]
    while waiting:
        v = waiting.pop()
        if v not in found and v.producer is not None:
            found.add(v)
            waiting += [u for u in v.producer.inputs if u.row_axis is not None]
    return found


class _Choice:
    """The minimum cut at the end of one segment.

    Each value has two vertices: that it is there, and that it is made again. To be there without being made again
    costs its bytes; to be made again costs its products, and that its inputs are there.
    """

    def __init__(self, free: set[Value], here: set[Value], products: int) -> None:
        self.free, self.here, self.products = free, here, products
        self.edges: dict[Any, dict[Any, int]] = {}

    def cheapest(self, needed: set[Value]) -> tuple[set[Value], set[Value]]:
        """What is held and what is made again, so that ``needed`` is there."""
        waiting, seen = list(needed), set(needed)
        for v in needed:
            self._edge("start", (v, "there"), NEVER)
        while waiting:
            v = waiting.pop()
            there, made = (v, "there"), (v, "made")
            if v in self.free or v.constant is not None:
                continue
            self._edge(there, made, v.bytes * self.products if v in self.here else NEVER)
            if not _may_be_made_again(v):
                self._edge(made, "end", NEVER)
                continue
            node = v.producer
            values = v.bytes // v.dtype.itemsize
            self._edge(made, "end", node.work * v.rows + values)
            for u in node.inputs:
                if u.row_axis is None:
                    continue
                self._edge(made, (u, "there"), NEVER)
                if u not in seen:
                    seen.add(u)
                    waiting.append(u)
        reached = self._cut()
        held = {v for v in seen if (v, "there") in reached and (v, "made") not in reached}
        return held - self.free, {v for v in seen if (v, "made") in reached}

    def _edge(self, a: Any, b: Any, capacity: int) -> None:
        self.edges.setdefault(a, {})
        self.edges[a][b] = self.edges[a].get(b, 0) + capacity
        self.edges.setdefault(b, {}).setdefault(a, 0)

    def _cut(self) -> set[Any]:
        """The vertices on the start's side of the minimum cut; paths are filled shortest first."""
        while True:
            came: dict[Any, Any] = {"start": None}
            queue = deque(["start"])
            while queue and "end" not in came:
                a = queue.popleft()
                for b, left in self.edges.get(a, {}).items():
                    if left > 0 and b not in came:
                        came[b] = a
                        queue.append(b)
            if "end" not in came:
                return set(came)
            path, b = [], "end"
            while came[b] is not None:
                path.append((came[b], b))
                b = came[b]
            amount = min(self.edges[a][b] for a, b in path)
            for a, b in path:
                self.edges[a][b] -= amount
                self.edges[b][a] += amount


def _may_be_made_again(value: Value) -> bool:
    node = value.producer
    if not isinstance(node, RowLocal) or node.whole_inputs:
        return False
    # A scan is dear, and its state, too, would have to be held.
    return not (isinstance(node, Apply) and node.operator.apply_work)
