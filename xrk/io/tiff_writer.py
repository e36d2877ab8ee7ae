"""Writing TIFF files: row by row (`create`), or a whole array (`write`); like a file that was read, or from scratch."""

import operator
import os
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from xrk.arguments import array_of, check_path, whole_number
from xrk.errors import ImageFileError, InputError, InputTypeError
from xrk.io import segments
from xrk.io.atomic import check_target
from xrk.io.codecs import CODES, LOSSLESS, check_encoder
from xrk.io.image import Image, Metadata, Page
from xrk.io.sink import Sink
from xrk.io.tiff_reader import DTYPES, SUPPORTED

__all__ = ["check_writable", "create", "write"]

LEVELS = {CODES["deflate"]: 12, 32946: 12, CODES["zstd"]: 22}  # the highest of a codec that has levels
MOST_SIDE = (1 << 31) - 1
OTHER_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".dcm", ".h5", ".hdf5", ".npy", ".npz", ".raw", ".edf"}


def create(
    path: str | os.PathLike,
    *,
    like: Any = None,
    shape: tuple[int, ...] | None = None,
    dtype: Any = None,
    tile: tuple[int, int] | None = None,
    rowsperstrip: int | None = None,
    compression: str | None = None,
    predictor: bool | None = None,
    level: int = 1,
    byteorder: str | None = None,
    bigtiff: bool | None = None,
    resolution: tuple[float, float] | None = None,
    resolution_unit: str = "none",
    description: str | None = None,
    threads: int | None = None,
) -> Sink:
    """A TIFF file to be written row by row: ``with xrk.io.create(...) as sink: sink.write(slice(0, 64), rows)``.

    Args:
        path: takes the file once it is complete; until then it lies beside it as ``<name>.<random>.partial``, and an
            older file under this name stays as it is.
        like: what `xrk.io.open` or `xrk.io.read` gave: the new file has its shape, dtype, byte order, BigTIFF or not,
            pages, strips or tiles, compression, predictor, resolution, description and text tags, but for what the
            other arguments say. `Sink.notes` tells what cannot be kept.
        shape: (H, W), or (N, H, W) for N pages. dtype: one that TIFF files are read in; float64 included.
        tile: (rows, columns), multiples of 16; or rowsperstrip: rows of a strip. Without both, strips as suits.
        compression: "none", "deflate", "zstd", "lzw" or "packbits".
        predictor: differences before compression; by default those of ``like``, else for integers wherever there is a
            compression (but PackBits).
        level: of deflate (1 to 12) and zstd (1 to 22). Noise is hardly smaller at more than 1.
        byteorder: "<" or ">"; by default that of ``like`` or of the dtype. With ``like`` it cannot be another.
        bigtiff: by default as ``like``, and wherever 4 GB could be exceeded, whatever the pixels.
        resolution: pixels per unit in x and y; resolution_unit: "none", "inch" or "cm".
        description: text of the first page; ASCII or UTF-8.
        threads: that encode at most; by default as many as there are processors, up to 8. The bytes never
            depend on it.

    Raises:
        ImageFileError: the file cannot be written there or like that. InputError, InputTypeError: arguments that do
        not fit together.
    """
    check_path(path)
    like = _metadata(like)
    if like is not None:
        shape = like.shape if shape is None else shape
        dtype = like.dtype if dtype is None else dtype
    if shape is None or dtype is None:
        raise InputError("create() was given no shape or no dtype; expected both, or like= a file that was read.")
    shape, dtype = _checked_shape(shape), _checked_dtype(dtype)
    order = like.byteorder if like is not None else byteorder or dtype.byteorder
    order = order if order in ("<", ">") else {"little": "<", "big": ">"}[sys.byteorder]
    if byteorder not in (None, order):
        raise InputError(f"byteorder={byteorder!r}; expected {'that of like, ' if like is not None else ''}{order!r}.")
    if not isinstance(predictor, bool | np.bool_ | None):
        raise InputTypeError(f"predictor={predictor!r}; expected True, False or None.")
    pages = _output_pages(like, compression, dtype, predictor)
    level = whole_number(level, "level", 1, min(LEVELS.get(page.compression, 22) for page in pages))
    threads = None if threads is None else whole_number(threads, "threads", 1)
    changes: dict[str, Any] = {}
    if tile is not None or rowsperstrip is not None:
        changes |= {"tile": _checked_tile(tile, rowsperstrip), "rowsperstrip": rowsperstrip}
    if resolution is not None:
        changes |= _resolution(resolution, resolution_unit)
    pages = [replace(page, **changes) for page in pages]
    if description is not None:
        pages = [replace(pages[0], description=_encoded(description)), *pages[1:]]
        if len(pages) == 1 and len(shape) == 3 and shape[0] > 1:
            pages.append(replace(pages[0], description=b""))
    _check_place(path, pages)
    return Sink(path, shape, dtype.newbyteorder("="), order, pages, like, bigtiff, level, threads)


