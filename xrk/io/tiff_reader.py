"""TIFF files beyond xrk's own reader, through tifffile: it parses, and decodes whole pages.

This file decides what is accepted, and turns every failure into one ImageFileError (TIFF 6.0; BigTIFF).
"""

import logging
import math
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile

from xrk.arguments import check_path
from xrk.errors import ImageFileError, InputError
from xrk.io import description, imagej
from xrk.io.codecs import DEFLATE, LOSSLESS, check_decoder, codec_name
from xrk.io.image import Metadata, Page
from xrk.io.tiff_native import CARRIED_TAGS, OFFSET_DTYPES, most_text, stated_levels
from xrk.radiograph import Correction

__all__ = ["DTYPES", "SUPPORTED", "WholePixels", "available_memory", "check_head", "errors_named", "read_report"]

DTYPES = "u1 i1 u2 i2 u4 i4 f2 f4 f8"
SUPPORTED = {np.dtype(name) for name in DTYPES.split()}
MAX_PAGES = 1 << 15  # tifffile takes a fifth of a millisecond to open each
FIELD_BYTES = np.array([0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8, 0])  # of a value, by its tag's type
ROWS = 256  # that are normalised at a time
OTHER_FORMATS = {
    b"\x89PNG": "a PNG", b"\xff\xd8\xff": "a JPEG", b"\x89HDF": "an HDF5", b"BM": "a BMP", b"GIF8": "a GIF",
    b"PK\x03\x04": "a ZIP", b"%PDF": "a PDF", b"\x93NUM": "a NumPy",
}  # fmt: skip


def read_report(path: str | os.PathLike) -> dict[str, Any] | None:
    """The report that xrk wrote into a TIFF file's metadata (as `Report.to_dict()`), or None. Pixels are not read."""
    check_path(path)
    with _opened(path) as (file, size), errors_named(path):
        _, order, _ = _page_offsets(path, file, size)
        with tifffile.TiffFile(file, is_ndpi=False, is_lsm=False) as tif:
            text = _raw(file, tif.pages[0].tags.get(270))
            kind = description.kind_of(text)
            info = imagej.get_info(_imagej_entries(file, tif.pages[0], order), order) if kind == "imagej" else ""
            return description.find_report(kind, text, info)


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[tuple[BinaryIO, int]]:
    if os.path.isdir(path):
        raise ImageFileError(f"{path} is a folder, not an image file.")
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would wait for ever
        raise ImageFileError(f"{path} is not a regular file.")
    try:
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except ImageFileError:
        raise
    except FileNotFoundError:
        raise ImageFileError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise ImageFileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


