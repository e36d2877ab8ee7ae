"""The front door: an image or a file in, the enhanced one out.

The result is x + (net(n) - n) * (white - black), n = (x - black) / (white - black), computed in float64: what the
network leaves alone stays as it is, in every dtype, to the last bit.
"""

import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import xrk
from xrk import arrays, io, loading, picture, radiograph
from xrk.errors import InputError, InputTypeError, MemoryBudgetError
from xrk.noise import NoiseModel, estimate_noise
from xrk.report import FrameReport, Report, residual_statistics
from xrk.runtime.budget import parse_memory
from xrk.runtime.device import describe_device, module_on, resolve_device
from xrk.runtime.frames import ROWS, FrameRunner
from xrk.runtime.whole import padded_size

Levels = tuple[float, float]
Progress = bool | Callable[[int, int], Any] | None


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
        incoming, model, levels=levels, noise=noise, mask=mask, memory=memory, device=device, runtime=runtime
    )
    result, frames, plan = job.run(progress, statistics=bool(report))
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
    """Enhances an image file into another of the same layout, dtype and metadata.

    Args:
        src: the file; its pages are a stack.
        dst: the file to write, whole or not at all; it may be ``src``.
        model, levels, noise, memory, device, runtime, progress: as for `enhance`; levels that the file states are used
            if none are given.
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
    image = io.read(src)
    io.check_writable(dst, image)
    if preview is not None:
        io.check_target(preview)
        if os.path.realpath(preview) in (os.path.realpath(src), os.path.realpath(dst)):
            raise InputError(f"The preview {os.fspath(preview)} is the image file itself; expected a name of its own.")
    facts: dict[str, Any] = {"input": Path(src).name}
    incoming = arrays.accept(image.array)
    radiograph.check_shape(incoming.shape)
    invalid = offset = None
    references = {name: r for name, r in (("dark", dark), ("flat", flat)) if r is not None}
    if references:
        known = levels if levels is not None else image.levels
        black = 0.0 if known is None else radiograph.resolve_levels(known, incoming.dtype)[0]
        pixels = (_reference(dark, "dark frame"), _reference(flat, "flat field"))
        correction = radiograph.prepare_correction(*pixels, incoming.shape[-2:], black)
        incoming, clipped = _corrected(incoming, correction)
        invalid, offset = correction.invalid, None if dark is None else correction.pedestal
        facts["correction"] = {
            **{name: Path(r).name if _is_path(r) else "array" for name, r in references.items()},
            "invalid": 0 if invalid is None else int(invalid.sum()),
            "clipped": clipped,
        }
    if _is_path(mask):
        facts["mask"] = Path(mask).name
        mask = io.read(mask).array != 0
    job = _prepare(
        incoming, model, levels=levels, noise=noise, mask=mask, memory=memory, device=device, runtime=runtime,
        stated_levels=image.levels, invalid=invalid, offset=offset,
    )  # fmt: skip
    result, frames, plan = job.run(progress, statistics=True)
    described = job.report(frames, plan, started, facts, [f"{Path(src).name}: {note}." for note in image.notes])
    io.write(dst, result, like=image, report=described.to_dict(timing=False) if report else None)
    if preview is not None:
        picture.preview_png(preview, incoming.array, result, levels=job.levels)
    return replace(described, seconds=time.perf_counter() - started)


# --- what is checked before anything runs -------------------------------------------------------------------------


def _prepare(
    incoming: arrays.Incoming,
    model: Any,
    *,
    levels: Levels | None,
    noise: NoiseModel | str | None,
    mask: Any,
    memory: int | str | None,
    device: str | torch.device | None,
    runtime: str,
    stated_levels: Levels | None = None,
    invalid: np.ndarray | None = None,
    offset: float | None = None,
) -> "_Job":
    radiograph.check_shape(incoming.shape)
    masks = [m for m in (incoming.mask, invalid) if m is not None]
    if mask is not None:
        masks.append(radiograph.check_mask(arrays.host_array(mask, "mask"), incoming.shape))
    masked = _Masked(incoming, tuple(masks))
    if not (noise is None or isinstance(noise, NoiseModel) or (isinstance(noise, str) and noise == "off")):
        kind = InputError if isinstance(noise, str) else InputTypeError
        raise kind(f'noise={noise!r}; expected None (what the model asks for), an xrk.NoiseModel, or "off".')
    if runtime not in ("bands", "whole"):
        raise InputError(f'runtime={runtime!r}; expected "bands" or "whole".')
    budget = parse_memory(memory)
    where = resolve_device(device, incoming.device)
    known = levels if levels is not None else stated_levels
    resolved = radiograph.resolve_levels(known, incoming.dtype, masked.frames())
    if known is not None:
        source = "given" if levels is not None else "file"
    else:
        source = "unit range" if incoming.dtype.kind == "f" else "range of the dtype"
    if offset is None and levels is not None:
        offset = resolved[0]
    return _Job(masked, _model(model), resolved, source, noise, offset, budget, where, runtime)


def _model(model: Any) -> loading.Model:
    if isinstance(model, str | os.PathLike):
        model = loading.load(model)
    if not isinstance(model, loading.Model):
        raise InputTypeError(
            f"The model is a {type(model).__name__}; expected a name, the path of a checkpoint, or what xrk.load gave."
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
def _told(progress: Progress, total: int) -> Iterator[Callable[[int, int], Any]]:
    if progress is None or progress is False:
        yield lambda done, total: None
    elif progress is True:
        with tqdm(total=total, unit="frame") as bar:
            yield lambda done, total: bar.update(done - bar.n)
    elif callable(progress):
        yield progress
    else:
        raise InputTypeError(f"progress={progress!r}; expected None, True, or a function of (frames done, frames).")


@dataclass(frozen=True)
class _Masked:
    """The frames of an image, each with its invalid pixels."""

    image: arrays.Incoming
    masks: tuple[np.ndarray, ...]

    def frame(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(H, W) counts, and bool (H, W) or None."""
        mask = None
        for one in self.masks:
            part = (one[i] if one.ndim == 3 else one).astype(bool, copy=False)
            mask = part if mask is None else mask | part
        frame = self.image.frame(i)
        return frame, radiograph.invalid_pixels(frame, mask)

    def frames(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        return (self.frame(i) for i in range(self.image.frames))


# --- the work ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One call, checked and ready to run."""

    image: _Masked
    model: loading.Model
    levels: Levels
    levels_source: str
    noise: NoiseModel | str | None
    offset: float | None  # counts without exposure, where the caller knows them
    memory: int | None
    device: torch.device
    runtime: str

    def run(self, progress: Progress, *, statistics: bool) -> tuple[np.ndarray, list[FrameReport], str]:
        image = self.image.image
        result = np.empty(image.shape, image.dtype)
        stack = result if result.ndim == 3 else result[None]
        described = []
        with _told(progress, image.frames) as tell:
            network = _Network(self.model, self.device, image.shape[-2:], self.memory, self._beside(), self.runtime)
            for i in range(image.frames):
                described.append(self._frame(i, network, stack[i], statistics))
                tell(i + 1, image.frames)
        return result, described, network.run.description

    def _beside(self) -> int:
        """Bytes that the call holds beside what the network's plan counts: at most this, whatever the frame."""
        image = self.image.image
        height, width = image.shape[-2:]
        padded = math.prod(padded_size((height, width), self.model.card.size_multiple))
        pixels, item = height * width, image.dtype.itemsize
        held = item * math.prod(image.shape) + 4 * pixels  # the result, the frame as the network sees it
        if padded != pixels:
            held += 4 * padded
        if not isinstance(image.array, np.ndarray) or not image.array.flags.c_contiguous or not image.dtype.isnative:
            held += 2 * item * pixels
        if self.image.masks or image.dtype.kind == "f":
            held += (2 + item) * pixels
        return held + 64 * ROWS * width  # what is worked on at a time, in float64

    def _frame(self, i: int, network: "_Network", out: np.ndarray, statistics: bool) -> FrameReport:
        """Enhances frame ``i`` into ``out`` (H, W)."""
        frame, invalid = self.image.frame(i)
        if invalid is not None and invalid.all():
            out[...] = frame
            return FrameReport(None, 0, frame.size, None)
        filled = frame if invalid is None else radiograph.fill(frame, invalid)
        noise = self._noise(filled, invalid)
        domain = _domain(network.card.domain, self.levels, noise)
        seen = domain.before(filled)
        swapped = not out.dtype.isnative
        native = np.empty_like(frame) if swapped else out.view(frame.dtype)
        clipped, threads = 0, torch.get_num_threads()
        for rows, answer in network(seen):
            before, after = domain.change(filled[rows], seen[rows], answer)
            if invalid is not None:
                after[invalid[rows]] = before[invalid[rows]]
            clipped += radiograph.apply_residual(filled[rows], before, after, domain.scale, native[rows], threads)
        residual = residual_statistics(filled, native, noise, invalid) if statistics else None
        if invalid is not None:
            native[invalid] = frame[invalid]
        if swapped:
            out[...] = native
        count = 0 if invalid is None else int(np.count_nonzero(invalid))
        return FrameReport(None if noise is None else noise.to_dict(), clipped, count, residual)

    def _noise(self, frame: np.ndarray, invalid: np.ndarray | None) -> NoiseModel | None:
        if isinstance(self.noise, NoiseModel):
            return self.noise
        if self.noise == "off" or self.model.card.noise == "none":
            return None
        return estimate_noise(frame, self.offset, mask=invalid)

    def report(
        self,
        frames: list[FrameReport],
        plan: str,
        started: float,
        file: dict[str, Any] | None = None,
        notes: Iterable[str] = (),
    ) -> Report:
        card, image = self.model.card, self.image.image
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


@dataclass(frozen=True)
class _Domain:
    """What the network sees of a frame, and what becomes of its answer: frame + (after - before) * scale."""

    noise: NoiseModel | None  # None: plain normalised counts
    shift: float
    unit: float  # the network's values are (v - shift) / unit, v counts or stabilised counts
    plain: bool  # stabilised counts as they are

    @property
    def scale(self) -> float:
        return self.unit if self.noise is None else 1.0

    def before(self, frame: np.ndarray) -> np.ndarray:
        """(H, W) float32, what the network is given."""
        threads = torch.get_num_threads()
        if self.noise is None:
            return radiograph.normalise(frame, self.shift, 1.0 / self.unit, threads)
        if self.plain:
            return self.noise.stabilise(frame, np.float32)
        out = np.empty(frame.shape, np.float32)
        for start in range(0, len(frame), ROWS):
            rows = slice(start, start + ROWS)
            stabilised = self.noise.stabilise(frame[rows], np.float64)
            out[rows] = radiograph.normalise(stabilised, self.shift, 1.0 / self.unit, threads)
        return out

    def change(self, frame: np.ndarray, seen: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(before, after) of the same rows, both float32 or both float64."""
        if self.noise is None:
            return seen.astype(answer.dtype, copy=False), answer
        stabilised = answer if self.plain else answer.astype(np.float64) * self.unit + self.shift
        return frame.astype(np.float64), self.noise.unstabilise(stabilised, np.float64)


def _domain(domain: str, levels: Levels, noise: NoiseModel | None) -> _Domain:
    black, white = levels
    low, high = (-1.0, 1.0) if domain == "symmetric" else (0.0, 1.0)
    if noise is None:
        unit = (white - black) / (high - low)
        return _Domain(None, black - low * unit, unit, False)
    if domain == "stabilised":
        return _Domain(noise, 0.0, 1.0, True)
    # Stabilised counts span hundreds of noise sigmas: the images of the levels become the range the network knows.
    dark, bright = (float(v) for v in noise.stabilise(np.array([black, white])))
    if not bright > dark:
        raise InputError(
            f"The white level {white:g} is not above the noise model's offset {noise.offset:g}; "
            "expected levels and a noise model of the same image."
        )
    unit = (bright - dark) / (high - low)
    return _Domain(noise, dark - low * unit, unit, False)


class _Network:
    """A model on its device, for frames of one size in numpy."""

    def __init__(
        self,
        model: loading.Model,
        device: torch.device,
        shape: tuple[int, int],
        memory: int | None,
        beside: int,
        runtime: str,
    ) -> None:
        self.card = model.card
        self.device = device
        module = module_on(model.module, device)
        sizes = {"size_multiple": self.card.size_multiple, "output_scale": self.card.output_scale}
        self.run = FrameRunner(module, shape, **sizes, memory=memory, beside=beside, whole=runtime == "whole")

    def __call__(self, v: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """(H, W) float32 in the network's range; rows of the module's own dtype out, all finite, and which they are."""
        run = self.run
        try:
            answer = run(torch.from_numpy(v).to(self.device, run.dtype))
        except torch.OutOfMemoryError as error:
            raise MemoryBudgetError(
                f"The frame {v.shape} does not fit on {describe_device(self.device)}; "
                'pass device="cpu", or memory= with what is free there.'
            ) from error
        for rows, part in answer:
            if not torch.isfinite(part).all():
                bad = sum(int((~torch.isfinite(part)).sum()) for _, part in answer)
                raise InputError(
                    f"The network's output is not finite at {bad} of {v.size} pixels; "
                    f"its input lay between {v.min():g} and {v.max():g}: expected levels near the image's values "
                    "(are there fill values that a mask should name?)."
                )
            yield rows, np.ascontiguousarray(part.to("cpu", run.dtype).numpy())


# --- around files ---------------------------------------------------------------------------------------------------


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def _reference(reference: Any, name: str) -> np.ndarray | None:
    if reference is None:
        return None
    return io.read(reference).array if _is_path(reference) else arrays.host_array(reference, name)


def _corrected(incoming: arrays.Incoming, correction: radiograph.Correction) -> tuple[arrays.Incoming, int]:
    """The corrected image, and how many pixels were clipped."""
    result = np.empty(incoming.shape, incoming.dtype)
    stack = result if result.ndim == 3 else result[None]
    clipped = 0
    for i in range(incoming.frames):
        stack[i], count = correction.apply(incoming.frame(i))
        clipped += count
    return arrays.accept(result), clipped
