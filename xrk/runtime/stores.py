"""The rows of a value while a segment runs: a band, a line buffer, a ring, or all of them (see `schedule.Store`)."""

from typing import Any

import torch
import torch.nn.functional as F

from xrk.runtime.graph import RowLocal
from xrk.runtime.rows import layout
from xrk.runtime.schedule import Store

__all__ = ["Rows", "rows_of", "split"]


class Rows:
    """The rows of one value during a pass; `stable` memory is not written to again as long as anyone reads it."""

    stable = False

    def __init__(self, store: Store, memory: torch.Tensor | None, device: torch.device) -> None:
        self.border, self.rows = store.border, store.value.rows
        self.value, self.device, self.memory = store.value, device, memory

    def read(self, a: int, b: int) -> torch.Tensor:
        """Rows [a, b)."""
        raise NotImplementedError

    def take(self, node: RowLocal, r0: int, r1: int, rows: list[Any], keep: int, stable: bool) -> None:
        """Computes rows [r0, r1) into here; ``stable``: the inputs in ``rows`` may be kept."""
        raise NotImplementedError

    def put(self, a: int, b: int, rows: torch.Tensor) -> None:
        """Rows [a, b) that were made before this began; the first to be here."""
        raise NotImplementedError

    def place(self, a: int, b: int) -> tuple[int, ...]:
        """Where in the memory `read` finds rows [a, b)."""
        raise NotImplementedError

    def advance(self, r0: int, r1: int, keep: int) -> tuple[int, ...]:
        """Makes room for rows [r0, r1), but moves nothing: where they go, and what has to move."""
        raise NotImplementedError

    def drop(self) -> None:
        """The band will not be read again."""

    def parts(self, a: int, b: int) -> list[torch.Tensor]:
        """Rows [a, b) within the image, in one piece or two."""
        return [self.read(a, b)]


class _Band(Rows):
    """The last step's own tensor."""

    stable = True
    first = end = 0
    tensor: torch.Tensor | None = None

    def place(self, a: int, b: int) -> tuple[int, ...]:
        return a - self.first, b - self.first

    def advance(self, r0: int, r1: int, keep: int) -> tuple[int, ...]:
        self.first, self.end = r0, r1
        return ()

    def read(self, a: int, b: int) -> torch.Tensor:
        t, first = self.tensor, self.first
        return t if (a, b) == (first, self.end) else self.value.part(t, a - first, b - first)

    def take(self, node: RowLocal, r0: int, r1: int, rows: list[Any], keep: int, stable: bool) -> None:
        y = node.compute(r0, r1, rows, None)
        if node.reads_in_place and not (stable and y.untyped_storage().nbytes() == y.nbytes):
            y = layout(self.value, r1 - r0, self.device).copy_(y)
        self.tensor, self.first, self.end = y, r0, r1

    def put(self, a: int, b: int, rows: torch.Tensor) -> None:
        self.tensor, self.first, self.end = layout(self.value, b - a, self.device).copy_(rows), a, b

    def drop(self) -> None:
        self.tensor = None


class _Line(Rows):
    """One block of memory; what is still needed moves to its beginning when it is full."""

    def __init__(self, store: Store, memory: torch.Tensor | None, device: torch.device) -> None:
        super().__init__(store, memory, device)
        self.capacity, self.settled = store.capacity, store.settled
        self.first = self.end = -store.border

    def place(self, a: int, b: int) -> tuple[int, ...]:
        return a - self.first, b - self.first

    def advance(self, r0: int, r1: int, keep: int) -> tuple[int, ...]:
        end, kept, by = (r1 if r1 < self.rows else r1 + self.border), 0, 0
        if self.settled or end - self.first > self.capacity:
            kept, by = self.end - keep, keep - self.first
            self.first = keep
        self.end = end
        return r0 - self.first, end - self.first, r0 == 0, kept, by

    def read(self, a: int, b: int) -> torch.Tensor:
        return self.value.part(self.memory, a - self.first, b - self.first)

    def take(self, node: RowLocal, r0: int, r1: int, rows: list[Any], keep: int, stable: bool) -> None:
        place = self._room(r0, r1, keep)
        if node.writes_out:
            node.compute(r0, r1, rows, place)
        else:
            place.copy_(node.compute(r0, r1, rows, None))

    def put(self, a: int, b: int, rows: torch.Tensor) -> None:
        self.first = self.end = a or -self.border
        self._room(a, b, self.first).copy_(rows)

    def _room(self, r0: int, r1: int, keep: int) -> torch.Tensor:
        first, last = self.first, self.end
        at, end, top, kept, by = self.advance(r0, r1, keep)
        if kept > 0 and by > 0:
            rows = self.value.part(self.memory, by, by + kept)
            try:
                self.value.part(self.memory, 0, kept).copy_(rows if by >= kept else rows.clone())
            except torch.OutOfMemoryError:
                self.first, self.end = first, last
                raise
        if top and self.border:
            self.value.part(self.memory, 0, self.border).zero_()
        if end > at + r1 - r0:
            self.value.part(self.memory, at + r1 - r0, end).zero_()
        return self.value.part(self.memory, at, at + r1 - r0)


