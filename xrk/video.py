"""Two cameras in time: a fast blurred sequence and a slow sharp one become one fast sharp one, frame by frame.

LR frame i lies between the key frames k = floor(i / ratio) and k + 1 of the HR camera; key frame k belongs to LR frame
k ratio. A network sees the LR frames i - r, i and i + r and both key frames (r is ``separation``), and gives frame i at
the size of the key frames. At the ends of the sequence the nearest LR frame stands for one that is not there, and the
last key frame for one after it (XFusion; Tang et al. 2025, J. Synchrotron Rad. 32, 432).

What the network makes of one frame alone, whatever stands around it, is made once and kept for as long as a window can
need it: of 2 r + 1 LR frames and two key frames. Memory does not grow with the sequence.
"""

import os
import platform
import time
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

import xrk
from xrk import loading, radiograph
from xrk.arguments import whole_number
from xrk.errors import InputError, InputTypeError
from xrk.models import VIDEO, Card
from xrk.models.stf import TwoCameras
from xrk.network import Levels, make_domain
from xrk.noise import NoiseModel, estimate_noise
from xrk.progress import Progress, check_progress, told
from xrk.runtime.budget import parse_memory
from xrk.runtime.device import describe_device, resolve_device
from xrk.video_counts import Conversion, Counts, Native, XFusion
from xrk.video_sources import Frames, open_frames
from xrk.video_windows import NETWORK_SCALE, Bicubic, Linear, Method, Network, Video

__all__ = ["BASELINES", "VideoReport", "fuse_video"]

BASELINES = {"bicubic": Bicubic, "linear": Linear}


@dataclass
class VideoReport:
    """What `xrk.fuse_video` does; its figures grow while frames are taken.

    Attributes:
        model, architecture: the card's; of a baseline its name, twice. weights_sha256: of the weights file, or None.
        shape: (N, H, W) of the result, N None where an iterator will tell. dtype: of the result.
        lr_shape: (H, W) of LR frames. scale, ratio, separation, compat: as given.
        levels, hr_levels: (black, white) of the cameras; None with compat. noise: the models used, or None.
        device: where the network runs. plan: how. memory: the budget in bytes, or None.
        start: number of the first frame. frames: frames given so far.
        clipped: their pixels that left the range of the dtype (compat: of [0, 1]).
        features: LR and HR frames that features were made of. used: features that windows used.
        versions: of xrk, torch, numpy and python. seconds: in the call and in making frames.
    """

    model: str
    architecture: str
    weights_sha256: str | None
    shape: tuple[int | None, int, int]
    dtype: str
    lr_shape: tuple[int, int]
    scale: int
    ratio: int
    separation: int
    compat: str | None
    levels: Levels | None
    hr_levels: Levels | None
    noise: dict[str, dict[str, Any]] | None
    device: str
    plan: str
    memory: int | None
    start: int
    frames: int = 0
    clipped: int = 0
    features: dict[str, int] = field(default_factory=lambda: {"lr": 0, "hr": 0})
    used: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self, *, timing: bool = True) -> dict[str, Any]:
        """Plain JSON values only; ``timing=False`` leaves the seconds out."""
        entries = asdict(self)
        if not timing:
            del entries["seconds"]
        return entries

    def __str__(self) -> str:
        size = " x ".join(map(str, self.shape[-2:]))
        rate = f"{self.frames / self.seconds:.3g} frames per second" if self.seconds and self.frames else "not run"
        lines = [
            f"{self.model} on {self.device}, {self.frames} frames of {size} {self.dtype}, {rate}",
            f"{self.plan}; {self.clipped} pixels clipped",
        ]
        if self.used:
            made = sum(self.features.values())
            lines.append(f"features of {made} frames made for {self.used} uses in windows")
        return "\n".join(lines)


