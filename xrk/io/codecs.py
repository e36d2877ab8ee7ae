"""TIFF compressions: their names, and which of them need the package imagecodecs (the extra ``codecs``)."""

import importlib.util
import os

import numpy as np
import tifffile

from xrk.errors import ImageFileError

__all__ = ["CODES", "DEFLATE", "LOSSLESS", "check_decoder", "check_encoder", "codec_name"]

CODES = {"none": 1, "lzw": 5, "deflate": 8, "packbits": 32773, "zstd": 50000}
DEFLATE = {8, 32946}
LOSSLESS = set(CODES.values()) | DEFLATE
KNOWN = {code.value for code in tifffile.COMPRESSION}  # to tifffile with imagecodecs
DECODED_ALONE = {1, 32773} | DEFLATE  # by tifffile without imagecodecs


def codec_name(compression: int) -> str:
    """The compression's name, by its number in the TIFF tag; "TIFF compression 99" where it has none."""
    names = {code: name for name, code in CODES.items()} | dict.fromkeys(DEFLATE, "deflate")
    if compression in names:
        return names[compression]
    known = tifffile.COMPRESSION(compression).name.replace("_", " ") if compression in KNOWN else ""
    return known or f"TIFF compression {compression}"


def check_decoder(path: str | os.PathLike, compression: int, predictor: int, bits: int) -> None:
    """Raise ImageFileError where pixels stored like this cannot be decoded here."""
    packed = bits not in (8, 16, 32, 64)
    if compression in DECODED_ALONE and predictor in (1, 2) and not packed:
        return
    what = codec_name(compression)
    if compression not in KNOWN:
        raise ImageFileError(f"{path} is stored as {what}, which xrk does not read.")
    if importlib.util.find_spec("imagecodecs") is None:
        if compression in DECODED_ALONE:
            what = f"pixels of {bits} bits" if packed else f"predictor {predictor}"
        raise _needs_imagecodecs(path, "read", what)
    if compression != 1 and compression not in tifffile.TIFF.DECOMPRESSORS:
        raise ImageFileError(f"{path} is stored as {what}, which xrk does not read.")


def check_encoder(path: str | os.PathLike, compression: int, predictor: int) -> None:
    """Raise ImageFileError where pixels cannot be encoded like this here."""
    if compression == 1:
        return
    try:
        # A trial, since some of tifffile's stand-ins for imagecodecs fail only when they are called.
        tifffile.TIFF.COMPRESSORS[compression](np.zeros(16, "u1"))
        if predictor == 3:
            tifffile.TIFF.PREDICTORS[3](np.zeros((1, 4, 1), "f4"), axis=-2)
    except Exception as error:
        what = f"{codec_name(compression)}{' with predictor 3' if predictor == 3 else ''}"
        raise _needs_imagecodecs(path, "written", what) from error


def _needs_imagecodecs(path: str | os.PathLike, verb: str, what: str) -> ImageFileError:
    return ImageFileError(f"{path} cannot be {verb}: {what} needs the package imagecodecs (pip install 'xrk[codecs]').")
