"""Writing a TIFF file row by row, in any order, whole or not at all."""

import math
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from xrk.arguments import array_of, black_and_white
from xrk.errors import ImageFileError, InputError, InputTypeError
from xrk.io import segments
from xrk.io.atomic import atomic_file
from xrk.io.directories import HEADER, Layout, encode_directories, header, metadata
from xrk.io.image import Page

try:
    from xrk import _native
except ImportError:  # a checkout whose extension is not built still works, only slower
    _native = None

__all__ = ["Sink"]

STRIP = 1 << 18  # bytes of a compressed strip where nobody says
LARGEST = 1 << 26  # bytes of a compressed strip that is held whole until it is complete; longer ones are cut
BAND = 1 << 18  # bytes of raw rows that one thread converts at a time


class Sink:
    """A TIFF file that is being written; `create` makes one.

    Used as a context manager it is complete at the end of the block, and gone after an exception in it.

    Attributes:
        shape, dtype: (H, W) or (N, H, W), and the pixels' dtype in the machine's byte order.
        notes: sentences about what the file does not have in common with the one it is like.
        report: set it to what shall be written into the metadata, where `xrk.io.read_report` finds it.
        limited: pixels so far that were floats beyond the range of an integer dtype.
    """

    def __init__(
        self,
        path,
        shape,
        dtype: np.dtype,
        order: str,
        pages: list[Page],
        like,
        bigtiff,
        level: int,
        threads: int | None,
    ) -> None:
        self.path, self.shape, self.dtype = Path(path), shape, dtype
        self.report: dict[str, Any] | None = None
        self.limited = 0
        self._order, self._level = order, level
        self._frames = shape[0] if len(shape) == 3 else 1
        self._threads = threads or min(8, _processors())
        self._encoders = None if _native is None else _native.TiffEncoders()
        self._entries = list(like.imagej) if like is not None else []
        # ImageJ's large stacks: one page, and all frames behind it. Its one offset is all that 32 bits must hold.
        self._contiguous = bool(like is not None and like.contiguous) and _layout(pages[0], shape, dtype)[0].raw_strips
        self._pages = [pages[min(i, len(pages) - 1)] for i in range(1 if self._contiguous else self._frames)]
        self._layouts, notes = [], []
        for page in self._pages:
            layout, note = _layout(page, shape, dtype)
            self._layouts.append(layout)
            notes += [note] if note and note not in notes else []
        self.notes = tuple(notes)
        worst = HEADER + sum(layout.worst_bytes + 16 * layout.segments + 8192 for layout in self._layouts)
        worst += sum(len(page.description) + sum(len(value) for _, _, value in page.tags) for page in self._pages)
        large = worst + sum(len(value) for _, value in self._entries) + (1 << 20) >= 1 << 32
        self._big = bool(large and not self._contiguous) or bool(like.bigtiff if bigtiff is None and like else bigtiff)
        self._end = HEADER  # where the next segment goes
        self._reserved = 0  # bytes for the directory in front of the frames, where behind them is beyond 4 GB
        if self._contiguous and not self._big and worst * self._frames >= 1 << 32:
            metadata_bytes = worst - HEADER - self._layouts[0].worst_bytes
            self._reserved = metadata_bytes + sum(len(value) for _, value in self._entries) + 2048 * (64 + self._frames)
            self._end += self._reserved
        self._bases: dict[int, int] = {}  # of frames whose rows have their place before they are written
        self._places = [np.zeros((2, layout.segments), np.uint64) for layout in self._layouts]
        self._written: list[np.ndarray | None] = [None] * self._frames  # rows, bool; all of them: an empty array
        self._waiting: dict[tuple[int, int], np.ndarray] = {}  # segments' rows that are not complete yet
        self._lock = threading.RLock()
        self._stack = ExitStack()
        self._file = self._stack.enter_context(atomic_file(path))
        self._open = True
        with self._guarded():
            # Until the directories are there the file says that it has none, which no reader takes for an image.
            self._file.write(header(order, self._big, 0))
            self._file.flush()

    @property
    def segment_rows(self) -> int:
        """Rows of the highest strip or tile that is held until it is complete."""
        return max((0 if layout.raw_strips else layout.rows for layout in self._layouts), default=0)

    # --- what a caller does ------------------------------------------------------------------------------------------

    def write(self, rows: slice, array: np.ndarray, page: int = 0, *, levels: tuple[float, float] | None = None) -> int:
        """Writes rows of a page; every row of every page once, in any order, from any thread.

        Args:
            rows: ``slice(first, end)``, or ``slice(None)`` for all.
            array: (end - first, W), of the file's dtype in either byte order, or floats: for an integer file
                they are rounded half to even and limited to its range.
            levels: (black, white); a float v then becomes v * (white - black) + black first, which undoes what
                `Source.read` does with the same levels.

        Returns:
            How many pixels were limited.

        Raises:
            InputError: rows that are not there or were written before, another shape, NaN for an integer file.
            InputTypeError: another dtype. ImageFileError: the file cannot be written (a full disk); it is gone then.
        """
        with self._lock:
            self._check_open()
            first, end = self._checked_rows(rows, page)
            array = array_of(array)
            if array.shape != (end - first, self.shape[-1]):
                expected = (end - first, self.shape[-1])
                raise InputError(f"Rows {first} to {end} of {self.path} are {expected}, not {array.shape}.")
            array, scale, offset = self._checked_pixels(array, levels)
            done = self._written[page]
            if done is None:
                done = self._written[page] = np.zeros(self.shape[-2], bool)
            if done.size == 0 or done[first:end].any():
                raise InputError(f"Rows among {first} to {end} of page {page} of {self.path} were written before.")
            with self._guarded():
                limited = self._write(first, end, array, page, scale, offset)
            done[first:end] = True
            if done.all():
                self._written[page] = np.zeros(0, bool)
            self.limited += limited
            return limited

    def close(self) -> None:
        """Completes the file and gives it its name; InputError where rows are missing, and the file is gone then."""
        with self._lock:
            if not self._open:
                return
            with self._guarded():
                self._check_complete()
                self._finish()
                self._open = False
            self._stack.close()

    def abandon(self) -> None:
        """Removes what was written; an older file under the name stays."""
        with self._lock:
            if self._open:
                self._leave(Exception("abandoned"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    # --- what is checked ---------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if not self._open:
            raise InputError(f"{self.path} is closed; nothing more can be written to it.")

    def _checked_rows(self, rows: slice, page: int) -> tuple[int, int]:
        height = self.shape[-2]
        if not isinstance(page, int | np.integer) or not 0 <= page < self._frames:
            raise InputError(f"page={page!r}; {self.path} has pages 0 to {self._frames - 1}.")
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise InputTypeError(f"rows={rows!r}; expected a slice of neighbouring rows, such as slice(0, 64).")
        first, end = 0 if rows.start is None else rows.start, height if rows.stop is None else rows.stop
        whole = all(isinstance(row, int | np.integer) for row in (first, end))
        if not whole or not 0 <= first < end <= height:
            raise InputError(f"rows={rows!r}; expected a slice of the rows 0 to {height}, not empty.")
        return int(first), int(end)

    def _checked_pixels(self, array: np.ndarray, levels) -> tuple[np.ndarray, float, float]:
        scale, offset = 1.0, 0.0
        if levels is not None:
            black, white = black_and_white(levels)
            scale, offset = white - black, black
        kind = array.dtype.newbyteorder("=")
        floats = kind.kind == "f"
        if not floats and (kind != self.dtype or levels is not None):
            what = "a float dtype, for levels were given" if levels is not None else f"{self.dtype} or floats"
            raise InputTypeError(f"Rows of dtype {array.dtype} were given for {self.path}; expected {what}.")
        if self.dtype.kind == "f":
            if levels is not None:
                array = array.astype(np.float64) * scale + offset
            with np.errstate(over="ignore"):
                array = array.astype(self.dtype, copy=False)
            return self._side_by_side(array), 1.0, 0.0
        wanted = kind if not floats else np.dtype(np.float64 if kind.itemsize > 4 else np.float32)
        return self._side_by_side(array.astype(wanted, copy=False)), scale, offset

    @staticmethod
    def _side_by_side(array: np.ndarray) -> np.ndarray:
        dense = array.strides[1] == array.itemsize and array.strides[0] >= 0 and array.flags.aligned
        return array if dense else np.ascontiguousarray(array)

    def _check_complete(self) -> None:
        for page, done in enumerate(self._written):
            if done is None or done.size:
                missing = [0] if done is None else np.flatnonzero(~done)
                count = self.shape[-2] if done is None else len(missing)
                raise InputError(
                    f"{self.path} is not complete: {count} rows of page {page} were never written (the first is row "
                    f"{missing[0]}); expected every row of every page."
                )

    # --- the work ----------------------------------------------------------------------------------------------------

    def _write(self, first: int, end: int, array: np.ndarray, page: int, scale: float, offset: float) -> int:
        layout = self._layouts[min(page, len(self._layouts) - 1)]
        if layout.raw_strips:
            return self._write_raw(first, array, page, layout, scale, offset)
        limited = 0
        # Whole segments go as they are, from the caller's memory; parts of others wait for the rest of their rows.
        for row in range(first // layout.rows * layout.rows, end, layout.rows):
            stop = min(row + layout.rows, layout.height)
            if row < first or stop > end:
                part = array[max(row - first, 0) : stop - first]
                limited += self._wait(page, row, max(row, first), part, layout, scale, offset)
        top = -(-first // layout.rows) * layout.rows
        bottom = end if end == layout.height else end // layout.rows * layout.rows
        if bottom > top:
            limited += self._encode(page, top, array[top - first : bottom - first], layout, scale, offset)
        return limited

    def _wait(self, page: int, row: int, first: int, part: np.ndarray, layout: Layout, scale, offset) -> int:
        """Keeps rows from ``first`` on of the segments that begin at ``row``, and encodes these once all are there."""
        stop = min(row + layout.rows, layout.height)
        held = self._waiting.get((page, row))
        if held is None:
            held = self._waiting[page, row] = np.empty((stop - row, layout.width), self.dtype)
        target = held[first - row : first - row + len(part)]
        limited = 0
        if part.dtype == self.dtype:
            target[...] = part
        else:
            limited = self._round(part, target, layout, scale, offset)
        done = self._written[page][row:stop].copy()
        done[first - row : first - row + len(part)] = True
        if done.all():
            del self._waiting[page, row]
            self._encode(page, row, held, layout, 1.0, 0.0)
        return limited

    def _round(self, pixels: np.ndarray, out: np.ndarray, layout: Layout, scale: float, offset: float) -> int:
        if _native is not None:
            geometry = self._geometry(layout, len(pixels), layout.rows)
            limited, absent = _native.tiff_convert(pixels, out, geometry, scale, offset)
        else:
            out[...], limited, absent = segments.round_to_integers(pixels, self.dtype, scale, offset)
        self._check_numbers(absent)
        return limited

    def _encode(self, page: int, row: int, pixels: np.ndarray, layout: Layout, scale: float, offset: float) -> int:
        limited = 0
        if segments.can_encode(layout.compression):
            geometry = self._geometry(layout, len(pixels), layout.rows)
            offsets, counts, limited, absent = _native.tiff_write_segments(
                self._encoders, self._file.fileno(), self._end, 2, pixels, 0, geometry, self._level, scale, offset,
                self._threads,
            )  # fmt: skip
            self._check_numbers(absent)
        else:
            if pixels.dtype != self.dtype:
                pixels, limited, absent = segments.round_to_integers(pixels, self.dtype, scale, offset)
                self._check_numbers(absent)
            offsets, counts = segments.write_segments(
                self._file.fileno(), self._end, pixels, layout, self._order, self._level, self._threads
            )
        at = row // layout.rows * layout.across
        self._places[page][:, at : at + len(offsets)] = offsets, counts
        self._end = int(offsets[-1] + counts[-1])
        return limited

    def _write_raw(self, first: int, pixels: np.ndarray, page: int, layout: Layout, scale, offset) -> int:
        position = self._base(page, layout) + first * layout.row_bytes
        if _native is None:
            limited = 0
            if pixels.dtype != self.dtype:
                pixels, limited, absent = segments.round_to_integers(pixels, self.dtype, scale, offset)
                self._check_numbers(absent)
            one = replace(layout, rows=len(pixels), predictor=1)
            segments.write_segments(self._file.fileno(), position, pixels, one, self._order, 1, 1)
            return limited
        geometry = self._geometry(layout, len(pixels), max(1, BAND // layout.row_bytes))
        _, _, limited, absent = _native.tiff_write_segments(
            self._encoders, self._file.fileno(), position, 1, pixels, 0, geometry, 1, scale, offset, self._threads
        )
        self._check_numbers(absent)
        return limited

    def _base(self, page: int, layout: Layout) -> int:
        """Where a frame of raw strips begins."""
        if page not in self._bases:
            frame = layout.height * layout.row_bytes
            if self._contiguous:
                self._bases = {i: self._end + i * frame for i in range(self._frames)}
                self._end += self._frames * frame
            else:
                self._bases[page] = -(-self._end // 16) * 16
                self._end = self._bases[page] + frame
        return self._bases[page]

    def _geometry(self, layout: Layout, height: int, rows: int) -> Any:
        return _native.TiffGeometry(
            width=layout.width, height=height, segment_width=layout.columns, segment_height=rows, tiled=layout.tiled,
            bits=8 * layout.dtype.itemsize, format={"u": 1, "i": 2, "f": 3}[layout.dtype.kind],
            compression=layout.compression, predictor=layout.predictor, big_endian=self._order == ">",
        )  # fmt: skip

    def _check_numbers(self, absent: int) -> None:
        if absent:
            raise InputError(f"{absent} pixels for {self.path} are no numbers (NaN); {self.dtype} has no such value.")

    def _finish(self) -> None:
        """Writes the directories, and then the header that leads to them."""
        for page, base in self._bases.items():
            if page < len(self._layouts):
                layout = self._layouts[page]
                rows = np.arange(0, layout.height, layout.rows, dtype=np.uint64)
                self._places[page][0] = base + rows * np.uint64(layout.row_bytes)
                self._places[page][1] = np.minimum(layout.height - rows, layout.rows) * np.uint64(layout.row_bytes)
        pages = []
        for i, (layout, page, places) in enumerate(zip(self._layouts, self._pages, self._places, strict=True)):
            entries, report = (self._entries, self.report) if i == 0 else ([], None)
            pages.append((layout, page, metadata(page, entries, self._order, report), *places))
        start = self._end + self._end % 2
        if self._reserved:
            start = HEADER
        directories = encode_directories(pages, self._order, self._big, start)
        if self._reserved and len(directories) > self._reserved:
            raise ImageFileError(
                f"{self.path} cannot be written: its metadata takes {len(directories)} bytes, and an ImageJ stack "
                f"above 4 GB has room for {self._reserved} in front of its frames."
            )
        self._file.seek(start)
        self._file.write(directories)
        self._file.seek(0)
        self._file.write(header(self._order, self._big, start))

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """After any exception the file is gone; what the system refuses becomes an ImageFileError."""
        try:
            yield
        except MemoryError as error:
            self._leave(error)
            raise ImageFileError(f"There is not enough memory to write {self.path}.") from error
        except BaseException as error:
            self._leave(error)
            raise

    def _leave(self, error: BaseException) -> None:
        self._open = False
        self._waiting.clear()
        self._stack.__exit__(type(error), error, error.__traceback__)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _layout(page: Page, shape: tuple[int, ...], dtype: np.dtype) -> tuple[Layout, str]:
    """The layout of a page, and what it cannot have in common with the page it is like."""
    height, width = shape[-2:]
    note = ""
    if page.tile:
        rows, columns = (math.ceil(side / 16) * 16 for side in page.tile)  # the format asks for multiples of 16
    else:
        columns, row_bytes = width, width * dtype.itemsize
        usual = height if page.compression == 1 else max(1, STRIP // row_bytes)
        rows = min(page.rowsperstrip or usual, height)
        if page.compression != 1 and rows * row_bytes > LARGEST:
            rows = max(1, LARGEST // row_bytes)
            note = f"its strips are cut to {rows} rows, since a compressed strip is held in memory whole"
    return Layout(height, width, dtype, page.tile is not None, rows, columns, page.compression, page.predictor), note