def fuse_video(
    lr: Any,
    hr: Any,
    *,
    scale: int = 4,
    ratio: int = 20,
    separation: int = 1,
    model: str | os.PathLike[str] | loading.Model | TwoCameras = "stf",
    levels: Levels | None = None,
    hr_levels: Levels | None = None,
    noise: NoiseModel | tuple[NoiseModel, NoiseModel] | str | None = None,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
    runtime: str = "bands",
    compat: str | None = None,
    start: int = 0,
    progress: Progress = None,
    report: bool = False,
) -> Any:
    """Fuses a fast low-resolution and a slow high-resolution sequence into a fast high-resolution one.

    Args:
        lr: (N, h, w), the fast camera's frames, counts; uint8, uint16, int16, int32, float32 or float64. An array of
            any kind that `xrk.enhance` takes, the path of a TIFF stack or of an HDF5 file ("file.h5::/data/set"; needs
            h5py; the name may be left out where there is one data set of three axes), an open data set, a list of
            frames, or an iterator, of which no more frames are taken than the next result needs.
        hr: (M, scale h, scale w), the slow camera's key frames, of the same dtype; kinds as for ``lr``.
        scale: HR pixels per LR pixel, along each side. Networks have 4.
        ratio: LR frames per key frame: key frame k belongs to LR frame k ratio. There is a key frame for every LR frame
            at such a place, and at most one after the last LR frame.
        separation: from the middle LR frame of a window to its neighbours, in frames.
        model: "stf" or what `xrk.list_models` names for video, the path of a checkpoint, what `xrk.load` gave, or a
            `TwoCameras` module, whose values lie between 0 and 1. Without a network: "bicubic" (LR frame i enlarged by
            cubic convolution, a = -0.75, the border repeated: torch's ``interpolate``), and "linear" (between the key
            frames, (1 - t) K(k) + t K(k + 1) with t = i / ratio - k).
        levels: (black, white) of both cameras, one normalisation for the whole sequence; by default what a file
            states, else the dtype's range for integers and (0, 1) for floats, which must then lie there.
        hr_levels: the HR camera's, where they are others. Results are counts of the HR camera.
        noise: as for `xrk.enhance`, for both cameras or a pair (LR, HR); None does what the model's card asks. An
            estimate is made from each camera's first frame.
        memory: the most memory to take beside what the caller holds and the weights as loaded, bytes or a text such as
            "2GiB". It does not depend on the length of the sequence. By default the fastest plans that fit.
        device: "cpu", "cuda", "cuda:1"; by default where the module lies.
        runtime: "bands", or "whole" for the plain network, as for `xrk.enhance`.
        compat: "xfusion" does as the original does, in 8 bits: see `xrk.video_counts.XFusion`. Frames are uint8;
            `xrk.metrics.xfusion_scores` measures them as its paper does.
        start: number of the first LR frame to give a result for; those before it are not computed.
        progress: True for a bar, or a function that is called with (frames done, frames), frames None where an iterator
            will tell. What it raises ends the sequence.
        report: return the pair (generator, `VideoReport`).

    Returns:
        A generator of frames (scale h, scale w), of the dtype of ``hr`` and its kind of array, in order: one for every
        LR frame from the first key frame on, up to the last but ``ratio`` frames after the last key frame, which then
        stands for both. Integers are rounded half to even and clipped to the dtype's range. What is not finite in
        float frames is filled from its surroundings first. Closing the generator frees all that it holds.

    Raises:
        At the call, InputError: sizes that do not fit the scale, fewer LR frames than a window has, frame counts that
        do not fit the ratio, options out of range, or a network for something else. InputTypeError: a kind or dtype
        that cannot be used, or two different dtypes. ImageFileError: a file that cannot be read. MemoryBudgetError:
        names the smallest budget. ModelNotFoundError, CheckpointError, CheckpointFileError, DeviceError: as for
        `xrk.enhance`. At the frame where it shows, all before it given: what only an iterator tells, such as its end
        or a frame of another size.
    """
    began = time.perf_counter()
    scale, ratio, separation = (
        whole_number(value, name, 1) for name, value in (("scale", scale), ("ratio", ratio), ("separation", separation))
    )
    start = whole_number(start, "start", 0)
    if compat not in (None, "xfusion"):
        raise InputError(f'compat={compat!r}; expected None or "xfusion".')
    if runtime not in ("bands", "whole"):
        raise InputError(f'runtime={runtime!r}; expected "bands" or "whole".')
    check_progress(progress)
    budget = parse_memory(memory)
    with ExitStack() as opened:
        sources = open_frames(lr, "low-resolution", opened), open_frames(hr, "high-resolution", opened)
        baseline = model if isinstance(model, str) and model in BASELINES else None
        loaded = None if baseline else _video_model(model)
        if loaded is not None and scale != NETWORK_SCALE:
            raise InputError(f"scale={scale}, but {loaded.card.name} makes frames {NETWORK_SCALE} times as large.")
        _check_frames(*sources, scale, compat)
        _check_counts(*sources, ratio, start, 1 if loaded is None else loaded.module.lr_frames)
        conversion, used = _conversion(*sources, loaded, levels, hr_levels, noise, compat, scale)
        size = (sources[0].shape, sources[1].shape)
        if isinstance(conversion, XFusion):
            size = (conversion.lr_shape, conversion.hr_shape)
        if loaded is None:
            resolve_device(device)  # a wrong one is told of, though baselines need none
            device = resolve_device("cpu")
            method: Method = BASELINES[baseline](size[1], ratio)
        else:
            device = resolve_device(device, next(loaded.module.parameters()).device)
            method = Network(loaded, sources, size, separation, budget, device, runtime)
        count = sources[0].count
        described = VideoReport(
            model=baseline or loaded.card.name, architecture=baseline or loaded.card.architecture,
            weights_sha256=None if loaded is None else loaded.card.sha256,
            shape=(None if count is None else count - start, *size[1]), dtype=conversion.dtype.name,
            lr_shape=sources[0].shape, scale=scale, ratio=ratio, separation=separation, compat=compat, **used,
            device=describe_device(device), plan=method.description, memory=budget, start=start, versions={
                "xrk": xrk.__version__, "torch": torch.__version__, "numpy": np.__version__,
                "python": platform.python_version(),
            },
        )  # fmt: skip
        video = Video(*sources, conversion, method, ratio, start)
        described.seconds = time.perf_counter() - began
        frames = _frames(video, described, progress, opened.pop_all())
    next(frames)  # up to where it holds the files, so that closing it closes them
    return (frames, described) if report else frames


