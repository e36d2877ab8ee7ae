"""Dual-energy fusion: a low-energy and a high-energy radiograph of the same object as one picture, in 16 bits.

The published rules (Sekhar, Deepthi, Rameshan, Electronic Imaging 2024, IPAS-244), without their detour over bytes:

``wavelet``: both frames are split by db4 over four levels; the averages are smoothed by a 3x3 kernel and averaged, the
    details are added. Every step is linear, so this is done once, with the frames' sum.
``spatial``: where the frames differ by less than a threshold, their mean; elsewhere the mean's place is taken by the
    frame that is further from the mean of its surroundings (after Zheng, 2004).

Both need a few rows around each row only. They run band by band, and the bands do not show in the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xrk import arrays, io, radiograph
from xrk.errors import InputError, InputTypeError
from xrk.io.atomic import atomic_file
from xrk.kernels import wavelet2d, wavelet2d_inverse
from xrk.picture import check_png, encode_png
from xrk.registration import Shift, find_shift, middle

__all__ = ["FusionReport", "fuse", "fuse_file", "pseudocolor"]

METHODS = ("wavelet", "spatial")
LEVELS = 4
# The kernel over the averages: corner, edge and centre, as published (they add up to 1.000002).
_CORNER, _EDGE, _CENTRE = 0.077847, 0.123317, 0.195346

# Rows of a band, and how far its rows reach into the neighbours': multiples of 2^LEVELS, so that a band's coefficients
# are the whole frame's. db4's filters of both directions and the kernel between them reach 112 rows up and 138 down.
_BAND, _REACH = 512, 160
_LARGEST_SHIFT = 2.0  # pixels


@dataclass(frozen=True)
class FusionReport:
    """What `fuse` did.

    Attributes:
        method: "wavelet" or "spatial".
        shape, dtype: of the frames.
        clipped: pixels whose fused value left the dtype's range (details are added, so that some do).
        shift: how far the high-energy frame lies from the low-energy one, in pixels (rows, columns); None where the
            frames have too little in common to tell.
        compat: "bytes" where the published byte planes were used.
    """

    method: str
    shape: tuple[int, int]
    dtype: str
    clipped: int
    shift: tuple[float, float] | None
    compat: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values only."""
        return asdict(self)


def fuse(
    low: Any,
    high: Any,
    method: str = "wavelet",
    *,
    threshold: float = 20.0,
    precision: str = "float64",
    compat: str | None = None,
    allow_shift: bool = False,
    report: bool = False,
) -> Any:
    """Fuses a low-energy and a high-energy radiograph into one.

    Args:
        low, high: (H, W), counts, of one shape and one dtype: uint8, uint16, int16, int32, float32 or float64. Kinds
            of arrays as for `xrk.enhance`.
        method: "wavelet" or "spatial", see above. Details are added by the wavelet rule, so fuse(x, x) is not x.
        threshold: of the spatial rule, in counts.
        precision: "float64" or "float32", what is computed in. float32 is faster and may differ by one count (of int32
            frames by more: it holds 24 bits).
        compat: "bytes" fuses the high and the low bytes of uint16 frames one by one with the wavelet rule, each rounded
            and cut to 8 bits, as published. By default the counts themselves are fused.
        allow_shift: fuse frames that are clearly shifted against each other by more than two pixels; shifts are told
            to the next whole pixel.
        report: also return the `FusionReport`.

    Returns:
        The fused frame, the same kind of array as ``low``, its shape and dtype; rounded half to even and clipped to the
        dtype's range (floats are neither). With ``report`` the pair (frame, FusionReport).

    Raises:
        InputError: shapes that differ or are not (H, W), an unknown method, precision or compat, a negative threshold,
        values that are not finite, or frames that are shifted. InputTypeError: a kind or dtype that cannot be used, or
        two different dtypes.
    """
    incoming = arrays.accept(low)
    frames = [np.asarray(array) for array in (incoming.array, arrays.accept(high).array)]
    first, second = (_Frame(a.shape, a.dtype, lambda rows, columns, a=a: a[rows, columns]) for a in frames)
    fused = np.empty(first.shape, first.dtype)

    def put(rows: slice, counts: np.ndarray) -> None:
        fused[rows] = counts

    options = _Options(method, threshold, precision, compat, allow_shift)
    described = _run(first, second, options, lambda: put)
    result = incoming.hand_back(fused)
    return (result, described) if report else result


