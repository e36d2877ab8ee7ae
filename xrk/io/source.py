"""Reading image files window by window: `open` gives a `Source`."""

import logging
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np

from xrk.arguments import black_and_white, check_path, whole_number
from xrk.errors import ImageFileError, InputError, InputTypeError
from xrk.io.image import Image, Metadata, Page
from xrk.io.tiff_native import NativePixels, NotTaken
from xrk.io.tiff_reader import WholePixels, available_memory, check_head
from xrk.radiograph import Correction

__all__ = ["Source", "open", "read"]

CACHE = 64 << 20
MOST_CACHE, MOST_THREADS = 1 << 62, 1 << 16
WHOLE = 256 << 20  # bytes of a strip that `read` decodes at once, which is faster, beside an array that is no smaller
BORDERS = ("reflect", "symmetric", "edge", "constant")
Levels = tuple[float, float]
Window = tuple[slice, slice] | tuple[slice, slice, int]  # rows, columns, page

_log = logging.getLogger("xrk.io")


def open(path: str | os.PathLike, *, threads: int | None = None, cache: int = CACHE) -> "Source":
    """Opens a TIFF file for reading in windows: ``with xrk.io.open(path) as source: source.read(rows, cols)``.

    Taken: one sample per pixel; unsigned and signed integers of up to 32 bits (packed ones, such as 12 bits, come
    in the next larger dtype), floats of 16, 32 and 64; strips and tiles; classic and BigTIFF; ImageJ, OME and plain
    files. Reduced copies of the image (a pyramid, a thumbnail) are left aside, and named in `Source.notes`. xrk's own
    reader takes most of these, and 262144 pages; for the rest tifffile reads whole pages, up to 32768 of them, and a
    line in the log "xrk.io" says why.

    Args:
        path: of a regular file.
        threads: that decode at most; by default as many as there are processors, up to 8.
        cache: bytes of decoded strips and tiles that are kept for windows that overlap; the one decoded last is kept
            in any case. A strip or tile larger than this, and than 32 MiB, is decoded in parts, from its first row
            on: it is best read from the top down. Uncompressed files need none.

    Raises:
        ImageFileError: absent, a folder, not TIFF, damaged or cut off (the message names the byte and what was expected
            there), colour, of an unsupported dtype, pages of different sizes, or compressed in a way that needs the
            extra ``codecs``.
    """
    threads = None if threads is None else whole_number(threads, "threads", 1, MOST_THREADS)
    return _opened(path, threads, whole_number(cache, "cache", 0, MOST_CACHE, " of bytes"))


def _opened(path: str | os.PathLike, threads: int | None, cache: int, whole: int = 0) -> "Source":
    check_path(path)
    check_head(path)
    try:
        pixels: Any = NativePixels(path, cache, threads or min(8, _processors()), whole)
    except NotTaken as reason:
        pixels = WholePixels(path)
        _log.info("%s is read by tifffile, page by page: %s.", path, reason)
    except OSError as error:
        if isinstance(error, ImageFileError):
            raise
        raise ImageFileError(f"{path} cannot be read: {error.strerror or error}.") from error
    except MemoryError as error:
        raise ImageFileError(f"There is not enough memory for {path}.") from error
    return Source(path, pixels)


def read(path: str | os.PathLike) -> Image:
    """Read a TIFF file: (H, W), or (N, H, W) where it has N pages, in the file's dtype and byte order.

    What is taken, and what is raised, is told at `open`; and ImageFileError where the pixels are more than the free
    memory of this machine.
    """
    with _opened(path, None, 0, WHOLE) as source:
        metadata = source.metadata
        size = math.prod(metadata.shape) * metadata.dtype.itemsize
        if size > available_memory():
            shape = " x ".join(map(str, metadata.shape))
            raise ImageFileError(
                f"{path} declares {shape} pixels of {metadata.dtype.name} ({size / 2**30:.1f} GiB): more than the free "
                "memory of this machine."
            )
        try:
            array = np.empty(metadata.shape, source.dtype)
        except (MemoryError, ValueError) as error:
            raise ImageFileError(f"There is not enough memory for {path}.") from error
        for page, frame in enumerate(array if array.ndim == 3 else array[None]):
            source.read(slice(None), slice(None), page, out=frame)
    if array.dtype != metadata.dtype:
        array = array.byteswap(inplace=True).view(metadata.dtype)
    return Image(array=array, **{field.name: getattr(metadata, field.name) for field in fields(metadata)})