class _Messages(logging.Filter):
    """Keeps tifffile's messages off the user's screen while xrk uses it, and remembers the errors of each thread."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[int | None, list[str]] = {}  # of the threads that use tifffile through xrk now

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread in self.errors and record.levelno >= logging.ERROR:
            self.errors[record.thread].append(record.getMessage())
        return not self.errors  # tifffile's own decoding threads are silenced as well


_messages = _Messages()
logging.getLogger("tifffile").addFilter(_messages)


@contextmanager
def errors_named(path: str | os.PathLike, what: str = "is damaged or not supported") -> Iterator[list[str]]:
    """tifffile raises a dozen kinds of exception over damaged files; all become one sentence that names the file.

    Yields the list of what tifffile has logged as errors so far.
    """
    thread = threading.get_ident()
    errors = _messages.errors[thread] = []
    try:
        yield errors
    except (ImageFileError, InputError):
        raise
    except MemoryError as error:
        raise ImageFileError(f"There is not enough memory for {path}.") from error
    except Exception as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageFileError(f"{path} {what}: {text}.") from error
    finally:
        del _messages.errors[thread]


def _check_log(path: str | os.PathLike, log: list[str]) -> None:
    """What tifffile logs as an error is damage that it passes over; only odd private tags may be passed over."""
    for message in log:
        tag = re.search(r"TiffTag (\d+)", message)
        if tag is None:
            raise ImageFileError(f"{path} is damaged: {' '.join(re.sub('<[^>]*>', '', message).split())[:200]}.")
        if int(tag[1]) < 32768:
            raise ImageFileError(f"{path} is cut off or damaged: its TIFF tag {tag[1]} cannot be read.")


def check_head(path: str | os.PathLike) -> None:
    """Raise ImageFileError unless this is a regular file that begins as a TIFF file does."""
    with _opened(path) as (file, size):
        head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if size == 0:
        raise ImageFileError(f"{path} is empty (0 bytes).")
    if order is None or len(head) < 8 or struct.unpack_from(f"{order}H", head, 2)[0] not in (42, 43):
        other = next((name for magic, name in OTHER_FORMATS.items() if head.startswith(magic)), None)
        raise ImageFileError(
            f"{path} is not a TIFF file{f': it looks like {other} file' if other else ''}; xrk reads TIFF only."
        )


def _page_offsets(path: str | os.PathLike, file: BinaryIO, size: int) -> tuple[list[int], str, bool]:
    """Offsets of all pages, byte order, and whether the file is BigTIFF; the chain of pages must end.

    Tifffile takes a copy of every tag's values: all together are limited here, since pages may share them.
    """
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}[head[:2]]
    bigtiff = struct.unpack_from(f"{order}H", head, 2)[0] == 43
    number, link = (8, 8) if bigtiff else (2, 4)  # bytes of: number of tags, an offset
    words = [("tag", "u2"), ("type", "u2"), ("count", f"u{link}"), ("value", f"V{link}")]
    entry = np.dtype([(name, order + kind) for name, kind in words])
    at, seen, held = (8 if bigtiff else 4), set(), 0
    offsets: list[int] = []

    def integer(start: int, length: int) -> int:
        file.seek(start)
        return int.from_bytes(file.read(length), {"<": "little", ">": "big"}[order])

    while True:
        offset = integer(at, link) if at + link <= size else size
        if offset == 0 and offsets:
            file.seek(0)
            return offsets, order, bigtiff
        if offset + number > size or offset < 8:
            raise ImageFileError(f"{path} is cut off or damaged: page {len(offsets) + 1} lies outside the file.")
        if offset in seen:
            raise ImageFileError(f"{path} is damaged: its pages never end (page {len(offsets) + 1}).")
        if len(offsets) >= MAX_PAGES:
            raise ImageFileError(f"{path} has more than {MAX_PAGES} pages, of a kind of which xrk takes no more.")
        seen.add(offset)
        offsets.append(offset)
        entries = integer(offset, number)
        at = offset + number + entry.itemsize * entries
        if at <= size:
            tags = np.frombuffer(file.read(entry.itemsize * entries), entry)
            values = np.minimum(tags["count"], size).astype(np.int64) * FIELD_BYTES[np.minimum(tags["type"], 19)]
            held += entry.itemsize * entries + int(values[values <= size].sum())
            if held > most_text(size):
                raise ImageFileError(f"{path} is damaged: the tags of its pages take more bytes than xrk takes.")


class WholePixels:
    """The frames of a file, each of them decoded as a whole; the last one is kept."""

    name = "tifffile"

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._last: tuple[int, np.ndarray] | None = None
        self._stack = ExitStack()
        try:
            with errors_named(path) as log:
                self._open(log)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, log: list[str]) -> None:
        path = self._path
        file, size = self._stack.enter_context(_opened(path))
        offsets, order, bigtiff = _page_offsets(path, file, size)
        tif = self._stack.enter_context(tifffile.TiffFile(file, is_ndpi=False, is_lsm=False))
        pages = [page for page in tif.pages if isinstance(page, tifffile.TiffPage)]
        _check_log(path, log)
        if len(pages) != len(offsets):
            raise ImageFileError(f"{path} is damaged: only {len(pages)} of its {len(offsets)} pages are whole.")
        self._file = file
        self._pages, self._metadata, self._hidden = _describe(path, file, size, pages, order, bigtiff)
        first = self._pages[0]
        self.frames = self._hidden or len(self._pages)
        self.shape = first.shape
        self.dtype = np.dtype(first.dtype).newbyteorder("=")
        if math.prod(self.shape) * self.dtype.itemsize > available_memory():
            raise ImageFileError(
                f"{path} declares pages of {self.shape[0]} x {self.shape[1]} pixels of {self.dtype.name}: more than "
                "the free memory of this machine."
            )
        for page in self._pages:
            _check_inflation(path, file, page)
        _check_log(path, log)

    def stated_levels(self) -> tuple[float, float] | None:
        return self._metadata.levels

    def metadata(self) -> Metadata:
        return self._metadata

    def _frame(self, index: int) -> np.ndarray:
        with self._lock:
            if self._last is None or self._last[0] != index:
                self._last = None
                with errors_named(self._path) as log:
                    self._last = index, self._decoded(index).reshape(self.shape).astype(self.dtype, copy=False)
                    _check_log(self._path, log)
            return self._last[1]

    def _decoded(self, index: int) -> np.ndarray:
        if self._hidden:
            dtype = self.dtype.newbyteorder(self._metadata.byteorder)
            self._file.seek(self._pages[0].dataoffsets[0] + index * math.prod(self.shape) * dtype.itemsize)
            return np.fromfile(self._file, dtype, math.prod(self.shape))
        return self._pages[index].asarray()

    def read(
        self,
        frame: int,
        row: int,
        column: int,
        out: np.ndarray,
        border: str,
        levels: tuple[float, float] | None,
        correction: Correction | None = None,
    ) -> int:
        """Fills ``out`` with the window whose first pixel is at (row, column); ``levels`` are (black, 1 / range).

        Returns how many pixels the correction clipped, of whole rows inside the image as counts.
        """
        pixels = self._frame(frame)
        if correction is not None:
            rows = row, row + len(out)
            out[...], clipped = correction.rows(*rows).apply(np.ascontiguousarray(pixels[slice(*rows)]))
            return clipped
        places = [np.arange(first, first + n) for first, n in zip((row, column), out.shape, strict=True)]
        outside = [(place < 0) | (place >= n) for place, n in zip(places, self.shape, strict=True)]
        rows, columns = (_inside(place, n, border) for place, n in zip(places, self.shape, strict=True))
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            window = pixels[rows[part]][:, columns]
            if levels is not None:
                with np.errstate(over="ignore", invalid="ignore"):
                    window = ((window - np.float64(levels[0])) * levels[1]).astype(out.dtype)
            out[part] = window
        if border == "constant":
            out[outside[0]] = 0
            out[:, outside[1]] = 0
        return 0

    def prefetch(self, frame: int, *window: int) -> None:
        self._frame(frame)

    def close(self) -> None:
        with self._lock:
            self._last = None
            self._stack.close()


def _inside(place: np.ndarray, size: int, border: str) -> np.ndarray:
    """The positions inside [0, size) that stand at these positions, inside and out."""
    if border in ("edge", "constant") or size == 1:
        return np.clip(place, 0, size - 1)
    period = 2 * size - 2 if border == "reflect" else 2 * size
    phase = place % period
    return np.where(phase < size, phase, period - phase - (border == "symmetric"))


def _describe(
    path, file: BinaryIO, size: int, pages: list[tifffile.TiffPage], order: str, bigtiff: bool
) -> tuple[list[tifffile.TiffPage], Metadata, int]:
    """The pages at full resolution, the file's metadata, and how many frames the only page stands for, or 0."""
    notes = []
    full = [page for page in pages if not page.subfiletype & 0b101]  # neither reduced copies nor masks
    if len(full) < len(pages) or any(page.subifds for page in full):
        notes.append("reduced copies of the image are not carried over")
    first = full[0] if full else pages[0]
    for page in full:
        _check_page(path, page, size)
        if (page.shape, page.dtype) != (first.shape, first.dtype):
            raise ImageFileError(
                f"{path} holds pages of different sizes or types ({first.shape} {first.dtype} and {page.shape} "
                f"{page.dtype}); xrk takes one frame, or a stack of equal frames."
            )
    if not full:
        raise ImageFileError(f"{path} holds no page at full resolution.")
    metadata = tuple(_page(file, page, order) for page in full)
    kind = description.kind_of(metadata[0].description)
    frames = _hidden_frames(path, first, size, metadata[0].description) if len(pages) == 1 else len(full)
    contiguous = frames > len(full)
    entries = _imagej_entries(file, first, order) if kind == "imagej" else []
    dtype = np.dtype(first.dtype).newbyteorder(order)
    levels, note = stated_levels(kind, metadata[0].description, first.bitspersample, dtype)
    notes += [note] if note else []
    declared = imagej.declared_frames(metadata[0].description) if kind == "imagej" else frames
    if declared != frames:
        notes.append(f"the description states {declared} frames, the file has {frames}")
    if first.compression not in LOSSLESS:
        notes.append(f"{codec_name(first.compression)} is written as deflate, which loses nothing")
    described = Metadata(
        path=Path(path),
        shape=first.shape if frames == 1 else (frames, *first.shape),
        dtype=dtype,
        byteorder=order,
        bigtiff=bigtiff,
        kind=kind,
        contiguous=contiguous,
        levels=levels,
        pages=metadata * frames if contiguous else metadata,
        imagej=tuple(entries),
        report=description.find_report(kind, metadata[0].description, imagej.get_info(entries, order)),
        notes=tuple(notes),
    )
    return full, described, frames if contiguous else 0