def fuse_file(
    low: str | os.PathLike[str],
    high: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    method: str = "wavelet",
    *,
    threshold: float = 20.0,
    precision: str = "float64",
    compat: str | None = None,
    allow_shift: bool = False,
    picture: str | os.PathLike[str] | None = None,
) -> FusionReport:
    """Fuses two TIFF files into a third with the layout and metadata of the first, written whole or not at all.

    Rows are read, fused and written band by band: the files may be larger than memory. The bytes are those of `fuse`.

    Args:
        low, high: files of one page each.
        dst: the file to write, neither of the two.
        picture: also write this PNG, see `pseudocolor`; the fused frame is then held whole.
        Others as for `fuse`.

    Raises:
        What `fuse` raises, and ImageFileError for a file that cannot be read or written; nothing is written then.
    """
    io.check_apart({"output": dst, "picture": picture}, {"low-energy frame": low, "high-energy frame": high})
    if picture is not None:
        check_png(picture)
    options = _Options(method, threshold, precision, compat, allow_shift)
    with ExitStack() as stack:
        first, second = (stack.enter_context(io.open(path)) for path in (low, high))
        sink: io.Sink | None = None
        shown: list[np.ndarray] = []

        def begin() -> _Put:
            nonlocal sink
            sink = stack.enter_context(io.create(dst, like=first))
            return put

        def put(rows: slice, counts: np.ndarray) -> None:
            sink.write(rows, counts)
            if picture is not None:
                shown.append(counts)

        described = _run(_frame_of(first), _frame_of(second), options, begin)
        sink.report = {"fusion": described.to_dict() | {"low": Path(low).name, "high": Path(high).name}}
    if picture is not None:
        fused = np.concatenate(shown)
        white = float(np.iinfo(fused.dtype).max if fused.dtype.kind in "iu" else np.max(fused))
        with atomic_file(picture) as file:
            file.write(encode_png(pseudocolor(fused, white if white > 0 else 1.0)))
    return described


def pseudocolor(fused: Any, white: float) -> NDArray[np.uint8]:
    """A colour picture of a fused frame: hue and brightness follow the counts.

    With v = counts * 255 / white: hue 2 v degrees (beyond 360 they go round), saturation 0.8, brightness
    (v / 255)^2.2, as published.

    Args:
        fused: (H, W), counts.
        white: counts that become v = 255; values outside 0 to white are cut to it.

    Returns:
        (H, W, 3) uint8, red, green, blue.
    """
    scaled = np.clip(np.asarray(fused, np.float64) * (255.0 / white), 0.0, 255.0)
    value = 255.0 * (scaled / 255.0) ** 2.2
    sector = (np.rint(scaled) * 2.0 / 60.0) % 6.0
    saturation = 0.8
    pixels = np.empty((*scaled.shape, 3), np.uint8)
    for channel, turn in enumerate((5.0, 3.0, 1.0)):  # the hexagon's formula for red, green and blue
        k = (sector + turn) % 6.0
        pixels[..., channel] = np.rint(value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1)))
    return pixels


# --- checks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """Where the counts of one frame come from: ``read`` takes slices of rows and of columns."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[slice, slice], np.ndarray]


@dataclass(frozen=True)
class _Options:
    method: str
    threshold: float
    precision: str
    compat: str | None
    allow_shift: bool


# Takes the rows that are done, from the top down, and their counts.
_Put = Callable[[slice, np.ndarray], Any]


