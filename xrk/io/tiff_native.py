"""TIFF files read by xrk's own reader (csrc/tiff): what it takes, and what a file's tags say beside the pixels."""

import os
import struct
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from xrk.errors import ImageFileError
from xrk.io import description, imagej, ome
from xrk.io.image import Metadata, Page
from xrk.radiograph import Correction

try:
    from xrk import _native
except ImportError:  # a checkout whose extension is not built still works, only slower: tifffile reads
    _native = None

__all__ = ["CARRIED_TAGS", "OFFSET_DTYPES", "NativePixels", "NotTaken", "most_text", "stated_levels"]

# Text that describes the exposure, its place in a document or its author, and the orientation. Tags that describe
# the pixel values (minimum, maximum, response curves) no longer hold after enhancement and are left out.
CARRIED_TAGS = {269, 271, 272, 274, 285, 286, 287, 297, 305, 306, 315, 316, 33432}
OFFSET_DTYPES = {13, 18}  # IFD, IFD8
DESCRIPTION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, SUB_IFDS = 270, 282, 283, 296, 330
WHOLE = 1 << 25  # bytes of a strip or tile that is decoded at once; larger ones come row by row, from the first one on
SHARED_TEXT, MOST_TEXT = 1 << 26, 1 << 30  # bytes of all pages' tags beyond those of the file, and at all

Entries = list[tuple[int, int, int, bytes]]  # (tag, type, count, values as stored)


def most_text(size: int) -> int:
    """Bytes that the tags of all pages together may take in a file of this size: pages may share some, but few."""
    return min(size + SHARED_TEXT, MOST_TEXT)


class NotTaken(Exception):
    """The file is sound as far as it was looked at, but beyond this reader: the message says what it is."""


