"""How far two frames of one object are shifted against each other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np

__all__ = ["Shift", "find_shift", "middle"]

# The middle of the frames is looked at: a power of two for the transform, enough structure, well under a second.
_SIDE = 1024
# The peak of the correlation in standard deviations of the rest from which it is believed. Simulated scenes of two
# energies give 36 and more at 50 quanta a pixel, white noise 5 to 8, unrelated scenes 6 to 22 (512 x 512).
_CLEAR = 30.0
# The surroundings of the peak are what lies further than 8 pixels from it: smaller surfaces have too few of them.
_LEAST = 32


@dataclass(frozen=True)
class Shift:
    """Whole pixels that the second frame lies further down and to the right than the first.

    Attributes:
        rows, columns: the shift.
        clarity: height of the correlation's peak, in standard deviations of its surroundings.
    """

    rows: float
    columns: float
    clarity: float


def middle(shape: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns that `find_shift` looks at."""
    sides = [min(n, _SIDE) for n in shape]
    rows, columns = (slice((n - side) // 2, (n + side) // 2) for n, side in zip(shape, sides, strict=True))
    return rows, columns


def find_shift(first: np.ndarray, second: np.ndarray) -> Shift | None:
    """The shift by phase correlation (Kuglin and Hines, 1975), or None where there is no clear peak.

    The frames' middle parts are windowed, and their cross-power spectrum is normalised to phases, so that only where
    structures lie counts, not how strongly each energy shows them. High frequencies, mostly noise, are damped, and
    single pixels that stand out are cut to their neighbours: a detector's bad pixels are no object.

    Args:
        first, second: (H, W) of one shape, any real dtype; below 32 x 32 nothing is clear.
    """
    part = middle(first.shape)
    height, width = first[part].shape
    if min(height, width) < _LEAST:
        return None
    frames = [_without_speckles(frame[part]).astype(np.float64) for frame in (first, second)]
    if any(np.ptp(frame) == 0 for frame in frames):
        return None
    window = np.outer(np.hanning(height), np.hanning(width))
    a, b = (_flattened(frame) * window for frame in frames)
    spectrum = np.conj(np.fft.rfft2(a)) * np.fft.rfft2(b)
    magnitude = np.abs(spectrum)
    phases = np.divide(spectrum, magnitude, out=np.zeros_like(spectrum), where=magnitude > 1e-12 * magnitude.max())
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    surface = np.fft.irfft2(phases * np.exp(-((frequency / 0.15) ** 2)), s=(height, width))
    row, column = np.unravel_index(int(np.argmax(surface)), surface.shape)
    peak = surface[row, column]
    around = np.zeros(surface.shape, bool)
    around[:17, :17] = True
    rest = surface[~np.roll(around, (row - 8, column - 8), axis=(0, 1))].std()
    clarity = float(peak / rest) if rest > 0 else float("inf")
    if clarity < _CLEAR:
        return None
    rows, columns = (int(i) if i <= n // 2 else int(i) - n for i, n in ((row, height), (column, width)))
    return Shift(float(rows), float(columns), clarity)


def _without_speckles(frame: np.ndarray) -> np.ndarray:
    """Every pixel cut to the range of its four neighbours (opposite ones where there is none)."""
    padded = np.pad(frame, 1, mode="reflect")
    beside = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    low, high = (reduce(extreme, beside) for extreme in (np.minimum, np.maximum))
    return np.clip(frame, low, high)


def _flattened(frame: np.ndarray) -> np.ndarray:
    """Without its mean plane: slopes across the frame would be edges where it is wrapped round."""
    frame = frame - frame.mean()
    rows, columns = (np.linspace(-1, 1, n) for n in frame.shape)
    frame -= (frame.mean(1) @ rows / (rows @ rows)) * rows[:, None]
    frame -= (frame.mean(0) @ columns / (columns @ columns)) * columns[None]
    return frame