def _frame_of(source: io.Source) -> _Frame:
    if len(source.shape) != 2:
        raise InputError(f"{source.path} has {source.shape[0]} pages; expected one frame.")
    return _Frame(source.shape, source.dtype, lambda rows, columns: source.read(rows, columns))


def _run(first: _Frame, second: _Frame, options: _Options, begin: Callable[[], _Put]) -> FusionReport:
    """Checks both frames, then fuses them; ``begin`` is called in between and says where the rows go."""
    _check(first, second, options)
    shift = _checked_shift(first, second, options.allow_shift)
    clipped = _fuse(first, second, _finish(options, first.dtype.newbyteorder("=")), begin())
    return FusionReport(
        options.method, first.shape, first.dtype.name, clipped,
        None if shift is None else (shift.rows, shift.columns), options.compat,
    )  # fmt: skip


def _check(first: _Frame, second: _Frame, options: _Options) -> None:
    if first.shape != second.shape or len(first.shape) != 2 or 0 in first.shape:
        raise InputError(
            f"The low-energy frame has shape {first.shape} and the high-energy frame {second.shape}; expected two "
            "(H, W) of one size."
        )
    radiograph.check_dtype(first.dtype)
    if first.dtype.newbyteorder("=") != second.dtype.newbyteorder("="):
        raise InputTypeError(
            f"The low-energy frame has dtype {first.dtype} and the high-energy frame {second.dtype}; "
            "expected one dtype."
        )
    for name, choices in (("method", METHODS), ("precision", ("float64", "float32")), ("compat", (None, "bytes"))):
        value = getattr(options, name)
        if value not in choices:
            raise InputError(f"{name}={value!r}; expected one of {', '.join(map(repr, choices))}.")
    if isinstance(options.threshold, bool) or not isinstance(options.threshold, Real):
        raise InputTypeError(f"threshold={options.threshold!r}; expected a number of counts.")
    if not options.threshold >= 0:
        raise InputError(f"threshold={options.threshold!r}; expected a number of counts, 0 or more.")
    if options.compat == "bytes" and (first.dtype.newbyteorder("=") != np.uint16 or options.method != "wavelet"):
        raise InputError(
            f'compat="bytes" takes uint16 frames and method="wavelet", not {first.dtype} and {options.method!r}.'
        )


def _checked_rows(first: _Frame, second: _Frame, rows: slice, columns: slice) -> list[np.ndarray]:
    """The counts of both frames there."""
    found = [frame.read(rows, columns) for frame in (first, second)]
    for name, counts in zip(("low", "high"), found, strict=True):
        if counts.dtype.kind == "f" and not np.isfinite(counts).all():
            raise InputError(f"The {name}-energy frame has values that are not finite; fill them first.")
    return found


def _checked_shift(first: _Frame, second: _Frame, allowed: bool) -> Shift | None:
    shift = find_shift(*_checked_rows(first, second, *middle(first.shape)))
    if shift is not None and not allowed and max(abs(shift.rows), abs(shift.columns)) > _LARGEST_SHIFT:
        raise InputError(
            f"The high-energy frame is shifted by {shift.rows:+.0f} rows and {shift.columns:+.0f} columns against the "
            "low-energy one; register the frames first, or pass allow_shift=True (--allow-shift)."
        )
    return shift


# --- the rules, band by band ----------------------------------------------------------------------------------------

# A rule takes the same rows of both frames, the first of them a row whose number is a multiple of 2^LEVELS, and returns
# as many fused rows; those within _REACH of an end that is not the frame's are not used.
_Rule = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _bands(height: int) -> Iterator[tuple[slice, slice, slice]]:
    """(rows to read, rows to write, which of the rows read these are)."""
    for start in range(0, height, _BAND):
        stop = min(start + _BAND, height)
        first, last = max(0, start - _REACH), min(height, stop + _REACH)
        yield slice(first, last), slice(start, stop), slice(start - first, stop - first)


