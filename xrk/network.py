"""What a network sees of the counts of a frame, its run on them, and what becomes of its answer."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xrk import loading, radiograph
from xrk.device_rows import DeviceRows
from xrk.errors import InputError, MemoryBudgetError
from xrk.models.blindspot import BlindSpot, Mean, Posterior
from xrk.noise import NoiseModel
from xrk.posterior import fit_noise
from xrk.runtime.device import describe_device, module_on
from xrk.runtime.frames import FrameRunner

__all__ = ["Domain", "Network", "make_domain"]

Levels = tuple[float, float]

_NO_QUANTA = 1.5**0.5  # 2 sqrt(3/8), where stabilised counts begin


@dataclass(frozen=True)
class Domain:
    """What the network sees of a frame, and what becomes of its answer: frame + (after - before) * scale."""

    noise: NoiseModel | None  # None: plain normalised counts
    shift: float
    unit: float  # the network's values are (v - shift) / unit, v counts or stabilised counts
    plain: bool  # stabilised counts as they are
    threads: int

    @property
    def scale(self) -> float:
        return self.unit if self.noise is None else 1.0

    @property
    def worth(self) -> tuple[float, float, float]:
        """(slope, constant, least): a step of one from the network's value v is max(slope v + constant, least) counts.

        Of stabilised counts it is the derivative of the algebraic inverse, and at least that at no quanta at all.
        """
        if self.noise is None:
            return 0.0, self.unit, 0.0
        slope, constant = self.noise.worth
        return slope * self.unit**2, (slope * self.shift + constant) * self.unit, slope * self.unit * _NO_QUANTA

    def before(self, counts: np.ndarray) -> np.ndarray:
        """What the network is given of these rows, float32."""
        if self.noise is None:
            return radiograph.normalise(counts, self.shift, 1.0 / self.unit, self.threads)
        if self.plain:
            return self.noise.stabilise(counts, np.float32)
        return radiograph.normalise(self.noise.stabilise(counts, np.float64), self.shift, 1.0 / self.unit, self.threads)

    def change(self, counts: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(before, after) of the same rows, both float32 or both float64; ``answer`` may be written over."""
        if self.noise is None:
            return self.before(counts).astype(answer.dtype, copy=False), answer
        stabilised = answer if self.plain else answer.astype(np.float64) * self.unit + self.shift
        return counts.astype(np.float64), self.noise.unstabilise(stabilised, np.float64)


def make_domain(domain: str, levels: Levels, noise: NoiseModel | None, threads: int) -> Domain:
    black, white = levels
    low, high = (-1.0, 1.0) if domain == "symmetric" else (0.0, 1.0)
    if noise is None:
        unit = (white - black) / (high - low)
        return Domain(None, black - low * unit, unit, False, threads)
    if domain == "stabilised":
        return Domain(noise, 0.0, 1.0, True, threads)
    # Stabilised counts span hundreds of noise sigmas: the images of the levels become the range the network knows.
    dark, bright = (float(v) for v in noise.stabilise(np.array([black, white])))
    if not bright > dark:
        raise InputError(
            f"The white level {white:g} is not above the noise model's offset {noise.offset:g}; "
            "expected levels and a noise model of the same image."
        )
    unit = (bright - dark) / (high - low)
    return Domain(noise, dark - low * unit, unit, False, threads)


# An integrator's loop asks for the same network again and again, and what is planned is kept with it.
_mean = functools.lru_cache(maxsize=2)(Mean)
_posterior = functools.lru_cache(maxsize=4)(Posterior)
_deviation = functools.lru_cache(maxsize=2)(Posterior)


