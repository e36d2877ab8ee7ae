"""Resizing: nearest, bilinear, bicubic.

Rows and their weights follow ATen's own arithmetic on the whole image's coordinates (UpSample.h: the scale, the source
position and the weights in float32, or float64 for float64 maps), so that a band's rows are the whole image's. Columns
are resized by torch's own operator, which is given the rows it has, one to one.
"""

from typing import Any

import numpy as np
import torch

from xrk.runtime.capture import Call, register
from xrk.runtime.graph import RowLocal, Value
from xrk.runtime.nodes_shape import spread
from xrk.runtime.rows import is_map

__all__ = ["Interpolation", "NearestUpsampling"]


class NearestUpsampling(RowLocal):
    """Each pixel repeated ``factor`` times down and across: one copy with zero strides."""

    label = "aten::upsample_nearest2d"
    writes_out = True

    def __init__(self, x: Value, factor: tuple[int, int]) -> None:
        self.factor = factor
        n, c, h, w = x.shape
        self._make([x], Value((n, c, h * factor[0], w * factor[1]), x.dtype, 2))

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        f = self.factor[0]
        return r0 // f, -(-r1 // f)

    def round_up(self, row: int) -> int:
        return -(-row // self.factor[0]) * self.factor[0]

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        x = rows[0]
        if out is None:
            out = torch.empty(
                self.output.band_shape(r1 - r0), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
            )
        f, g = self.factor
        if r0 % f or r1 % f:  # the first band of a run may begin, or the last end, within a pixel
            index = torch.arange(r0, r1, device=x.device) // f - r0 // f
            out.unflatten(3, (-1, g)).copy_(x.index_select(2, index).unsqueeze(4))
        else:
            out.unflatten(3, (-1, g)).unflatten(2, (-1, f)).copy_(x[:, :, :, None, :, None])
        return out


class Interpolation(RowLocal):
    """Any of the modes at any scale: rows gathered and weighted here, columns by ATen."""

    def __init__(
        self, mode: str, x: Value, size: tuple[int, int], align_corners: bool, scales: tuple[float | None, float | None]
    ) -> None:
        """``mode``: "nearest", "nearest-exact", "bilinear" or "bicubic"; ``scales``: as given to ATen, or None."""
        self.mode, self.align_corners, self.scales = mode, align_corners, scales
        self.label = f"aten::upsample_{mode}2d"
        self._make([x], Value((*x.shape[:2], *size), x.dtype, 2))
        real = np.float64 if x.dtype == torch.float64 else np.float32
        self._index, self._weight = _taps(mode, x.shape[2], size[0], align_corners, scales[0], real)
        first, last = self._index[:, 0], self._index[:, -1]
        # Which rows any later row needs, and any earlier one: the ends of a window never go back.
        self._low = np.minimum.accumulate(first[::-1])[::-1]
        self._high = np.maximum.accumulate(last)

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        return int(self._low[r0]), int(self._high[r1 - 1]) + 1

    def prepare(self) -> None:
        self._index = torch.from_numpy(self._index)
        self._weight = None if self._weight is None else torch.from_numpy(self._weight).to(self.output.dtype)

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        x = self._across(rows[0])
        index = (self._index[r0:r1] - int(self._low[r0])).to(x.device)
        if self._weight is None:
            return x.index_select(2, index[:, 0])
        weight = self._weight[r0:r1].to(x.device).view(1, 1, r1 - r0, -1, 1)
        y = x.index_select(2, index[:, 0]).mul_(weight[:, :, :, 0])
        for tap in range(1, index.shape[1]):
            y.addcmul_(x.index_select(2, index[:, tap]), weight[:, :, :, tap])
        return y

    def _across(self, x: torch.Tensor) -> torch.Tensor:
        width = self.output.shape[3]
        if width == x.shape[3] and self.scales[1] in (None, 1.0):
            return x
        size, wide = [x.shape[2], width], self.scales[1]
        up = torch.ops.aten
        if self.mode == "nearest":
            return up.upsample_nearest2d(x, size, 1.0, wide)
        if self.mode == "nearest-exact":
            return up._upsample_nearest_exact2d(x, size, 1.0, wide)
        resize = up.upsample_bilinear2d if self.mode == "bilinear" else up.upsample_bicubic2d
        return resize(x, size, self.align_corners, 1.0, wide)

    def scratch(self, r0: int, r1: int) -> int:
        a, b = self.need(0, r0, r1)
        across = self.output.bytes_of(b - a) if self.output.shape[3] != self.inputs[0].shape[3] else 0
        return across + (0 if self._weight is None else self.output.bytes_of(r1 - r0))


def _taps(
    mode: str, length: int, target: int, align_corners: bool, given: float | None, real: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows (target, taps), int64, and their weights, or None where there is one tap of weight 1."""
    at = np.arange(target, dtype=real)
    if align_corners and mode in ("bilinear", "bicubic"):
        scale = real(length - 1) / real(target - 1) if target > 1 else real(0)
    else:
        # As ATen has it: 1 / scale in double, then narrowed.
        scale = real(1.0 / given) if given is not None and given > 0 else real(length) / real(target)
    if mode == "nearest":
        source = np.floor(at * scale)
        return np.minimum(source.astype(np.int64), length - 1)[:, None], None
    if mode == "nearest-exact":
        source = np.floor((at + real(0.5)) * scale)
        return np.minimum(source.astype(np.int64), length - 1)[:, None], None
    position = at * scale if align_corners else (at + real(0.5)) * scale - real(0.5)
    if mode == "bilinear":
        position = np.maximum(position, real(0))
        low = np.minimum(position.astype(np.int64), length - 1)
        part = np.clip(position - low.astype(real), 0, 1).astype(real)
        return np.stack([low, np.minimum(low + 1, length - 1)], 1), np.stack([real(1) - part, part], 1)
    low = np.floor(position)
    t = position - low
    index = np.clip(low.astype(np.int64)[:, None] + np.arange(-1, 3), 0, length - 1)
    return index, np.stack(_cubic(t, real(-0.75)), 1)


def _cubic(t: np.ndarray, a: Any) -> list[np.ndarray]:
    """Keys' kernel at the four samples around a position t in [0, 1) after the second of them."""

    def near(x: np.ndarray) -> np.ndarray:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    u = 1 - t
    return [w.astype(t.dtype) for w in (far(t + 1), near(t), near(u), far(u + 1))]


@register(
    "aten::upsample_nearest2d",
    "aten::_upsample_nearest_exact2d",
    "aten::upsample_bilinear2d",
    "aten::upsample_bicubic2d",
)
def _upsample(call: Call) -> Any:
    x = call.values[0]
    if not is_map(x) and x.row_axis is not None:
        return None
    factors = call.get("scale_factors")
    if factors is not None:
        scales = tuple(float(f) for f in factors)
        size = tuple(int(s * f) for s, f in zip(x.shape[2:], scales, strict=True))
    else:
        size, scales = tuple(call["output_size"]), (call.get("scales_h"), call.get("scales_w"))
    if x.row_axis is None:
        return spread(call, size)
    mode = {
        "aten::upsample_nearest2d": "nearest",
        "aten::_upsample_nearest_exact2d": "nearest-exact",
        "aten::upsample_bilinear2d": "bilinear",
        "aten::upsample_bicubic2d": "bicubic",
    }[call.name]
    whole = [t % s == 0 and (f is None or f == t // s) for t, s, f in zip(size, x.shape[2:], scales, strict=True)]
    if mode.startswith("nearest") and all(whole):
        return call.add(NearestUpsampling(x, (size[0] // x.shape[2], size[1] // x.shape[3])))
    return call.add(Interpolation(mode, x, size, bool(call.get("align_corners", False)), scales))
