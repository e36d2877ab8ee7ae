"""The front door: an image or a file in, the enhanced one out.

The result is x + (net(n) - n) * (white - black), n = (x - black) / (white - black), computed in float64: what the
network leaves alone stays as it is, in every dtype, to the last bit.
"""

import os
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from xrk import arrays, io, loading, picture, radiograph
from xrk.bands import Pixels
from xrk.errors import InputError, InputTypeError
from xrk.job import READ_CACHE, pixels_of, prepare
from xrk.noise import NoiseModel
from xrk.progress import Progress, told
from xrk.report import Report
from xrk.runtime.device import resolve_device
from xrk.runtime.frames import group_rows

Levels = tuple[float, float]


def enhance(
    image: Any,
    model: str | os.PathLike[str] | loading.Model | nn.Module = "resnet18-unet",
    *,
    levels: Levels | None = None,
    noise: NoiseModel | str | None = None,
    mask: Any = None,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
    runtime: str = "bands",
    compat: str | None = None,
    progress: Progress = None,
    report: bool = False,
    uncertainty: bool = False,
) -> Any:
    """Enhances one radiograph or a stack of them.

    Args:
        image: (H, W) or (N, H, W), counts; uint8, uint16, int16, int32, float32 or float64 of either byte order, any
            strides, any size from 1 x 1 up. A numpy array, a torch tensor on any device, or anything with DLPack,
            ``__array_interface__`` or ``__array__`` (the table in `xrk.arrays`). It is never written to. A stack is
            enhanced frame by frame.
        model: a name that `xrk.list_models` knows, the path of a checkpoint, what `xrk.load` gave, or a torch module in
            eval mode, for which see `xrk.load`.
        levels: (black, white) in the image's units, one normalisation for the whole image. By default the dtype's
            range for integers and (0, 1) for floats, which must then lie there. Values outside are enhanced like all
            others.
        noise: None does what the model's card asks: nothing, or estimate the noise of each frame (given ``levels``,
            black is taken as the offset). A `NoiseModel` is used as given, for every frame: the network then sees
            stabilised counts, of unit noise or, for a network that was not made for them, mapped to its own range; a
            blind-spot network of plain counts keeps these, and its answer and the pixel are weighed by the noise.
            "off" gives the network the plain normalised counts; one that was trained on stabilised counts is then
            outside what it knows.
        mask: nonzero where a pixel is invalid, bool or uint8, (H, W) or the image's shape. These pixels, NaN and Inf
            are filled from their surroundings for the network and come back as they were.
        memory: the most memory that the call may take beside the image itself and the weights as loaded, bytes or a
            text such as "2GiB": the result, the frame as the network sees it, and the plan's `peak_bytes` (see
            `xrk.plan`) fit in it. By default the fastest plan that fits what is free. The result depends on it by no
            more than the rounding of sums.
        device: "cpu", "cuda", "cuda:1"; by default the GPU that a tensor lies on, and else the CPU.
        runtime: "bands" runs the network band by band, each row once (see `xrk.plan`); "whole" on the whole frame, as
            the plain module: what the bands are tested against. A network with an operator that the runtime does not
            know is run whole where no memory is named, and the report says so.
        compat: "tiles" runs a blind-spot network from a Keras file as its published code does, to reproduce earlier
            results (see `xrk.tiles`): tiles of 512, a noise fit for each, truncated; not to be wanted otherwise.
        progress: True for a bar, or a function that is called with (frames done, frames). What it raises ends the call.
        report: also return the `Report`.
        uncertainty: put the standard deviation of every pixel into the report, ``report.uncertainty``. A blind-spot
            network knows it: that of the posterior, in counts. It costs a second run; ``report=True`` is needed.

    Returns:
        The enhanced image: same kind of array, shape, dtype, byte order and device, C-contiguous; with ``report`` the
        pair (image, Report). Integers are rounded half to even and clipped to the dtype's range, floats neither. With
        a noise model the exact unbiased inverse of the stabilisation is used (Makitalo and Foi, 2013), which is not its
        algebraic inverse: a network that changes nothing then adds up to about a quarter of the gain, in counts.
        The same call gives the same bytes.

    Raises:
        InputError: a shape or a value that cannot be used. InputTypeError: a kind or a dtype. ModelNotFoundError,
        CheckpointError, CheckpointFileError: see `xrk.load`. DeviceError: the device is not there. MemoryBudgetError:
        no plan fits the budget (the message names the smallest), or the frame does not fit on the GPU.
    """
    started = time.perf_counter()
    if uncertainty and not report:
        raise InputError("The uncertainty is part of the report; expected report=True beside uncertainty=True.")
    incoming = arrays.accept(image)
    job = prepare(
        pixels_of(incoming), model, levels=levels, noise=noise, mask=mask, memory=memory,
        device=resolve_device(device, incoming.device), runtime=runtime, uncertainty=uncertainty,
        compat=compat,
    )  # fmt: skip
    result = np.empty(incoming.shape, incoming.dtype)
    stack = result if result.ndim == 3 else result[None]
    deviation = np.empty(incoming.shape, np.float32) if uncertainty else None

    def put(frame: int, rows: slice, pixels: np.ndarray) -> None:
        stack[frame, rows] = pixels

    def unsure(frame: int, rows: slice, pixels: np.ndarray) -> None:
        deviation.reshape(stack.shape)[frame, rows] = pixels

    with told(progress, len(stack), "frame") as advance:

        def tell(frame: int, rows: int) -> None:
            if rows == 0:
                advance(frame, len(stack))

        held = result.nbytes + (deviation.nbytes if uncertainty else 0)
        frames, plan = job.run(put, tell, held, statistics=bool(report), unsure=unsure if uncertainty else None)
    handed_back = incoming.hand_back(result)
    return (handed_back, job.report(frames, plan, started, uncertainty=deviation)) if report else handed_back