def write(
    path: str | os.PathLike,
    array: np.ndarray,
    *,
    like: Image | Metadata | None = None,
    report: dict[str, Any] | None = None,
    compression: str | None = None,
) -> None:
    """Write a TIFF file, whole or not at all; `create` does the same row by row.

    array: (H, W), or (N, H, W) for N pages, of a dtype that `read` gives; byte order as in the array.
    like: an image that was read, of the same shape: the output has its byte order, BigTIFF or not, pages, strips or
        tiles, compression, predictor, resolution, description and text tags. `Image.notes` tells what differs.
        Classic TIFF becomes BigTIFF where 4 GB could be exceeded.
    report: JSON-able; put into the metadata as `xrk.io.description` says, where `read_report` finds it.
    compression: "none", "deflate", "zstd", "lzw" or "packbits" in place of that of `like`; without both,
        the file is uncompressed.

    Raises ImageFileError as `check_writable`, or where the disk is full; InputError and InputTypeError for an array
    or an option that does not fit.
    """
    array = array_of(array)
    like = _metadata(like)
    if like is not None and tuple(like.shape) != array.shape:
        raise InputError(f"an array of shape {array.shape} cannot be written like one of shape {tuple(like.shape)}.")
    with create(path, like=like, shape=array.shape, dtype=array.dtype, compression=compression) as sink:
        sink.report = report
        for page, frame in enumerate(array if array.ndim == 3 else array[None]):
            sink.write(slice(None), frame, page)


def check_writable(path: str | os.PathLike, like: Any = None, *, compression: str | None = None) -> None:
    """Whether `create` or `write` with these arguments can work; to be asked before time is spent on the pixels.

    Raises ImageFileError: the folder is missing or closed to writing, the name is that of a folder or of another
    format, or the compression needs a library that is not here.
    """
    check_path(path)
    like = _metadata(like)
    _check_place(path, _output_pages(like, compression, like.dtype if like is not None else np.dtype("u2")))


def _metadata(like: Any) -> Metadata | None:
    """Of a Source its metadata, for its own dtype says nothing of the byte order."""
    found = getattr(like, "metadata", like)
    if found is not None and not isinstance(found, Metadata):
        raise InputTypeError(f"like is a {type(like).__name__}; expected what xrk.io.open or xrk.io.read gave.")
    return found


def _encoded(description: Any) -> bytes:
    if not isinstance(description, str):
        raise InputTypeError(f"description is a {type(description).__name__}; expected a text.")
    try:
        return description.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"description is no text that UTF-8 can hold: {error.reason}.") from None


def _check_place(path: str | os.PathLike, pages: list[Page]) -> None:
    check_target(path)
    if Path(path).suffix.lower() in OTHER_SUFFIXES:
        raise ImageFileError(f"{path} cannot be written: xrk writes TIFF; give the file a name that ends in .tif.")
    for compression, predictor in {(page.compression, page.predictor) for page in pages}:
        if not segments.can_encode(compression):
            check_encoder(path, compression, predictor)


def _checked_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise InputTypeError(f"shape={shape!r}; expected (H, W) or (N, H, W), whole numbers.") from None
    if len(sizes) not in (2, 3) or min(sizes) < 1 or max(sizes[-2:]) > MOST_SIDE:
        raise InputError(f"a TIFF file takes an array (H, W) or (N, H, W) that is not empty, not one of {sizes}.")
    return sizes


def _checked_dtype(dtype: Any) -> np.dtype:
    try:
        known = np.dtype(dtype)
    except TypeError:
        known = None
    if known is None or known.newbyteorder("=") not in SUPPORTED:
        raise InputTypeError(f"a TIFF file takes arrays of the dtypes {DTYPES}, not {dtype}.")
    return known


def _checked_tile(tile: tuple[int, int] | None, rowsperstrip: int | None) -> tuple[int, int] | None:
    if tile is not None and rowsperstrip is not None:
        raise InputError("create() was given both tile= and rowsperstrip=; expected one of them.")
    if rowsperstrip is not None:
        whole_number(rowsperstrip, "rowsperstrip", 1, MOST_SIDE)
        return None
    try:
        sides = tuple(operator.index(side) for side in tile)
    except TypeError:
        raise InputTypeError(f"tile={tile!r}; expected (rows, columns), whole numbers.") from None
    if len(sides) != 2 or any(side < 16 or side % 16 or side > 1 << 15 for side in sides):
        raise InputError(f"tile={tile!r}; expected (rows, columns), multiples of 16 up to {1 << 15}.")
    return sides


def _resolution(resolution: tuple[float, float], unit: str) -> dict[str, Any]:
    units = {"none": 1, "inch": 2, "cm": 3}
    if unit not in units:
        raise InputError(f"resolution_unit={unit!r}; expected one of {', '.join(units)}.")
    try:
        ratios = tuple(Fraction(value).limit_denominator(1 << 16) for value in resolution)
    except (TypeError, ValueError, ArithmeticError):
        ratios = ()
    if len(ratios) != 2 or not all(0 < ratio.numerator < 1 << 32 for ratio in ratios):
        raise InputError(f"resolution={resolution!r}; expected pixels per unit in x and y, both above 0.")
    return {"resolution": tuple((r.numerator, r.denominator) for r in ratios), "resolution_unit": units[unit]}


def _output_pages(like: Any, compression: str | None, dtype: np.dtype, predictor: bool | None = None) -> list[Page]:
    """The pages to write: those of ``like``, with a codec that loses nothing and a predictor that the dtype allows."""
    if compression is not None and compression not in CODES:
        raise InputError(f"compression must be one of {', '.join(CODES)}, not {compression!r}.")
    allowed = 3 if dtype.kind == "f" else 2
    pages = []
    for page in like.pages if like is not None else [Page(predictor=2)]:
        kept = page.compression if page.compression in LOSSLESS else CODES["deflate"]
        code = kept if compression is None else CODES[compression]
        wanted = page.predictor == allowed if predictor is None else predictor
        pages.append(replace(page, compression=code, predictor=allowed if wanted and code not in (1, 32773) else 1))
    return pages
