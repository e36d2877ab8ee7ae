"""The front door: an image or a file in, the enhanced one out.

The result is x + (net(n) - n) * (white - black), n = (x - black) / (white - black), computed in float64: what the
network leaves alone stays as it is, in every dtype, to the last bit.
"""

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import xrk
from xrk import arrays, io, loading, picture, radiograph
from xrk.bands import Frames, InOrder, Pixels
from xrk.errors import InputError, InputTypeError
from xrk.models import VIDEO
from xrk.network import Network, make_domain
from xrk.noise import NoiseModel, estimate_noise
from xrk.noise_line import OnDemand
from xrk.report import FrameReport, Report, ResidualStatistics
from xrk.runtime.budget import parse_memory
from xrk.runtime.device import describe_device, resolve_device
from xrk.runtime.frames import group_rows

Levels = tuple[float, float]
Progress = bool | Callable[[int, int], Any] | None
READ_CACHE = 32 << 20  # bytes of decoded strips and tiles: most are read once, and whole


def enhance(
    image: Any,
    model: str | os.PathLike[str] | loading.Model = "resnet18-unet",
    *,
    levels: Levels | None = None,
    noise: NoiseModel | str | None = None,
    mask: Any = None,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
    runtime: str = "bands",
    progress: Progress = None,
    report: bool = False,
) -> Any:
    """Enhances one radiograph or a stack of them.

    Args:
        image: (H, W) or (N, H, W), counts; uint8, uint16, int16, int32, float32 or float64 of either byte order, any
            strides, any size from 1 x 1 up. A numpy array, a torch tensor on any device, or anything with DLPack,
            ``__array_interface__`` or ``__array__`` (the table in `xrk.arrays`). It is never written to. A stack is
            enhanced frame by frame.
        model: a name that `xrk.list_models` knows, the path of a checkpoint, or what `xrk.load` gave.
        levels: (black, white) in the image's units, one normalisation for the whole image. By default the dtype's
            range for integers and (0, 1) for floats, which must then lie there. Values outside are enhanced like all
            others.
        noise: None does what the model's card asks: nothing, or estimate the noise of each frame (given ``levels``,
            black is taken as the offset). A `NoiseModel` is used as given, for every frame: the network then sees
            stabilised counts, of unit noise or, for a network that was not made for them, mapped to its own range.
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
        progress: True for a bar, or a function that is called with (frames done, frames). What it raises ends the call.
        report: also return the `Report`.

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
    incoming = arrays.accept(image)
    job = _prepare(
        _pixels_of(incoming), model, levels=levels, noise=noise, mask=mask, memory=memory,
        device=resolve_device(device, incoming.device), runtime=runtime,
    )  # fmt: skip
    result = np.empty(incoming.shape, incoming.dtype)
    stack = result if result.ndim == 3 else result[None]

    def put(frame: int, rows: slice, pixels: np.ndarray) -> None:
        stack[frame, rows] = pixels

    with _told(progress, len(stack), "frame") as told:

        def tell(frame: int, rows: int) -> None:
            if rows == 0:
                told(frame, len(stack))

        frames, plan = job.run(put, tell, result.nbytes, statistics=bool(report))
    handed_back = incoming.hand_back(result)
    return (handed_back, job.report(frames, plan, started)) if report else handed_back


def enhance_file(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    model: str | os.PathLike[str] | loading.Model = "resnet18-unet",
    *,
    levels: Levels | None = None,
    noise: NoiseModel | str | None = None,
    mask: Any = None,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
    runtime: str = "bands",
    progress: Progress = None,
    dark: Any = None,
    flat: Any = None,
    preview: str | os.PathLike[str] | None = None,
    report: bool = True,
) -> Report:
    """Enhances an image file into another of the same layout, dtype and metadata, to the bit as `enhance` its pixels.

    Rows are decoded, enhanced and encoded at once, by a thread each beside the network's own, and none is kept longer
    than the network needs it: a file may be larger than memory. Held whole are references and masks, what a preview
    shows, a strip or tile row at a time, and frames of networks that cannot be run from the top down.

    Args:
        src: the file; its pages are a stack.
        dst: the file to write, whole or not at all; it may be ``src``.
        model, levels, noise, device, runtime: as for `enhance`; levels that the file states are used if none are given.
        memory: as for `enhance`; what reading and writing hold is part of it.
        progress: True for a bar, or a function that is called with (rows done, rows of all frames).
        mask: as for `enhance`, or the path of an image that is nonzero where a pixel is invalid.
        dark, flat: dark frame and flat field in the file's units, (H, W) or stacks to be averaged, arrays or paths.
            The image becomes (I - D) * median(F - D) / (F - D) + median(D) first, in its dtype, and median(D) is the
            offset that a noise estimate starts from; where F <= D a pixel is invalid. Without a dark, D is the black
            level (0 if no levels are known).
        preview: a PNG to write beside, before and after, 8 bit.
        report: write the report into the file as well (without the seconds: the same call gives the same bytes).

    Returns:
        The `Report`; its ``file`` entry tells the files and what the correction did.

    Raises:
        What `enhance` raises, and ImageFileError for a file that cannot be read or written; before anything is written.
    """
    started = time.perf_counter()
    for name, path in (("src", src), ("dst", dst), *((("preview", preview),) if preview is not None else ())):
        if not _is_path(path):
            raise InputTypeError(f"{name} is a {type(path).__name__}; expected a path (an array goes to xrk.enhance).")
    if preview is not None:
        io.check_target(preview)
        if os.path.realpath(preview) in (os.path.realpath(src), os.path.realpath(dst)):
            raise InputError(f"The preview {os.fspath(preview)} is the image file itself; expected a name of its own.")
    with io.open(src, cache=READ_CACHE) as source:
        io.check_writable(dst, source)
        stated = source.metadata.levels
        pixels = _pixels_of(source)
        radiograph.check_shape(pixels.shape)
        facts: dict[str, Any] = {"input": Path(src).name}
        correction = _correction(dark, flat, levels if levels is not None else stated, pixels, facts)
        if _is_path(mask):
            facts["mask"] = Path(mask).name
            mask = io.read(mask).array != 0
        job = _prepare(
            replace(pixels, correction=correction), model, levels=levels, noise=noise, mask=mask, memory=memory,
            device=resolve_device(device), runtime=runtime, stated_levels=stated,
            offset=None if dark is None else correction.pedestal,
        )  # fmt: skip
        shown = _Shown(pixels) if preview is not None else None
        height = pixels.shape[-2]
        with io.create(dst, like=source) as sink, _told(progress, pixels.count * height, "row") as tell:

            def put(frame: int, rows: slice, result: np.ndarray) -> None:
                sink.write(rows, result, frame)
                if shown is not None:
                    shown.after(frame, rows, result)

            frames, plan = job.run(
                put, lambda frame, rows: tell(frame * height + rows, pixels.count * height), _sink_bytes(pixels, sink),
                statistics=True, seen=None if shown is None else shown.before,
            )  # fmt: skip
            if correction is not None:
                facts["correction"]["clipped"] = sum(job.clipped.values())
            notes = [f"{Path(src).name}: {note}." for note in (*source.metadata.notes, *sink.notes)]
            described = job.report(frames, plan, started, facts, notes)
            sink.report = described.to_dict(timing=False) if report else None
    if shown is not None:
        picture.preview_png(preview, *shown.frames, levels=job.levels)
    return replace(described, seconds=time.perf_counter() - started)


# --- what is checked before anything runs -------------------------------------------------------------------------


def _prepare(
    pixels: Pixels,
    model: Any,
    *,
    levels: Levels | None,
    noise: NoiseModel | str | None,
    mask: Any,
    memory: int | str | None,
    device: torch.device,
    runtime: str,
    stated_levels: Levels | None = None,
    offset: float | None = None,
) -> "_Job":
    radiograph.check_shape(pixels.shape)
    radiograph.check_dtype(pixels.dtype)
    if mask is not None:
        checked = radiograph.check_mask(arrays.host_array(mask, "mask"), pixels.shape)
        pixels = replace(pixels, masks=(*pixels.masks, checked))
    if not (noise is None or isinstance(noise, NoiseModel) or (isinstance(noise, str) and noise == "off")):
        kind = InputError if isinstance(noise, str) else InputTypeError
        raise kind(f'noise={noise!r}; expected None (what the model asks for), an xrk.NoiseModel, or "off".')
    if runtime not in ("bands", "whole"):
        raise InputError(f'runtime={runtime!r}; expected "bands" or "whole".')
    budget = parse_memory(memory)
    known = levels if levels is not None else stated_levels
    whole = Frames(pixels, group_rows(pixels.shape[-1]))
    try:
        resolved = radiograph.resolve_levels(known, pixels.dtype, whole.valid())
    finally:
        whole.close()
    if known is not None:
        source = "given" if levels is not None else "file"
    else:
        source = "unit range" if pixels.dtype.kind == "f" else "range of the dtype"
    if offset is None and levels is not None:
        offset = resolved[0]
    return _Job(pixels, _model(model), resolved, source, noise, offset, budget, device, runtime)


def _pixels_of(image: "arrays.Incoming | io.Source") -> Pixels:
    """Where the pixels of an array or of an opened file come from."""
    if isinstance(image, io.Source):
        return Pixels(
            tuple(image.shape), image.metadata.dtype,
            lambda frame, a, b: image.read(slice(a, b), slice(None), frame), ahead=True,
        )  # fmt: skip
    last: list[Any] = [None, None]

    def read(frame: int, a: int, b: int) -> np.ndarray:
        if last[0] != frame:  # one copy of a frame at most, where it is not as it should be
            last[:] = frame, image.frame(frame)
        return last[1][a:b]

    return Pixels(image.shape, image.dtype, read, masks=() if image.mask is None else (image.mask,))


def _model(model: Any) -> loading.Model:
    if isinstance(model, str | os.PathLike):
        model = loading.load(model)
    if not isinstance(model, loading.Model):
        raise InputTypeError(
            f"The model is a {type(model).__name__}; expected a name, the path of a checkpoint, or what xrk.load gave."
        )
    if model.card.architecture in VIDEO:
        raise InputError(
            f"{model.card.name} ({model.card.architecture}) is a network for video, low-resolution frames and "
            "high-resolution key frames in (xrk.fuse_video); expected a network for single images."
        )
    if model.card.output_scale > 1:
        raise InputError(
            f"{model.card.name} magnifies {model.card.output_scale:g} times, and an enhanced frame keeps its size; "
            "call the network itself, xrk.load(path).module."
        )
    if any(part.training for part in model.module.modules()):
        raise InputError(f"The module of {model.card.name} is in training mode; call .eval() on it first.")
    dtypes = {p.dtype for p in model.module.parameters() if p.is_floating_point()}
    if not dtypes <= {torch.float32} and dtypes != {torch.float64}:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise InputTypeError(f"The weights of {model.card.name} are {names}; expected float32 (or float64) throughout.")
    return model


@contextmanager
def _told(progress: Progress, total: int, unit: str) -> Iterator[Callable[[int, int], Any]]:
    if progress is None or progress is False:
        yield lambda done, total: None
    elif progress is True:
        with tqdm(total=total, unit=unit) as bar:
            yield lambda done, total: bar.update(done - bar.n)
    elif callable(progress):
        yield progress
    else:
        raise InputTypeError(f"progress={progress!r}; expected None, True, or a function of (done, all).")


# --- the work ------------------------------------------------------------------------------------------------------


Put = Callable[[int, slice, np.ndarray], None]


@dataclass(frozen=True)
class _Job:
    """One call, checked and ready to run."""

    pixels: Pixels
    model: loading.Model
    levels: Levels
    levels_source: str
    noise: NoiseModel | str | None
    offset: float | None  # counts without exposure, where the caller knows them
    memory: int | None
    device: torch.device
    runtime: str
    clipped: dict[tuple[int, int], int] = field(default_factory=dict)  # pixels that the correction clipped, in parts

    def run(
        self, put: Put, tell: Callable[[int, int], Any], held: int, *, statistics: bool,
        seen: Put | None = None,
    ) -> tuple[list[FrameReport], str]:  # fmt: skip
        """Enhances all frames.

        put: takes (frame, rows, their pixels in the machine's byte order), from the top down, in one thread.
        tell: is called with (frames done, 0), and between two frames with the rows done of the next one.
        held: the most bytes that ``put`` keeps. seen: takes the rows before they are enhanced, as ``put`` does.
        """
        described = []
        height, width = self.pixels.shape[-2:]
        held += self._beside()
        network = Network(
            self.model, self.device, (height, width), self.memory, held, self.runtime, self._group_bytes()
        )
        frames = Frames(self.pixels, network.run.group, network.groups, self.clipped)
        try:
            for i in range(self.pixels.count):
                described.append(self._frame(i, frames, network, put, tell, statistics, seen))
                tell(i + 1, 0)
        finally:
            frames.close()
        return described, network.run.description

    def _group_bytes(self) -> int:
        """What one group of rows takes that was read: counts, invalid pixels and fillings."""
        width, item = self.pixels.shape[-1], self.pixels.dtype.itemsize
        masked = bool(self.pixels.masks) or self.pixels.dtype.kind == "f" or self.pixels.correction is not None
        kept = (2 * item + 1 if masked else item) if self.pixels.ahead or masked else 0
        return kept * width * group_rows(width)

    def _beside(self) -> int:
        """Bytes that the call holds beside what the network's plan counts: at most this, whatever the frame."""
        pixels = self.pixels
        height, width = pixels.shape[-2:]
        item, rows = pixels.dtype.itemsize, group_rows(pixels.shape[-1])
        held = 16 * rows * width  # a group as the network sees it, twice, and two as it gave them
        held += (64 + 2 * item) * rows * width  # what is worked on at a time, in float64
        if pixels.ahead:
            held += READ_CACHE
        else:
            held += 2 * item * height * width  # a frame that is not as it should be is copied
        if pixels.correction is not None:
            held += 17 * height * width + 24 * rows * width
        return held

    def _frame(
        self,
        i: int,
        frames: Frames,
        network: Network,
        put: Put,
        tell: Callable[[int, int], Any],
        statistics: bool,
        seen,
    ) -> FrameReport:
        """Enhances frame ``i``."""
        height, width = self.pixels.shape[-2:]
        if frames.all_invalid(i):
            for rows in frames.groups():
                counts = frames.counts(i, rows.start, rows.stop)
                if seen is not None:
                    seen(i, rows, counts)
                put(i, rows, counts)
            return FrameReport(None, 0, height * width, None)
        noise = self._noise(i, frames)
        domain = make_domain(network.card.domain, self.levels, noise, torch.get_num_threads())
        residual = ResidualStatistics(noise)
        clipped = invalid = 0

        def finish(rows: slice, answer: np.ndarray) -> None:
            nonlocal clipped, invalid
            band = frames.band(i, rows.start, rows.stop)
            before, after = domain.change(band.filled, answer)
            if band.invalid is not None:
                after[band.invalid] = before[band.invalid]
            out = np.empty(band.filled.shape, band.filled.dtype)
            clipped += radiograph.apply_residual(band.filled, before, after, domain.scale, out, domain.threads)
            if statistics:
                residual.add(band.filled, out, band.invalid)
            if band.invalid is not None:
                out[band.invalid] = band.counts[band.invalid]
                invalid += int(np.count_nonzero(band.invalid))
            if seen is not None:
                seen(i, rows, band.counts)
            put(i, rows, out)

        with InOrder(self.pixels.ahead) as finishing:

            def give(rows: slice, answer: np.ndarray) -> None:
                finishing.do(finish, rows, answer)
                if rows.stop < height:
                    tell(i, rows.stop)

            network(lambda a, b: domain.before(frames.band(i, a, b).filled), give)
            finishing.finish()
        return FrameReport(
            None if noise is None else noise.to_dict(), clipped, invalid, residual.result() if statistics else None
        )

    def _noise(self, i: int, frames: Frames) -> NoiseModel | None:
        if isinstance(self.noise, NoiseModel):
            return self.noise
        if self.noise == "off" or self.model.card.noise == "none":
            return None
        shape = self.pixels.shape[-2:]
        if not self.pixels.ahead:
            return estimate_noise(frames.counts(i, 0, shape[0]), self.offset, mask=frames.invalid(i, 0, shape[0]))
        counts = OnDemand(shape, self.pixels.dtype.newbyteorder("="), lambda a, b: frames.counts(i, a, b))
        mask = None
        if self.pixels.masks or self.pixels.correction is not None or self.pixels.dtype.kind == "f":

            def invalid(a: int, b: int) -> np.ndarray:
                found = frames.invalid(i, a, b)
                return np.zeros((b - a, shape[1]), bool) if found is None else found

            mask = OnDemand(shape, np.dtype(bool), invalid)
        return estimate_noise(counts, self.offset, mask=mask)

    def report(
        self,
        frames: list[FrameReport],
        plan: str,
        started: float,
        file: dict[str, Any] | None = None,
        notes: Iterable[str] = (),
    ) -> Report:
        card, image = self.model.card, self.pixels
        warnings = list(notes)
        untouched = [i for i, frame in enumerate(frames) if frame.residual is None]
        warnings += [f"Frame {i}: every pixel is invalid; returned as it was." for i in untouched]
        for i, frame in enumerate(frames):
            if not isinstance(self.noise, NoiseModel) and frame.noise is not None and frame.noise["gain"] == 0.0:
                warnings.append(f"Frame {i}: no quantum noise was found; {frame.noise['source']}.")
        if self.noise == "off" and card.domain == "stabilised":
            warnings.append(f"{card.name} was trained on stabilised counts and ran without a noise model.")
        return Report(
            model=card.name,
            architecture=card.architecture,
            domain=card.domain,
            weights_sha256=card.sha256,
            shape=image.shape,
            dtype=image.dtype.str,
            levels=self.levels,
            levels_source=self.levels_source,
            frames=frames,
            device=describe_device(self.device),
            kernels=radiograph.kernel_path(),
            plan=plan,
            memory=self.memory,
            versions={
                "xrk": xrk.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            seconds=time.perf_counter() - started,
            warnings=warnings,
            file=file,
        )


# --- around files ---------------------------------------------------------------------------------------------------


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


def _sink_bytes(pixels: Pixels, sink: io.Sink) -> int:
    """What a file that is written holds: rows of segments that are not complete, and segments on their way."""
    width, item = pixels.shape[-1], pixels.dtype.itemsize
    return item * width * (3 * group_rows(width) + 2 * sink.segment_rows)


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
