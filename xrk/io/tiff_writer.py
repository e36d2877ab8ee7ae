"""Writing TIFF files through tifffile, like a file that was read, whole or not at all (TIFF 6.0; BigTIFF)."""

import math
import os
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from xrk.errors import ImageFileError, InputError, InputTypeError
from xrk.io import description, imagej
from xrk.io.atomic import atomic_file, check_target
from xrk.io.codecs import CODES, LOSSLESS, check_encoder
from xrk.io.image import Image, Page
from xrk.io.tiff_reader import DTYPES, SUPPORTED, errors_named

__all__ = ["check_writable", "write"]

OTHER_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".dcm", ".h5", ".hdf5", ".npy", ".npz", ".raw", ".edf"}
SOFTWARE = 305


def check_writable(path: str | os.PathLike, like: Image | None = None, *, compression: str | None = None) -> None:
    """Whether `write` with these arguments can work; to be asked before time is spent on the pixels.

    Raises ImageFileError: the folder is missing or closed to writing, the name is that of a folder or of another
    format, or the compression needs the extra ``codecs``.
    """
    check_target(path)
    if Path(path).suffix.lower() in OTHER_SUFFIXES:
        raise ImageFileError(f"{path} cannot be written: xrk writes TIFF; give the file a name that ends in .tif.")
    for page in _output_pages(like, compression, like.array.dtype if like else np.dtype("u2")):
        check_encoder(path, page.compression, page.predictor)


def write(
    path: str | os.PathLike,
    array: np.ndarray,
    *,
    like: Image | None = None,
    report: dict[str, Any] | None = None,
    compression: str | None = None,
) -> None:
    """Write a TIFF file, whole or not at all.

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
    array = np.asarray(array)
    if array.ndim not in (2, 3) or array.size == 0:
        raise InputError(f"a TIFF file takes an array (H, W) or (N, H, W) that is not empty, not one of {array.shape}.")
    if array.dtype.newbyteorder("=") not in SUPPORTED:
        raise InputTypeError(f"a TIFF file takes arrays of the dtypes {DTYPES}, not {array.dtype}.")
    if like is not None and like.array.shape != array.shape:
        raise InputError(f"an array of shape {array.shape} cannot be written like one of shape {like.array.shape}.")
    check_writable(path, like, compression=compression)

    order = like.byteorder if like else array.dtype.byteorder
    order = order if order in "<>" else {"little": "<", "big": ">"}[sys.byteorder]
    contiguous = like is not None and like.contiguous
    # Compressed data may be larger than raw, and pages need room. A contiguous stack is addressed by one offset only.
    large = not contiguous and 1.05 * array.nbytes + 65536 * len(array) >= 2**32
    pages = _output_pages(like, compression, array.dtype)
    with (
        errors_named(path, "cannot be written"),
        atomic_file(path) as file,
        tifffile.TiffWriter(file, bigtiff=large or bool(like and like.bigtiff), byteorder=order, ome=False) as writer,
    ):
        for index, frame in enumerate([array] if contiguous or array.ndim == 2 else array):
            page = pages[min(index, len(pages) - 1)]
            entries = list(like.imagej) if like and index == 0 else []
            options = _layout(page, frame) | _metadata(page, entries, order, report if index == 0 else None)
            writer.write(frame, truncate=contiguous, **options)


def _output_pages(like: Image | None, compression: str | None, dtype: np.dtype) -> list[Page]:
    """The pages to write: those of `like`, with a codec that loses nothing and a predictor that the dtype allows."""
    if compression is not None and compression not in CODES:
        raise InputError(f"compression must be one of {', '.join(CODES)}, not {compression!r}.")
    allowed = 3 if dtype.kind == "f" else 2
    pages = []
    for page in like.pages if like else [Page(predictor=2)]:
        kept = page.compression if page.compression in LOSSLESS else CODES["deflate"]
        code = kept if compression is None else CODES[compression]
        predictor = page.predictor if page.predictor == allowed and code != 1 else 1
        pages.append(replace(page, compression=code, predictor=predictor))
    return pages


def _layout(page: Page, frame: np.ndarray) -> dict[str, Any]:
    """TiffWriter.write's arguments for the layout of a page."""
    options = {
        "photometric": page.photometric,
        "compression": page.compression,
        "predictor": page.predictor,
        "subfiletype": page.subfiletype,
        "contiguous": False,
    }
    if page.tile:
        options["tile"] = tuple(math.ceil(side / 16) * 16 for side in page.tile)  # the format asks for multiples of 16
    elif page.rowsperstrip:
        options["rowsperstrip"] = min(page.rowsperstrip, frame.shape[-2])
    return options


def _metadata(page: Page, entries: list, order: str, report: dict[str, Any] | None) -> dict[str, Any]:
    """TiffWriter.write's arguments for the metadata of a page, the report among them."""
    text = page.description
    if report is not None:
        kind = description.kind_of(text)
        text, info = description.add_report(kind, text, imagej.get_info(entries, order), report)
        if kind == "imagej":
            entries = imagej.set_info(entries, info, order)
    tags = list(page.tags)
    if entries:
        counts, data = imagej.write(entries, order)
        tags += [(imagej.COUNTS, 4, struct.pack(f"{order}{len(counts)}I", *counts)), (imagej.METADATA, 1, data)]
    if not any(code == SOFTWARE for code, _, _ in tags):
        tags.append((SOFTWARE, 2, b"xrk"))
    options: dict[str, Any] = {
        "metadata": None,
        "software": False,
        "extratags": [(code, dtype, None, value, False) for code, dtype, value in tags],
    }
    if text:
        options["description"] = text
    if page.resolution:
        options["resolution"] = page.resolution
        options["resolutionunit"] = page.resolution_unit
    return options
