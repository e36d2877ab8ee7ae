"""The frames of an image some rows at a time: their counts, their invalid pixels, and what those are filled with.

An image is an array or a file. Both are read in groups of rows, so that what is computed from them is the same, to the
last bit; a file's groups are read ahead by a thread of their own, and kept as long as the network lags behind them.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from xrk import radiograph

__all__ = ["Band", "Frames", "InOrder", "Pixels"]

Read = Callable[[int, int, int], np.ndarray]
Corrected = Callable[[int, int, int, radiograph.Correction], tuple[np.ndarray, int]]


class Band(NamedTuple):
    """Some rows of a frame; arrays (rows, W)."""

    counts: np.ndarray  # in the machine's byte order, C-contiguous
    invalid: np.ndarray | None  # bool; None where no pixel is
    filled: np.ndarray  # the counts, invalid ones filled from their surroundings


@dataclass(frozen=True)
class Pixels:
    """Where the pixels of an image come from.

    Attributes:
        shape: (H, W) or (N, H, W).
        dtype: with the image's byte order.
        read: (frame, first row, end) -> counts (rows, W) in the machine's byte order, C-contiguous; from any thread.
        ahead: whether reading takes so long that it is worth a thread.
        masks: nonzero where a pixel is invalid; bool or uint8, (H, W) or the image's shape.
        correction: dark and flat-field correction of every frame.
        corrected: those rows corrected, and how many pixels were clipped, where reading does both in one pass.
        bad: bool (H, W): the detector's bad pixels; they get their filling for good, and are enhanced like all others.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Read
    ahead: bool = False
    masks: tuple[np.ndarray, ...] = ()
    correction: radiograph.Correction | None = None
    corrected: Corrected | None = None
    bad: np.ndarray | None = None

    @property
    def has_invalid(self) -> bool:
        """Whether a pixel may be invalid or bad."""
        return bool(self.masks) or self.dtype.kind == "f" or self.correction is not None or self.bad is not None

    @property
    def count(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1


@dataclass
class Frames:
    """The frames of an image, each in groups of ``group`` rows.

    kept: how many groups are kept once they were read. It must cover what the network reads ahead of what it hands on.
    """

    pixels: Pixels
    group: int
    kept: int = 4
    clipped: dict[tuple[int, int], int] = field(default_factory=dict)  # pixels that the correction clipped, by group

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "xrk-read") if self.pixels.ahead else None
        self._groups: OrderedDict[tuple[int, int], Band | Future[Band]] = OrderedDict()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Ends the reading thread; what it has begun it ends, what was planned it does not begin."""
        self._groups.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def height(self) -> int:
        return self.pixels.shape[-2]

    def groups(self) -> Iterator[slice]:
        """The groups of a frame, from the top down."""
        return (slice(a, min(a + self.group, self.height)) for a in range(0, self.height, self.group))

    def band(self, frame: int, a: int, b: int) -> Band:
        """Rows [a, b) of a frame. Views where they lie in one group; nobody writes to them."""
        parts = []
        for at in range(a // self.group, -(-b // self.group)):
            band, first = self._group(frame, at), at * self.group
            parts.append(_cut(band, max(a - first, 0), min(b - first, self.group)))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def counts(self, frame: int, a: int, b: int) -> np.ndarray:
        """Rows [a, b) as they are to be enhanced, invalid pixels as they came."""
        correction = self.pixels.correction
        if correction is None:
            return self.pixels.read(frame, a, b)
        if self.pixels.corrected is not None:
            corrected, clipped = self.pixels.corrected(frame, a, b, correction)
        else:
            corrected, clipped = correction.rows(a, b).apply(self.pixels.read(frame, a, b))
        if a % self.group == 0 and b == min(a + self.group, self.height):
            self.clipped[frame, a] = clipped
        return corrected

    def unknown(self, frame: int, a: int, b: int, counts: np.ndarray | None = None) -> np.ndarray | None:
        """Where rows [a, b) are bad, masked, NaN or Inf; None where nowhere."""
        mask = None
        correction, bad = self.pixels.correction, self.pixels.bad
        masks = list(self.pixels.masks)
        if correction is not None and correction.invalid is not None:
            masks.append(correction.invalid)
        if bad is not None:
            masks.append(bad)
        for one in masks:
            part = (one[frame] if one.ndim == 3 else one)[a:b].astype(bool, copy=False)
            mask = part if mask is None else mask | part
        if self.pixels.dtype.kind != "f":
            return mask if mask is not None and mask.any() else None
        return radiograph.invalid_pixels(self.counts(frame, a, b) if counts is None else counts, mask)

    def valid(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Counts and invalid pixels of the whole image in parts."""
        for frame in range(self.pixels.count):
            for rows in self.groups():
                counts = self.counts(frame, rows.start, rows.stop)
                yield counts, self.unknown(frame, rows.start, rows.stop, counts)

    def all_invalid(self, frame: int) -> bool:
        """Whether nothing is known of a frame."""
        if not self.pixels.has_invalid:
            return False
        for rows in self.groups():
            invalid = self.unknown(frame, rows.start, rows.stop)
            if invalid is None or not invalid.all():
                return False
        return True

    def _group(self, frame: int, at: int) -> Band:
        with self._lock:
            found = self._groups.get((frame, at))
            if found is not None:
                self._groups.move_to_end((frame, at))
        band = found.result() if isinstance(found, Future) else found
        if band is None:
            band = self._read(frame, at)
        with self._lock:
            self._groups[frame, at] = band
            self._plan_next(frame, at)
            while len(self._groups) > self.kept + 1:
                self._groups.popitem(last=False)
        return band

    def _plan_next(self, frame: int, at: int) -> None:
        """The group after the one at hand, or the next frame's first, is read while others work."""
        if self._pool is None:
            return
        following = (frame, at + 1) if (at + 1) * self.group < self.height else (frame + 1, 0)
        if following[0] < self.pixels.count and following not in self._groups:
            self._groups[following] = self._pool.submit(self._read, *following)

    def _read(self, frame: int, at: int) -> Band:
        a, b = at * self.group, min((at + 1) * self.group, self.height)
        counts = self.counts(frame, a, b)
        unknown = self.unknown(frame, a, b, counts)
        if unknown is None:
            return Band(counts, None, counts)
        filled = radiograph.fill_rows(
            lambda a, b: self.counts(frame, a, b), lambda a, b: self.unknown(frame, a, b), (self.height, a, b)
        )
        if self.pixels.bad is None:
            return Band(counts, unknown, filled)
        bad = self.pixels.bad[a:b]
        invalid = unknown & ~bad
        return Band(np.where(bad, filled, counts), invalid if invalid.any() else None, filled)


