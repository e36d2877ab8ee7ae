"""What a frame is: counts between a black and a white level, some of them invalid.

Frames are numpy arrays (H, W) in C order and in the machine's byte order; stacks are (N, H, W). Nothing here writes
into what it is given. The pixel arithmetic is done by `xrk._native` where it is built and by numpy otherwise; both
compute in float64 and give the same bits.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from xrk.arguments import black_and_white
from xrk.errors import InputError, InputTypeError

try:
    from xrk import _native
except ImportError:  # a checkout whose extension is not built still works, only slower; `kernel_path` says so
    _native = None

DTYPES = tuple(np.dtype(name) for name in ("uint8", "uint16", "int16", "int32", "float32", "float64"))

_BLOCK = 1 << 16  # pixels that numpy works on at a time: their float64 copies stay in the cache


def kernel_path() -> str:
    """Which code does the pixel arithmetic here: "native (avx2)" and the like, or "numpy"."""
    return "numpy" if _native is None else f"native ({_native.simd()})"


# --- what is accepted ---------------------------------------------------------------------------------------------


def check_dtype(dtype: np.dtype | str) -> np.dtype:
    """The dtype, in its own byte order; InputTypeError unless it is one of `DTYPES`, also for an unknown name."""
    try:
        known = np.dtype(dtype)
    except TypeError:
        known = None
    if known is None or known.newbyteorder("=") not in DTYPES:
        accepted = ", ".join(d.name for d in DTYPES)
        raise InputTypeError(f"The image is of dtype {dtype}; expected one of {accepted} (either byte order).")
    return known


def check_shape(shape: tuple[int, ...]) -> None:
    """InputError unless the shape is (H, W) or (N, H, W), without a side of 0.

    A rank of 3 whose last side is 1, 3 or 4 (and the others above 8) is taken for colour channels and refused too:
    as a stack it would be H frames of a few columns, which nobody means.
    """
    if len(shape) not in (2, 3):
        raise InputError(f"The image has shape {shape}; expected (H, W) or a stack (N, H, W).")
    if 0 in shape:
        raise InputError(f"The image is empty, its shape {shape}; expected at least one pixel.")
    if len(shape) == 3 and shape[2] in (1, 3, 4) and min(shape[:2]) > 8:
        hint = "pass image[..., 0]" if shape[2] == 1 else "a radiograph is grey: pass one channel, or their mean"
        raise InputError(
            f"The image has shape {shape}, which looks like (H, W, channels), RGB for example; "
            f"expected (H, W) or a stack (N, H, W): {hint}."
        )


def check_mask(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The mask (True or nonzero = invalid), (H, W) or the image's own shape.

    Raises InputTypeError for another dtype than bool or uint8, InputError for another shape.
    """
    if mask.dtype not in (np.dtype(bool), np.dtype(np.uint8)):
        raise InputTypeError(f"The mask is of dtype {mask.dtype}; expected bool or uint8, nonzero where invalid.")
    if mask.shape not in (shape, shape[-2:]):
        also = f" or {shape}" if len(shape) == 3 else ""
        raise InputError(f"The mask has shape {mask.shape} for an image of shape {shape}; expected {shape[-2:]}{also}.")
    return mask


