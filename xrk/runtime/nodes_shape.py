"""Operators that move pixels: padding, slices, concatenation, pixel shuffles, flips and rolls."""

from typing import Any

import torch
import torch.nn.functional as F

from xrk.runtime.capture import Call, register
from xrk.runtime.graph import RowLocal, Value
from xrk.runtime.rows import Rowwise, Turned, clip, is_map

__all__ = ["Concatenation", "Padding", "PixelShuffle", "PixelUnshuffle", "RowConcatenation", "Slice", "Spread"]


class Padding(RowLocal):
    """Padding on four sides (negative crops); rows that lie outside are repeated, reflected or filled."""

    label = "aten::pad"
    writes_out = True

    def __init__(self, x: Value, pad: tuple[int, int, int, int], mode: str, value: float) -> None:
        """``pad``: left, right, top, bottom; ``mode``: "constant", "reflect", "replicate" or "circular"."""
        self.pad, self.mode, self.value = pad, mode, value
        left, right, top, bottom = pad
        n, c, h, w = x.shape
        if mode == "circular" and (top > 0 or bottom > 0):
            self.whole_inputs = frozenset([0])
        self._make([x], Value((n, c, h + top + bottom, w + left + right), x.dtype, 2))

    def _source(self, row: int) -> int:
        """The input row, outside [0, H) for a filled one."""
        h, r = self.inputs[0].rows, row - self.pad[2]
        if self.mode == "replicate":
            return clip(r, 0, h - 1)
        if self.mode == "reflect":
            r = abs(r)
            return r if r < h else 2 * (h - 1) - r
        return r % h if self.mode == "circular" else r

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        h, top = self.inputs[0].rows, self.pad[2]
        a, b = clip(r0 - top, 0, h), clip(r1 - top, 0, h)
        if self.mode == "replicate":
            return min(a, h - 1), max(b, 1)
        if self.mode == "reflect":
            a = 0 if r0 < top else min(a, self._source(self.output.rows - 1), self._source(r0))
            return a, max(b, self._source(0) + 1)
        return a, b

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        left, right, top, _ = self.pad
        h, x = self.inputs[0].rows, rows[0]
        first = 0 if self.whole_inputs else self.need(0, r0, r1)[0]
        if x is None:
            shape = self.output.band_shape(r1 - r0)
            out = torch.empty(shape, dtype=self.output.dtype, device=self.home) if out is None else out
            return out.fill_(self.value)
        inside = (clip(r0, top, h + top), clip(r1, top, h + top))
        if inside == (r0, r1):
            y = x[:, :, r0 - top - first : r1 - top - first]
        elif self.mode == "constant":
            y = x[:, :, inside[0] - top - first : inside[1] - top - first]
            y = F.pad(y, (0, 0, inside[0] - r0, r1 - inside[1]), value=self.value)
        else:
            index = torch.tensor([self._source(r) - first for r in range(r0, r1)], device=x.device)
            y = x.index_select(2, index)
        width = x.shape[3]
        y = y[:, :, :, max(0, -left) : width - max(0, -right)]
        left, right = max(0, left), max(0, right)
        if out is None:
            out = torch.empty(
                self.output.band_shape(r1 - r0), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
            )
        width = y.shape[3]
        out[:, :, :, left : left + width] = y
        if not left and not right:
            return out
        if self.mode == "constant":
            out[:, :, :, :left] = self.value
            out[:, :, :, left + width :] = self.value
        elif self.mode == "replicate":
            out[:, :, :, :left] = y[:, :, :, :1]
            out[:, :, :, left + width :] = y[:, :, :, -1:]
        elif self.mode == "circular":
            out[:, :, :, :left] = y[:, :, :, width - left :]
            out[:, :, :, left + width :] = y[:, :, :, :right]
        else:
            out[:, :, :, :left] = y[:, :, :, 1 : left + 1].flip(3)
            out[:, :, :, left + width :] = y[:, :, :, width - right - 1 : width - 1].flip(3)
        return out

    def scratch(self, r0: int, r1: int) -> int:
        top = self.pad[2]
        edge = r0 < top or r1 > self.inputs[0].rows + top
        return self.inputs[0].bytes_of(r1 - r0) if edge else 0