class Source:
    """An image file that is read window by window; `open` makes one. Any number of threads may read at once.

    Attributes:
        path: of the file.
        shape: (H, W), or (N, H, W) for a file of N pages.
        dtype: of raw counts as `read` gives them, in the machine's byte order.
        levels: (black, white) that `read` normalises by: what the file states (a packed 12-bit file: 0 to 4095; an OME
            file's SignificantBits), else the range of the dtype, (0, 1) for floats.
        reader: "xrk", or "tifffile" for files beyond xrk's own reader.
    """

    def __init__(self, path: str | os.PathLike, pixels: NativePixels | WholePixels) -> None:
        """`open` is the way to make one."""
        self.path = Path(path)
        self._pixels = pixels
        self._height, self._width = pixels.shape
        self._frames: int = pixels.frames
        self._metadata: Metadata | None = None
        self._background: ThreadPoolExecutor | None = None
        self._closed = False
        self.reader: str = pixels.name
        self.shape = pixels.shape if pixels.frames == 1 else (pixels.frames, *pixels.shape)
        self.dtype: np.dtype = pixels.dtype
        self.levels: Levels = self._levels()

    # --- what the file says ------------------------------------------------------------------------------------------

    @property
    def metadata(self) -> Metadata:
        """Everything but the pixels. It is read when first asked for: a page's tags one after the other."""
        if self._metadata is None:
            self._check_open()
            self._metadata = self._pixels.metadata()
        return self._metadata

    @property
    def pages(self) -> tuple[Page, ...]:
        """Layout and metadata of each frame."""
        return self.metadata.pages

    def __getattr__(self, name: str) -> Any:
        # What a file that is written like this one takes over: `create` asks an `Image` and a `Source` for the same.
        if name in {*(field.name for field in fields(Metadata)), "description", "compression", "resolution", "layout"}:
            return getattr(self.metadata, name)
        raise AttributeError(f"a Source has no {name!r}")

    def _levels(self) -> Levels:
        stated = self._pixels.stated_levels()
        if stated is not None:
            return float(stated[0]), float(stated[1])
        if self.dtype.kind == "f":
            return 0.0, 1.0
        limits = np.iinfo(self.dtype)
        return float(limits.min), float(limits.max)

    # --- pixels ------------------------------------------------------------------------------------------------------

    def read(
        self,
        rows: slice = slice(None),
        cols: slice = slice(None),
        page: int = 0,
        *,
        halo: int | tuple[int, int] = 0,
        border: str = "reflect",
        dtype: Any = None,
        levels: Levels | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """One window of one page, with a frame of ``halo`` pixels around it.

        Args:
            rows, cols: ``slice(first, end)`` inside the image, or ``slice(None)`` for all.
            page: which frame, from 0.
            halo: pixels added on each side, or the pair (above and below, left and right).
            border: what stands where the halo reaches beyond the image, as `numpy.pad` of the whole image has it:
                "reflect" (again and again where the halo is larger than the image), "symmetric", "edge", or "constant"
                (zeros).
            dtype: float16, float32 or float64 for (count - black) / (white - black), computed as (count - black) times
                the inverse in double precision and rounded once; nothing is clipped. Without it, the file's own
                dtype and raw counts.
            levels: (black, white) for that; by default `levels` of this object.
            out: takes the window: (rows + 2 halo, columns + 2 halo), of the dtype, in the machine's byte order, the
                pixels of a row side by side. It may be any memory that numpy sees, pinned memory too.

        Returns:
            ``out``, or a new array. On an error, what ``out`` holds is undefined.

        Raises:
            ImageFileError: the file is damaged there, or was cut short or closed in the meantime. InputError,
            InputTypeError: arguments that do not fit.
        """
        self._check_open()
        frame, (top, bottom), (left, right) = self._window(rows, cols, page)
        above, beside = _halo(halo)
        if border not in BORDERS:
            raise InputError(f"border={border!r}; expected one of {', '.join(BORDERS)}.")
        wanted, scale = self._conversion(dtype, levels)
        shape = (bottom - top + 2 * above, right - left + 2 * beside)
        if out is None:
            try:
                out = np.empty(shape, wanted)
            except (MemoryError, ValueError) as error:
                raise ImageFileError(
                    f"There is not enough memory for a window of {shape[0]} x {shape[1]} pixels of {self.path}."
                ) from error
        _check_out(out, shape, wanted)
        self._pixels.read(frame, top - above, left - beside, out, border, scale)
        return out

    def read_corrected(self, rows: slice, correction: Correction, page: int = 0) -> tuple[np.ndarray, int]:
        """Whole rows as counts, corrected for dark frame and flat field as they are decoded, and how many were clipped.

        correction: what `xrk.radiograph.prepare_correction` gives for frames of this size; the result is that of its
        `apply`. Raises what `read` raises.
        """
        self._check_open()
        frame, (top, bottom), _ = self._window(rows, slice(None), page)
        out = np.empty((bottom - top, self._width), self.dtype)
        return out, self._pixels.read(frame, top, 0, out, "reflect", None, correction)

    def prefetch(self, rows: slice, cols: slice, page: int = 0, *, halo: int | tuple[int, int] = 0) -> "Future[None]":
        """Decodes into the cache, in a thread of its own, what `read` of this window will need; in the order asked for.

        The future's ``cancel()`` takes it back if it has not begun; `close` ends all. Errors are left to `read`.
        """
        self._check_open()
        frame, (top, bottom), (left, right) = self._window(rows, cols, page)
        above, beside = _halo(halo)
        place = (top - above, left - beside, bottom - top + 2 * above, right - left + 2 * beside)
        return self._executor().submit(self._prefetch, frame, *place)

    def windows(
        self,
        schedule: Iterable[Window],
        *,
        ahead: int = 1,
        halo: int | tuple[int, int] = 0,
        border: str = "reflect",
        dtype: Any = None,
        levels: Levels | None = None,
    ) -> Iterator[np.ndarray]:
        """The windows of a schedule in its order, up to ``ahead`` of them read while the last one is in use.

        schedule: (rows, cols) or (rows, cols, page), as for `read`. An iterator that is closed or thrown away reads no
        further. Raises what `read` raises, in the place of the window that fails.
        """
        ahead = whole_number(ahead, "ahead", 1)
        options = {"halo": halo, "border": border, "dtype": dtype, "levels": levels}
        left = iter(schedule)
        ring: list[Future[np.ndarray]] = []
        try:
            while True:
                for window in islice(left, ahead + 1 - len(ring)):
                    ring.append(self._executor().submit(self.read, *window, **options))
                if not ring:
                    return
                yield ring.pop(0).result()
        finally:
            for future in ring:
                future.cancel()

    def close(self) -> None:
        """Closes the file. Reads that run in other threads end with an ImageFileError."""
        if self._closed:
            return
        self._closed = True
        self._pixels.close()
        if self._background is not None:
            self._background.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<xrk.io.Source {str(self.path)!r} {self.shape} {self.dtype.name}{', closed' if self._closed else ''}>"

    # --- arguments ---------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise InputError(f"{self.path} is closed; open it again with xrk.io.open.")

    def _executor(self) -> ThreadPoolExecutor:
        if self._background is None:
            self._background = ThreadPoolExecutor(1, thread_name_prefix="xrk-io")
        return self._background

    def _prefetch(self, *window: int) -> None:
        try:
            self._pixels.prefetch(*window)
        except ImageFileError:
            return

    def _window(self, rows: slice, cols: slice, page: int) -> tuple[int, tuple[int, int], tuple[int, int]]:
        if not isinstance(page, int | np.integer) or not 0 <= page < self._frames:
            raise InputError(f"page={page!r}; {self.path} has the pages 0 to {self._frames - 1}.")
        return int(page), _bounds(rows, self._height, "rows"), _bounds(cols, self._width, "cols")

    def _conversion(self, dtype: Any, levels: Levels | None) -> tuple[np.dtype, Levels | None]:
        """The dtype to give, and (black, 1 / range), or None for raw counts."""
        if dtype is None:
            if levels is not None:
                raise InputError("levels are given without a dtype; pass dtype=numpy.float32 for normalised values.")
            return self.dtype, None
        try:
            wanted = np.dtype(dtype)
        except TypeError:
            wanted = np.dtype(object)
        if wanted == self.dtype and wanted.kind != "f" and levels is None:
            return self.dtype, None
        if wanted.kind != "f" or wanted.itemsize not in (2, 4, 8) or not wanted.isnative:
            raise InputTypeError(
                f"dtype={dtype!r}; expected float16, float32 or float64 for normalised values, or nothing for the "
                f"file's own {self.dtype.name}."
            )
        black, white = black_and_white(self.levels if levels is None else levels)
        return wanted, (black, 1.0 / (white - black))


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _bounds(part: slice, size: int, name: str) -> tuple[int, int]:
    if not isinstance(part, slice):
        raise InputTypeError(f"{name} is a {type(part).__name__}; expected a slice.")
    first = 0 if part.start is None else part.start
    end = size if part.stop is None else part.stop
    if part.step not in (None, 1) or not all(isinstance(v, int | np.integer) for v in (first, end)):
        raise InputError(f"{name}={part!r}; expected slice(first, end) of integers, in steps of one.")
    if not 0 <= first < end <= size:
        raise InputError(f"{name}={first}:{end}; expected at least one of 0:{size}, and nothing outside.")
    return int(first), int(end)


def _halo(halo: int | tuple[int, int]) -> tuple[int, int]:
    pair = (halo, halo) if isinstance(halo, int | np.integer) else halo
    if (
        not isinstance(pair, tuple)
        or len(pair) != 2
        or not all(isinstance(v, int | np.integer) and 0 <= v < 1 << 31 for v in pair)
    ):
        raise InputError(f"halo={halo!r}; expected a number of pixels, or the pair (above and below, left and right).")
    return int(pair[0]), int(pair[1])


def _check_out(out: Any, shape: tuple[int, int], dtype: np.dtype) -> None:
    if not isinstance(out, np.ndarray):
        raise InputTypeError(f"out is a {type(out).__name__}; expected a numpy array.")
    if out.shape != shape or out.dtype != dtype:
        raise InputError(f"out is {out.shape} of {out.dtype}; expected {shape} of {dtype}.")
    if not out.flags.writeable or (shape[1] > 1 and out.strides[1] != dtype.itemsize) or out.strides[0] < 0:
        raise InputError("out must be writable, with the pixels of a row side by side and its rows in ascending order.")
