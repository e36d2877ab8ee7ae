"""The verb `xrk inspect`."""

import argparse
import os
from collections.abc import Callable
from typing import Any

from xrk.cli import IMAGE_SUFFIXES

__all__ = ["add"]

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".hdf5", ".h5")


def add(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verb and its arguments; ``verb`` as in `xrk.cli`."""
    inspect = verb("inspect", _run, "say what an image or a checkpoint is, and what of it does not fit")
    inspect.add_argument(
        "file", metavar="FILE", help="a TIFF image, or a checkpoint (.pth, .pt, .ckpt, .safetensors, .hdf5)"
    )


def _run(arguments: argparse.Namespace) -> int:
    path = arguments.file
    if _kind(path) == "checkpoint":
        from xrk.loading import inspect_checkpoint

        print(inspect_checkpoint(path))
    else:
        print(_describe_image(path))
    return 0


def _kind(path: str) -> str:
    """ "image" or "checkpoint", by the file's first bytes, or else by its name."""
    from xrk.errors import ImageFileError

    head = b""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            head = file.read(9)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") or path.lower().endswith(IMAGE_SUFFIXES):
        return "image"
    known = head.startswith((b"PK\x03\x04", b"\x80", b"\x89HDF\r\n")) or head[8:9] == b"{"
    if known or path.lower().endswith(CHECKPOINT_SUFFIXES):
        return "checkpoint"
    if os.path.isfile(path):
        raise ImageFileError(f"{path} is neither a TIFF image nor a checkpoint of torch, safetensors or Keras.")
    return "image"


def _describe_image(path: str) -> str:
    import numpy as np

    import xrk
    from xrk import io

    image = io.read(path)
    frames = image.array.reshape(-1, *image.array.shape[-2:])
    finite = np.isfinite(frames) if image.array.dtype.kind == "f" else None
    values = frames if finite is None else frames[finite]
    family = {"imagej": "ImageJ ", "ome": "OME ", "plain": ""}[image.kind]
    count = f", {len(frames)} frames" if image.array.ndim == 3 else ""
    rows = [("size", f"{frames.shape[2]} x {frames.shape[1]} pixels, {image.array.dtype.name}{count}")]
    if values.size:
        rows.append(("values", f"{values.min():g} to {values.max():g}, mean {values.mean(dtype=np.float64):g}"))
    rows.append(("levels", _levels(image)))
    invalid = frames.size - values.size
    rows.append(("invalid", f"{invalid} pixels are NaN or infinite" if invalid else "none"))
    try:
        noise = xrk.estimate_noise(frames[0], mask=None if finite is None else ~finite[0])
        sign = "-" if noise.intercept < 0 else "+"
        line = f"variance = {noise.gain:.4g} x mean {sign} {abs(noise.intercept):.4g}"
        rows.append(("noise", f"{line}{' in the first frame' if count else ''}; {noise.source}"))
    except xrk.errors.XrkError as error:
        rows.append(("noise", f"not estimated: {error}"))
    if image.resolution is not None and image.resolution != (1.0, 1.0, "none"):
        x, y, unit = image.resolution
        rows.append(("resolution", f"{x:g} x {y:g} pixels per {'unit' if unit == 'none' else unit}"))
    words = " ".join(line for line in image.description.splitlines() if not line.startswith('{"xrk": '))
    if words.strip():
        rows.append(("description", " ".join(words.split())[:100]))
    if image.report is not None:
        version = (image.report.get("versions") or {}).get("xrk", "?")
        rows.append(("enhanced", f"by xrk {version} with {image.report.get('model')} (xrk.io.read_report tells more)"))
    rows += [("note", note) for note in image.notes]
    head = f"{path}: an image ({family}{image.layout})"
    return "\n".join([head, *(f"  {name:11} {text}" for name, text in rows)])


def _levels(image: Any) -> str:
    import numpy as np

    if image.levels is not None:
        return "{:g} to {:g}, as the file states".format(*image.levels)
    if image.array.dtype.kind == "f":
        return "not stated; floats outside [0, 1] need --levels BLACK WHITE"
    limits = np.iinfo(image.array.dtype)
    return f"not stated; {limits.min} to {limits.max} (the dtype's range) unless --levels BLACK WHITE says otherwise"