class Slice(RowLocal):
    """Every step-th row from a start; other axes are a `Rowwise`."""

    label = "aten::slice"
    reads_in_place = True

    def __init__(self, x: Value, start: int, stop: int, step: int) -> None:
        self.start, self.step = start, step
        rows = len(range(start, stop, step))
        self._make([x], Value(x.band_shape(rows), x.dtype, x.row_axis))

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        return self.start + r0 * self.step, self.start + (r1 - 1) * self.step + 1

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        if self.step == 1:
            return rows[0]
        every = [slice(None)] * len(self.output.shape)
        every[self.output.row_axis] = slice(None, None, self.step)
        return rows[0][tuple(every)]


class Concatenation(RowLocal):
    """Channels side by side, written where they belong; `fusion` lets up-sampling write there directly."""

    label = "aten::cat"
    writes_out = True

    def __init__(self, inputs: list[Value], axis: int) -> None:
        self.axis = axis
        self.parts: list[RowLocal | None] = [None] * len(inputs)  # the node that makes a part in place
        self.sizes = [v.shape[axis] for v in inputs]
        first = inputs[0]
        shape = (*first.shape[:axis], sum(self.sizes), *first.shape[axis + 1 :])
        self._make(inputs, Value(shape, first.dtype, first.row_axis, span=first.span))

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        part = self.parts[i]
        return (r0, r1) if part is None else part.need(0, r0, r1)

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        if out is None:
            shape = self.output.band_shape(r1 - r0)
            layout = torch.channels_last if is_map(self.output) else torch.contiguous_format
            out = torch.empty(shape, dtype=self.output.dtype, device=self.home, memory_format=layout)
        at = 0
        for part, size, x in zip(self.parts, self.sizes, rows, strict=True):
            place = out.narrow(self.axis, at, size)
            if part is None:
                place.copy_(x)
            else:
                part.compute(r0, r1, [x], place)
            at += size
        return out

    def round_up(self, row: int) -> int:
        for part in self.parts:
            row = row if part is None else part.round_up(row)
        return row


class RowConcatenation(RowLocal):
    """Maps one below the other."""

    label = "aten::cat"

    def __init__(self, inputs: list[Value], axis: int) -> None:
        self.starts = [0]
        for v in inputs:
            self.starts.append(self.starts[-1] + v.rows)
        self._make(inputs, Value(inputs[0].band_shape(self.starts[-1]), inputs[0].dtype, axis))

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        return tuple(clip(r - self.starts[i], 0, self.inputs[i].rows) for r in (r0, r1))

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        return torch.cat([t for t in rows if t is not None], self.output.row_axis)