def _check_page(path, page: tifffile.TiffPage, size: int) -> None:
    """Refuse what xrk does not take, and damage that shows without decoding."""
    if page.samplesperpixel != 1 or page.photometric not in (0, 1):
        if page.photometric in (2, 3, 5, 6):
            raise ImageFileError(
                f"{path} is a colour image; a radiograph has one grey value per pixel: convert it to grey first."
            )
        raise ImageFileError(
            f"{path} has {page.samplesperpixel} samples per pixel and photometric interpretation "
            f"{int(page.photometric)}; xrk takes one grey value per pixel: save each as a page of its own."
        )
    if page.is_stk:
        raise ImageFileError(f"{path} is a MetaMorph stack; save it as a plain or ImageJ TIFF first.")
    if page.imagewidth < 1 or page.imagelength < 1:
        raise ImageFileError(f"{path} is damaged: it declares {page.imagewidth} x {page.imagelength} pixels.")
    if page.imagedepth != 1 or page.dtype is None or np.dtype(page.dtype) not in SUPPORTED:
        format_name = {1: "unsigned integer", 2: "integer", 3: "float"}.get(int(page.sampleformat), "complex or other")
        raise ImageFileError(
            f"{path} has pixels of a type xrk does not take ({page.bitspersample}-bit {format_name}"
            f"{', in volumes' if page.imagedepth != 1 else ''}); it takes {DTYPES}."
        )
    check_decoder(path, int(page.compression), int(page.predictor), page.bitspersample)

    length, width = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    if length < 1 or width < 1 or length * width > (page.imagelength + 65536) * (page.imagewidth + 65536):
        raise ImageFileError(f"{path} is damaged: it declares tiles or strips of {width} x {length} pixels.")
    across = math.ceil(page.imagewidth / width) if page.is_tiled else 1
    expected = across * math.ceil(page.imagelength / length)
    if not len(page.dataoffsets) == len(page.databytecounts) == expected:
        raise ImageFileError(
            f"{path} is damaged: it lists {len(page.dataoffsets)} tiles or strips where its size asks for {expected}."
        )
    for index, (offset, count) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
        rows = length if page.is_tiled else min(length, page.imagelength - index * length)
        least = rows * math.ceil(width * page.bitspersample / 8) if page.compression == 1 else 1
        if offset < 8 or count < least or offset + count > size:
            raise ImageFileError(
                f"{path} is cut off or damaged: tile or strip {index + 1} of {expected} is "
                f"{f'{count} bytes at {offset} in a file of {size}' if count >= least else 'too short'}."
            )