class Network:
    """A model on its device, for frames of one size in numpy.

    Of a blind-spot network it is the posterior mean that runs, which the pixel itself has a say in. Where the noise in
    it is to be fitted, or is known (``calibrated``) where the network sees plain counts, `fits` is true and `fit` comes
    before each frame; where ``deviates``, `deviation` may come after it.
    """

    def __init__(
        self,
        model: loading.Model,
        device: torch.device,
        shape: tuple[int, int],
        memory: int | None,
        beside: int,
        runtime: str,
        group_bytes: int,
        deviates: bool = False,
        calibrated: bool = False,
    ) -> None:
        self.card = model.card
        self.device = device
        module = module_on(model.module, device)
        self.fits = isinstance(module, BlindSpot) and self.card.noise == "fit" and (calibrated or module.noise is None)
        self._blind, self._line = None, None
        if isinstance(module, BlindSpot):
            self._blind = module
            answers = not self.fits and module.std is not None and module.noise is not None
            module = _posterior(module) if answers else _mean(module)
        options = {
            "size_multiple": self.card.size_multiple, "output_scale": self.card.output_scale, "memory": memory,
            "whole": runtime == "whole",
        }  # fmt: skip
        # Rows that were read are wanted again with the network's answer: how far that lags behind is known once it is
        # planned. Up to three groups more wait for the thread that takes the answers, and one is read ahead.
        groups = 7
        # The weights of the mean, and of the deviation, in a plan's layout lie there beside the posterior's.
        beside += (self.fits + deviates) * sum(p.numel() * p.element_size() for p in module.parameters())
        while True:
            self._plan = functools.partial(FrameRunner, shape=shape, beside=beside + groups * group_bytes, **options)
            self.run = self._plan(module)
            self.groups = min(-(-self.run.lag // self.run.group) + 6, -(-shape[0] // self.run.group) + 1)
            if memory is None or self.groups <= groups:
                return
            groups = self.groups

    def fit(
        self, read: Callable[[int, int], np.ndarray], line: tuple[float, float] | None, floor: float
    ) -> tuple[float, float, float] | None:
        """Makes the answer the posterior mean of this frame; returns (slope, intercept, floor) of the noise's variance.

        read: as for a call. line: (slope, intercept) where the noise is known; by default it is fitted to the frame
        and the network's mean of it, which costs a run of its own. None where the network has no deviation.
        """
        if self._blind.std is None:
            return None
        if line is None:
            # The same pixels whatever the plan: whole rows, evenly spread, about a hundred thousand.
            height, width = self.run.shape
            chosen = np.unique(np.linspace(0, height - 1, max(1, min(height, (1 << 17) // width))).astype(int))
            seen, mean = [], []

            def take(rows: slice, answer: np.ndarray) -> None:
                here = chosen[(chosen >= rows.start) & (chosen < rows.stop)]
                mean.append(answer[here - rows.start])
                seen.extend(read(int(row), int(row) + 1)[0].copy() for row in here)

            self.run = self._plan(_mean(self._blind))
            self(read, take)
            found = fit_noise(np.stack(seen), np.concatenate(mean), floor=floor)
            line = found.slope, found.intercept
        self._line = (*line, floor)
        self.run = self._plan(_posterior(self._blind, self._line))
        return self._line

    def deviation(
        self,
        read: Callable[[int, int], np.ndarray],
        write: Callable[[slice, np.ndarray], None],
        worth: tuple[float, float, float],
    ) -> None:
        """Runs the network again, for the standard deviation of its answer (see `Posterior`): in counts, float32.

        read, write: as for a call, after which this comes.
        """
        answering, self.run = self.run, self._plan(_deviation(self._blind, self._line, worth))
        self(read, write)
        self.run = answering

    def __call__(
        self,
        read: Callable[[int, int], np.ndarray],
        write: Callable[[slice, Any], None],
        way: DeviceRows | None = None,
    ) -> None:
        """Runs the network on one frame.

        read: (first, end) -> those rows (rows, W), float32, in the network's range. write: takes rows of the answer
        from the top down, of the module's own dtype, all finite. way: to the device and back; ``read`` then gives
        counts, and ``write`` takes what `DeviceRows.hand` gives.
        """
        run, low, high = self.run, math.inf, -math.inf

        def rows(a: int, b: int) -> torch.Tensor:
            nonlocal low, high
            v = read(a, b)
            low, high = min(low, float(v.min())), max(high, float(v.max()))
            return torch.from_numpy(v).to(self.device, run.dtype) if way is None else way.up(v)

        def give(where: slice, part: torch.Tensor) -> None:
            if not torch.isfinite(part).all():
                bad = int((~torch.isfinite(part)).sum())
                least, most = (low, high) if way is None else (way.value(low), way.value(high))
                raise InputError(
                    f"The network's output is not finite at {bad} of {part.numel()} pixels, in the rows {where.start} "
                    f"to {where.stop}; its input lay between {least:g} and {most:g}: expected levels near the image's "
                    "values (are there fill values that a mask should name?)."
                )
            if way is None:
                write(where, np.ascontiguousarray(part.to("cpu", run.dtype).numpy()))
            else:
                write(where, way.hand(part))

        try:
            run.run(rows, give)
        except torch.OutOfMemoryError as error:
            raise MemoryBudgetError(
                f"The frame {run.shape} does not fit on {describe_device(self.device)}; "
                'pass device="cpu", or memory= with what is free there.'
            ) from error