def enhance_file(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    model: str | os.PathLike[str] | loading.Model | nn.Module = "resnet18-unet",
    *,
    levels: Levels | None = None,
    noise: NoiseModel | str | None = None,
    mask: Any = None,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
    runtime: str = "bands",
    compat: str | None = None,
    progress: Progress = None,
    dark: Any = None,
    flat: Any = None,
    badpixels: Any = None,
    preview: str | os.PathLike[str] | None = None,
    report: bool = True,
    uncertainty: str | os.PathLike[str] | None = None,
) -> Report:
    """Enhances an image file into another of the same layout, dtype and metadata, to the bit as `enhance` its pixels.

    Rows are decoded, enhanced and encoded at once, by a thread each beside the network's own, and none is kept longer
    than the network needs it: a file may be larger than memory. Held whole are references and masks, what a preview
    shows, a strip or tile row at a time, and frames of networks that cannot be run from the top down.

    Args:
        src: the file; its pages are a stack.
        dst: the file to write, whole or not at all; it may be ``src``. No other file that is read can be written to.
        model, levels, noise, device, runtime, compat: as for `enhance`; levels that the file states are used if none
            are given.
        memory: as for `enhance`; what reading and writing hold is part of it.
        progress: True for a bar, or a function that is called with (rows done, rows of all frames).
        mask: as for `enhance`, or the path of an image that is nonzero where a pixel is invalid.
        dark, flat: dark frame and flat field in the file's units, (H, W) or stacks to be averaged, arrays or paths.
            The image becomes (I - D) * median(F - D) / (F - D) + median(D) first, in its dtype, and median(D) is the
            offset that a noise estimate starts from; where F <= D a pixel is invalid. Without a dark, D is the black
            level (0 if no levels are known).
        badpixels: nonzero where the detector's pixel is bad, (H, W), an array or a path; `xrk.calibrate` finds them.
            Unlike pixels of the mask, these get a value from their surroundings, and are enhanced like all others.
        preview: a PNG to write beside, before and after, 8 bit.
        report: write the report into the file as well (without the seconds: the same call gives the same bytes).
        uncertainty: a TIFF to write beside: `enhance`'s ``report.uncertainty``, streamed as the result is.

    Returns:
        The `Report`; its ``file`` entry tells the files and what the correction did.

    Raises:
        What `enhance` raises, and ImageFileError for a file that cannot be read or written; before anything is written.
    """
    started = time.perf_counter()
    beside = {name: path for name, path in (("preview", preview), ("uncertainty", uncertainty)) if path is not None}
    for name, path in {"src": src, "dst": dst, **beside}.items():
        if not _is_path(path):
            raise InputTypeError(f"{name} is a {type(path).__name__}; expected a path (an array goes to xrk.enhance).")
    io.check_apart(beside, {"input": src})
    references = {"dark frame": dark, "flat field": flat, "map of bad pixels": badpixels, "mask": mask, "model": model}
    io.check_apart({"output": dst, **beside}, references)
    for name, path in beside.items():
        (picture.check_png if name == "preview" else io.check_writable)(path)
    with io.open(src, cache=READ_CACHE) as source:
        io.check_writable(dst, source)
        stated = source.metadata.levels
        pixels = pixels_of(source)
        radiograph.check_shape(pixels.shape)
        facts: dict[str, Any] = {"input": Path(src).name}
        correction = _correction(dark, flat, levels if levels is not None else stated, pixels, facts)
        bad = _bad_pixels(badpixels, pixels.shape[-2:], facts)
        if _is_path(mask):
            facts["mask"] = Path(mask).name
            mask = io.read(mask).array != 0
        job = prepare(
            replace(pixels, correction=correction, bad=bad), model, levels=levels, noise=noise, mask=mask,
            memory=memory, device=resolve_device(device), runtime=runtime, stated_levels=stated,
            offset=None if dark is None else correction.pedestal, uncertainty=uncertainty is not None,
            compat=compat,
        )  # fmt: skip
        shown = _Shown(pixels) if preview is not None else None
        height = pixels.shape[-2]
        with ExitStack() as outputs:
            tell = outputs.enter_context(told(progress, pixels.count * height, "row"))
            sink = outputs.enter_context(io.create(dst, like=source))
            held, unsure = _sink_bytes(pixels.dtype, sink), None
            if uncertainty is not None:
                facts["uncertainty"] = Path(uncertainty).name
                second = outputs.enter_context(io.create(uncertainty, shape=pixels.shape, dtype=np.float32))
                held += _sink_bytes(second.dtype, second)

                def unsure(frame: int, rows: slice, deviation: np.ndarray) -> None:
                    second.write(rows, deviation, frame)

            def put(frame: int, rows: slice, result: np.ndarray) -> None:
                sink.write(rows, result, frame)
                if shown is not None:
                    shown.after(frame, rows, result)

            frames, plan = job.run(
                put, lambda frame, rows: tell(frame * height + rows, pixels.count * height), held,
                statistics=True, seen=None if shown is None else shown.before, unsure=unsure,
            )  # fmt: skip
            if correction is not None:
                facts["correction"]["clipped"] = sum(job.clipped.values())
            notes = [f"{Path(src).name}: {note}." for note in (*source.metadata.notes, *sink.notes)]
            described = job.report(frames, plan, started, facts, notes)
            sink.report = described.to_dict(timing=False) if report else None
    if shown is not None:
        picture.preview_png(preview, *shown.frames, levels=job.levels)
    return replace(described, seconds=time.perf_counter() - started)


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def _reference(reference: Any, name: str) -> np.ndarray | None:
    if reference is None:
        return None
    return io.read(reference).array if _is_path(reference) else arrays.host_array(reference, name)