def _check_inflation(path, file: BinaryIO, page: tifffile.TiffPage) -> None:
    """Refuse deflate data that inflates to far more than its tile or strip: tifffile alone would inflate all of it."""
    if page.compression not in DEFLATE:
        return
    length, width = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    bound = length * width * np.dtype(page.dtype).itemsize + 65536
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if count * 1032 > max(bound, 1 << 28):  # deflate's largest ratio: the segments of usual files need no look
            file.seek(offset)
            inflate = zlib.decompressobj()
            data, total = file.read(count), 0
            while data and not inflate.eof and total <= bound:
                total += len(inflate.decompress(data, 1 << 24))
                data = inflate.unconsumed_tail
            if total > bound:
                raise ImageFileError(f"{path} is damaged: a tile or strip inflates to more than its {bound} bytes.")


def _hidden_frames(path, page: tifffile.TiffPage, size: int, text: bytes) -> int:
    """Frames behind the only page of a file: ImageJ's form for stacks above 4 GB; 1 for all other files."""
    declared = imagej.declared_frames(text) if text.startswith(b"ImageJ=") else 1
    if declared == 1 or page.compression != 1 or page.is_tiled or not page.is_contiguous:
        return 1
    frame = page.imagewidth * page.imagelength * np.dtype(page.dtype).itemsize
    start = page.dataoffsets[0]
    if size - start >= declared * frame:
        return declared
    if page.offset < start and size - start > frame:  # ImageJ puts nothing but frames behind the first one
        raise ImageFileError(f"{path} is cut off: its description states {declared} frames, more than there are.")
    return 1