class _Ring(Rows):
    """One block of memory, written round and round; row r lies at (r + border) modulo its length."""

    def __init__(self, store: Store, memory: torch.Tensor | None, device: torch.device) -> None:
        super().__init__(store, memory, device)
        self.capacity = store.capacity

    def place(self, a: int, b: int) -> tuple[int, ...]:
        return (a + self.border) % self.capacity, b - a

    def advance(self, r0: int, r1: int, keep: int) -> tuple[int, ...]:
        return *self.place(r0, r1), r0 == 0, r1 == self.rows

    def parts(self, a: int, b: int) -> list[torch.Tensor]:
        at, count = (a + self.border) % self.capacity, b - a
        if at + count <= self.capacity:
            return [self.value.part(self.memory, at, at + count)]
        ahead = self.capacity - at
        return [self.value.part(self.memory, at, self.capacity), self.value.part(self.memory, 0, count - ahead)]

    def read(self, a: int, b: int) -> torch.Tensor:
        parts = self.parts(a, b)
        if len(parts) == 1:
            return parts[0]
        joined = layout(self.value, b - a, self.device)
        split(joined, self.value.row_axis, parts, into=False)
        return joined

    def take(self, node: RowLocal, r0: int, r1: int, rows: list[Any], keep: int, stable: bool) -> None:
        parts = self.parts(r0, r1)
        if len(parts) == 1 and node.writes_out:
            node.compute(r0, r1, rows, parts[0])
            self._borders(r0, r1)
        else:
            self.put(r0, r1, node.compute(r0, r1, rows, None))

    def put(self, a: int, b: int, rows: torch.Tensor) -> None:
        split(rows, self.value.row_axis, self.parts(a, b), into=True)
        self._borders(a, b)

    def _borders(self, r0: int, r1: int) -> None:
        if r0 == 0 and self.border:
            self.parts(-self.border, 0)[0].zero_()
        if r1 == self.rows and self.border:
            for part in self.parts(r1, r1 + self.border):
                part.zero_()


def split(rows: torch.Tensor, axis: int, parts: list[torch.Tensor], into: bool) -> None:
    """Copies ``rows`` into the parts, one after the other, or from them."""
    at = 0
    for part in parts:
        piece = rows.narrow(axis, at, part.shape[axis])
        part.copy_(piece) if into else piece.copy_(part)
        at += part.shape[axis]


class _Whole(Rows):
    """All rows; ``first``: the row that the memory begins with, while a window of them takes its place."""

    def __init__(self, store: Store, memory: torch.Tensor | None, device: torch.device) -> None:
        super().__init__(store, memory, device)
        self.first, self.over = 0, store.over

    def place(self, a: int, b: int) -> tuple[int, ...]:
        return a - self.first, b - self.first, max(0, -a), max(0, b - self.rows)

    def advance(self, r0: int, r1: int, keep: int) -> tuple[int, ...]:
        return self.place(r0, r1)

    def read(self, a: int, b: int) -> torch.Tensor:
        if a >= 0 and b <= self.rows:
            return self.value.part(self.memory, a - self.first, b - self.first)
        inside = self.value.part(self.memory, max(a, 0) - self.first, min(b, self.rows) - self.first)
        return F.pad(inside, (0, 0, max(0, -a), max(0, b - self.rows)))

    def take(self, node: RowLocal, r0: int, r1: int, rows: list[Any], keep: int, stable: bool) -> None:
        place = self.value.part(self.memory, r0 - self.first, r1 - self.first)
        # What it reads may be what is written over.
        if node.writes_out and self.over is None:
            node.compute(r0, r1, rows, place)
        else:
            place.copy_(node.compute(r0, r1, rows, None))


_KINDS = {"band": _Band, "line": _Line, "ring": _Ring, "whole": _Whole}


def rows_of(store: Store, memory: torch.Tensor | None, device: torch.device) -> Rows:
    """What holds the rows of a store; ``memory``: for its whole map, or for `Store.capacity` rows."""
    return _KINDS[store.kind](store, memory, device)
