"""Segments encoded without the compiled module, or with a codec that it has no library for: slower, the same pixels."""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tifffile

from xrk.io.codecs import codec_name
from xrk.io.directories import Layout

try:
    from xrk import _native
except ImportError:
    _native = None

__all__ = ["can_encode", "prepare", "round_to_integers", "write_segments"]

log = logging.getLogger("xrk")
_told: set[int] = set()


def can_encode(compression: int) -> bool:
    """Whether the compiled module has an encoder for this compression here."""
    return _native is not None and _native.tiff_can_encode(compression)


def round_to_integers(pixels: np.ndarray, dtype: np.dtype, scale: float, offset: float) -> tuple[np.ndarray, int, int]:
    """pixels * scale + offset, rounded half to even and limited to an integer dtype; how many were limited, or NaN."""
    exact = np.rint(pixels.astype(np.float64) * scale + offset)
    absent = np.isnan(exact)
    exact[absent] = 0
    limits = np.iinfo(dtype)
    limited = np.count_nonzero((exact < limits.min) | (exact > limits.max))
    return exact.clip(limits.min, limits.max).astype(dtype), limited, np.count_nonzero(absent)


def prepare(pixels: np.ndarray, layout: Layout, order: str) -> Iterator[np.ndarray]:
    """The segments of a band (rows, W) that begins with one, uncompressed as they would lie in the file: uint8 (rows,
    bytes) each."""
    for top in range(0, len(pixels), layout.rows):
        for left in range(0, layout.width, layout.columns):
            block = pixels[top : top + layout.rows, left : left + layout.columns]
            if layout.tiled:
                missing = (layout.rows - block.shape[0], layout.columns - block.shape[1])
                block = np.pad(block, [(0, count) for count in missing], mode="edge")
            yield _predicted(np.ascontiguousarray(block), layout.predictor, order)


def _predicted(block: np.ndarray, predictor: int, order: str) -> np.ndarray:
    rows, columns = block.shape
    if predictor == 3:
        planes = block.astype(block.dtype.newbyteorder(">")).view("u1").reshape(rows, columns, -1)
        line = np.ascontiguousarray(planes.transpose(0, 2, 1)).reshape(rows, -1)
        return np.diff(line, axis=1, prepend=np.uint8(0))
    if predictor == 2:
        block = block.view(f"u{block.dtype.itemsize}")
        block = np.diff(block, axis=1, prepend=block.dtype.type(0))
    return block.astype(block.dtype.newbyteorder(order), copy=False).view("u1").reshape(rows, -1)


def write_segments(
    file: int, position: int, pixels: np.ndarray, layout: Layout, order: str, level: int, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a band of whole segments and writes them from ``position`` on; returns their offsets and byte counts.

    Encoders are tifffile's, which asks imagecodecs for most.
    """
    encode = _encoder(layout.compression, level)
    offsets, counts = [], []
    with ThreadPoolExecutor(threads) as pool:
        for data in pool.map(encode, prepare(pixels, layout, order)):
            position += position % 2
            _write_all(file, data, position)
            offsets.append(position)
            counts.append(len(data))
            position += len(data)
    return np.array(offsets, np.uint64), np.array(counts, np.uint64)


def _encoder(compression: int, level: int) -> Callable[[np.ndarray], bytes]:
    if compression == 1:
        return lambda segment: segment.tobytes()
    if compression not in _told:
        _told.add(compression)
        log.info("%s is encoded by tifffile: xrk finds no library of its own for it", codec_name(compression))
    encode = tifffile.TIFF.COMPRESSORS[compression]
    if compression in (5, 32773):
        return lambda segment: bytes(encode(segment))
    return lambda segment: bytes(encode(segment, level=level))


def _write_all(file: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, position)
        view, position = view[written:], position + written