def available_memory() -> float:
    """Bytes that can be allocated without swapping, as far as the system says."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return math.inf


def _page(file: BinaryIO, page: tifffile.TiffPage, order: str) -> Page:
    ratios = [_raw(file, page.tags.get(code)) for code in (282, 283)]
    resolution = tuple(struct.unpack(f"{order}II", ratio) for ratio in ratios if len(ratio) == 8)
    tags = []
    for tag in page.tags:
        # The range from 65000 on, which cameras and detector software write freely, and private text; other private
        # tags may hold offsets into the file that they came from.
        private = tag.code >= 65000 or (tag.code >= 32768 and tag.dtype == 2)
        if (tag.code in CARRIED_TAGS or private) and tag.dtype not in OFFSET_DTYPES:
            tags.append((tag.code, int(tag.dtype), _raw(file, tag)))
    return Page(
        compression=int(page.compression),
        predictor=int(page.predictor),
        tile=(page.tilelength, page.tilewidth) if page.is_tiled else None,
        rowsperstrip=None if page.is_tiled else page.rowsperstrip,
        photometric=int(page.photometric),
        subfiletype=int(page.subfiletype),
        resolution=resolution if len(resolution) == 2 and all(n and d for n, d in resolution) else None,
        resolution_unit=int(page.tags.valueof(296, 2)),
        description=_raw(file, page.tags.get(270)).rstrip(b"\0"),
        tags=tuple(tags),
    )


def _imagej_entries(file: BinaryIO, page: tifffile.TiffPage, order: str) -> imagej.Entries:
    lengths, data = _raw(file, page.tags.get(imagej.COUNTS)), _raw(file, page.tags.get(imagej.METADATA))
    try:
        return imagej.read(struct.unpack(f"{order}{len(lengths) // 4}I", lengths), data, order)
    except (ValueError, struct.error):  # absent or damaged: the pixels do not depend on it
        return []


def _raw(file: BinaryIO, tag: tifffile.TiffTag | None) -> bytes:
    """A tag's value as it lies in the file; empty without the tag."""
    if tag is None:
        return b""
    file.seek(tag.valueoffset)
    return file.read(tag.valuebytecount)
