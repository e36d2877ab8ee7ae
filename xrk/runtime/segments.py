"""A graph cut where something must see a whole map before the rest can begin.

A segment is one pass from the top of the image to the bottom. In it rows run through row-local nodes only; it ends
when every row of what it is for has been made: summaries, maps that are read whole or in another order, outputs. A
map that a later segment reads is kept whole (*materialised*) by the segment that makes it, so nothing is computed
twice; or, where the planner says so, it is made again in the later one.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from xrk.runtime.graph import Graph, Node, Plain, RowLocal, Summarise, Value

__all__ = ["Segment", "cut"]


@dataclass
class Segment:
    """One pass over the rows.

    Attributes:
        before: what is run once, on whole tensors, before the pass, in order.
        nodes: the row-local nodes of the pass, each after those that make its inputs.
        summaries: what sees all rows of its inputs in this pass.
        whole: the values that the pass materialises; outputs of the network among them.
        sources: values with rows that were there before.
        last_use: values that nothing after this segment reads.
        outputs: those of `whole` that the network gives.
    """

    before: list[Node] = field(default_factory=list)
    nodes: list[RowLocal] = field(default_factory=list)
    summaries: list[Summarise] = field(default_factory=list)
    whole: list[Value] = field(default_factory=list)
    sources: list[Value] = field(default_factory=list)
    last_use: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)


def cut(graph: Graph, again: Collection[Value] = ()) -> list[Segment]:
    """The segments of a graph, in order; ``again``: values that later segments make again and do not keep."""
    kept: set[Value] = set()
    while True:
        attempt = _Attempt(graph, kept, set(again))
        segments = attempt.run()
        if segments is not None:
            _find_last_uses(graph, segments)
            return segments


class _Attempt:
    def __init__(self, graph: Graph, kept: set[Value], again: set[Value]) -> None:
        self.graph, self.kept, self.again = graph, kept, again
        self.held: set[Value] = {graph.input}
        for node in graph.nodes:
            self.held.update(v for v in node.inputs if v.constant is not None)
        self.held.update(v for v in graph.outputs if v.constant is not None)
        self.made: set[Value] = set()  # in an earlier segment
        self.changed = False
        self.apart = any(isinstance(n, RowLocal) and n.apart for n in graph.nodes)

    def run(self) -> list[Segment] | None:
        """The segments; None where a value was found that must be kept, after adding it to `kept`."""
        segments = []
        waiting: list[Node] = [n for n in self.graph.nodes if not isinstance(n, RowLocal)]
        while True:
            segment = Segment()
            self._run_plain(waiting, segment)
            if all(v in self.held for v in self.graph.outputs):
                if segment.before:
                    segments.append(segment)
                return None if self.changed else segments
            self._choose(waiting, segment)
            waiting = [n for n in waiting if n not in segment.summaries]
            self.held.update(segment.whole)
            self.held.update(n.output for n in segment.summaries)
            segments.append(segment)

    def _run_plain(self, waiting: list[Node], segment: Segment) -> None:
        for node in list(waiting):
            if isinstance(node, Plain) and all(v in self.held for v in node.inputs):
                segment.before.append(node)
                self.held.add(node.output)
                waiting.remove(node)

    def _choose(self, waiting: list[Node], segment: Segment) -> None:
        possible: dict[Value, bool] = {v: True for v in self.held}
        for node in self.graph.nodes:
            possible[node.output] = node.output in self.held or (
                isinstance(node, RowLocal)
                and all(
                    v in self.held if v.row_axis is None or i in node.whole_inputs else possible[v]
                    for i, v in enumerate(node.inputs)
                )
            )
        wanted = [v for v in self.graph.outputs if v not in self.held]
        for node in self.graph.nodes:
            if isinstance(node, RowLocal):
                wanted += [node.inputs[i] for i in node.whole_inputs if node.inputs[i] not in self.held]
            elif isinstance(node, Plain) and node in waiting:
                wanted += [v for v in node.inputs if v.row_axis is not None and v not in self.held]
        whole = {v: None for v in wanted if possible[v]}
        if self.apart and whole:
            whole = self._first(whole)
        for node in waiting:
            if isinstance(node, Summarise) and all(possible[v] for v in node.inputs):
                segment.summaries.append(node)
        needed = set(whole)
        for node in segment.summaries:
            needed.update(node.inputs)
        self._gather(needed, whole, segment)

    def _first(self, whole: dict[Value, None]) -> dict[Value, None]:
        """The one that is made first, and those that it is needed for."""
        order = {node.output: i for i, node in enumerate(self.graph.nodes)}
        first = min(whole, key=order.__getitem__)
        return {v: None for v in whole if first in self._made_of(v)}

    def _made_of(self, value: Value) -> set[Value]:
        """The value, and what is made in a segment that makes it."""
        found, waiting = {value}, [value]
        while waiting:
            v = waiting.pop()
            for u in v.producer.inputs:
                if u.row_axis is not None and u not in self.held and u not in found:
                    found.add(u)
                    waiting.append(u)
        return found

    def _gather(self, needed: set[Value], whole: dict[Value, None], segment: Segment) -> None:
        sources: dict[Value, None] = {}
        for v in needed & self.held:
            sources[v] = None
        for node in reversed(self.graph.nodes):
            v = node.output
            if v not in needed or v in self.held or not isinstance(node, RowLocal):
                continue
            if v in self.made and v not in self.again and v not in self.kept:
                self.kept.add(v)
                self.changed = True
                continue  # what it is made of is not needed again
            segment.nodes.append(node)
            if v in self.kept:
                whole[v] = None
            for i, u in enumerate(node.inputs):
                if u.row_axis is None:
                    continue
                if u in self.held or i in node.whole_inputs:
                    sources[u] = None
                else:
                    needed.add(u)
        segment.nodes.reverse()
        self.made.update(n.output for n in segment.nodes)
        segment.whole = list(whole)
        segment.sources = list(sources)


def _find_last_uses(graph: Graph, segments: list[Segment]) -> None:
    seen: set[Value] = set(graph.outputs) | {graph.input}
    for segment in reversed(segments):
        used = {v for n in (*segment.before, *segment.nodes, *segment.summaries) for v in n.inputs}
        used.update(n.output for n in (*segment.before, *segment.summaries))
        used.update(segment.whole)
        inside = {n.output for n in segment.nodes} - set(segment.whole)
        segment.last_use = [v for v in used if v not in seen and v not in inside and v.constant is None]
        seen.update(segment.last_use)
        segment.outputs = [v for v in segment.whole if v in graph.outputs]
