"""8-bit pictures of radiographs, to be looked at: PNG, without any imaging library.

All frames of a picture share one grey scale, taken from the one with the least noise, and so do their enlarged parts:
what looks different is different. A residual has a symmetric scale, mid-grey is zero, and its label states the scale.
"""

import os
import struct
import textwrap
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from xrk.errors import ImageFileError, InputError
from xrk.io.atomic import atomic_file, check_target

__all__ = ["check_png", "encode_png", "panel_png", "preview_png", "strip_png"]

OTHER_SUFFIXES = {".jpg", ".jpeg", ".jp2", ".gif", ".bmp", ".webp", ".svg", ".pdf", ".tif", ".tiff"}

WIDTH = 1600  # of a picture, at most
MARGIN, GAP = 24, 16
BACKGROUND, TEXT, FAINT, ACCENT = (22, 23, 26), (232, 232, 230), (150, 152, 156), (255, 176, 46)
CURVES = ((150, 152, 156), (255, 176, 46), (90, 190, 255))
Region = tuple[int, int, int, int]  # row, column, rows, columns


def check_png(path: str | os.PathLike) -> None:
    """Whether a picture can be written at ``path``: ImageFileError, also where the name is that of another format."""
    if Path(path).suffix.lower() in OTHER_SUFFIXES:
        raise ImageFileError(f"{path} cannot be written: pictures are PNG; give the file a name that ends in .png.")
    check_target(path)


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG file of uint8 pixels, grey (H, W) or RGB (H, W, 3) (PNG specification, third edition, 5, 9 and 11)."""
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)) or not pixels.size:
        raise InputError(f"a PNG takes uint8 pixels (H, W) or (H, W, 3), not {pixels.dtype} {pixels.shape}.")
    height, width = pixels.shape[:2]
    rows = np.ascontiguousarray(pixels).reshape(height, -1)
    filtered = np.empty((height, rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = 2  # filter "Up": each row as its difference to the one above
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    body = zlib.compress(filtered.tobytes(), 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def preview_png(
    path: str | os.PathLike,
    before: np.ndarray,
    after: np.ndarray,
    levels: tuple[float, float] | None = None,
) -> None:
    """Picture of a frame before and after enhancement, side by side, with an enlarged part below.

    before, after: (H, W) of one shape, real dtypes; of stacks (N, H, W) the middle frame is shown.
    levels: the (black, white) that the frames were enhanced with; the grey scale shows nothing outside them.
    Raises ImageFileError where the file cannot be written, InputError where the shapes differ.
    """
    if before.shape != after.shape or before.ndim not in (2, 3) or not before.size:
        raise InputError(f"a preview takes two frames or stacks of one shape, not {before.shape} and {after.shape}.")
    suffix = ""
    if before.ndim == 3:
        middle = len(before) // 2
        suffix = f", frame {middle + 1} of {len(before)}" if len(before) > 1 else ""
        before, after = before[middle], after[middle]
    window = _window(after, levels)
    frames = [("before" + suffix, before), ("after" + suffix, after)]
    _write(path, [_Panel(*frame, window, _exponent(window)) for frame in frames], 1, None)


def panel_png(
    path: str | os.PathLike,
    frames: Sequence[tuple[str, np.ndarray]],
    residual: tuple[str, np.ndarray] | None = None,
    zoom: Region | None = None,
    profile: int | None = None,
) -> None:
    """Picture of several frames of one scene side by side, and their residual, with an enlarged part of each below.

    frames: (label, (H, W) array) each, all of one shape; the last one sets the grey scale of all, so put the one with
        the least noise there.
    residual: (label, (H, W) array); shown on a symmetric scale, which is added to the label.
    zoom: (row, column, rows, columns) of the enlarged part, which is fitted to the panel's width; without it, a part
        with much structure is chosen.
    profile: a row whose values are drawn below, one curve for each frame.
    Raises ImageFileError where the file cannot be written, InputError where shapes do not fit.
    """
    arrays = [array for _, array in frames] + ([residual[1]] if residual else [])
    if not frames or any(array.ndim != 2 or not array.size or array.shape != arrays[0].shape for array in arrays):
        raise InputError(f"a panel takes frames (H, W) of one shape, not {[array.shape for array in arrays]}.")
    window = _window(frames[-1][1], None)
    panels = [_Panel(*frame, window, _exponent(window)) for frame in frames]
    if residual:
        half = _half_range(residual[1])
        label = f"{residual[0]}, \N{PLUS-MINUS SIGN}{_number(half)}"
        panels.append(_Panel(label, residual[1], (-half, half), is_frame=False))
    row = None
    if profile is not None:
        if not 0 <= profile < arrays[0].shape[0]:
            raise InputError(f"the profile's row is {profile}; the frames have rows 0 to {arrays[0].shape[0] - 1}.")
        row = (f"row {profile}", [(label, array[profile]) for label, array in frames])
    _write(path, panels, len(frames) - 1, zoom, row)


def strip_png(
    path: str | os.PathLike, rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[str]
) -> None:
    """Picture of several videos of one scene: a row for each, a column for each time.

    rows: (label, (H, W) arrays, one for each column), all of one shape; the last row sets the grey scale of all.
    columns: what stands below each column.
    Raises ImageFileError where the file cannot be written, InputError where shapes or numbers do not fit.
    """
    arrays = [array for _, frames in rows for array in frames]
    wrong = not arrays or any(len(frames) != len(columns) for _, frames in rows)
    if wrong or any(array.ndim != 2 or not array.size or array.shape != arrays[0].shape for array in arrays):
        raise InputError(f"a strip takes rows of {len(columns)} frames (H, W) of one shape.")
    window = _window(np.concatenate(list(rows[-1][1])), None)
    height, width = arrays[0].shape
    cell = (WIDTH - 2 * MARGIN - GAP * (len(columns) - 1)) // len(columns)
    shrink = max(1, -(-width // cell))
    grow = max(1, cell // width)
    line, step = 24, -(-height // shrink) * grow
    inner = max(-(-width // shrink) * grow, 60)
    total = 2 * MARGIN + len(columns) * inner + GAP * (len(columns) - 1)
    canvas = np.empty((2 * MARGIN + len(rows) * (2 * line + step) + line, total, 3), np.uint8)
    canvas[:] = BACKGROUND
    for i, (label, frames) in enumerate(rows):
        top = MARGIN + i * (2 * line + step) + line
        _draw_text(canvas, _fit(label, total - 2 * MARGIN, 2), top - line, MARGIN, 2, TEXT)
        for j, (name, array) in enumerate(zip(columns, frames, strict=True)):
            left = MARGIN + j * (inner + GAP)
            grey = _enlarge(_Panel("", array, window, _exponent(window)).grey(_area_mean(array, shrink)), grow)
            canvas[top : top + grey.shape[0], left : left + grey.shape[1]] = grey[..., None]
            if i == len(rows) - 1:
                _draw_text(canvas, _fit(name, inner, 2), top + step + 8, left, 2, FAINT)
    data = encode_png(canvas)
    with atomic_file(path) as file:
        file.write(data)


# Grey scales


@dataclass(frozen=True)
class _Panel:
    label: str
    array: np.ndarray
    window: tuple[float, float]
    exponent: float = 1.0
    is_frame: bool = True

    def grey(self, values: np.ndarray) -> np.ndarray:
        """uint8 of float values; what is not a number is black."""
        low, high = self.window
        scaled = np.nan_to_num((values - low) / (high - low), nan=0.0, posinf=1.0, neginf=0.0)
        return np.rint(255.0 * np.clip(scaled, 0.0, 1.0) ** self.exponent).astype(np.uint8)


def _sample(array: np.ndarray) -> np.ndarray:
    """At most about a million finite values of the array, evenly spread, as float64; one zero where there is none."""
    step = max(1, round((array.size / 2**20) ** 0.5))
    values = array[::step, ::step].astype(np.float64)
    values = values[np.isfinite(values)]
    return values if values.size else np.zeros(1)


def _window(array: np.ndarray, levels: tuple[float, float] | None) -> tuple[float, float]:
    low, high = (float(value) for value in np.percentile(_sample(array), (0.2, 99.8)))
    pad = 0.02 * (high - low)
    low, high = low - pad, high + pad
    if levels is not None and max(low, levels[0]) < min(high, levels[1]):
        low, high = max(low, levels[0]), min(high, levels[1])
    half = max(0.5, 1e-6 * abs(low))  # of the window of a frame of one value
    return (low, high) if high > low else (low - half, low + half)


def _exponent(window: tuple[float, float]) -> float:
    """Of the grey scale: near the square root where the window reaches down to little light.

    The square root shows the noise of counted quanta alike in thin and in thick parts.
    """
    return 0.6 if window[0] < 0.25 * window[1] else 1.0


def _half_range(array: np.ndarray) -> float:
    """Half of a symmetric scale: 99 % of the values lie inside; rounded to a number with two digits."""
    half = float(np.percentile(np.abs(_sample(array)), 99))
    return float(f"{half:.1e}") or 1.0


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


# Layout


def _write(
    path: str | os.PathLike,
    panels: list[_Panel],
    clearest: int,
    zoom: Region | None,
    profile: tuple[str, list[tuple[str, np.ndarray]]] | None = None,
) -> None:
    with np.errstate(all="ignore"):  # a picture of values out of all bounds is poor, and no reason to fail or to warn
        canvas = _compose(panels, clearest, zoom)
        if profile is not None:
            canvas = np.concatenate([canvas, _profiles(canvas.shape[1], *profile)])
        data = encode_png(canvas)
    with atomic_file(path) as file:
        file.write(data)


def _compose(panels: list[_Panel], clearest: int, zoom: Region | None) -> np.ndarray:
    """The picture (H, W, 3): a row of whole frames with their labels, a row of enlarged parts, a caption.

    clearest: the panel in which the part to enlarge is looked for, if `zoom` does not name it.
    """
    height, width = panels[0].array.shape
    cell = (WIDTH - 2 * MARGIN - GAP * (len(panels) - 1)) // len(panels)
    shrink = max(1, -(-width // cell), -(-height // (2 * cell)))
    grow = max(1, min(cell // width, cell // height)) if shrink == 1 else 1
    wholes = [panel.grey(_enlarge(_area_mean(panel.array, shrink), grow)) for panel in panels]
    inner = max(wholes[0].shape[1], 160)

    side = -(-inner // (3 if len(panels) < 3 else 2))
    region = zoom if zoom is not None else _structured(panels[clearest], side)
    (row, rows), (column, columns), factor = _fill(region, (height, width), inner)
    enlarged = [
        replace(panel, array=panel.array[row : row + rows, column : column + columns].astype(np.float64))
        for panel in panels
    ]
    # A scale of their own shows more of them; that of the first frame, so that its noise is not cut off.
    closer = _window(enlarged[0].array, None)
    enlarged = [replace(part, window=closer) if part.is_frame else part for part in enlarged]
    parts = [part.grey(_enlarge(part.array, factor))[:, :inner] for part in enlarged]

    scale = 2 if cell >= 300 else 1
    line = 8 * scale + 8
    captions = [
        f"above: grey scale {_scale(panels[0])}",
        f"below: rows {row}..{row + rows - 1}, columns {column}..{column + columns - 1}, enlarged {factor}x, "
        f"grey scale {_scale(enlarged[0])}",
    ]
    texts = [_fit(panel.label, inner, scale) for panel in panels]
    top = MARGIN + line
    second = top + wholes[0].shape[0] + GAP
    bottom = second + parts[0].shape[0] + GAP
    total = 2 * MARGIN + len(panels) * inner + GAP * (len(panels) - 1)
    captions = [text for caption in captions for text in _wrap(caption, total - 2 * MARGIN, scale)]
    canvas = np.empty((bottom + len(captions) * line + MARGIN - 8, total, 3), np.uint8)
    canvas[:] = BACKGROUND
    for index, (whole, part, text) in enumerate(zip(wholes, parts, texts, strict=True)):
        left = MARGIN + index * (inner + GAP)
        _draw_text(canvas, text, MARGIN, left, scale, TEXT)
        canvas[top : top + whole.shape[0], left : left + whole.shape[1]] = whole[..., None]
        canvas[second : second + part.shape[0], left : left + part.shape[1]] = part[..., None]
        box = (np.array([row, column, row + rows, column + columns]) * grow) // shrink
        _draw_frame(canvas, top + box[0], left + box[1], top + box[2], left + box[3])
    for index, text in enumerate(captions):
        _draw_text(canvas, text, bottom + index * line, MARGIN, scale, FAINT)
    return canvas


def _profiles(width: int, title: str, curves: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """A strip (H, width, 3) with a curve for each row of values, their names in their colours above."""
    height, line = 240, 24
    strip = np.empty((height + line + MARGIN, width, 3), np.uint8)
    strip[:] = BACKGROUND
    inner = width - 2 * MARGIN
    values = [np.nan_to_num(row.astype(np.float64)) for _, row in curves]
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    high = high if high > low else low + 1.0
    left = MARGIN
    header = [(f"{title}, {_number(low)} .. {_number(high)}", FAINT)]
    header += [(label, CURVES[i % len(CURVES)]) for i, (label, _) in enumerate(curves)]
    for text, colour in header:
        _draw_text(strip, text, 0, left, 2, colour)
        left += 12 * (len(text) + 2)
    for i, row in enumerate(values):
        # Each column of the picture spans the values that fall on it, and reaches to its neighbour's.
        at = np.linspace(0, len(row) - 1, inner)
        y = (height - 1) * (1 - (np.interp(at, np.arange(len(row)), row) - low) / (high - low))
        for column in range(inner - 1):
            first, last = sorted((int(y[column]), int(y[column + 1])))
            strip[line + first : line + last + 2, MARGIN + column] = CURVES[i % len(CURVES)]
    return strip


def _scale(panel: _Panel) -> str:
    form = "linear" if panel.exponent == 1.0 else f"exponent {panel.exponent}"
    return f"{_number(panel.window[0])} .. {_number(panel.window[1])}, {form}"


def _fill(region: Region, shape: tuple[int, int], inner: int) -> tuple[tuple[int, int], tuple[int, int], int]:
    """(row, rows), (column, columns) and the factor that enlarges the region to a panel's width.

    The region is widened or narrowed, as far as the frame goes, so that a whole factor fills the panel, and it is cut
    to twice as high as wide.
    """
    row, column, rows, columns = region
    if not (0 <= row < row + rows <= shape[0] and 0 <= column < column + columns <= shape[1]):
        raise InputError(f"the zoom {region} (row, column, rows, columns) lies outside the frame {shape}.")
    factor = max(1, round(inner / columns))
    change = -(-inner // factor) - columns

    def fitted(start: int, length: int, limit: int) -> tuple[int, int]:
        longer = min(max(1, length + change), limit, max(1, 2 * inner // factor))
        return min(max(0, start - (longer - length) // 2), limit - longer), longer

    return fitted(row, rows, shape[0]), fitted(column, columns, shape[1]), factor


def _area_mean(array: np.ndarray, factor: int) -> np.ndarray:
    """(H, W) to (ceil(H / factor), ceil(W / factor)) float64, each the mean of the pixels it covers."""
    if factor == 1:
        return array.astype(np.float64)
    rows, columns = (np.arange(0, side, factor) for side in array.shape)
    sums = np.add.reduceat(array, rows, axis=0, dtype=np.float64)
    sums = np.add.reduceat(sums, columns, axis=1)
    counts = [np.diff(np.append(starts, side)) for starts, side in zip((rows, columns), array.shape, strict=True)]
    return sums / np.outer(*counts)


def _enlarge(array: np.ndarray, factor: int) -> np.ndarray:
    return array.repeat(factor, axis=0).repeat(factor, axis=1)


def _structured(panel: _Panel, side: int) -> Region:
    """The part of about side x side pixels in which most of the panel, at the scale of a few pixels, is structure."""
    height, width = panel.array.shape
    rows, columns = min(side, height), min(side, width)
    factor = max(2 if min(height, width) >= 2 * side else 1, -(-max(height, width) // 2048))
    coarse = panel.grey(_area_mean(panel.array, factor)).astype(np.float64)
    if min(coarse.shape) < 3:
        return (height - rows) // 2, (width - columns) // 2, rows, columns
    # Second differences answer to edges and lines, not to slopes; a multiple of their median is taken for noise; the
    # bound lets many faint lines count for more than one strong edge.
    bends = np.zeros(coarse.shape)
    bends[:, 1:-1] += np.abs(coarse[:, 2:] + coarse[:, :-2] - 2 * coarse[:, 1:-1])
    bends[1:-1] += np.abs(coarse[2:] + coarse[:-2] - 2 * coarse[1:-1])
    bounded = np.clip(bends - 4 * np.median(bends) - 1, 0, 8)
    integral = np.pad(bounded, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    high, wide = max(1, rows // factor), max(1, columns // factor)
    sums = integral[high:, wide:] - integral[:-high, wide:] - integral[high:, :-wide] + integral[:-high, :-wide]
    row, column = np.unravel_index(np.argmax(sums), sums.shape)
    return min(int(row) * factor, height - rows), min(int(column) * factor, width - columns), rows, columns


def _draw_frame(canvas: np.ndarray, top: int, left: int, bottom: int, right: int) -> None:
    bottom, right = max(bottom, top + 3), max(right, left + 3)
    canvas[top:bottom, [left, right - 1]] = ACCENT
    canvas[[top, bottom - 1], left:right] = ACCENT


# Text


def _draw_text(canvas: np.ndarray, text: str, top: int, left: int, scale: int, colour: tuple[int, int, int]) -> None:
    for index, character in enumerate(text):
        glyph = _enlarge(GLYPHS.get(character, GLYPHS["?"]), scale)
        at = left + index * 6 * scale
        part = canvas[top : top + glyph.shape[0], at : at + glyph.shape[1]]
        part[glyph[: part.shape[0], : part.shape[1]]] = colour


def _fit(text: str, width: int, scale: int) -> str:
    most = max(1, width // (6 * scale))
    return text if len(text) <= most else text[: most - 2] + ".."


def _wrap(text: str, width: int, scale: int) -> list[str]:
    return textwrap.wrap(text, max(20, width // (6 * scale)))


# A font of 5 x 8 pixels drawn for this file: the characters from space to tilde, then the plus-minus sign. A glyph is
# ten hexadecimal digits, its 40 pixels row by row.
_FONT = """
    0000000000 2108420080 5294000000 52beafa940 23e8e2f880 ce44444e60 64a88ac9a0 2110000000 1110841040
    4104211100 012aea9000 0109f21000 0000001888 0001f00000 0000003180 0844444200 74675cc5c0 23084211c0
    74422223e0 f88820c5c0 11952f8840 fc3c10c5c0 3221e8c5c0 f844442100 7462e8c5c0 7462f08980 0318063000
    0318061100 1111041040 003e0f8000 4104111100 7442220080 7442dad5c0 74631fc620 f463e8c7c0 74610845c0
    e4a318cb80 fc21e843e0 fc21e84200 746178c5e0 8c63f8c620 71084211c0 3884214980 8ca98a4a20 84210843e0
    8eeb58c620 8c7359c620 746318c5c0 f463e84200 74631ac9a0 f463ea4a20 7c20e087c0 f908421080 8c6318c5c0
    8c6318a880 8c635ad540 8c54454620 8c62a21080 f8444443e0 72108421c0 8410410420 70842109c0 22a2000000
    00000003e0 4100000000 001c17c5e0 842d98c7c0 001d0845c0 085b38c5e0 001d1fc1c0 3251c42100 001f18bc2e
    842d98c620 20184211c0 100c210a4c 84254c5240 61084211c0 00355ad6a0 002d98c620 001d18c5c0 003d18fa10
    001b38bc21 002d984200 001f0707c0 42388424c0 002318cda0 002318a880 00231ad540 0022a22a20 002318bc2e
    003e2223e0 1108821040 2108421080 4108221100 0011510000 213e4203e0
"""


def _glyph(digits: str) -> np.ndarray:
    return np.array([bit == "1" for bit in f"{int(digits, 16):040b}"]).reshape(8, 5)


GLYPHS = {
    character: _glyph(digits)
    for character, digits in zip([*map(chr, range(32, 127)), "\N{PLUS-MINUS SIGN}"], _FONT.split(), strict=True)
}
