"""The Poisson-Gaussian noise of a detector: its model, where it comes from, and variance stabilisation.

A count is z = gain * Poisson((m - offset) / gain) + N(offset, read_noise^2) with mean m, so that
var(z) = gain * (m - offset) + read_noise^2 = gain * m + intercept. The model comes from the caller, from flat and dark
frames (`NoiseModel.from_flats`) or from one image (`estimate_noise`). One image gives gain and intercept only.

Everything here is pointwise or a statistic of one array; it knows neither files nor devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from xrk.anscombe import Tables, tables
from xrk.errors import InputError, InputTypeError
from xrk.noise_line import OnDemand, fit_line

__all__ = ["NoiseModel", "estimate_noise"]

# Chunks of this many values stay in the second-level cache, and no float64 copy of a frame is ever made.
_CHUNK = 16384
# With a read noise of more quanta than this the noise is Gaussian of one variance, as far as float64 can tell.
_GAUSSIAN = 1e6


@dataclass(frozen=True)
class NoiseModel:
    """z = gain * Poisson(x / gain) + N(offset, read_noise^2), where x is the mean count above the offset.

    gain: DN per quantum, >= 0 (0: purely Gaussian noise). offset: DN. read_noise: DN rms, >= 0; gain and read_noise are
    not both 0. source: where the model comes from, in words.

    Raises InputError for a value out of range or not finite, InputTypeError for one that is no number.
    """

    gain: float
    offset: float = 0.0
    read_noise: float = 0.0
    source: str = "given"

    def __post_init__(self) -> None:
        for name in ("gain", "offset", "read_noise"):
            value = getattr(self, name)
            if not isinstance(value, Real):
                raise InputTypeError(f"NoiseModel: {name} is {value!r}; it must be one real number.")
            number = float(value)
            if not math.isfinite(number) or (number < 0 and name != "offset"):
                wanted = "finite" if name == "offset" else "finite and not negative"
                raise InputError(f"NoiseModel: {name} is {number}; it must be {wanted}.")
            object.__setattr__(self, name, number)
        if self.gain == 0 and self.read_noise == 0:
            raise InputError(
                "NoiseModel: gain and read_noise are both 0, which is no noise; give at least one of them."
            )

    @property
    def intercept(self) -> float:
        """The variance (DN^2) that the line gain * mean + intercept has at 0 counts: read_noise^2 - gain * offset."""
        return self.read_noise**2 - self.gain * self.offset

    def to_dict(self) -> dict[str, Any]:
        """The four fields, as JSON knows them."""
        return asdict(self)

    def variance(self, mean: ArrayLike, dtype: DTypeLike | None = None) -> np.ndarray:
        """gain * (mean - offset) + read_noise^2, in DN^2; below the offset there are no quanta, so read_noise^2 there.

        mean: counts, any shape and real dtype. Returns the same shape; dtype as for `stabilise`.
        """

        def chunk(mean: np.ndarray) -> np.ndarray:
            above = np.maximum(mean - self.offset, 0.0)
            above *= self.gain
            above += self.read_noise**2
            return above

        return _pointwise(chunk, mean, dtype, "mean")

    def stabilise(self, counts: ArrayLike, dtype: DTypeLike | None = None) -> np.ndarray:
        """The generalised Anscombe transform 2/gain sqrt(gain z + 3/8 gain^2 + read_noise^2 - gain offset): noise sd 1.

        The root's argument is clipped at 0, where read noise has thrown a count far below the offset. With gain 0, and
        with a read noise of more than a million quanta, it is (z - offset) / read_noise.

        counts: any shape and real dtype, DN. dtype: float32 or float64 of the result; None keeps a float32 or float16
        input in float32 and gives float64 otherwise. It is computed in float64, chunk by chunk. NaN stays NaN.

        Starck, Murtagh and Bijaoui, "Image Processing and Data Analysis", 1998; Makitalo and Foi 2013, equation 2.
        """
        if self._gaussian:
            return _pointwise(lambda z: (z - self.offset) / self.read_noise, counts, dtype, "counts")
        scale = 4 / self.gain
        shift = 4 * (0.375 + self._sigma**2 - self.offset / self.gain)

        def chunk(z: np.ndarray) -> np.ndarray:
            inside = z * scale
            inside += shift
            np.maximum(inside, 0.0, out=inside)
            return np.sqrt(inside, out=inside)

        return _pointwise(chunk, counts, dtype, "counts")

    def unstabilise(self, values: ArrayLike, dtype: DTypeLike | None = None) -> np.ndarray:
        """The mean count m (DN) whose `expected_stabilised` is `values`: the exact unbiased inverse of `stabilise`.

        Exact to 1e-7 of the noise's sd in float64, from no quanta to infinity (see `xrk.anscombe`; Makitalo and Foi
        2013). Values below that of no quanta continue along a straight line, so the inverse is increasing and defined
        everywhere. It is *not* the algebraic inverse: unstabilise(stabilise(z)) is about z + gain / 4, because the mean
        of a concave function of z lies below the function of the mean.

        values, dtype: as for `stabilise`.
        """
        if self._gaussian:
            return _pointwise(lambda v: v * self.read_noise + self.offset, values, dtype, "values")
        table = self._tables

        def chunk(value: np.ndarray) -> np.ndarray:
            quanta = table.quanta(value)
            quanta *= self.gain
            quanta += self.offset
            return quanta

        return _pointwise(chunk, values, dtype, "values")

    def expected_stabilised(self, mean_counts: ArrayLike, dtype: DTypeLike | None = None) -> np.ndarray:
        """E[stabilise(z)] where the mean of z is `mean_counts` (DN): the inverse map of `unstabilise`.

        mean_counts, dtype: as for `stabilise`.
        """
        if self._gaussian:
            return self.stabilise(mean_counts, dtype)
        table = self._tables

        def chunk(mean: np.ndarray) -> np.ndarray:
            return table.expected((mean - self.offset) / self.gain)

        return _pointwise(chunk, mean_counts, dtype, "mean_counts")

    @property
    def worth(self) -> tuple[float, float]:
        """(slope, constant): near the stabilised value v a step of one is about slope * v + constant counts."""
        return (0.0, self.read_noise) if self._gaussian else (self.gain / 2, 0.0)

    @classmethod
    def from_flats(cls, flats: ArrayLike | Sequence[ArrayLike], darks: ArrayLike) -> NoiseModel:
        """Photon transfer from flat and dark frames.

        flats: (N, H, W) frames of one constant exposure, N >= 2, or a list of such stacks, one per exposure. darks:
        (M, H, W) frames without exposure, M >= 2. Real dtypes, DN.

        offset: median over pixels of the darks' means. read_noise: median over pixels of the darks' standard deviation
        over time, corrected for the median of few samples; the variance q^2 / 12 of rounding to steps of q is part of
        it, and a read noise below about half a step cannot be measured. gain: the slope of (flat variance - dark
        variance) against (flat mean - dark mean) over pixels and exposures through the origin, weighted as Poisson
        noise asks (the ratio of the sums). The flats' variances come from differences of successive frames, which
        cancel fixed pattern and slow drift; flicker of the whole lamp is taken out. Pixels whose flat variance is
        improbable for their mean are left out. Saturated flats give a wrong gain.

        Raises InputError for shapes that do not fit or flats not brighter than the darks. Janesick, "Photon Transfer",
        2007.
        """
        dark = _stack(darks, "darks")
        level, dark_variance = _temporal(dark, None)
        finite = np.isfinite(dark_variance)
        if not finite.any():
            raise InputError("NoiseModel.from_flats: no pixel of the darks is finite in every frame.")
        # The median of chi^2 with few degrees of freedom lies below its mean (Wilson and Hilferty).
        read_noise = float(np.median(np.sqrt(dark_variance[finite]))) / (1 - 2 / (9 * (len(dark) - 1))) ** 1.5
        signal, excess, freedom, told = [], [], [], []
        for stack in _exposures(flats):
            if stack.shape[1:] != dark.shape[1:]:
                raise InputError(
                    f"NoiseModel.from_flats: flats have shape {stack.shape} and darks {dark.shape}; "
                    "expected the same height and width."
                )
            mean, variance = _temporal(stack, level)
            good = finite & np.isfinite(variance)
            signal.append(mean[good] - level[good])
            excess.append(variance[good] - dark_variance[good])
            # The degrees of freedom of a mean of squared successive differences (von Neumann).
            freedom.append(np.full(signal[-1].size, 2 * (len(stack) - 1) ** 2 / (3 * len(stack) - 4)))
            told.append(
                f"{len(stack)} flats {np.median(signal[-1]) if signal[-1].size else math.nan:.4g} DN above dark"
            )
        gain = _robust_ratio(*map(np.concatenate, (signal, excess, freedom)), read_noise**2)
        if not gain > 0:
            raise InputError(
                f"NoiseModel.from_flats: {'; '.join(told)}; expected flats brighter and noisier than the darks; "
                "are the two exchanged?"
            )
        source = f"photon transfer: {', '.join(told)}; {len(dark)} darks"
        return cls(gain, float(np.median(level[finite])), read_noise, source)

    @property
    def _sigma(self) -> float:
        return self.read_noise / self.gain

    @property
    def _gaussian(self) -> bool:
        return self.read_noise > _GAUSSIAN * self.gain

    @property
    def _tables(self) -> Tables:
        return tables(self._sigma)


def estimate_noise(
    image: ArrayLike | OnDemand, offset: float | None = None, *, mask: ArrayLike | OnDemand | None = None
) -> NoiseModel:
    """The Poisson-Gaussian noise of one image, from a robust line var = gain * mean + c over its local variances.

    image: (H, W) counts (DN), any size, any real dtype; NaN and Inf are left out. offset: the mean count (DN) without
    exposure, where it is known. mask: (H, W) bool, True where a pixel is invalid. It is deterministic and takes a fixed
    sample of a large frame; `xrk.noise_line` says how it works and where it fails, and has `OnDemand`, for a frame of
    which only the sample's rows are read.

    One image identifies gain and c = read_noise^2 - gain * offset only, so
    - with `offset` given, read_noise^2 = c + gain * offset; where that is negative, the line crosses zero above
      `offset`: the crossing becomes the offset and the read noise is 0;
    - without it, c >= 0 gives offset 0 and read_noise = sqrt(c), and c < 0 the crossing as the offset and read noise 0;
    - an image of one level, or too small, has one variance and no line: gain = variance / (mean - offset) and read
      noise 0;
    - an image without noise gives gain 0 and the read noise of rounding to 1 (floats: to 2^-16 of the largest value).
    `source` of the result says which of these it was. The variance is that of a pixel, also where neighbours are
    correlated. The read noise contains the rounding noise q / sqrt(12) of data in steps of q.

    Raises InputError for an image that is empty or not of rank 2, or a mask of another shape; InputTypeError for a
    wrong dtype.
    """
    image = image if isinstance(image, OnDemand) else _real(image, "image")
    if image.ndim != 2 or image.size == 0:
        raise InputError(f"estimate_noise: the image has shape {image.shape}; expected one frame (H, W), not empty.")
    if mask is not None:
        mask = mask if isinstance(mask, OnDemand) else np.asarray(mask)
        if mask.dtype != np.bool_:
            raise InputTypeError(f"estimate_noise: the mask has dtype {mask.dtype}; expected bool, True where invalid.")
        if mask.shape != image.shape:
            raise InputError(
                f"estimate_noise: the mask has shape {mask.shape}, the image {image.shape}; expected equal."
            )
    base = 0.0 if offset is None else NoiseModel(1.0, offset).offset
    line = fit_line(image, mask)
    told = f"estimated from one image, {line.description}"
    deviation = math.sqrt(line.variance)
    if not line.noisy:
        return NoiseModel(0.0, base, deviation, f"{told}; read noise {deviation:.3g} assumed")
    signal = line.mean - base
    if line.slope_error > 0.3 * max(abs(line.slope), line.variance / signal if signal > 0 else 0.0):
        told += f"; its levels do not tell gain from read noise (variance {line.variance:.4g} at {line.mean:.6g})"
        # Less than a quarter of a quantum per pixel: rather a dark frame.
        if signal < 0.5 * deviation:
            told += f"; hardly any signal above the offset {base:g}, so all taken as read noise"
            return NoiseModel(0.0, base, deviation, told)
        told += f"; above the offset {base:g} all taken as quantum noise, read noise 0"
        return NoiseModel(line.variance / signal, base, 0.0, told)
    if line.slope <= 0:
        return NoiseModel(0.0, base, deviation, f"{told}; the variance does not rise with the mean: all read noise")
    read_variance = line.intercept + line.slope * base
    if read_variance < 0:
        crossing = -line.intercept / line.slope
        told += f"; the line crosses zero at {crossing:.6g}, taken as the offset, read noise 0"
        return NoiseModel(line.slope, crossing, 0.0, told)
    told += f"; offset {base:g} {'assumed' if offset is None else 'given'}"
    return NoiseModel(line.slope, base, math.sqrt(read_variance), told)


def _real(array: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.kind not in "fiu":
        raise InputTypeError(f"{name} has dtype {array.dtype}; expected real numbers (integer or float).")
    return array


def _pointwise(
    chunk: Callable[[np.ndarray], np.ndarray], array: ArrayLike, dtype: DTypeLike | None, name: str
) -> np.ndarray:
    """Apply `chunk` (float64 -> float64) piece by piece to an array of any layout and byte order."""
    array = _real(array, name)
    if dtype is None:
        dtype = np.float32 if array.dtype.kind == "f" and array.dtype.itemsize <= 4 else np.float64
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.float64):
        raise InputTypeError(f"dtype is {dtype}; expected float32 or float64.")
    pieces = np.nditer(
        [array, None],
        flags=["external_loop", "buffered", "zerosize_ok"],
        op_flags=[["readonly"], ["writeonly", "allocate"]],
        op_dtypes=[np.float64, dtype],
        casting="same_kind",
        buffersize=_CHUNK,
    )
    # Inf, and what becomes too large for its dtype, is Inf without a warning; NaN is NaN.
    with pieces, np.errstate(over="ignore", invalid="ignore"):
        for source, target in pieces:
            target[...] = chunk(source)
        return pieces.operands[1]


def _stack(frames: ArrayLike, name: str) -> np.ndarray:
    stack = _real(frames, name)
    if stack.ndim != 3 or stack.shape[0] < 2 or stack.size == 0:
        raise InputError(
            f"NoiseModel.from_flats: {name} has shape {stack.shape}; expected (N, H, W) with at least 2 frames."
        )
    return stack


def _exposures(flats: ArrayLike | Sequence[ArrayLike]) -> list[np.ndarray]:
    if isinstance(flats, (list, tuple)) and flats and all(np.ndim(stack) == 3 for stack in flats):
        return [_stack(stack, f"flats[{i}]") for i, stack in enumerate(flats)]
    return [_stack(flats, "flats")]


def _temporal(stack: np.ndarray, dark: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Per pixel mean and variance over time, (H, W) float64, frame by frame; for flats from successive differences."""
    with np.errstate(invalid="ignore"):
        mean = np.zeros(stack.shape[1:])
        for frame in stack:
            mean += frame
        mean /= len(stack)
        square = np.zeros_like(mean)
        if dark is None:
            for frame in stack:
                square += (frame - mean) ** 2
            return mean, square / (len(stack) - 1)
        signal = np.where(np.isfinite(mean - dark), mean - dark, 0.0)
        # In few pixels the noise itself would pass for flicker.
        flicker = mean.size > 64 and signal.sum() > 0
        for before, after in pairwise(stack):
            change = after.astype(np.float64) - before
            if flicker:
                change -= signal * (np.nansum(np.where(signal != 0, change, 0.0)) / signal.sum())
            square += change**2
        square /= 2 * (len(stack) - 1)
        return mean, square * (mean.size / (mean.size - 1) if flicker else 1.0)


def _robust_ratio(signal: np.ndarray, excess: np.ndarray, freedom: np.ndarray, read_variance: float) -> float:
    """sum(excess) / sum(signal) over the pixels whose variance is probable for its `freedom`; 0 where there is none."""
    bright = signal > 0
    if not bright.any():
        return 0.0
    # A median is biased for few frames, but a few wild pixels do not move it.
    gain = float(np.median(excess[bright] / signal[bright]))
    spread = 2 / (9 * freedom)
    keep = bright
    for _ in range(20):
        # The cube root of chi^2 / k is nearly normal, with mean 1 - 2/(9k) and variance 2/(9k) (Wilson and Hilferty).
        expected = np.maximum(gain, 0.0) * np.maximum(signal, 0.0) + max(read_variance, 1e-12)
        root = np.cbrt(np.maximum(excess + read_variance, 0.0) / expected)
        before, keep = keep, bright & (np.abs(root - (1 - spread)) < 4.5 * np.sqrt(spread))
        if not keep.any():
            return gain
        gain = float(excess[keep].sum() / signal[keep].sum())
        if np.array_equal(before, keep):
            break
    return gain
