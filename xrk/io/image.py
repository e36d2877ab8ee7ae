"""What an image file is to xrk: its pixels, and everything needed to write another one like it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xrk.io.codecs import codec_name

__all__ = ["Image", "Metadata", "Page"]


@dataclass(frozen=True)
class Page:
    """Layout and metadata of one page (TIFF 6.0, sections 3 to 8, 14 and 15)."""

    compression: int = 1  # number of the Compression tag
    predictor: int = 1  # 1 none, 2 horizontal differences, 3 floating point
    tile: tuple[int, int] | None = None  # (length, width) in pixels; None: strips
    rowsperstrip: int | None = None  # None: as the writer likes
    photometric: int = 1  # 0 white is zero, 1 black is zero
    subfiletype: int = 0
    resolution: tuple[tuple[int, int], tuple[int, int]] | None = None  # x and y, each a ratio, in pixels per unit
    resolution_unit: int = 1  # 1 none, 2 inch, 3 centimetre
    description: bytes = b""
    tags: tuple[tuple[int, int, bytes], ...] = ()  # others that are carried over: (code, data type, value as stored)


@dataclass(frozen=True)
class Metadata:
    """Everything about an image file but its pixels.

    `shape` is (H, W), or (N, H, W) for a file of N pages; `dtype` has the file's byte order.
    `levels` is the (black, white) that the file itself states, in counts, or None. Packed integers state it (12 bits
    stored as 12 bits: (0, 4095)) and so does the attribute SignificantBits of an OME file; nothing else is believed.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    byteorder: str = "<"  # "<" or ">"
    bigtiff: bool = False
    kind: str = "plain"  # whose description it is: "plain", "imagej" or "ome"
    contiguous: bool = False  # ImageJ's form for large stacks: one page, all frames one after the other behind it
    levels: tuple[float, float] | None = None
    pages: tuple[Page, ...] = (Page(),)
    imagej: tuple[tuple[bytes, bytes], ...] = ()  # the entries of ImageJ's own metadata tag: (kind, value)
    report: dict[str, Any] | None = None  # what an earlier run of xrk wrote into the file
    notes: tuple[str, ...] = ()  # what its user should know, above all what an output will not have in common with it

    @property
    def description(self) -> str:
        """ImageDescription of the first page."""
        return self.pages[0].description.decode("utf-8", "replace")

    @property
    def compression(self) -> str:
        """Compression of the first page, by name."""
        return codec_name(self.pages[0].compression)

    @property
    def resolution(self) -> tuple[float, float, str] | None:
        """Pixels per unit in x and y, and the unit: "none", "inch" or "cm". None where the file does not say."""
        page = self.pages[0]
        if page.resolution is None:
            return None
        (x, x_parts), (y, y_parts) = page.resolution
        return x / x_parts, y / y_parts, {2: "inch", 3: "cm"}.get(page.resolution_unit, "none")

    @property
    def layout(self) -> str:
        """How the pixels are stored, in words."""
        page = self.pages[0]
        parts = ["BigTIFF" if self.bigtiff else "TIFF", {"<": "little-endian", ">": "big-endian"}[self.byteorder]]
        if page.tile:
            parts.append(f"tiles of {page.tile[1]} x {page.tile[0]}")
        elif page.rowsperstrip and page.rowsperstrip < self.shape[-2]:
            parts.append(f"strips of {page.rowsperstrip} rows")
        else:
            parts.append("one strip")
        parts.append("uncompressed" if page.compression == 1 else self.compression)
        if page.predictor != 1:
            parts.append(f"predictor {page.predictor}")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Image(Metadata):
    """An image file, read: `array` has its shape, and its dtype with the file's byte order."""

    array: np.ndarray