def _correction(
    dark: Any, flat: Any, levels: Levels | None, pixels: Pixels, facts: dict[str, Any]
) -> radiograph.Correction | None:
    """The correction that these references give, which is then told among the facts."""
    references = {name: r for name, r in (("dark", dark), ("flat", flat)) if r is not None}
    if not references:
        return None
    black = 0.0 if levels is None else radiograph.resolve_levels(levels, pixels.dtype)[0]
    arrays_ = (_reference(dark, "dark frame"), _reference(flat, "flat field"))
    correction = radiograph.prepare_correction(*arrays_, pixels.shape[-2:], black)
    facts["correction"] = {
        **{name: Path(r).name if _is_path(r) else "array" for name, r in references.items()},
        "invalid": 0 if correction.invalid is None else int(correction.invalid.sum()),
        "clipped": 0,
    }
    return correction


def _bad_pixels(badpixels: Any, shape: tuple[int, int], facts: dict[str, Any]) -> np.ndarray | None:
    """Where the detector's pixels are bad, bool (H, W), which is then told among the facts."""
    if badpixels is None:
        return None
    given = _reference(badpixels, "map of bad pixels")
    if given.dtype.kind not in "bui":
        raise InputTypeError(f"The map of bad pixels is of dtype {given.dtype}; expected integers, nonzero where bad.")
    if given.shape != shape:
        raise InputError(f"The map of bad pixels has shape {given.shape}; expected {shape}.")
    bad = given != 0
    if bad.all():
        raise InputError("The map of bad pixels names every pixel; expected nonzero where a pixel is bad.")
    name = Path(badpixels).name if _is_path(badpixels) else "array"
    facts["badpixels"] = {"map": name, "repaired": int(np.count_nonzero(bad))}
    return bad if bad.any() else None


def _sink_bytes(dtype: np.dtype, sink: io.Sink) -> int:
    """What a file that is written holds: rows of segments that are not complete, and segments on their way."""
    width = sink.shape[-1]
    return dtype.itemsize * width * (3 * group_rows(width) + 2 * sink.segment_rows)


class _Shown:
    """The frame that a preview shows, before and after: the middle one of a stack."""

    def __init__(self, pixels: Pixels) -> None:
        self._frame = pixels.count // 2
        self.frames = [np.empty(pixels.shape[-2:], pixels.dtype.newbyteorder("=")) for _ in range(2)]

    def before(self, frame: int, rows: slice, counts: np.ndarray) -> None:
        if frame == self._frame:
            self.frames[0][rows] = counts

    def after(self, frame: int, rows: slice, counts: np.ndarray) -> None:
        if frame == self._frame:
            self.frames[1][rows] = counts
