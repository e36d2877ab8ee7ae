"""Dark frame, flat field and bad pixels of a detector, from series of frames (classes of ASTM E2597/E2597M)."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntFlag
from pathlib import Path
from typing import Any

import numpy as np

from xrk import arrays, io
from xrk.errors import InputError, InputTypeError

__all__ = ["BadPixel", "Calibration", "calibrate"]

AREA, CELL = 23, 3  # an area of at least 21 x 21 pixels around each pixel, the same for cells of 3 x 3
NEIGHBOURS = 9
OVER, UNDER = 1.3, 0.6  # of the area's median
NOISY = 6.0  # median standard deviations
NON_UNIFORM = 0.01  # of the neighbours' median
CERTAIN = 4.0  # standard errors by which a mean must lie beyond a limit
WORK = 1 << 23  # values that medians are taken of at a time


class BadPixel(IntFlag):
    """What is wrong with a pixel; a pixel may be of several classes."""

    DEAD = 1  # no response: the flats' mean is not above the darks' by more than their noise
    OVER = 2  # response (flat - dark) above 1.3 times the median of the area of 21 x 21 pixels
    UNDER = 4  # below 0.6 times that median
    NOISY = 8  # standard deviation over the darks above 6 times the median one
    NON_UNIFORM = 16  # corrected by the others, flats differ by more than 1 % from the median of 9 x 9 pixels
    CLUSTER = 32  # one of the eight neighbours is bad, too
    KERNEL = 64  # fewer than five of them are good: too few for a filling that can be trusted


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found; arrays (H, W), ready for ``enhance_file(dark=, flat=, badpixels=)``.

    Attributes:
        dark, flat: means over the frames, float32, counts.
        badpixels: uint8, `BadPixel` flags; 0 is a good pixel.
        sources: the files of the series, by what they hold, where they came from files: `save` leaves them alone.
    """

    dark: np.ndarray
    flat: np.ndarray
    badpixels: np.ndarray
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def counts(self) -> dict[str, int]:
        """Pixels of each class."""
        return {flag.name.lower(): int(np.count_nonzero(self.badpixels & int(flag))) for flag in BadPixel}

    def save(self, folder: str | os.PathLike) -> list[Path]:
        """Writes dark.tif, flat.tif and badpixels.tif into a folder; returns their paths.

        Raises:
            InputError: one of them is a file that the series came from. ImageFileError: a file cannot be written.
        """
        paths = {name: Path(folder, f"{name}.tif") for name in ("dark", "flat", "badpixels")}
        io.check_apart(paths, self.sources)
        for name, path in paths.items():
            io.write(path, getattr(self, name), report={"calibration": {"pixels": self.counts}})
        return list(paths.values())


def calibrate(flats: Any, darks: Any) -> Calibration:
    """Dark frame, flat field and bad pixels from series taken with and without exposure.

    Args:
        flats: (N, H, W) counts of one uniform exposure, or the path of such a stack; N >= 2, and 30 or more for means
            that 1 % can be told in. Pixels whose noise hides 1 % are not called non-uniform.
        darks: (M, H, W) without exposure; M >= 2, and 30 or more by the standard.

    Returns:
        A `Calibration`. The limits are those of ASTM E2597: dead, 0.6 and 1.3 of the median of 21 x 21 pixels, 6 median
        standard deviations, 1 % of the median of 9 x 9; clusters are marked by their pixels.

    Raises:
        InputError: shapes that do not fit, or flats that are above the darks nowhere. InputTypeError: another dtype.
        ImageFileError: a file that cannot be read.
    """
    flat_stack, dark_stack = _stack(flats, "flats"), _stack(darks, "darks")
    if flat_stack.shape[1:] != dark_stack.shape[1:]:
        raise InputError(
            f"calibrate: flats are {flat_stack.shape} and darks {dark_stack.shape}; expected equal H and W."
        )
    dark, dark_variance = _moments(dark_stack)
    flat, flat_variance = _moments(flat_stack)
    error = np.sqrt(flat_variance / len(flat_stack) + dark_variance / len(dark_stack))
    response = flat - dark
    bad = np.zeros(dark.shape, np.uint8)

    def mark(flag: BadPixel, where: np.ndarray) -> None:
        bad[where] |= np.uint8(flag)

    with np.errstate(invalid="ignore"):
        alive = response > CERTAIN * error
    if not alive.any():
        raise InputError("calibrate: the flats are above the darks nowhere; are the two exchanged?")
    mark(BadPixel.DEAD, ~alive)
    # Pixels that are plainly wrong would pull the medians of small areas.
    area = _area_medians(np.where(alive, response, np.nan))
    mark(BadPixel.OVER, alive & (response > OVER * area))
    mark(BadPixel.UNDER, alive & (response < UNDER * area))
    sigma = np.sqrt(dark_variance)
    mark(BadPixel.NOISY, sigma > NOISY * np.median(sigma))
    mark(BadPixel.NON_UNIFORM, _non_uniform(flat_stack, dark, error, alive & (bad == 0)))
    _mark_clusters(bad)
    files = {"series of flats": flats, "series of darks": darks}
    sources = {name: os.path.abspath(path) for name, path in files.items() if isinstance(path, str | os.PathLike)}
    return Calibration(dark.astype(np.float32), flat.astype(np.float32), bad, sources)