def _frames(
    video: Video, report: VideoReport, progress: Progress, opened: ExitStack
) -> Generator[Any, int | None, None]:
    """Gives None, and then the frames; the number of another first frame may be sent once, in return for that frame."""
    count = report.shape[0]
    with opened:
        video.at = (yield None) or video.at
        with told(progress, count, "frame") as tell:
            while True:
                began = time.perf_counter()
                frame = video.next()
                if frame is None:
                    return
                result = video.hand_back(frame)
                report.frames += 1
                report.clipped = video.clipped
                report.features, report.used = dict(video.method.made), video.method.used
                report.seconds += time.perf_counter() - began
                tell(report.frames, count)
                yield result


# --- checks ---------------------------------------------------------------------------------------------------------


def _video_model(model: Any) -> loading.Model:
    model = loading.ready(model)
    card, module = model.card, model.module
    if not isinstance(module, TwoCameras):
        raise InputError(
            f"{card.name} ({card.architecture}) is a network for single images; expected one for two cameras: "
            f"{', '.join(VIDEO)}."
        )
    if module.in_channels != 1:
        raise InputError(f"{card.name} takes frames of {module.in_channels} channels; expected a network for one.")
    return model


def _check_frames(lr: Frames, hr: Frames, scale: int, compat: str | None) -> None:
    if lr.dtype != hr.dtype:
        raise InputTypeError(
            f"The low-resolution frames are {lr.dtype.name} and the high-resolution frames {hr.dtype.name}; "
            "expected one dtype."
        )
    expected = tuple(scale * side for side in lr.shape)
    registered = compat is not None and lr.dtype == np.uint16 and lr.shape == hr.shape
    if hr.shape != expected and not registered:
        raise InputError(
            f"Low-resolution frames of {lr.shape[0]} x {lr.shape[1]} and scale={scale} go with high-resolution frames "
            f"of {expected[0]} x {expected[1]}, not {hr.shape[0]} x {hr.shape[1]}."
        )


