"""One call of the front door, checked and run: image in bands, through a network, out in bands."""

import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

import xrk
from xrk import arrays, io, loading, radiograph
from xrk.bands import Frames, InOrder, Pixels
from xrk.device_rows import device_rows
from xrk.errors import InputError, InputTypeError
from xrk.models import VIDEO, BlindSpot
from xrk.network import Domain, Network, make_domain
from xrk.noise import NoiseModel, estimate_noise
from xrk.noise_line import OnDemand
from xrk.report import FrameReport, Report, ResidualStatistics
from xrk.runtime.budget import parse_memory
from xrk.runtime.device import describe_device, module_on
from xrk.runtime.frames import group_rows
from xrk.tiles import enhance_in_tiles

__all__ = ["READ_CACHE", "Job", "pixels_of", "prepare"]

READ_CACHE = 32 << 20  # bytes of decoded strips and tiles: most are read once, and whole
Levels = tuple[float, float]


def prepare(
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
    uncertainty: bool = False,
    compat: str | None = None,
) -> "Job":
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
    network = _model(model)
    if uncertainty:
        _check_uncertainty(network, noise)
    if compat is not None:
        _check_compat(compat, network, pixels.dtype, noise, memory, uncertainty)
    return Job(pixels, network, resolved, source, noise, offset, budget, device, runtime, uncertainty, compat)


def pixels_of(image: "arrays.Incoming | io.Source") -> Pixels:
    """Where the pixels of an array or of an opened file come from."""
    if isinstance(image, io.Source):
        return Pixels(
            tuple(image.shape), image.metadata.dtype,
            lambda frame, a, b: image.read(slice(a, b), slice(None), frame), ahead=True,
            corrected=lambda frame, a, b, correction: image.read_corrected(slice(a, b), correction, frame),
        )  # fmt: skip
    last: list[Any] = [None, None]

    def read(frame: int, a: int, b: int) -> np.ndarray:
        if last[0] != frame:  # one copy of a frame at most, where it is not as it should be
            last[:] = frame, image.frame(frame)
        return last[1][a:b]

    return Pixels(image.shape, image.dtype, read, masks=() if image.mask is None else (image.mask,))


def _model(model: Any) -> loading.Model:
    model = loading.ready(model)
    if model.card.architecture in VIDEO:
        raise InputError(
            f"{model.card.name} ({model.card.architecture}) is a network for video, low-resolution frames and "
            "high-resolution key frames in; expected a network for single images."
        )
    if model.card.output_scale > 1:
        raise InputError(
            f"{model.card.name} magnifies {model.card.output_scale:g} times, and an enhanced frame keeps its size; "
            "call the network itself, xrk.load(path).module."
        )
    channels = model.card.config.get("in_channels", 1)
    if channels != 1:
        raise InputError(
            f"{model.card.name} takes images of {channels} channels, and a radiograph has one; call the network "
            "itself, xrk.load(path).module."
        )
    return model


def _check_uncertainty(model: loading.Model, noise: NoiseModel | str | None) -> None:
    if not isinstance(model.module, BlindSpot) or model.module.std is None:
        raise InputError(
            f"{model.card.name} does not tell how sure it is of a pixel; expected a blind-spot network with a standard "
            'deviation, such as model="blindspot", or no uncertainty.'
        )
    if noise == "off" and model.module.noise is None:
        raise InputError(
            f'Without a noise model {model.card.name} gives a mean and no posterior; leave out noise="off" or '
            "the uncertainty."
        )


def _check_compat(
    compat: Any, model: loading.Model, dtype: np.dtype, noise: Any, memory: Any, uncertainty: bool
) -> None:
    if compat != "tiles":
        raise InputError(f'compat={compat!r}; expected None or "tiles".')
    module = model.module
    if not isinstance(module, BlindSpot) or module.std is None or module.noise is not None or model.card.noise != "fit":
        raise InputError(
            'compat="tiles" is how blind-spot networks without a noise of their own were published, and '
            f"{model.card.name} is none; leave it out."
        )
    if dtype.kind not in "iu":
        raise InputTypeError(f'compat="tiles" truncates to integers, and the image is {dtype.name}; expected integers.')
    given = (("noise", noise), ("memory", memory), ("uncertainty", uncertainty or None))
    for name, value in given:
        if value is not None:
            raise InputError(f'compat="tiles" fits its own noise on whole tiles; leave out {name}=.')


