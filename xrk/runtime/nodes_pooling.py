"""Maximum and average over windows."""

from typing import Any

import torch
import torch.nn.functional as F

from xrk.runtime.capture import Call, register
from xrk.runtime.graph import RowLocal, Value
from xrk.runtime.nodes_convolution import _two
from xrk.runtime.rows import Window, clip, is_map

__all__ = ["AdaptivePooling", "Pooling"]


class Pooling(RowLocal):
    """Windows of one size; beyond the image there is nothing (maximum) or zeros (average, where they count)."""

    def __init__(
        self,
        kind: str,
        x: Value,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        ceil_mode: bool,
        count_padding: bool = True,
        divisor: int | None = None,
    ) -> None:
        """``kind``: "max" or "avg"; the others as for torch's functions of these names."""
        self.kind, self.label = kind, f"aten::{kind}_pool2d"
        self.kernel, self.stride, self.padding, self.dilation = kernel, stride, padding, dilation
        self.ceil_mode, self.count_padding, self.divisor = ceil_mode, count_padding, divisor
        self.window = Window(stride[0], padding[0], dilation[0] * (kernel[0] - 1) + 1)
        sizes = [_pooled(*s, ceil_mode) for s in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)]
        # Average with windows that hang over the edge: a sum, and its own count for every pixel.
        self._counted = kind == "avg" and divisor is None and (any(padding) or ceil_mode)
        self._make([x], Value((*x.shape[:2], *sizes), x.dtype, 2))

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        height = self.inputs[0].rows
        a, b = self.window.of(r0, r1)
        b = clip(b, 1, height)
        return clip(a, 0, b - 1), b

    def prepare(self) -> None:
        if not self._counted:
            return
        counts = []
        for axis in (0, 1):
            size, out = self.inputs[0].shape[2 + axis], self.output.shape[2 + axis]
            k, s, p = self.kernel[axis], self.stride[axis], self.padding[axis]
            start = torch.arange(out) * s - p
            end = torch.minimum(start + k, torch.tensor(size + p))
            if not self.count_padding:
                start, end = start.clamp(min=0), end.clamp(max=size)
            counts.append((end - start).to(self.output.dtype))
        self._counts = counts

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        x = rows[0]
        a, b = self.window.of(r0, r1)
        above, below = max(0, -a), max(0, b - self.inputs[0].rows)
        if above or below:
            x = F.pad(x, (0, 0, above, below), value=float("-inf") if self.kind == "max" else 0.0)
        padding = (0, self.padding[1])
        if self.kind == "max":
            return F.max_pool2d(x, self.kernel, self.stride, padding, self.dilation, self.ceil_mode)
        if not self._counted:
            return F.avg_pool2d(x, self.kernel, self.stride, padding, self.ceil_mode, True, self.divisor)
        y = F.avg_pool2d(x, self.kernel, self.stride, padding, self.ceil_mode, True, 1)
        tall, wide = (c.to(y.device) for c in self._counts)
        return y.div_(tall[r0:r1, None] * wide)

    def scratch(self, r0: int, r1: int) -> int:
        a, b = self.window.of(r0, r1)
        indices = self.output.shape[1] * (r1 - r0) * self.output.shape[3] * 8 if self.kind == "max" else 0
        edge = a < 0 or b > self.inputs[0].rows
        return indices + (self.inputs[0].bytes_of(b - a) if edge else 0)


def _pooled(size: int, k: int, s: int, p: int, d: int, ceil_mode: bool) -> int:
    span = size + 2 * p - d * (k - 1) - 1
    count = (-(-span // s) if ceil_mode else span // s) + 1
    # The last window must begin inside the image or the padding before it.
    return count - 1 if ceil_mode and (count - 1) * s >= size + p else count


class AdaptivePooling(RowLocal):
    """Output row r looks at rows floor(r H / h) to ceil((r + 1) H / h)."""

    def __init__(self, kind: str, x: Value, size: tuple[int, int]) -> None:
        """``size``: (h, w) of the output."""
        self.kind, self.label = kind, f"aten::adaptive_{kind}_pool2d"
        self._pool = F.adaptive_max_pool2d if kind == "max" else F.adaptive_avg_pool2d
        self._make([x], Value((*x.shape[:2], *size), x.dtype, 2))

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        size, out = self.inputs[0].rows, self.output.rows
        return r0 * size // out, -(-r1 * size // out)

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        width, first = self.output.shape[3], self.need(0, r0, r1)[0]
        made = []
        for r in range(r0, r1):
            a, b = self.need(0, r, r + 1)
            made.append(self._pool(rows[0][:, :, a - first : b - first], (1, width)))
        return made[0] if len(made) == 1 else torch.cat(made, 2)

    def scratch(self, r0: int, r1: int) -> int:
        return self.output.bytes_of(r1 - r0)


@register("aten::max_pool2d")
def _max_pool2d(call: Call) -> Any:
    x = call["self"]
    if not is_map(x):
        return None
    kernel = _two(call["kernel_size"])
    stride = _two(call["stride"]) if call["stride"] else kernel
    return call.add(Pooling("max", x, kernel, stride, _two(call["padding"]), _two(call["dilation"]), call["ceil_mode"]))


@register("aten::avg_pool2d")
def _avg_pool2d(call: Call) -> Any:
    x = call["self"]
    if not is_map(x):
        return None
    kernel = _two(call["kernel_size"])
    stride = _two(call["stride"]) if call["stride"] else kernel
    options = (call["ceil_mode"], call["count_include_pad"], call["divisor_override"])
    return call.add(Pooling("avg", x, kernel, stride, _two(call["padding"]), (1, 1), *options))


def adaptive(call: Call, kind: str, x: Value, size: Any) -> Any:
    """Adaptive pooling to more than one row."""
    height, width = (x.shape[2 + i] if s is None else s for i, s in enumerate(size))
    return call.add(AdaptivePooling(kind, x, (height, width)))