def _check_counts(lr: Frames, hr: Frames, ratio: int, start: int, window: int) -> None:
    if lr.count is None:
        return
    if lr.count < window:
        raise InputError(f"There are {lr.count} low-resolution frames; expected at least the {window} of a window.")
    if start >= lr.count:
        raise InputError(f"start={start}, but there are {lr.count} low-resolution frames.")
    last = (lr.count - 1) // ratio
    if hr.count is not None and not last + 1 <= hr.count <= last + 2:
        raise InputError(
            f"{lr.count} low-resolution frames at ratio={ratio} go with {last + 1} or {last + 2} high-resolution key "
            f"frames, not {hr.count}."
        )


def _conversion(
    lr: Frames,
    hr: Frames,
    model: loading.Model | None,
    levels: Any,
    hr_levels: Any,
    noise: Any,
    compat: Any,
    scale: int,
) -> tuple[Conversion, dict[str, Any]]:
    """How counts become values, and what the report says of it."""
    pair = noise if isinstance(noise, tuple) else (noise, noise)
    known = all(n is None or isinstance(n, NoiseModel) or (isinstance(n, str) and n == "off") for n in pair)
    if len(pair) != 2 or not known:
        kind = InputError if isinstance(noise, str | tuple) else InputTypeError
        raise kind(f'noise={noise!r}; expected None, an xrk.NoiseModel or a pair of them, or "off".')
    if compat is not None:
        if levels is not None or hr_levels is not None or any(isinstance(n, NoiseModel) for n in pair):
            raise InputError('compat="xfusion" has its own range and no noise model; leave out levels= and noise=.')
        conversion: Conversion = XFusion(lr.dtype, lr.shape, hr.shape, scale)
        return conversion, {"levels": None, "hr_levels": None, "noise": None}
    name, hr_levels = ("levels", levels) if hr_levels is None else ("hr_levels", hr_levels)
    found = [
        radiograph.resolve_levels(source.levels if given is None else given, source.dtype, name=called)
        for source, given, called in ((lr, levels, "levels"), (hr, hr_levels, name))
    ]
    for source, given in ((lr, levels), (hr, hr_levels)):
        if source.dtype.kind == "f" and given is None and source.levels is None:
            source.check = _in_unit_range
            source.peek()
    facts: dict[str, Any] = {"levels": found[0], "hr_levels": found[1], "noise": None}
    if model is None:
        if any(isinstance(n, NoiseModel) for n in pair):
            raise InputError("A baseline sees the counts as they are; leave out noise=.")
        return Counts(lr.dtype, *found), facts
    models = [_noise_of(source, n, model.card) for source, n in zip((lr, hr), pair, strict=True)]
    if any(m is not None for m in models):
        facts["noise"] = {name: m.to_dict() for name, m in zip(("lr", "hr"), models, strict=True) if m is not None}
    threads = torch.get_num_threads()
    domains = (make_domain(model.card.domain, at, m, threads) for at, m in zip(found, models, strict=True))
    return Native(lr.dtype, *domains), facts


def _in_unit_range(frame: np.ndarray, name: str) -> None:
    finite = frame[np.isfinite(frame)]
    if finite.size and (finite.min() < 0.0 or finite.max() > 1.0):
        raise InputError(
            f"The {name} has values between {finite.min():g} and {finite.max():g}; without levels floats are expected "
            "in [0, 1]: pass levels=(black, white)."
        )


def _noise_of(source: Frames, noise: Any, card: Card) -> NoiseModel | None:
    if noise is None and card.noise == "estimate":
        return estimate_noise(source.peek())
    return noise if isinstance(noise, NoiseModel) else None
