"""The line var(z) = slope * mean + intercept of pixel variance against mean, from one image.

Sample: blocks of 8x8 pixels, at most about 33 000, on a grid that depends on the shape only. Each block is expanded in
orthonormal polynomials (products of discrete Legendre polynomials in y and x). A coefficient of degree d = i + j is
blind to all content of lower degree, and of white noise its square has the mean sigma^2.

1. The mean square of the high degrees (6 to 14) against the block's mean: a mixture of chi^2-distributed blocks around
   a line, and of blocks with content above it, is fitted by expectation-maximisation with maximum likelihood weights.
2. The blocks whose low degrees (2 and 3) stay at the noise are kept: the quietest 30 % at each level and all near
   them. The choice uses other coefficients than the measurement, so it does not bias it.
3. Their power against degree, d0 to 14, is compared with that of white noise blurred by a kernel (k, 1-2k, k) in y and
   x, and with sums of this and white noise. Light spread makes power fall with degree that way, texture makes it fall
   otherwise. d0 rises from 4 until the fit is good, so that texture is left out. This gives the correlation of
   neighbours, and with it the factor from the measured power to the pixel variance. Read noise is white where quantum
   noise is not, so the factor may vary with the level.
4. The line again, over the blocks and degrees kept, times that factor.

Local variances with a robust line are the idea of Foi, Trimeche, Katkovnik and Egiazarian, "Practical
Poissonian-Gaussian noise modeling and fitting for single-image raw-data", IEEE Trans. Image Process. 17, 2008; blocks,
polynomials and blur are our own.

Limits: texture finer than about 4 pixels that is stronger than the noise in all of the image cannot be told from
correlated noise. Fixed pattern of the detector counts as noise. A frame that is clipped nearly everywhere gives a wrong
line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

__all__ = ["NoiseLine", "OnDemand", "fit_line"]

_BLOCKS = 32768
# Edge of a block, and how many blocks it needs; the smaller ones serve small images and dense masks.
_EDGES = {8: 32, 5: 32, 3: 9, 2: 1}
# Noise shapes: kernels (k, 1-2k, k), lag-1 correlations from -0.13 to 0.55, each with shares of white noise added.
_KERNELS, _WHITE = map(np.ravel, np.meshgrid(np.linspace(-0.06, 0.2, 53), [0.0, 0.03, 0.06, 0.1, 0.2, 0.35, 0.5, 0.7]))
# Fewer blocks than this say one variance, not a line.
_FEWEST = 32
# Values from here on count as invalid, like infinity, and differences below as none: squares of squares must be finite.
_HUGE, _TINY = 1e60, 1e-60


@dataclass(frozen=True)
class OnDemand:
    """A frame, or its mask, whose rows are read when they are asked for: only those of the sample ever are.

    read: (first, end) -> those rows, (end - first, W), of this dtype.
    """

    shape: tuple[int, int]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]

    @property
    def ndim(self) -> int:
        return 2

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, end, _ = rows.indices(self.shape[0])
        return self.read(first, end)


@dataclass(frozen=True)
class NoiseLine:
    """What one image says about its noise; all in DN and DN^2.

    mean: the level around which the line was fitted; variance: the pixel variance there. slope: DN per quantum, with
    its standard error, which is infinite where the image has one level only. correlation: of neighbouring pixels.
    noisy: False where no noise was seen; `variance` is then an assumption. description: in words.
    """

    mean: float
    variance: float
    slope: float = 0.0
    slope_error: float = math.inf
    correlation: float = 0.0
    noisy: bool = True
    description: str = ""

    @property
    def intercept(self) -> float:
        return self.variance - self.slope * self.mean

    def at(self, mean: np.ndarray) -> np.ndarray:
        """The variance at `mean`, kept above a hundredth of that in the middle."""
        return np.maximum(self.variance + self.slope * (mean - self.mean), 1e-2 * self.variance)


@dataclass(frozen=True)
class _Basis:
    """Polynomials on a block, sorted by degree."""

    transform: np.ndarray  # (pixels, coefficients)
    degree: np.ndarray  # (coefficients,)
    power: np.ndarray  # (coefficients, kernels): mean square of a coefficient, of blurred noise with pixel variance 1
    correlation: np.ndarray  # (kernels,): lag-1 correlation

    def share(self, lowest: int, highest: int = 99) -> np.ndarray:
        """Weights (coefficients,) of the mean over the degrees from `lowest` to `highest`."""
        members = (self.degree >= lowest) & (self.degree <= highest)
        return members / max(members.sum(), 1)


@lru_cache(maxsize=16)
def _basis(height: int, width: int) -> _Basis:
    rows, columns = _polynomials(height), _polynomials(width)
    kernel = np.stack([_KERNELS, 1 - 2 * _KERNELS, _KERNELS])
    lags = np.stack([(kernel**2).sum(0), 2 * kernel[0] * kernel[1], kernel[0] * kernel[2]])
    lags /= lags[0]
    degree = np.add.outer(np.arange(height), np.arange(width)).ravel()
    order = np.argsort(degree, kind="stable")
    transform = np.einsum("iy,jx->yxij", rows, columns).reshape(height * width, height * width)
    power = (_blurred_power(rows, lags)[:, None] * _blurred_power(columns, lags)[None, :]).reshape(height * width, -1)
    power = (1 - _WHITE) * power + _WHITE
    return _Basis(
        transform=np.ascontiguousarray(transform[:, order]),
        degree=degree[order],
        power=np.maximum(power[order], 1e-3),
        correlation=(1 - _WHITE) * lags[1],
    )


def _polynomials(n: int) -> np.ndarray:
    """Orthonormal polynomials on n points, (degree, point)."""
    points = (np.arange(n) - (n - 1) / 2) / n
    return np.linalg.qr(np.vander(points, n, increasing=True))[0].T


def _blurred_power(polynomials: np.ndarray, lags: np.ndarray) -> np.ndarray:
    """Mean square of 1-D coefficients, (degree, kernels), of noise with the autocorrelation `lags` (3, kernels)."""
    n = polynomials.shape[1]
    power = np.ones((n, 1)) * lags[0]
    for lag in range(1, min(n, 3)):
        overlap = (polynomials[:, lag:] * polynomials[:, : n - lag]).sum(axis=1)
        power += 2 * overlap[:, None] * lags[lag]
    return power


def fit_line(image: np.ndarray | OnDemand, mask: np.ndarray | OnDemand | None = None) -> NoiseLine:
    """The noise line of `image` (H, W), any real dtype; `mask` (H, W) bool, True where invalid. Never fails."""
    blocks, edges, stride = _sample(image, mask)
    if blocks.size == 0 or blocks.shape[1] == 1:
        return _without_blocks(image, mask)
    span = np.ptp(blocks, axis=1)
    if _is_noise_free(blocks, span, edges):
        return _noise_free(blocks, image.dtype, 0.0)
    if not span.all():
        blocks = blocks[span > 0]
    step = _smallest_step(blocks, image.dtype)
    mean = blocks.mean(axis=1)
    basis = _basis(*edges)
    power = (blocks - mean[:, None]) @ basis.transform
    power *= power
    keep = _unclipped(blocks, mean, power @ basis.share(_high_degree(basis)), basis, step)
    if not keep.all():
        mean, power = mean[keep], power[keep]
    line = _measure(mean, power, basis, stride[0] * stride[1] / (edges[0] * edges[1]))
    if line.variance < step**2 / 24:
        return _noise_free(blocks, image.dtype, line.variance)
    words = f"{len(mean)} blocks of {edges[0]}x{edges[1]} pixels"
    if line.correlation:
        words += f", neighbours correlated by {line.correlation:.2f}"
    return replace(_steady(line, mean, blocks.shape[1]), description=words)


def _noise_free(values: np.ndarray, dtype: np.dtype, measured: float) -> NoiseLine:
    """Noise of rounding to 1, or for floats to 2^-16 of the largest value, so that a model of it has noise at all."""
    top = float(np.abs(values).max()) if values.size else 0.0
    unit = 1.0 if dtype.kind in "iu" or top == 0 else max(top / 65536, _TINY)
    return NoiseLine(
        mean=float(values.mean()) if values.size else 0.0,
        variance=max(measured, unit**2 / 12),
        noisy=False,
        description="which shows no noise" if values.size else "which has no valid pixel",
    )


def _sample(
    image: np.ndarray | OnDemand, mask: np.ndarray | OnDemand | None
) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
    """Blocks without an invalid pixel, (blocks, pixels) float64, their edges and the strides of their grid."""
    best: tuple[np.ndarray, tuple[int, int], tuple[int, int]] | None = None
    for edge, fewest in _EDGES.items():
        edges = (min(edge, image.shape[0]), min(edge, image.shape[1]))
        places = (image.shape[0] - edges[0] + 1, image.shape[1] - edges[1] + 1)
        step = math.ceil(math.sqrt(places[0] * places[1] / _BLOCKS))
        # Along a frame of few rows or columns the blocks that its other axis cannot give.
        stride = (min(step, places[0]), min(step, places[1]))
        if min(places) < step:
            stride = tuple(1 if place < step else math.ceil(math.prod(places) / _BLOCKS) for place in places)
        blocks = _windows(image, edges, stride).astype(np.float64)
        total = len(blocks)
        if mask is not None:
            blocks = blocks[~_windows(mask, edges, stride).any(axis=1)]
        if image.dtype.kind == "f":
            # NaN fails the comparison; larger values would overflow when squared.
            blocks = blocks[(np.abs(blocks) < _HUGE).all(axis=1)]
        if best is None or len(blocks) > 1.5 * len(best[0]):
            best = blocks, edges, stride
        if len(blocks) >= fewest * (1 if len(blocks) > total // 2 else 8):
            return blocks, edges, stride
    return best


def _windows(array: np.ndarray | OnDemand, edges: tuple[int, int], stride: tuple[int, int]) -> np.ndarray:
    if isinstance(array, OnDemand):
        starts = range(0, array.shape[0] - edges[0] + 1, stride[0])
        bands = (array[start : start + edges[0]] for start in starts)
        return np.concatenate([_windows(band, edges, (1, stride[1])) for band in bands])
    windows = np.lib.stride_tricks.sliding_window_view(array, edges)[:: stride[0], :: stride[1]]
    return windows.reshape(-1, edges[0] * edges[1])


def _without_blocks(image: np.ndarray, mask: np.ndarray | None) -> NoiseLine:
    """One pixel, or so many invalid ones that hardly two neighbours are left."""
    image, mask = (array[:] if isinstance(array, OnDemand) else array for array in (image, mask))
    values = (image.ravel() if mask is None else image[~mask]).astype(np.float64)
    values = values[np.abs(values) < _HUGE]
    # 0.455 is the median of chi^2 with one degree of freedom.
    variance = float(np.median(np.diff(values) ** 2)) / 2 / 0.455 if values.size > 1 else 0.0
    if variance < _TINY**2:
        return _noise_free(values, image.dtype, variance)
    return NoiseLine(float(values.mean()), variance, description=f"{values.size} valid pixels")


def _smallest_step(values: np.ndarray, dtype: np.dtype) -> float:
    """The smallest difference between two values of the sample: 1 or more for integers."""
    values = values.ravel()
    values = np.unique(values[:: max(1, values.size // 200_000)])
    # Differences of floats below their spacing are rounding of the arithmetic that made them.
    smallest = 1.0
    if dtype.kind == "f":
        # The one below the largest: there is no next one above the largest of all floats.
        below = np.nextafter(np.abs(values).max().astype(dtype), dtype.type(0))
        smallest = max(float(np.spacing(below)), _TINY)
    steps = np.diff(values)
    steps = steps[steps >= smallest]
    return float(steps.min()) if steps.size else smallest


def _is_noise_free(blocks: np.ndarray, span: np.ndarray, edges: tuple[int, int]) -> bool:
    """Many constant blocks, and in the others edges only: spans over many decades, or equal neighbours beside steps."""
    varied = span > _TINY
    if not varied.any():
        return True
    if varied.mean() > 0.7:
        return False
    if np.quantile(span[varied], 0.1) < 0.01 * np.median(span[varied]):
        return True
    rest = blocks[varied].reshape(-1, *edges)
    steps = peaks = pairs = 0
    for axis in (1, 2):
        change = np.moveaxis(np.diff(rest, axis=axis), axis, 0)
        pairs += change.size
        steps += np.count_nonzero(change)
        # Single quanta in the dark are peaks; edges are steps.
        peaks += np.count_nonzero(change[1:] * change[:-1] < 0)
    return steps < 0.4 * pairs and peaks < 0.2 * steps


def _high_degree(basis: _Basis) -> int:
    return max(1, round(0.43 * int(basis.degree[-1])))


def _unclipped(blocks: np.ndarray, mean: np.ndarray, measured: np.ndarray, basis: _Basis, step: float) -> np.ndarray:
    """False for blocks that are clipped at the image's lowest or highest value, or whose noise rounding hides."""
    freedom = int((basis.degree >= _high_degree(basis)).sum())
    enough = max(_FEWEST, len(blocks) // 50)
    keep = np.ones(len(blocks), bool)
    for sign in (1, -1):
        extreme = (sign * blocks[keep]).max()
        reaching = (sign * blocks == extreme).sum(axis=1)
        touching = keep & (reaching > 0)
        rest = keep & (reaching == 0)
        if rest.sum() < enough:
            continue
        line = _mixture_line(mean[rest], measured[rest], freedom)
        if sign < 0 and touching.mean() > 0.05:
            # Poisson counts pile up at no quanta by nature. They keep the variance of the line, clipped noise does not:
            # in simulations the lower quartile below is 0.88 or more for the former, 0.74 or less for the latter.
            most = touching & (reaching >= np.quantile(reaching[touching], 0.75))
            if np.quantile(measured[most] / line.at(mean[most]), 0.25) > 0.8:
                continue
        # Where nothing is clipped, this costs the few blocks that hold the extreme.
        keep = rest
        if touching.mean() > 0.01:
            # What is left beside a clipped block by luck has too little variance.
            far = rest & (sign * mean + 2.5 * np.sqrt(line.at(mean)) < extreme)
            keep = far if far.sum() >= enough else rest
    # Where the noise is below 0.4 steps rms, rounding no longer acts like added noise.
    resolved = keep & (_mixture_line(mean[keep], measured[keep], freedom).at(mean) >= 0.16 * step**2)
    return resolved if resolved.sum() >= max(_FEWEST, 0.2 * keep.sum()) else keep


def _measure(mean: np.ndarray, power: np.ndarray, basis: _Basis, area: float) -> NoiseLine:
    """Steps 1 to 4 of the module's text; for blocks smaller than 8x8 step 1 alone. area: stride^2 / edge^2."""
    # Overlapping blocks carry less information than their number says; measured on white noise, for the variance of a
    # block and for the power of a coefficient.
    weight, profile_weight = min(1.0, 2 * area), min(1.0, 8 / 3 * math.sqrt(area))
    first = _high_degree(basis)
    measured = power @ basis.share(first)
    freedom = int((basis.degree >= first).sum())
    if len(mean) < _FEWEST:
        # Too few for the mixture: the median, over that of chi^2 (Wilson and Hilferty).
        return NoiseLine(float(mean.mean()), float(np.median(measured)) / (1 - 2 / (9 * freedom)) ** 3)
    line = _mixture_line(mean, measured, freedom, weight)
    if basis.degree[-1] < 14:
        return line
    low = power @ basis.share(2, 3)
    while True:
        expected = line.at(mean)
        likely = measured < expected * (1 + 3 * math.sqrt(2 / freedom))
        chosen = _quiet(mean, low / expected, likely)
        count = profile_weight * len(chosen)
        profile = _profile(power, expected, chosen)
        start, shapes = _blur(profile, basis, count)
        if start <= first:
            break
        # Texture reaches the degrees in use: choose and measure again without them.
        first = start
        measured = power @ basis.share(first)
        freedom = int((basis.degree >= first).sum())
        line = _mixture_line(mean[chosen], measured[chosen], freedom, weight)
    level = mean[chosen]
    variance = (power @ basis.share(start))[chosen]
    used = basis.degree >= start
    freedom = int(used.sum())
    shape, _, _ = _best_shape(profile, basis, start, shapes)
    correlation = float(basis.correlation[shape])
    # A few high degrees cannot tell a weak blur from a trace of texture.
    threshold = max(0.03 if start < 6 else 0.015 * (start - 3), 2 / math.sqrt(count * freedom))
    if abs(correlation) < threshold:
        return _mixture_line(level, variance, freedom, weight)
    # The noise cannot have more variance than the blocks have.
    limit = 1.25 * profile[1:].mean() / profile[used].mean()
    levels, factors = [], []
    for group in np.array_split(chosen[np.argsort(level, kind="stable")], 3 if count > 300 else 1):
        levels.append(mean[group].mean())
        found, _, _ = _best_shape(_profile(power, expected, group), basis, start, shapes)
        factors.append(min(1 / basis.power[used, found].mean(), limit))
    variance *= np.interp(level, levels, factors)
    likely = basis.power[used, shape]
    line = _mixture_line(level, variance, freedom * likely.mean() ** 2 / (likely**2).mean(), weight)
    return replace(line, correlation=correlation)


def _mixture_line(mean: np.ndarray, measured: np.ndarray, freedom: float, weight: float = 1.0) -> NoiseLine:
    """A line mu(mean), where `measured` is mu chi^2 / freedom, except in blocks with content, where it is more.

    mean, measured: (blocks,) float64. Deterministic expectation-maximisation from a line through low quantiles.
    """
    middle = float(mean.mean())
    scale = max(float(mean.std()), 1e-6 * abs(middle), 1e-150)
    t = (mean - middle) / scale
    centre, slope = _start_line(t, measured, 1 - 0.65 * math.sqrt(2 / freedom))
    floor = max(1e-3 * centre, _TINY**2)
    share = 0.7
    half = freedom / 2
    constant = half * math.log(half) - math.lgamma(half)
    for _ in range(40):
        mu = np.maximum(centre + slope * t, floor)
        x = np.maximum(measured / mu, 1e-12)
        # Both are densities of log x; content is spread evenly over four decades above the noise.
        noise = share * np.exp(constant + half * (np.log(x) - x))
        content = (1 - share) / 9.2 * np.minimum(x, 1.0) ** 2
        belief = noise / (noise + content + 1e-300)
        share = min(max(float(belief.mean()), 0.05), 0.999)
        w = belief / mu**2
        total = max(float(w.sum()), 1e-300)
        t_mean, v_mean = float(w @ t) / total, float(w @ measured) / total
        around = t - t_mean
        lever = float(w @ (around * around))
        new_slope = float(w @ (around * measured)) / lever if lever > 1e-9 * total else 0.0
        new_centre = v_mean - new_slope * t_mean
        moved = abs(new_centre - centre) + abs(new_slope - slope)
        centre, slope = new_centre, new_slope
        if moved < 1e-4 * abs(centre):
            break
    error = math.sqrt(2 / (freedom * weight * lever)) / scale if lever > 1e-9 * total else math.inf
    return NoiseLine(middle + scale * t_mean, max(v_mean, 1e-300), slope / scale, error)


def _start_line(t: np.ndarray, measured: np.ndarray, factor: float) -> tuple[float, float]:
    """Value at t = 0 and slope of a line through the lower quartiles of bins of equal count, divided by `factor`."""
    bins = np.array_split(np.argsort(t, kind="stable"), int(np.clip(len(t) // 40, 1, 32)))
    x = np.array([t[b].mean() for b in bins])
    y = np.array([np.quantile(measured[b], 0.25) for b in bins]) / factor
    typical = max(float(np.median(y)), 1e-300)
    if len(bins) < 3:
        return typical, 0.0
    design = np.stack([np.ones_like(x), x], axis=1)
    w = 1 / np.maximum(y, 1e-3 * typical) ** 2
    for _ in range(30):
        root = np.sqrt(w)
        line = np.linalg.lstsq(design * root[:, None], y * root, rcond=None)[0]
        mu = np.maximum(design @ line, 1e-3 * typical)
        excess = y / mu - 1
        # Least absolute deviations, twice as strict below the line: content only ever adds.
        w = np.where(excess > 0, 0.5, 1.0) / (mu**2 * np.maximum(np.abs(excess), 0.02))
    return float(line[0]) if line[0] > 1e-3 * typical else typical, float(line[1])


def _quiet(mean: np.ndarray, low: np.ndarray, likely: np.ndarray) -> np.ndarray:
    """Indices of the blocks whose low degrees show noise only, at each of up to 8 levels."""
    groups = np.array_split(np.argsort(mean, kind="stable"), int(np.clip(len(mean) // 50, 1, 8)))
    groups = [group for group in (group[likely[group]] for group in groups) if group.size]
    if not groups:
        return np.arange(len(mean))
    quiet = np.array([np.quantile(low[group], 0.3) for group in groups])
    # White read noise weighs most in the dark, so noise alone has no more low degrees there than in brighter parts.
    quiet = np.minimum(quiet, 1.3 * np.minimum.accumulate(quiet[::-1])[::-1])
    # Of chi^2 with the 7 degrees of freedom of the low coefficients, 98 % lies below 3.5 times the 0.3 quantile.
    return np.sort(np.concatenate([g[low[g] <= 3.5 * q] for g, q in zip(groups, quiet, strict=True)]))


def _profile(power: np.ndarray, expected: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Mean power of every coefficient over the blocks `chosen`, relative to `expected` (blocks,)."""
    w = np.zeros(len(power))
    w[chosen] = 1 / expected[chosen] / len(chosen)
    return w @ power


def _blur(profile: np.ndarray, basis: _Basis, count: float) -> tuple[int, np.ndarray]:
    """The lowest degree from which on `profile` is that of a shape of noise, and the indices of the shapes to try.

    A sum of blurred and white noise (read noise, light with long tails) looks like smooth texture with white noise, so
    it is believed only where most degrees fit.
    """
    blurred, mixed = np.flatnonzero(_WHITE == 0), np.arange(len(_WHITE))
    for start, shapes in [(d, s) for d in range(4, 11) for s in ((blurred, mixed) if d < 7 else (blurred,))]:
        _, misfit, degrees = _best_shape(profile, basis, start, shapes)
        if misfit < (0.014 if start == 4 else 0.008) + math.sqrt(2 / count * degrees / (basis.degree >= start).sum()):
            break
    return start, shapes


def _best_shape(profile: np.ndarray, basis: _Basis, start: int, shapes: np.ndarray) -> tuple[int, float, int]:
    """The shape whose power against degree fits best, the rms misfit of logarithms, and the number of degrees."""
    members = [basis.degree == degree for degree in range(start, int(basis.degree[-1]) + 1)]
    share = np.array([m.sum() for m in members], float)
    share /= share.sum()
    measured = np.array([profile[m].mean() for m in members])[:, None]
    expected = np.array([basis.power[m].mean(axis=0) for m in members])[:, shapes]
    # A small sum under the logarithm, because relative errors of nearly no power do not matter.
    ratio = np.log(measured / (share @ measured) + 0.1) - np.log(expected / (share @ expected) + 0.1)
    misfit = np.sqrt(share @ (ratio - share @ ratio) ** 2)
    best = int(misfit.argmin())
    return int(shapes[best]), float(misfit[best]), len(members)


def _steady(line: NoiseLine, mean: np.ndarray, pixels: int) -> NoiseLine:
    """`line` with no slope where the levels differ by noise only, and not below zero at the levels present."""
    spread = 6 * line.variance * (1 + 2 * line.correlation) ** 2 / pixels
    if len(mean) < _FEWEST or mean.var() < spread:
        return replace(line, slope=0.0, slope_error=math.inf)
    lowest = float(np.quantile(mean, 0.005))
    steepest = 0.99 * line.variance / max(line.mean - lowest, 1e-300)
    return replace(line, slope=min(line.slope, steepest))
