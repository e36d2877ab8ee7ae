"""BRISQUE, a figure of merit without a reference: how far an image's statistics are from those of good photographs.

Mittal, Moorthy, Bovik, "No-Reference Image Quality Assessment in the Spatial Domain", IEEE Trans. Image Process. 21,
2012, 4695: eighteen parameters of the distributions of normalised values and of products of neighbours, at two scales,
and a support vector regression from them to a score. The parameters are computed here; the regression, fitted to the
opinions people gave on the LIVE data base, is read from the package ``brisque`` as a file. Nothing of that package
runs: it would want OpenCV, and its scaling comes as a pickle, of which plain numbers are taken and nothing else.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xrk.errors import InputError

__all__ = ["brisque", "features"]

_SMALLEST = 16  # pixels a side: the second scale has half, and its windows are seven wide
_GAMMAS = np.arange(200, 10001) / 1000  # the shapes of a distribution that are tried


def brisque(image: ArrayLike, data_range: float) -> float:
    """The BRISQUE score: 0 for the best photographs, 100 for the worst; lower is better, some images leave that range.

    Read it with care. The regression was fitted to 8-bit photographs that had been compressed, blurred or made noisy;
    a radiograph's smooth gradients, its noise and the look of its edges are none of what it has seen, and a smoothed
    picture may score better than a sharp one. It can rank one scene's versions; it cannot be compared between scenes,
    and it says nothing of whether a detail is true.

    Args:
        image: (H, W), counts, any real dtype, H and W at least 16.
        data_range: the counts that stand for white; they become 255, without rounding.

    Raises:
        InputError: another shape, values that are not finite, ``data_range`` is not positive, or the package that
        holds the regression is not there (``pip install --no-deps brisque``).
    """
    found = features(image, data_range)
    model = _model()
    scaled = 2 * (found - model.lowest) / (model.highest - model.lowest) - 1
    distance = ((model.vectors - scaled) ** 2).sum(1)
    return float(model.weights @ np.exp(-model.gamma * distance) - model.rho)


def features(image: ArrayLike, data_range: float) -> NDArray[np.float64]:
    """The 36 parameters that the score is made of, eighteen at the image's size and eighteen at half of it.

    With m and s the mean and the deviation under a Gaussian window of 7 x 7 (sigma 7/6; zeros beyond the border), the
    values (x - m) / (s + 1), x from 0 to 255, are fitted by a generalised Gaussian: shape and variance. Their products
    with the neighbour to the right, below, below to the right and above to the right are fitted by asymmetric ones:
    shape, mean, and the variances of both sides. As in the authors' program, neighbours go round at the border.

    Args, Raises: as for `brisque`.
    """
    x = np.asarray(image, np.float64)
    if x.ndim != 2 or min(x.shape) < _SMALLEST:
        raise InputError(f"BRISQUE needs an image (H, W) of at least {_SMALLEST}x{_SMALLEST}, not shape {x.shape}.")
    if not data_range > 0:
        raise InputError(f"data_range is {data_range}; it must be a positive number.")
    if not np.isfinite(x).all():
        raise InputError("The image has values that are not finite; BRISQUE needs them filled.")
    x = x * (255.0 / data_range)
    found: list[float] = []
    for scale in range(2):
        if scale:
            x = _half(_half(x).T).T
        mean = _windowed(x)
        deviation = np.sqrt(np.abs(_windowed(x * x) - mean * mean))
        values = (x - mean) / (deviation + 1)
        found += _gaussian(values)
        for shift in ((0, 1), (1, 0), (1, 1), (-1, 1)):
            found += _asymmetric(values * np.roll(values, shift, (0, 1)))
    return np.array(found)


def _windowed(x: np.ndarray) -> np.ndarray:
    """The mean under the Gaussian window, zeros beyond the border."""
    taps = np.exp(-((np.arange(7) - 3) ** 2) / (2 * (7 / 6) ** 2))
    taps /= taps.sum()
    for axis in (0, 1):
        padded = np.pad(x, [(3, 3) if a == axis else (0, 0) for a in (0, 1)])
        x = sum(tap * padded.take(np.arange(i, i + x.shape[axis]), axis) for i, tap in enumerate(taps))
    return x


def _half(x: np.ndarray) -> np.ndarray:
    """Every second row of a cubic (a = -0.5) that is widened to twice its length against aliasing; mirrored borders."""
    distance = np.abs(np.arange(8) - 3.5) / 2
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    taps = np.where(distance < 1, near, far) / 2
    rows = -(-len(x) // 2)
    padded = np.pad(x, ((3, 5), (0, 0)), mode="symmetric")
    return sum(tap * padded[i : i + 2 * rows : 2] for i, tap in enumerate(taps))


@functools.cache
def _ratios() -> NDArray[np.float64]:
    """(mean of |v|)^2 / mean of v^2 of a generalised Gaussian, for each of `_GAMMAS`."""
    logs = [2 * math.lgamma(2 / g) - math.lgamma(1 / g) - math.lgamma(3 / g) for g in _GAMMAS]
    return np.exp(np.array(logs))


def _shape(ratio: float) -> float:
    return float(_GAMMAS[np.argmin((_ratios() - ratio) ** 2)])


def _gaussian(values: np.ndarray) -> list[float]:
    variance = float(np.mean(values**2))
    if variance == 0:  # a flat image: what the search ends with where nothing fits
        return [float(_GAMMAS[-1]), 0.0]
    return [_shape(float(np.mean(np.abs(values))) ** 2 / variance), variance]


def _asymmetric(values: np.ndarray) -> list[float]:
    sides = (values[values < 0], values[values > 0])
    left, right = (float(np.sqrt(np.mean(part**2))) if part.size else 0.0 for part in sides)
    if left == 0 or right == 0:
        return [float(_GAMMAS[-1]), 0.0, left**2, right**2]
    side = left / right
    ratio = float(np.mean(np.abs(values))) ** 2 / float(np.mean(values**2))
    shape = _shape(ratio * (side**3 + 1) * (side + 1) / (side**2 + 1) ** 2)
    one, two, three = (math.lgamma(n / shape) for n in (1, 2, 3))
    mean = (right - left) * math.exp(two - one + (one - three) / 2)
    return [shape, mean, left**2, right**2]


# --- the regression -------------------------------------------------------------------------------------------------


class _Model:
    """A support vector regression with a radial kernel, from libsvm's text, and the ranges its input is scaled by."""

    def __init__(self, text: str, scaling: dict[str, Any]) -> None:
        head, _, body = text.partition("\nSV\n")
        facts = dict(line.split(" ", 1) for line in head.splitlines())
        if facts.get("svm_type") != "epsilon_svr" or facts.get("kernel_type") != "rbf":
            raise ValueError("no regression with a radial kernel")
        self.gamma, self.rho = float(facts["gamma"]), float(facts["rho"])
        lines = [line.split() for line in body.splitlines() if line.strip()]
        self.weights = np.array([float(line[0]) for line in lines])
        self.vectors = np.zeros((len(lines), 36))
        for vector, line in zip(self.vectors, lines, strict=True):
            for entry in line[1:]:
                number, value = entry.split(":")
                vector[int(number) - 1] = float(value)
        self.lowest, self.highest = (np.array(scaling[name], np.float64).reshape(36) for name in ("min_", "max_"))


class _NumbersOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is no number")


@functools.cache
def _model() -> _Model:
    spec = importlib.util.find_spec("brisque")  # found, not imported
    if spec is None or spec.origin is None:
        raise InputError("BRISQUE's regression is in the package brisque: pip install --no-deps brisque.")
    folder = Path(spec.origin).parent / "models"
    try:
        with open(folder / "normalize.pickle", "rb") as file:
            scaling = _NumbersOnly(file).load()
        return _Model((folder / "svm.txt").read_text(), scaling)
    except (OSError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(
            f"The regression in {folder} cannot be read ({error}); expected the files of brisque 0.2."
        ) from error