class NativePixels:
    """The frames of a file: windows of them are decoded where they are needed."""

    name = "xrk"

    def __init__(self, path: str | os.PathLike, cache: int, threads: int, whole: int = 0) -> None:
        """whole: bytes of a strip or tile that may be decoded at once, where that is more than the cache and `WHOLE`.

        Raises ImageFileError for a damaged file, and NotTaken.
        """
        if _native is None:
            raise NotTaken("the compiled module xrk._native cannot be imported")
        self._path, self._threads = path, threads
        # Not to wait for the other end, should the file have become a pipe since somebody looked at it.
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(path, flags)
        try:
            self._reader = _native.TiffReader(descriptor, cache, max(cache, WHOLE, whole))
        except _native.TiffFailure as failure:
            raise self._error(failure) from None
        reader = self._reader
        if reader.unsupported:
            raise NotTaken(reader.unsupported)
        if reader.frames == 0:
            raise ImageFileError(f"{path} holds no page at full resolution.")
        try:
            self._look()
        except _native.TiffFailure as failure:
            raise self._error(failure) from None

    def _look(self) -> None:
        reader, path = self._reader, self._path
        first = reader.frame(0)
        odd = reader.first_odd_frame()
        if odd is not None:
            sizes = [f"{d['height']} x {d['width']} {d['dtype']}" for d in (first, reader.frame(odd))]
            raise ImageFileError(
                f"{path} holds pages of different sizes or types ({sizes[0]} and {sizes[1]}); xrk takes one frame, or "
                "a stack of equal frames."
            )
        if not all(reader.can_decode(i) for i in range(reader.frames)):
            raise NotTaken(f"there is no library here for its compression ({first['compression']})")
        reader.check_segments()
        self._entries: Entries = reader.entries(0, most_text(reader.size))
        text = _by_tag(self._entries).get(DESCRIPTION, b"").rstrip(b"\0")
        self._kind = description.kind_of(text)
        self.contiguous = reader.pages == 1 and self._kind == "imagej" and self._find_hidden(text, first)
        self.frames = reader.frames
        self.shape = (first["height"], first["width"])
        self.dtype = np.dtype(first["dtype"])
        self._levels, self._level_note = stated_levels(self._kind, text, first["bits"], self.dtype)

    def _find_hidden(self, text: bytes, first: dict[str, Any]) -> bool:
        """Whether frames stand behind the only page of a file: ImageJ's form for stacks above 4 GB."""
        declared = imagej.declared_frames(text)
        start = self._reader.contiguous_start()
        if declared == 1 or start is None:
            return False
        if self._reader.set_hidden(declared):
            return True
        frame = first["height"] * ((first["width"] * first["bits"] + 7) // 8)
        # ImageJ puts nothing but frames behind the first one.
        if first["offset"] < start and self._reader.size - start > frame:
            raise ImageFileError(
                f"{self._path} is cut off: its description states {declared} frames, more than there are."
            )
        return False

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

        Returns how many pixels the correction clipped.
        """
        parts = None if correction is None else tuple(getattr(correction, field.name) for field in fields(correction))
        try:
            return self._reader.read(frame, row, column, out, border, levels, self._threads, parts)
        except _native.TiffFailure as failure:
            raise self._error(failure) from None
        except MemoryError:
            raise ImageFileError(f"There is not enough memory for {self._path}.") from None

    def prefetch(self, frame: int, row: int, column: int, rows: int, columns: int) -> None:
        """Decodes what a later `read` of this window needs."""
        try:
            self._reader.load(frame, row, column, rows, columns, self._threads)
        except _native.TiffFailure as failure:
            raise self._error(failure) from None

    @property
    def cached_bytes(self) -> int:
        return self._reader.cached_bytes

    @property
    def decoded_segments(self) -> int:
        return self._reader.decoded_segments

    def close(self) -> None:
        """Ends reads that run in other threads. The file is closed as the last of them ends."""
        self._reader.cancel()

    def stated_levels(self) -> tuple[float, float] | None:
        """What the file says of its black and white level."""
        return self._levels

    def metadata(self) -> Metadata:
        """Reads the tags of every page."""
        order = self._reader.byteorder
        try:
            pages = self._read_pages()
        except _native.TiffFailure as failure:
            raise self._error(failure) from None
        except MemoryError:
            raise ImageFileError(f"There is not enough memory for the tags of {self._path}.") from None
        notes = []
        if self._reader.pages > self.frames or any(tag == SUB_IFDS for tag, *_ in self._entries):
            notes.append("reduced copies of the image are not carried over")
        text = pages[0].description
        found = _imagej_entries(self._entries, order) if self._kind == "imagej" else []
        notes += [self._level_note] if self._level_note else []
        declared = imagej.declared_frames(text) if self._kind == "imagej" else self.frames
        if declared != self.frames:
            notes.append(f"the description states {declared} frames, the file has {self.frames}")
        return Metadata(
            path=Path(self._path),
            shape=self.shape if self.frames == 1 else (self.frames, *self.shape),
            dtype=self.dtype.newbyteorder(order),
            byteorder=order,
            bigtiff=self._reader.bigtiff,
            kind=self._kind,
            contiguous=self.contiguous,
            levels=self._levels,
            pages=tuple(pages),
            imagej=tuple(found),
            report=description.find_report(self._kind, text, imagej.get_info(found, order)),
            notes=tuple(notes),
        )

    def _read_pages(self) -> list[Page]:
        order, left = self._reader.byteorder, most_text(self._reader.size)
        pages = []
        for i in range(1 if self.contiguous else self.frames):
            entries = self._entries if i == 0 else self._reader.entries(i, left)
            left -= sum(len(value) for *_, value in entries)
            pages.append(_page(self._reader.frame(i), entries, order))
        return pages * self.frames if self.contiguous else pages

    def _error(self, failure: Exception) -> ImageFileError:
        kind, what, offset = failure.args
        if kind == "cancelled":
            return ImageFileError(f"{self._path} was closed while it was read.")
        if kind == "system":
            return ImageFileError(f"{self._path} cannot be read: {what}.")
        where = "" if offset is None else f" at byte {offset}"
        return ImageFileError(f"{self._path} is damaged{where}: {what}.")


def stated_levels(kind: str, text: bytes, bits: int, dtype: np.dtype) -> tuple[tuple[float, float] | None, str]:
    """The levels that a file states, or None, and a note about them, or nothing."""
    levels = ome.significant_levels(text.decode("utf-8", "replace")) if kind == "ome" else None
    if bits == 8 * dtype.itemsize or dtype.kind == "f":
        return levels, ""
    note = f"{bits}-bit packed pixels are written as {dtype.name}, since values may exceed {bits} bits"
    return ((0, 2**bits - 1) if dtype.kind == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)), note


def _by_tag(entries: Entries) -> dict[int, bytes]:
    return {tag: value for tag, _, _, value in entries}


def _page(frame: dict[str, Any], entries: Entries, order: str) -> Page:
    found = _by_tag(entries)
    ratios = [found.get(tag, b"") for tag in (X_RESOLUTION, Y_RESOLUTION)]
    resolution = tuple(struct.unpack(f"{order}II", ratio) for ratio in ratios if len(ratio) == 8)
    unit = found.get(RESOLUTION_UNIT, b"")
    tags = []
    for tag, dtype, _, value in entries:
        # The range from 65000 on, which cameras and detector software write freely, and private text; other private
        # tags may hold offsets into the file that they came from.
        private = tag >= 65000 or (tag >= 32768 and dtype == 2)
        if (tag in CARRIED_TAGS or private) and dtype not in OFFSET_DTYPES:
            tags.append((tag, dtype, value))
    return Page(
        compression=frame["compression"],
        predictor=frame["predictor"],
        tile=frame["segment"] if frame["tiled"] else None,
        rowsperstrip=None if frame["tiled"] else frame["segment"][0],
        photometric=frame["photometric"],
        subfiletype=frame["subfile_type"],
        resolution=resolution if len(resolution) == 2 and all(n and d for n, d in resolution) else None,
        resolution_unit=struct.unpack(f"{order}H", unit)[0] if len(unit) == 2 else 2,
        description=found.get(DESCRIPTION, b"").rstrip(b"\0"),
        tags=tuple(tags),
    )


def _imagej_entries(entries: Entries, order: str) -> imagej.Entries:
    lengths, data = (_by_tag(entries).get(tag, b"") for tag in (imagej.COUNTS, imagej.METADATA))
    try:
        return imagej.read(struct.unpack(f"{order}{len(lengths) // 4}I", lengths), data, order)
    except (ValueError, struct.error):  # absent or damaged: the pixels do not depend on it
        return []