def _fuse(first: _Frame, second: _Frame, finish: _Finish, put: _Put) -> int:
    """Hands on the fused rows, and says how many pixels were clipped."""
    clipped = 0
    for source, target, inside in _bands(first.shape[0]):
        counts, count = finish(*_checked_rows(first, second, source, slice(None)), inside)
        clipped += count
        put(target, counts)
    return clipped


# Takes the rows of both frames that were read and says which of them are wanted; gives the counts of these, and how
# many were clipped.
_Finish = Callable[[np.ndarray, np.ndarray, slice], tuple[np.ndarray, int]]


def _finish(options: _Options, dtype: np.dtype) -> _Finish:
    if options.compat == "bytes":
        return _fused_bytes
    return _rounded(_rule(options.method, options.threshold, options.precision), dtype)


def _rounded(rule: _Rule, dtype: np.dtype) -> _Finish:
    """The rule's values as counts: integers rounded half to even and clipped."""

    def finish(low: np.ndarray, high: np.ndarray, inside: slice) -> tuple[np.ndarray, int]:
        rows = rule(low, high)[inside]
        out = np.empty(rows.shape, dtype)
        return out, radiograph.round_counts(rows, out)

    return finish


def _rule(method: str, threshold: float, precision: str) -> _Rule:
    dtype = np.dtype(precision)
    if method == "wavelet":
        return lambda low, high: _wavelet(np.add(low, high, dtype=dtype))
    return lambda low, high: _spatial(low.astype(dtype), high.astype(dtype), threshold)


def _wavelet(total: np.ndarray) -> np.ndarray:
    """The wavelet rule for frames whose sum is ``total``, (H, W) of float32 or float64."""
    x = torch.from_numpy(np.ascontiguousarray(total))
    parts = []
    for _ in range(LEVELS):
        parts.append(wavelet2d(x))
        x = parts[-1][0].contiguous()
    x = _smoothed(x) / 2
    for part in reversed(parts):
        height, width = part.shape[-2:]
        part[0] = x[:height, :width]  # an odd size came back with one more row or column
        x = wavelet2d_inverse(part)
    return x[: total.shape[0], : total.shape[1]].numpy()


def _smoothed(x: torch.Tensor) -> torch.Tensor:
    """The 3x3 kernel; beyond the border lies the mirror image about the outermost pixels."""
    padded = np.pad(x.numpy(), 1, mode="reflect")
    rows = [torch.from_numpy(padded[i : i + x.shape[0]]) for i in range(3)]
    w = x.shape[1]

    def across(row: torch.Tensor, outer: float, inner: float) -> torch.Tensor:
        return outer * (row[:, :w] + row[:, 2:]) + inner * row[:, 1 : w + 1]

    return across(rows[0] + rows[2], _CORNER, _EDGE) + across(rows[1], _EDGE, _CENTRE)


def _spatial(low: np.ndarray, high: np.ndarray, threshold: float) -> np.ndarray:
    mean = low / 2 + high / 2
    padded = np.pad(mean, 1, mode="reflect")  # of one row or column: repeated
    height, width = mean.shape
    around = sum(padded[i : i + height, j : j + width] for i in range(3) for j in range(3)) / 9
    detail = np.where(np.abs(around - high) < np.abs(around - low), low, high)
    return np.where(np.abs(low - high) < threshold, mean, detail).astype(mean.dtype, copy=False)


def _fused_bytes(first: np.ndarray, second: np.ndarray, inside: slice) -> tuple[np.ndarray, int]:
    """High and low bytes fused on their own, each rounded and cut to 8 bits, and put together again."""
    finish = _rounded(_rule("wavelet", 0.0, "float64"), np.dtype(np.uint8))
    planes, clipped = [], 0
    for shift in (8, 0):
        plane, count = finish(*(((frame >> shift) & 255).astype(np.uint8) for frame in (first, second)), inside)
        planes.append(plane.astype(np.uint16))
        clipped += count
    return (planes[0] << 8) | planes[1], clipped