class PixelShuffle(RowLocal):
    """(1, C r^2, H, W) -> (1, C, H r, W r)."""

    label = "aten::pixel_shuffle"
    writes_out = True

    def __init__(self, x: Value, factor: int) -> None:
        self.factor = factor
        n, c, h, w = x.shape
        self._make([x], Value((n, c // factor**2, h * factor, w * factor), x.dtype, 2))

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        return r0 // self.factor, -(-r1 // self.factor)

    def round_up(self, row: int) -> int:
        return -(-row // self.factor) * self.factor

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        f, x = self.factor, rows[0]
        if out is None or r0 % f or r1 % f:
            first = r0 // f * f
            y = F.pixel_shuffle(x, f)[:, :, r0 - first : r1 - first]
            y = y.contiguous(memory_format=torch.channels_last)
            return y if out is None else out.copy_(y)
        # out[c, h f + i, w f + j] = x[c f f + i f + j, h, w]
        split = x.unflatten(1, (-1, f, f)).permute(0, 1, 4, 2, 5, 3)
        out.unflatten(3, (-1, f)).unflatten(2, (-1, f)).copy_(split)
        return out

    def scratch(self, r0: int, r1: int) -> int:
        return self.output.bytes_of(r1 - r0)


class PixelUnshuffle(RowLocal):
    """(1, C, H r, W r) -> (1, C r^2, H, W)."""

    label = "aten::pixel_unshuffle"

    def __init__(self, x: Value, factor: int) -> None:
        self.factor = factor
        n, c, h, w = x.shape
        self._make([x], Value((n, c * factor**2, h // factor, w // factor), x.dtype, 2))

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        return r0 * self.factor, r1 * self.factor

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        return F.pixel_unshuffle(rows[0], self.factor).contiguous(memory_format=torch.channels_last)

    def scratch(self, r0: int, r1: int) -> int:
        return self.output.bytes_of(r1 - r0)


class Spread(RowLocal):
    """A vector (1, C, 1, 1) on every pixel of a map."""

    writes_out = True

    def __init__(self, label: str, x: Value, size: tuple[int, int]) -> None:
        self.label = label
        self._make([x], Value((*x.shape[:2], *size), x.dtype, 2))

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        return 0, 0

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        if out is not None:
            return out.copy_(rows[0])
        return rows[0].expand(self.output.band_shape(r1 - r0)).contiguous(memory_format=torch.channels_last)


# --- handlers ------------------------------------------------------------------------------------------------------


@register("aten::pad", "aten::constant_pad_nd", "aten::reflection_pad2d", "aten::replication_pad2d")
def _pad(call: Call) -> Any:
    x = call["self"]
    pad = list(call.get("pad") or call.get("padding"))
    mode = call.get("mode") or {"aten::reflection_pad2d": "reflect", "aten::replication_pad2d": "replicate"}.get(
        call.name, "constant"
    )
    count = len(x.shape)
    pad += [0] * (2 * count - len(pad))
    at = 2 * (count - 1 - x.row_axis)
    if mode == "constant" and not any(pad[at : at + 2]):
        call.arguments["pad"] = pad
        return call.rowwise(x.row_axis)
    if not is_map(x):
        return None
    if any(pad[4:]):
        if mode != "constant":
            return None
        func, value = torch.ops.aten.constant_pad_nd.default, call["value"] or 0.0
        return call.then(func, call.then(func, x, pad[:4], value), [0] * 4 + pad[4:], value)
    pad = pad[:4]
    h, w = x.shape[2:]
    least = {"reflect": 1, "circular": 0}.get(mode)
    if least is not None and (max(pad[:2]) > w - least or max(pad[2:]) > h - least):
        raise ValueError(f"a padding of {pad} by {mode} is larger than a map of {h} x {w} allows")
    if min(pad) < 0 and mode != "constant":
        return None
    value = call.get("value")
    return call.add(Padding(x, tuple(pad), mode, 0.0 if value is None else float(value)))


@register("aten::cat", "aten::concat", "aten::concatenate")
def _cat(call: Call) -> Any:
    tensors = call["tensors"]
    rowed = next(v for v in call.values if v.row_axis is not None)
    dim = call["dim"] % len(rowed.shape)
    inputs = []
    for t in tensors:
        if isinstance(t, torch.Tensor):
            along = t.ndim == len(rowed.shape) and (t.shape[rowed.row_axis] == rowed.rows or dim == rowed.row_axis)
            if not along:
                return None
            t = call.constant(t, rowed.row_axis, rowed.span)
        if (t.row_axis, t.span, t.dtype) != (rowed.row_axis, rowed.span, rowed.dtype):
            return None
        others = [(a, b) for d, (a, b) in enumerate(zip(t.shape, rowed.shape, strict=True)) if d != dim]
        if any(a != b for a, b in others):
            raise ValueError(f"maps of shapes {t.shape} and {rowed.shape} meet in a concatenation")
        inputs.append(t)
    if dim == rowed.row_axis:
        return call.add(RowConcatenation(inputs, dim)) if rowed.span == 1 else None
    return call.add(Concatenation(inputs, dim))


@register("aten::slice", "aten::narrow")
def _slice(call: Call) -> Any:
    v = call["self"]
    dim = call["dim"] % len(v.shape)
    size = v.shape[dim]
    start = call["start"] or 0
    if isinstance(start, Value | torch.Tensor):
        return None
    start = clip(start + size if start < 0 else start, 0, size)
    if call.name == "aten::narrow":
        stop, step = start + call["length"], 1
    else:
        stop, step = call["end"], call["step"]
        stop = size if stop is None else clip(stop + size if stop < 0 else stop, start, size)
    if (start, stop, step) == (0, size, 1):
        return v
    first, end = min(abs(call["start"] or 0), size), call.get("end") or 0
    call.crops(v, dim, first - end if -size <= end < 0 else max(first, stop % size))
    if dim == v.row_axis:
        if stop <= start or v.span > 1:
            return None
        return call.add(Slice(v, start, stop, step))
    return call.rowwise(v.row_axis, view=True)


@register("aten::chunk", "aten::split", "aten::split_with_sizes", "aten::unsafe_chunk", "aten::unsafe_split")
def _split(call: Call) -> Any:
    v = call["self"]
    dim = call["dim"] % len(v.shape)
    size = v.shape[dim]
    if "chunk" in call.name:
        each = -(-size // call["chunks"])
        lengths = [min(each, size - i) for i in range(0, size, each)]
    else:
        given = call.get("split_size", call.get("split_sizes"))
        lengths = [min(given, size - i) for i in range(0, size, given)] if isinstance(given, int) else list(given)
    made, start = [], 0
    for length in lengths:
        made.append(call.then(torch.ops.aten.slice.Tensor, v, dim, start, start + length))
        start += length
    return made


def spread(call: Call, size: tuple[int, int]) -> Value | None:
    """A small vector that becomes a map; None where it is no (1, C, 1, 1), or becomes none."""
    v = call.values[0]
    if len(v.shape) != 4 or v.shape[0] != 1 or v.shape[2:] != (1, 1) or len(call.values) > 1 or min(size) < 1:
        return None
    return call.add(Spread(call.name, v, size)) if max(size) > 1 else None


@register("aten::pixel_shuffle")
def _pixel_shuffle(call: Call) -> Any:
    x, f = call["self"], call["upscale_factor"]
    if is_map(x) and x.shape[1] % f**2:
        raise ValueError(f"{x.shape[1]} channels are shuffled into blocks of {f} x {f} pixels")
    return call.add(PixelShuffle(x, f)) if is_map(x) else None


@register("aten::pixel_unshuffle")
def _pixel_unshuffle(call: Call) -> Any:
    x, f = call["self"], call["downscale_factor"]
    if is_map(x) and (x.shape[2] % f or x.shape[3] % f):
        raise ValueError(f"a map of {x.shape[2]} x {x.shape[3]} is taken apart into blocks of {f} x {f} pixels")
    return call.add(PixelUnshuffle(x, f)) if is_map(x) else None


@register("aten::channel_shuffle")
def _channel_shuffle(call: Call) -> Any:
    v = call["self"]
    return call.add(Rowwise(call.name, call.runner(), [v], v.alike())) if is_map(v) else None


@register("aten::flip")
def _flip(call: Call) -> Any:
    v = call["self"]
    dims = {d % len(v.shape) for d in call["dims"]}
    if v.row_axis not in dims:
        return call.rowwise(v.row_axis)
    if v.span > 1:
        return None
    axis, h = v.row_axis, v.rows

    def rows(x: torch.Tensor, r0: int, r1: int) -> torch.Tensor:
        return x.narrow(axis, h - r1, r1 - r0).flip(tuple(dims))

    return call.add(Turned(call.name, v, v.alike(), rows))


@register("aten::rot90")
def _rot90(call: Call) -> Any:
    v = call["self"]
    first, second = (d % len(v.shape) for d in call["dims"])
    turns = call["k"] % 4
    flip, transpose = torch.ops.aten.flip.default, torch.ops.aten.transpose.int
    if turns == 2:
        return call.then(flip, v, [first, second])
    if turns == 1:
        return call.then(transpose, call.then(flip, v, [second]), first, second)
    return call.then(flip, call.then(transpose, v, first, second), [second]) if turns else v


@register("aten::roll")
def _roll(call: Call) -> Any:
    v = call["self"]
    if not call["dims"]:
        return None
    by = {d % len(v.shape): s for d, s in zip(call["dims"], call["shifts"], strict=True)}
    if v.row_axis not in by:
        return call.rowwise(v.row_axis)
    if v.span > 1:
        return None
    axis, h = v.row_axis, v.rows
    shift = by.pop(axis) % h
    others, steps = tuple(by), tuple(by.values())

    def rows(x: torch.Tensor, r0: int, r1: int) -> torch.Tensor:
        index = (torch.arange(r0, r1, device=x.device) - shift) % h
        y = x.index_select(axis, index)
        return y.roll(steps, others) if others else y

    return call.add(Turned(call.name, v, v.alike(), rows))