def _stack(frames: Any, name: str) -> np.ndarray:
    if isinstance(frames, str | os.PathLike):
        stack = io.read(frames).array
    elif isinstance(frames, Sequence):
        each = [arrays.host_array(frame, name) for frame in frames]
        shapes = {frame.shape for frame in each}
        if len(shapes) != 1:
            given = " and ".join(map(str, sorted(shapes)[:2])) if shapes else "no frame at all"
            raise InputError(f"calibrate: {name} are {given}; expected frames of one shape (H, W), 2 or more.")
        stack = np.stack(each)
    else:
        stack = arrays.host_array(frames, name)
    if stack.dtype.kind not in "uif":
        raise InputTypeError(f"calibrate: {name} are of dtype {stack.dtype}; expected integers or floats.")
    if stack.ndim != 3 or len(stack) < 2 or 0 in stack.shape:
        raise InputError(f"calibrate: {name} have shape {stack.shape}; expected (N, H, W) with at least 2 frames.")
    return stack


def _moments(stack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance over time, (H, W) float64, frame by frame (Welford); pixels that are not finite give NaN."""
    mean, squares = np.zeros(stack.shape[1:]), np.zeros(stack.shape[1:])
    with np.errstate(invalid="ignore"):
        for number, frame in enumerate(stack, start=1):
            change = frame - mean
            mean += change / number
            squares += change * (frame - mean)
    return mean, squares / (len(stack) - 1)


def _medians(values: np.ndarray, size: int, step: int) -> np.ndarray:
    """Medians of size x size pixels around every ``step``-th pixel, NaN left out; mirrored at the image's edges."""
    half = size // 2
    padded = np.pad(values, half, mode="symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size))[step // 2 :: step, step // 2 :: step]
    out = np.empty(windows.shape[:2])
    rows = max(1, WORK // (windows.shape[1] * size * size))
    for start in range(0, len(windows), rows):
        part = np.sort(windows[start : start + rows].reshape(-1, size * size), axis=1)  # NaN come last
        known = size * size - np.isnan(part).sum(axis=1)
        middle = np.maximum(known - 1, 0)
        each = np.arange(len(part))
        median = (part[each, middle // 2] + part[each, (middle + 1) // 2]) / 2
        out[start : start + rows] = np.where(known > 0, median, np.nan).reshape(-1, windows.shape[1])
    return out


def _area_medians(response: np.ndarray) -> np.ndarray:
    """For each pixel the median of an area of at least 21 x 21 around it; the image's where none of it is alive."""
    height, width = response.shape
    padded = np.pad(response, ((0, -height % CELL), (0, -width % CELL)), mode="edge")
    cells = _medians(padded, AREA, CELL)
    cells[np.isnan(cells)] = np.nanmedian(response)
    return cells.repeat(CELL, axis=0).repeat(CELL, axis=1)[:height, :width]


def _non_uniform(flats: np.ndarray, dark: np.ndarray, error: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Where one half of the flats, corrected by the other half, is not uniform."""
    first, second = (sum(frame.astype(np.float64) for frame in flats[i::2]) / len(flats[i::2]) - dark for i in (0, 1))
    usable = good & (first > 0) & (second > 0)
    ratio = np.divide(first, second, out=np.full(dark.shape, np.nan), where=usable)
    median = _medians(ratio, NEIGHBOURS, 1)
    # Each half's mean has about 2 times the variance of the mean of all, and the ratio that of both halves.
    noise = 2.0 * np.divide(error, second, out=np.zeros(dark.shape), where=usable)
    with np.errstate(invalid="ignore"):
        return usable & (np.abs(ratio / median - 1) > NON_UNIFORM + CERTAIN * noise)


def _mark_clusters(bad: np.ndarray) -> None:
    """Adds the flags of clusters."""
    wrong = np.pad(bad != 0, 1)
    height, width = bad.shape
    shifts = [(y, x) for y in range(3) for x in range(3) if (y, x) != (1, 1)]
    neighbours = sum(wrong[y : y + height, x : x + width].astype(np.uint8) for y, x in shifts)
    inside = np.pad(np.ones(bad.shape, np.uint8), 1)
    good = sum(inside[y : y + height, x : x + width] for y, x in shifts) - neighbours
    itself = bad != 0
    bad[itself & (neighbours > 0)] |= np.uint8(BadPixel.CLUSTER)
    bad[itself & (good < 5)] |= np.uint8(BadPixel.KERNEL)
