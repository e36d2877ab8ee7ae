"""In which order the rows of a segment are made, and how many of them each value must keep.

The order is found by running the segment without data: each band of what the segment is for asks for the rows it
needs, node by node backwards, and a node computes at most a band's share at once. So bands go depth-first through the
network, every row is computed once, and a value keeps only rows that some reader has yet to see.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from xrk.runtime.graph import Node, RowLocal, Summarise, Value
from xrk.runtime.segments import Segment

__all__ = ["Pass", "Step", "Store", "schedule"]


@dataclass(eq=False)
class Store:
    """Where the rows of a value are while a segment runs.

    Attributes:
        kind: "band": the tensor that the last step gave; "line": memory for `capacity` rows, those still needed moved
            to its beginning when it is full; "ring": the same, written round and round, for rows that are kept long;
            "whole": all rows.
        border: rows of zeros above row 0 and below the last.
        over: the map of an earlier segment in whose memory all rows lie (see `overlays`).
        settled: a line's kept rows move to its beginning for every step, full or not.
    """

    value: Value
    kind: str = "band"
    capacity: int = 0
    border: int = 0
    index: int = -1
    over: Value | None = None
    settled: bool = False

    @property
    def bytes(self) -> int:
        """What is allocated for the whole pass."""
        if self.kind == "band":
            return 0
        return self.value.bytes if self.kind == "whole" else self.value.bytes_of(self.capacity)

    @property
    def reserved(self) -> int:
        """`bytes`, rounded up to whole cache lines."""
        return -(-self.bytes // 64) * 64


@dataclass(slots=True)
class Step:
    """Rows [r0, r1) of a node.

    Attributes:
        reads: (input, store, first row, end) for every input with rows that is not read whole.
        keep: the lowest row of its own output that is still needed, where older ones are in its store.
        drops: stores whose band nobody reads any more afterwards.
    """

    node: Node
    r0: int
    r1: int
    reads: tuple[tuple[int, int, int, int], ...]
    store: int
    keep: int
    drops: tuple[int, ...] = ()


@dataclass
class Pass:
    """A segment with its order.

    Attributes:
        stores: one for each value that is read or made in rows; `index` is its place in this list.
        steps: the order.
        peak: the most bytes that bands, results and scratch take at once, the stores' own memory not counted.
        work: products of all steps.
        band, least: what it was made with.
        kept: rows [a, b) of values that were made before the first step and are still needed.
    """

    segment: Segment
    stores: list[Store] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    peak: int = 0
    work: int = 0
    band: int = 1
    least: int = 1
    kept: dict[Value, tuple[int, int]] = field(default_factory=dict)

    @property
    def line_bytes(self) -> int:
        """Bytes of the memory that keeps rows from band to band."""
        return sum(s.reserved for s in self.stores if s.kind in ("line", "ring"))

    def measure(self) -> None:
        """Sets `peak` and `work` from the order."""
        self.peak = self.work = 0
        live, bands = 0, {}
        for step in self.steps:
            node, size = step.node, 0
            held = live
            for _, k, a, b in step.reads:
                store = self.stores[k]
                around = store.kind == "ring" and (a + store.border) % store.capacity + b - a > store.capacity
                if around or (store.kind == "whole" and (a < 0 or b > store.value.rows)):
                    held += store.value.bytes_of(b - a)
            if isinstance(node, RowLocal):
                store = self.stores[step.store]
                size = store.value.bytes_of(step.r1 - step.r0)
                direct = store.kind in ("line", "ring") and node.writes_out
                held += node.scratch(step.r0, step.r1) + (0 if direct else size)
                self.work += node.work * (step.r1 - step.r0)
                if store.kind == "band":
                    live += size
                    bands[step.store] = size
            else:
                held += node.operator.summarise_scratch(step.r1 - step.r0)
                self.work += node.operator.summarise_work * (step.r1 - step.r0)
            self.peak = max(self.peak, held)
            for k in step.drops:
                live -= bands.pop(k, 0)


def schedule(
    segment: Segment, band: int, least: int = 1, done: Mapping[Node, int] | None = None, repeat: bool | None = None
) -> Pass:
    """The order of a segment in bands of ``band`` rows, counted on the value of the segment that has the most rows.

    Where that is fewer than ``least`` rows of a smaller map, so many are made at once before they are enlarged: the
    weights of such layers are large, and are read for every step. It costs as many more rows of the skips around them.

    ``done``: rows of each node that were made already; the order is that of the rest.

    ``repeat``: lines are settled and rings longer, so that all are back where they were after the same few bands, and
    these can be recorded (see `steady`); by default so on a GPU.
    """
    if repeat is None:
        repeat = any(n.home.type == "cuda" for n in segment.nodes)
    return _Run(segment, band, least, done or {}, repeat).result()


class _Reader:
    """One node while the order is found."""

    __slots__ = ("cap", "done", "inputs", "keep", "least", "node", "readers", "rows", "store", "summary")

    def __init__(self, node: RowLocal | Summarise, rows: int, cap: int, least: int) -> None:
        self.node, self.rows, self.done = node, rows, 0
        self.least = least if cap < least else 1
        self.cap = max(cap, self.least)
        self.summary = isinstance(node, Summarise)
        self.inputs: list[tuple[int, Store, _Reader | None]] = []  # position, store, who makes it in this pass
        self.keep: dict[int, int] = {}
        self.readers: list[tuple[_Reader, int]] = []
        self.store: Store | None = None

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        return (r0, r1) if self.summary else self.node.need(i, r0, r1)

    def lowest(self) -> int:
        """The lowest row of its output that some reader has yet to see."""
        return min((reader.keep[i] for reader, i in self.readers), default=self.rows)


class _Run:
    def __init__(self, segment: Segment, band: int, least: int, done: Mapping[Node, int], repeat: bool) -> None:
        self.segment, self.repeat = segment, repeat
        self.least = least
        self.steps: list[Step] = []
        self.stores: list[Store] = []
        self._of: dict[Value, Store] = {}
        self._made_by: dict[Value, _Reader] = {}
        self._last: dict[int, tuple[int, int]] = {}  # store -> the last rows that it was given
        self._kept: dict[int, int] = {}
        self._alone: dict[int, bool] = {}
        most = max([v.rows for n in (*segment.nodes, *segment.summaries) for v in self._rowed(n)], default=1)
        self.band = min(band, most)
        self.most = most
        for v in segment.sources:
            self._store(v, "whole")
        readers = [self._reader(n, n.output.rows) for n in segment.nodes]
        ends = [self._reader(n, n.inputs[0].rows) for n in segment.summaries]
        self.ends = [*ends, *(self._made_by[v] for v in segment.whole)]
        for v in segment.whole:
            self._of[v].kind = "whole"
        self.kept: dict[Value, tuple[int, int]] = {}
        if done:
            self._resume([*readers, *ends], done)
        self._run()
        self._choose(readers)

    @staticmethod
    def _rowed(node: Node) -> list[Value]:
        return [v for v in (*node.inputs, node.output) if v.row_axis is not None]

    def _store(self, value: Value, kind: str = "band") -> Store:
        store = Store(value, kind, index=len(self.stores))
        self.stores.append(store)
        self._of[value] = store
        return store

    def _reader(self, node: RowLocal | Summarise, rows: int) -> _Reader:
        reader = _Reader(node, rows, max(1, round(rows * self.band / self.most)), self.least)
        whole = node.whole_inputs if isinstance(node, RowLocal) else ()
        for i, v in enumerate(node.inputs):
            if v.row_axis is None or i in whole:
                continue
            made_by = self._made_by.get(v)
            store = self._of.get(v) or self._store(v, "whole")
            reader.inputs.append((i, store, made_by))
            if made_by is None:
                continue
            if isinstance(node, RowLocal) and i in node.bordered:
                store.border = max(store.border, node.border)
            reader.keep[i] = reader.need(i, 0, rows)[0]
            made_by.readers.append((reader, i))
        if isinstance(node, RowLocal):
            reader.store = self._store(node.output)
            self._made_by[node.output] = reader
            k = reader.store.index
            self._last[k], self._kept[k], self._alone[k] = (0, 0), 0, True
        return reader

    def _resume(self, readers: list[_Reader], done: Mapping[Node, int]) -> None:
        for reader in readers:
            reader.done = done.get(reader.node, 0)
            for i, store, made_by in reader.inputs:
                if made_by is not None:
                    over = reader.done == reader.rows
                    reader.keep[i] = (
                        made_by.rows + store.border if over else reader.need(i, reader.done, reader.rows)[0]
                    )
        for reader in readers:
            store, low = reader.store, max(reader.lowest(), 0)
            if store is None or store.kind == "whole" or low >= reader.done:
                continue
            self.kept[store.value] = self._last[store.index] = (low, reader.done)
            end = reader.done + (store.border if reader.done == reader.rows else 0)
            store.capacity = end - (low or -store.border)

    def _run(self) -> None:
        for number in range(1, -(-self.most // self.band) + 1):
            for end in self.ends:
                self._advance(end, min(end.rows, -(-end.rows * number * self.band // self.most)))

    def _advance(self, end: _Reader, target: int) -> None:
        stack = [(end, target)]
        while stack:
            reader, target = stack[-1]
            if reader.done >= target:
                stack.pop()
                continue
            # A band's share, and a little more rather than leave a sliver for a step of its own.
            r1 = target if target - reader.done <= reader.cap + reader.cap // 2 + 4 else reader.done + reader.cap
            if not reader.summary:
                r1 = min(max(reader.node.round_up(r1), reader.done + 1), reader.rows)
            reads, ready = [], True
            for i, store, made_by in reader.inputs:
                a, b = reader.need(i, reader.done, r1)
                if made_by is not None:
                    b_inside = b if b < made_by.rows else made_by.rows
                    if made_by.done < b_inside and b > a:
                        if reader.rows > made_by.rows:
                            # Up-sampling: the small maps below are made some rows at a time, for their weights
                            # are large and are read for every step.
                            b_inside = min(-(-b_inside // made_by.least) * made_by.least, made_by.rows)
                        stack.append((made_by, b_inside))
                        ready = False
                        break
                reads.append((i, store.index, a, b))
            if ready:
                self._emit(reader, r1, reads)

    def _emit(self, reader: _Reader, r1: int, reads: list[tuple[int, int, int, int]]) -> None:
        r0, drops = reader.done, []
        reader.done = r1
        for (_, k, a, b), (i, store, made_by) in zip(reads, reader.inputs, strict=True):
            if made_by is None:
                continue
            first, last = self._last[k]
            if b > a and (a < first or b > last):
                self._alone[k] = False
            reader.keep[i] = reader.need(i, r1, reader.rows)[0] if r1 < reader.rows else made_by.rows + store.border
            if made_by.lowest() >= last and k not in drops:
                drops.append(k)
        keep, index = 0, -1
        if reader.store is not None:
            index, border = reader.store.index, reader.store.border
            keep = min(reader.lowest(), r0)
            self._last[index] = (r0, r1)
            end = r1 + border if r1 == reader.rows else r1
            reader.store.capacity = max(reader.store.capacity, end - keep)
            self._kept[index] += r0 - keep
            if reader.lowest() >= r1:
                drops.append(index)
        self.steps.append(Step(reader.node, r0, r1, tuple(reads), index, keep, tuple(drops)))

    def _choose(self, readers: list[_Reader]) -> None:
        """Which kind of store each value gets."""
        for reader in readers:
            store, k = reader.store, reader.store.index
            if store.kind == "whole" or (self._alone[k] and not store.border):
                continue
            # Moving the kept rows costs a copy of them for every band: rows that outlast a band go round instead.
            if self._kept[k] <= reader.rows:
                store.kind, store.settled = "line", self.repeat
            else:
                store.kind = "ring"
                count = -(-store.capacity // reader.cap)
                # Powers of two have the largest of them as their period.
                count = 1 << (count - 1).bit_length() if self.repeat else count
                store.capacity = min(count * reader.cap, reader.rows + 2 * store.border)

    def result(self) -> Pass:
        made = Pass(self.segment, self.stores, self.steps, band=self.band, least=self.least, kept=self.kept)
        made.measure()
        return made
