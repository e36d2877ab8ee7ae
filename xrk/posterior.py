"""What a blind-spot network's answer and the pixel itself say together.

The network gives the mean m and variance s^2 of a pixel as its surroundings predict it, noise included; the pixel y has
noise of variance v(m). The best estimate of the noise-free value weighs both (Khademi et al., WACV 2021, equation 4):

    u = max(s^2 - v, floor)      variance of the noise-free value given the surroundings
    x = (m v + y u) / (v + u),   var x = v u / (v + u)

Everything is in the network's units, 0 at black and 1 at white. Without a calibration v = max(a m + b, floor) is fitted
to the frame: the a and b under which the pixels are most likely given m.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["NoiseFit", "combine", "fit_noise", "without_noise"]

_Array = NDArray[np.floating]

# Pixels that the fit looks at: their error in a and b is far below the noise's own, and a frame of any size takes the
# same time.
_SAMPLE = 1 << 17
# Of the mean, in standard deviations of the pixels from it.
_LEAST_SPREAD = 0.01


@dataclass(frozen=True)
class NoiseFit:
    """Variance of a pixel's noise, in the network's units: max(slope * mean + intercept, floor)."""

    slope: float
    intercept: float
    floor: float

    def variance(self, mean: _Array) -> _Array:
        return np.maximum(self.slope * mean + self.intercept, self.floor)


def fit_noise(pixels: _Array, mean: _Array, *, floor: float, compat: bool = False) -> NoiseFit:
    """The line under which ``pixels`` are most likely Gaussian around ``mean``.

    Minimises mean[(y - m)^2 / v + log v], v = max(a m + b, floor), by Nelder and Mead's simplex from (0.01, 0), over
    an even sample of the pixels whose mean lies between its quantiles 0.02 and 0.97. Where these lie less than a
    hundredth of the pixels' deviation from their mean apart, no line can be told, and the last digits of the mean would
    make one: the variance is then the same everywhere, that of the whole sample. (Poisson noise of one quantum or more
    varies by a hundredth at most there.)

    Args:
        pixels, mean: arrays of one shape, in the network's units.
        floor: least variance.
        compat: as the published code does it: all pixels, chosen by the quantiles of the pixels themselves, which cuts
            the noise off where it is largest, and the search ended at 1e-4, which is coarse for 16-bit frames.
    """
    y, m = pixels.ravel(), mean.ravel()
    if y.size > _SAMPLE and not compat:
        chosen = np.linspace(0, y.size - 1, _SAMPLE).astype(np.int64)
        y, m = y[chosen], m[chosen]
    y, m = y.astype(np.float64), m.astype(np.float64)
    judged = y if compat else m
    low, high = np.quantile(judged, (0.02, 0.97))
    inside = (judged >= low) & (judged <= high)
    constant = float(np.mean((y - m) ** 2))
    if not compat and high - low < _LEAST_SPREAD * constant**0.5:
        return NoiseFit(0.0, constant, floor)
    m, squared = m[inside], (y[inside] - m[inside]) ** 2

    def cost(line: _Array) -> float:
        variance = np.maximum(line[0] * m + line[1], floor)
        return float(np.mean(squared / variance + np.log(variance)))

    slope, intercept = _simplex(cost, np.array([0.01, 0.0]), 1e-4 if compat else 1e-12)
    return NoiseFit(float(slope), float(intercept), floor)


def combine(pixels: _Array, mean: _Array, rest: _Array, variance: _Array) -> tuple[_Array, _Array]:
    """(x, standard deviation of x) of the posterior, in the arrays' dtype.

    Args:
        rest: u, variance of the noise-free value given the surroundings; see `without_noise`.
        variance: v, of the pixels' noise.
    """
    both = variance + rest
    return (mean * variance + pixels * rest) / both, np.sqrt(variance * rest / both)


def without_noise(std: _Array, variance: _Array, floor: float) -> _Array:
    """u: what of a pixel's variance given its surroundings is not its noise's, at least ``floor``."""
    return np.maximum(np.square(std) - variance, floor)


def _simplex(cost: Callable[[_Array], float], start: _Array, tolerance: float) -> _Array:
    """Nelder and Mead, Computer Journal 7 (1965) 308: reflect, expand, contract, shrink.

    First steps of 5 % (0.00025 where the start is 0), at most 200 evaluations for each unknown, ended where both the
    points and their costs lie within ``tolerance``: the settings that the published results were made with.
    """
    points = [start] + [
        start + np.eye(len(start))[i] * (0.05 * start[i] if start[i] else 0.00025) for i in range(len(start))
    ]
    costs = [cost(p) for p in points]
    evaluations, most = len(points), 200 * len(start)
    while evaluations < most:
        order = np.argsort(costs, kind="stable")
        points, costs = [points[i] for i in order], [costs[i] for i in order]
        near = max(np.abs(p - points[0]).max() for p in points[1:])
        if near <= tolerance and max(abs(c - costs[0]) for c in costs[1:]) <= tolerance:
            break
        middle = np.mean(points[:-1], axis=0)
        reflected = 2 * middle - points[-1]
        value = cost(reflected)
        evaluations += 1
        if value < costs[0]:
            expanded = 3 * middle - 2 * points[-1]
            further = cost(expanded)
            evaluations += 1
            points[-1], costs[-1] = (expanded, further) if further < value else (reflected, value)
        elif value < costs[-2]:
            points[-1], costs[-1] = reflected, value
        else:
            outside = value < costs[-1]
            contracted = 1.5 * middle - 0.5 * points[-1] if outside else 0.5 * middle + 0.5 * points[-1]
            inner = cost(contracted)
            evaluations += 1
            if inner <= value if outside else inner < costs[-1]:
                points[-1], costs[-1] = contracted, inner
            else:
                points = [points[0], *(points[0] + 0.5 * (p - points[0]) for p in points[1:])]
                costs = [costs[0], *(cost(p) for p in points[1:])]
                evaluations += len(points) - 1
    return points[int(np.argmin(costs))]