Put = Callable[[int, slice, np.ndarray], None]


@dataclass(frozen=True)
class Job:
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
    uncertainty: bool = False  # a second run of the network for each frame: how sure it is of every pixel
    compat: str | None = None  # "tiles": as the blind-spot networks' published code runs them
    clipped: dict[tuple[int, int], int] = field(default_factory=dict)  # pixels that the correction clipped, in parts

    def run(
        self, put: Put, tell: Callable[[int, int], Any], held: int, *, statistics: bool,
        seen: Put | None = None, unsure: Put | None = None,
    ) -> tuple[list[FrameReport], str]:  # fmt: skip
        """Enhances all frames.

        put: takes (frame, rows, their pixels in the machine's byte order), from the top down, in one thread.
        tell: is called with (frames done, 0), and between two frames with the rows done of the next one.
        held: the most bytes that ``put`` and ``unsure`` keep. seen: takes the rows before they are enhanced, as ``put``
        does. unsure: takes the posterior's standard deviation in counts, float32, NaN where a pixel is invalid, once
        the frame is done; where ``uncertainty`` is asked for.
        """
        if self.compat is not None:
            return self._in_tiles(put, tell, statistics, seen), "tiles of 512, as published"
        described = []
        height, width = self.pixels.shape[-2:]
        held += self._beside()
        network = Network(
            self.model, self.device, (height, width), self.memory, held, self.runtime, self._group_bytes(),
            self.uncertainty, isinstance(self.noise, NoiseModel),
        )  # fmt: skip
        frames = Frames(self.pixels, network.run.group, network.groups, self.clipped)
        try:
            for i in range(self.pixels.count):
                described.append(self._frame(i, frames, network, put, tell, statistics, seen, unsure))
                tell(i + 1, 0)
        finally:
            frames.close()
        return described, network.run.description

    def _group_bytes(self) -> int:
        """What one group of rows takes that was read: counts, invalid pixels and fillings."""
        width, item = self.pixels.shape[-1], self.pixels.dtype.itemsize
        masked = self.pixels.has_invalid
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
        if pixels.bad is not None:
            held += height * width
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
        seen: Put | None,
        unsure: Put | None,
    ) -> FrameReport:
        """Enhances frame ``i``."""
        height, width = self.pixels.shape[-2:]
        if frames.all_invalid(i):
            for rows in frames.groups():
                counts = frames.counts(i, rows.start, rows.stop)
                if seen is not None:
                    seen(i, rows, counts)
                put(i, rows, counts)
                if unsure is not None:
                    unsure(i, rows, np.full(counts.shape, np.nan, np.float32))
            return FrameReport(None, 0, height * width, None)
        noise = self._noise(i, frames)
        told = None if noise is None else noise.to_dict()
        threads = torch.get_num_threads()
        if network.fits:
            domain = make_domain(network.card.domain, self.levels, None, threads)
            if self.noise != "off":
                line = network.fit(
                    lambda a, b: domain.before(frames.band(i, a, b).filled), *self._line(domain.unit, noise)
                )
                noise = _counted(line, domain) if noise is None else noise
                told = None if noise is None else noise.to_dict()
        else:
            domain = make_domain(network.card.domain, self.levels, noise, threads)
        residual = ResidualStatistics(noise)
        clipped = invalid = 0
        way = None
        if domain.noise is None:
            way = device_rows(self.device, network.run.dtype, self.pixels.dtype, domain.shift, domain.unit)

        def finish(rows: slice, answer: Any) -> None:
            nonlocal clipped, invalid
            band = frames.band(i, rows.start, rows.stop)
            if way is not None and band.invalid is None:
                out, beyond = way.down(band.filled, answer)
                clipped += beyond
            else:
                before, after = domain.change(band.filled, answer if way is None else way.to_host(answer))
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

            def give(rows: slice, answer: Any) -> None:
                finishing.do(finish, rows, answer)
                if rows.stop < height:
                    tell(i, rows.stop)

            def given(a: int, b: int) -> np.ndarray:
                counts = frames.band(i, a, b).filled
                return domain.before(counts) if way is None else counts

            network(given, give, way)
            finishing.finish()
        if unsure is not None:

            def spread(rows: slice, deviation: np.ndarray) -> None:
                invalid = frames.band(i, rows.start, rows.stop).invalid
                if invalid is not None:
                    deviation[invalid] = np.nan
                unsure(i, rows, deviation.astype(np.float32, copy=False))

            network.deviation(lambda a, b: domain.before(frames.band(i, a, b).filled), spread, domain.worth)
        return FrameReport(told, clipped, invalid, residual.result() if statistics else None)

    def _in_tiles(self, put: Put, tell: Callable[[int, int], Any], statistics: bool, seen: Put | None):
        """Enhances all frames with `xrk.tiles`."""
        height, width = self.pixels.shape[-2:]
        network, rows = module_on(self.model.module, self.device), slice(0, height)
        frames, described = Frames(self.pixels, group_rows(width), clipped=self.clipped), []
        try:
            for i in range(self.pixels.count):
                band = frames.band(i, 0, height)
                residual, clipped = ResidualStatistics(), 0
                if seen is not None:
                    seen(i, rows, band.counts)
                out = band.counts
                if not frames.all_invalid(i):
                    out, clipped = enhance_in_tiles(network, band.filled, self.levels)
                    if statistics:
                        residual.add(band.filled, out, band.invalid)
                    if band.invalid is not None:
                        out[band.invalid] = band.counts[band.invalid]
                put(i, rows, out)
                invalid = 0 if band.invalid is None else int(np.count_nonzero(band.invalid))
                told = residual.result() if statistics and invalid < height * width else None
                described.append(FrameReport(None, clipped, invalid, told))
                tell(i + 1, 0)
        finally:
            frames.close()
        return described

    def _line(self, unit: float, noise: NoiseModel | None) -> tuple[tuple[float, float] | None, float]:
        """Slope and intercept of the noise's variance in units of ``unit`` counts, where it is given, and its floor."""
        quantum = 1.0 if self.pixels.dtype.kind in "iu" else 2.0**-20 * unit
        floor = (quantum / unit) ** 2 / 12  # of the rounding to counts
        if noise is None:
            return None, floor
        black = self.levels[0]
        return (noise.gain / unit, (noise.gain * black + noise.intercept) / unit**2), floor

    def _noise(self, i: int, frames: Frames) -> NoiseModel | None:
        if isinstance(self.noise, NoiseModel):
            return self.noise
        if self.noise == "off" or self.model.card.noise in ("none", "fit"):
            return None
        shape = self.pixels.shape[-2:]
        if not self.pixels.ahead:
            return estimate_noise(frames.counts(i, 0, shape[0]), self.offset, mask=frames.unknown(i, 0, shape[0]))
        counts = OnDemand(shape, self.pixels.dtype.newbyteorder("="), lambda a, b: frames.counts(i, a, b))
        mask = None
        if self.pixels.has_invalid:

            def invalid(a: int, b: int) -> np.ndarray:
                found = frames.unknown(i, a, b)
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
        uncertainty: np.ndarray | None = None,
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
            uncertainty=uncertainty,
        )


def _counted(line: tuple[float, float, float] | None, domain: Domain) -> NoiseModel | None:
    """A fitted line of the noise's variance as a noise model in counts, where it rises."""
    if line is None or line[0] <= 0:
        return None
    slope, intercept, _ = line
    gain, constant = slope * domain.unit, intercept * domain.unit**2 - slope * domain.unit * domain.shift
    read = max(constant, 0.0) ** 0.5
    offset = -min(constant, 0.0) / gain
    return NoiseModel(gain, offset, read, "fitted to the frame and the network's mean of it")