def invalid_pixels(frame: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray | None:
    """Where ``frame`` (H, W) is NaN, Inf or masked: bool (H, W), or None if nowhere."""
    bad = None
    if frame.dtype.kind == "f":
        bad = ~np.isfinite(frame)
        if mask is not None:
            bad |= mask.astype(bool)
    elif mask is not None:
        bad = mask.astype(bool)
    return bad if bad is not None and bad.any() else None


def resolve_levels(
    levels: tuple[float, float] | None,
    dtype: np.dtype,
    frames: Iterable[tuple[np.ndarray, np.ndarray | None]] = (),
    name: str = "levels",
) -> tuple[float, float]:
    """The black and the white level as floats, in the image's units; ``name``: what errors call them.

    ``levels`` as given; without it the dtype's range for integers, and (0, 1) for floats if all valid pixels of
    ``frames`` (pairs of a frame and its invalid pixels; read for floats only) lie there. No maximum is guessed from.

    Raises InputError for levels that are not finite, equal or reversed, and for floats outside [0, 1] without
    levels; InputTypeError for what is no pair of real numbers.
    """
    if levels is not None:
        return black_and_white(levels, name)
    if dtype.kind != "f":
        limits = np.iinfo(dtype)
        return float(limits.min), float(limits.max)
    low, high = math.inf, -math.inf
    for frame, invalid in frames:
        where = True if invalid is None else ~invalid
        low = min(low, float(frame.min(where=where, initial=math.inf)))
        high = max(high, float(frame.max(where=where, initial=-math.inf)))
    if low < 0.0 or high > 1.0:
        raise InputError(
            f"A {dtype.name} image whose values lie between {low:g} and {high:g} needs levels=(black, white); "
            "without levels floats are expected in [0, 1]."
        )
    return 0.0, 1.0


# --- invalid pixels ------------------------------------------------------------------------------------------------


def fill(frame: np.ndarray, invalid: np.ndarray) -> np.ndarray:
    """A copy of ``frame`` (H, W), same dtype, its ``invalid`` pixels (bool, at least one is valid) replaced.

    Each gets the bilinear interpolation of local means of the valid pixels, from the finest resolution on which there
    are any (after the pull-push of Gortler, Grzeszczuk, Szeliski and Cohen, "The Lumigraph", 1996, on rebinning), so
    that a hole is filled from its rim and a single dead pixel from its neighbours. Integers are rounded half to even.
    """
    values = np.where(invalid, 0.0, frame)
    values = values.astype(np.float64, copy=False)
    _push_pull(values, ~invalid)
    out = frame.copy()
    fillings = values[invalid]
    out[invalid] = fillings if frame.dtype.kind == "f" else np.rint(fillings)
    return out


def fill_rows(
    counts: Callable[[int, int], np.ndarray],
    invalid: Callable[[int, int], np.ndarray | None],
    where: tuple[int, int, int],
) -> np.ndarray:
    """Rows of what `fill` gives for a whole frame, bit for bit, from as few other rows as their holes ask for.

    A frame without a valid pixel comes back as it is.

    counts, invalid: (first, end) -> those rows of the frame, and where they are invalid. where: (H, first, end).
    """
    height, first, end = where
    step = 4
    while True:
        # A pixel is filled from cells of 2, 4, ... rows at most two cells away, up to the size at which every cell of
        # the surroundings has a valid pixel. Bands begin and end with whole cells of that size.
        a, b = max(first // step - 2, 0) * step, min((-(-end // step) + 2) * step, height)
        bad = invalid(a, b)
        if bad is None or (bad.all() and b - a == height):
            return counts(first, end).copy()
        if (a == 0 and b == height) or _known_at(bad, step):
            return fill(counts(a, b), bad)[first - a : end - a]
        step *= 2


def _known_at(invalid: np.ndarray, size: int) -> bool:
    """Whether every cell of ``size`` x ``size`` pixels, those cut off by the edges too, has a valid one."""
    valid = ~invalid
    for axis, length in enumerate(invalid.shape):
        valid = np.logical_or.reduceat(valid, np.arange(0, length, size), axis=axis)
    return bool(valid.all())


def _push_pull(values: np.ndarray, known: np.ndarray) -> None:
    """Fills ``values`` (0 where not ``known``) in place."""
    rows, columns = np.nonzero(~known)
    if rows.size == 0:
        return
    count = _sum_2x2(known.astype(np.float64))
    coarse = _sum_2x2(values)
    coarse /= np.maximum(count, 1.0)
    _push_pull(coarse, count > 0.0)
    # A pixel's centre lies a quarter of a coarse cell from its own cell's centre, towards one neighbour per axis.
    row, column = rows // 2, columns // 2
    row_beside = np.clip(row + 2 * (rows % 2) - 1, 0, coarse.shape[0] - 1)
    column_beside = np.clip(column + 2 * (columns % 2) - 1, 0, coarse.shape[1] - 1)
    near = 0.75 * coarse[row, column] + 0.25 * coarse[row, column_beside]
    far = 0.75 * coarse[row_beside, column] + 0.25 * coarse[row_beside, column_beside]
    values[rows, columns] = 0.75 * near + 0.25 * far


def _sum_2x2(values: np.ndarray) -> np.ndarray:
    """Sums over blocks of 2 x 2; a last odd row or column forms blocks of its own."""
    by_row = values[0::2].copy()
    by_row[: values.shape[0] // 2] += values[1::2]
    out = by_row[:, 0::2].copy()
    out[:, : values.shape[1] // 2] += by_row[:, 1::2]
    return out


# --- counts to the network's range and back -----------------------------------------------------------------------


def normalise(frame: np.ndarray, black: float, inverse_range: float, threads: int = 1) -> np.ndarray:
    """(frame - black) * inverse_range, computed in float64, as float32 (H, W)."""
    out = np.empty(frame.shape, np.float32)
    if _native is not None:
        _native.normalise(frame, black, inverse_range, out, threads=threads)
        return out
    source, target = frame.reshape(-1), out.reshape(-1)
    with np.errstate(over="ignore"):  # beyond float32 it is Inf, as in the native code; the caller looks at the result
        for start in range(0, source.size, _BLOCK):
            block = source[start : start + _BLOCK].astype(np.float64)
            block -= black
            block *= inverse_range
            target[start : start + _BLOCK] = block
    return out


def apply_residual(
    frame: np.ndarray, before: np.ndarray, after: np.ndarray, scale: float, out: np.ndarray, threads: int = 1
) -> int:
    """out = frame + (after - before) * scale in float64; returns how many pixels were clipped.

    ``before`` and ``after`` are finite arrays of the frame's shape, both float32 or both float64; ``out`` has the
    frame's shape and dtype and is C-contiguous. Integers are rounded half to even and clipped to the dtype's range,
    floats neither. Where nothing changes, the pixel's bits do not either (a -0.0 stays one).
    """
    if _native is not None:
        clipped = _native.apply_residual(frame, before, after, scale, out, threads=threads)
    else:
        clipped = _apply_residual(*(a.reshape(-1) for a in (frame, before, after)), scale, out.reshape(-1))
    if frame.dtype.kind == "f":
        np.copyto(out, frame, where=out == frame)
    return int(clipped)


def _apply_residual(frame: np.ndarray, before: np.ndarray, after: np.ndarray, scale: float, out: np.ndarray) -> int:
    clipped = 0
    for start in range(0, frame.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        block = after[part].astype(np.float64)
        block -= before[part]
        block *= scale
        block += frame[part]
        with np.errstate(over="ignore"):
            clipped += round_counts(block, out[part])
    return clipped


def round_counts(values: np.ndarray, out: np.ndarray) -> int:
    """Writes values, floats that may be written over, in the dtype of ``out``; returns how many were clipped.

    Integers are rounded half to even and clipped to the dtype's range, floats neither.
    """
    clipped = 0
    if out.dtype.kind != "f":
        limits = np.iinfo(out.dtype)
        np.rint(values, out=values)
        clipped = int(np.count_nonzero((values < limits.min) | (values > limits.max)))
        np.clip(values, limits.min, limits.max, out=values)
    out[...] = values
    return clipped


# --- dark frame and flat field --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Correction:
    """Dark and flat-field correction of one detector, ready for frame after frame; `prepare_correction` makes it."""

    dark: np.ndarray | np.float64  # (H, W) float64, counts
    gain: np.ndarray | np.float64  # (H, W) float64: median(F - D) / (F - D), 0 where invalid
    pedestal: float  # the dark's median, added again
    invalid: np.ndarray | None  # (H, W) bool: F <= D, or a reference that is not finite

    def rows(self, a: int, b: int) -> "Correction":
        """The same for rows [a, b) of a frame."""
        parts = (
            v[a:b] if isinstance(v, np.ndarray) else v for v in (self.dark, self.gain, self.pedestal, self.invalid)
        )
        return Correction(*parts)

    def apply(self, frame: np.ndarray) -> tuple[np.ndarray, int]:
        """The corrected frame (H, W) in the frame's dtype, and how many pixels were clipped to its range (integers).

        Invalid pixels, the frame's own NaN and Inf among them, are left as they were.
        """
        if frame.dtype.kind == "f":
            with np.errstate(invalid="ignore", over="ignore"):
                out = ((frame - self.dark) * self.gain + self.pedestal).astype(frame.dtype)
            clipped = 0
        else:
            exact = np.rint((frame - self.dark) * self.gain + self.pedestal)
            limits = np.iinfo(frame.dtype)
            outside = (exact < limits.min) | (exact > limits.max)
            out = exact.clip(limits.min, limits.max).astype(frame.dtype)
            clipped = np.count_nonzero(outside if self.invalid is None else outside & ~self.invalid)
        if self.invalid is not None:
            out[self.invalid] = frame[self.invalid]
        if frame.dtype.kind == "f":
            np.copyto(out, frame, where=~np.isfinite(frame))
        return out, int(clipped)


def prepare_correction(
    dark: np.ndarray | None, flat: np.ndarray | None, shape: tuple[int, int], offset: float = 0.0
) -> Correction:
    """The correction (I - D) * median(F - D) / (F - D) + median(D) for frames of ``shape`` (H, W).

    Args:
        dark, flat: (H, W), or stacks (N, H, W) whose mean is taken; integers or floats in the frames' units; either
            may be missing. Without a dark, D is ``offset``; without a flat, the factor is 1.
        offset: the black level, for a flat without a dark.

    The flat's median keeps the scale of the counts. The dark's median, added again, keeps the black level: noise that
    reaches below it still fits an unsigned dtype, and ``levels`` mean what they meant.

    Raises:
        InputError: another shape, or a flat that is above the dark nowhere. InputTypeError: another dtype.
    """
    d = offset if dark is None else _mean_reference(dark, "dark frame", shape)
    invalid = np.zeros(shape, bool) if dark is None else ~np.isfinite(d)
    gain = np.float64(1.0)
    if flat is not None:
        with np.errstate(invalid="ignore"):  # Inf - Inf, invalid either way
            signal = _mean_reference(flat, "flat field", shape) - d
            invalid |= ~(np.isfinite(signal) & (signal > 0.0))
        if invalid.all():
            raise InputError("The flat field is above the dark frame nowhere; expected F > D (are the two exchanged?).")
        gain = np.divide(np.median(signal[~invalid]), signal, out=np.zeros(shape), where=~invalid)
    elif invalid.all():
        raise InputError("The dark frame has no finite pixel; expected counts.")
    pedestal = offset if dark is None else float(np.median(d[~invalid]))
    d = np.float64(d) if dark is None else np.where(invalid, 0.0, d)  # numpy keeps float32 beside a plain number
    return Correction(d, gain, pedestal, invalid if invalid.any() else None)


def correct(
    frame: np.ndarray, dark: np.ndarray | None = None, flat: np.ndarray | None = None, offset: float = 0.0
) -> tuple[np.ndarray, np.ndarray | None]:
    """One corrected frame (H, W) in its dtype, and its invalid pixels (bool (H, W), or None).

    The formula, the references and the errors are those of `prepare_correction`. Pixels where F <= D keep the counts
    they had.
    """
    correction = prepare_correction(dark, flat, frame.shape, offset)
    return correction.apply(frame)[0], correction.invalid


def _mean_reference(reference: np.ndarray, name: str, shape: tuple[int, int]) -> np.ndarray:
    if reference.dtype.kind not in "uif":
        raise InputTypeError(f"The {name} is of dtype {reference.dtype}; expected integers or floats.")
    if reference.ndim not in (2, 3) or 0 in reference.shape or reference.shape[-2:] != tuple(shape):
        raise InputError(f"The {name} has shape {reference.shape}; expected {tuple(shape)}, or a stack of such frames.")
    if reference.ndim == 2:
        return reference.astype(np.float64, order="C")
    total = np.zeros(shape)
    for one in reference:
        total += one
    return total / len(reference)