def _cut(band: Band, a: int, b: int) -> Band:
    counts, invalid, filled = band
    return Band(counts[a:b], None if invalid is None else invalid[a:b], filled[a:b])


def _joined(parts: list[Band]) -> Band:
    invalid = None
    if any(part.invalid is not None for part in parts):
        given = (np.zeros(p.counts.shape, bool) if p.invalid is None else p.invalid for p in parts)
        invalid = np.concatenate(list(given))
    counts = np.concatenate([part.counts for part in parts])
    return Band(counts, invalid, counts if invalid is None else np.concatenate([part.filled for part in parts]))


class InOrder:
    """Work that is done in its order by one thread beside the caller's, or at once where ``beside`` is False.

    At most ``most`` pieces wait; what one of them raises is raised by the next call, and no other is begun then.
    """

    def __init__(self, beside: bool, most: int = 2) -> None:
        self._pool = ThreadPoolExecutor(1, "xrk-write") if beside else None
        self._most = most
        self._waiting: list[Future[None]] = []

    def do(self, work: Callable[..., None], *arguments: object) -> None:
        if self._pool is None:
            work(*arguments)
            return
        while len(self._waiting) >= self._most:
            self._waiting.pop(0).result()
        self._waiting.append(self._pool.submit(work, *arguments))

    def finish(self) -> None:
        """Returns when all is done."""
        while self._waiting:
            self._waiting.pop(0).result()

    def __enter__(self) -> "InOrder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
