"""The directories of a TIFF file, as bytes: what comes last when a file is written (TIFF 6.0, section 2; BigTIFF)."""

import math
import struct
from dataclasses import dataclass

import numpy as np

from xrk.io import description, imagej
from xrk.io.image import Page

__all__ = ["HEADER", "Layout", "encode_directories", "header", "metadata"]

HEADER = 16  # bytes kept free for it; pixels begin behind
SHORT, LONG, RATIONAL, LONG8 = 3, 4, 5, 16
BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8, 17: 8}
SOFTWARE = 305
FORMATS = {"u": 1, "i": 2, "f": 3}
ORDERS = {"<": "little", ">": "big"}

Tag = tuple[int, int, bytes]  # code, data type, value in the file's byte order


@dataclass(frozen=True)
class Layout:
    """How the pixels of a page are stored."""

    height: int
    width: int
    dtype: np.dtype  # in the machine's byte order
    tiled: bool
    rows: int  # of a tile, or of a strip
    columns: int  # of a tile; the width for strips
    compression: int
    predictor: int

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def raw_strips(self) -> bool:
        """Whether every row has its place before any is written."""
        return self.compression == 1 and not self.tiled

    @property
    def across(self) -> int:
        return math.ceil(self.width / self.columns)

    @property
    def segments(self) -> int:
        return self.across * math.ceil(self.height / self.rows)

    @property
    def worst_bytes(self) -> int:
        """The most bytes that the pixels take in the file, whatever they are."""
        rows = self.rows * math.ceil(self.height / self.rows) if self.tiled else self.height
        raw = rows * self.across * self.columns * self.dtype.itemsize
        # LZW may take 12 bits for every byte; the others add a little to each segment, PackBits to each row.
        grown = raw * 3 // 2 if self.compression == 5 else raw + raw // 64
        return raw if self.compression == 1 else grown + 1024 * self.segments + 2 * rows * self.across


def header(order: str, big: bool, first: int) -> bytes:
    """The head of a file whose first directory lies at ``first``."""
    mark = b"II" if order == "<" else b"MM"
    return mark + (struct.pack(f"{order}HHHQ", 43, 8, 0, first) if big else struct.pack(f"{order}HI", 42, first))


def metadata(page: Page, entries: imagej.Entries, order: str, report: dict | None) -> list[Tag]:
    """The tags of a page that do not describe how its pixels are stored; ``entries`` and report: of the first page."""
    text = page.description
    if report is not None:
        kind = description.kind_of(text)
        text, info = description.add_report(kind, text, imagej.get_info(entries, order), report)
        if kind == "imagej":
            entries = imagej.set_info(entries, info, order)
    tags = list(page.tags)
    if text:
        tags.append((270, 2, text + b"\0"))
    if entries:
        counts, data = imagej.write(entries, order)
        tags += [(imagej.COUNTS, LONG, struct.pack(f"{order}{len(counts)}I", *counts)), (imagej.METADATA, 1, data)]
    if not any(code == SOFTWARE for code, _, _ in tags):
        tags.append((SOFTWARE, 2, b"xrk\0"))
    resolution = page.resolution or ((1, 1), (1, 1))
    tags += [(282 + i, RATIONAL, struct.pack(f"{order}II", *ratio)) for i, ratio in enumerate(resolution)]
    tags.append((296, SHORT, struct.pack(f"{order}H", page.resolution_unit)))
    return tags


def encode_directories(
    pages: list[tuple[Layout, Page, list[Tag], np.ndarray, np.ndarray]], order: str, big: bool, start: int
) -> bytes:
    """The directories of all pages, for a file that goes on at ``start`` (even).

    pages: for each its layout, what it is like, `metadata`, and offsets and byte counts of its segments.
    """
    out = bytearray()
    link = None  # where the offset of the directory at hand belongs; the first one's is in the header
    pointer = "Q" if big else "I"
    for layout, page, tags, offsets, counts in pages:
        at = start + len(out)
        if link is not None:
            struct.pack_into(order + pointer, out, link, at)
        encoded = [*tags, *_layout_tags(layout, page, offsets, counts, order, big)]
        encoded.sort(key=lambda tag: tag[0])
        link = len(out) + _append(out, encoded, order, big, at)
    return bytes(out)


def _layout_tags(layout: Layout, page: Page, offsets: np.ndarray, counts: np.ndarray, order: str, big: bool):
    kind = LONG8 if big else LONG
    number = np.dtype(order + ("u8" if big else "u4"))
    # The only count that classic TIFF may not hold is that of ImageJ's stacks, of which it reads the offset alone.
    places = [a.clip(max=np.iinfo(number).max).astype(number).tobytes() for a in (offsets, counts)]

    def short(code: int, value: int) -> Tag:
        return code, SHORT, struct.pack(f"{order}H", value)

    def long(code: int, value: int) -> Tag:
        return code, LONG, struct.pack(f"{order}I", value)

    tags = [
        long(254, page.subfiletype),
        long(256, layout.width),
        long(257, layout.height),
        short(258, 8 * layout.dtype.itemsize),
        short(259, layout.compression),
        short(262, page.photometric),
        short(277, 1),
        short(339, FORMATS[layout.dtype.kind]),
    ]
    if layout.predictor != 1:
        tags.append(short(317, layout.predictor))
    if layout.tiled:
        tags += [long(322, layout.columns), long(323, layout.rows), (324, kind, places[0]), (325, kind, places[1])]
    else:
        tags += [long(278, layout.rows), (273, kind, places[0]), (279, kind, places[1])]
    return tags


def _append(out: bytearray, tags: list[Tag], order: str, big: bool, at: int) -> int:
    """Appends one directory that begins at ``at`` in the file; returns where in it the next one's offset belongs."""
    count, entry, inside = ("Q", "HHQ", 8) if big else ("H", "HHI", 4)
    head, size = struct.calcsize(f"={count}"), struct.calcsize(f"={entry}") + inside
    link = head + size * len(tags)
    values = bytearray()
    body = bytearray(struct.pack(order + count, len(tags)))
    for code, kind, value in tags:
        body += struct.pack(order + entry, code, kind, len(value) // BYTES[kind])
        if len(value) <= inside:
            body += value.ljust(inside, b"\0")
        else:
            body += (at + link + inside + len(values)).to_bytes(inside, ORDERS[order])
            values += value + b"\0" * (len(value) % 2)
    out += body + bytes(inside) + values
    out += bytes(len(out) % 2)
    return link
