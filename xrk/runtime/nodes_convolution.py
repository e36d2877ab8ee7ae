"""Convolution and transposed convolution."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from xrk.kernels import PackedDoubledConv2d, packed_values
from xrk.kernels.convolution.conv2d import fold_batch_norm
from xrk.runtime.capture import Call, register
from xrk.runtime.graph import RowLocal, Value
from xrk.runtime.prepared import Convolve, packs, prepare_convolution, prepared_bytes, prepares, transforms
from xrk.runtime.rows import Window, as_channels_last, channels_last, clip, is_map, layout

__all__ = ["Convolution", "TransposedConvolution", "UpsampledConvolution"]

# Bytes from which on weights that are larger for speed's sake are taken smaller where memory is short.
LIGHT = 1 << 18


class Convolution(RowLocal):
    """A convolution with zeros around the image, and what may follow it at once.

    act(norm(conv(x) + bias) + residual); `fusion` sets `norm` and `activation` and makes the residual
    a second input.
    """

    label = "aten::conv2d"

    def __init__(
        self,
        x: Value,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> None:
        """``weight``: (O, C / groups, K, L), known; the others as for `torch.nn.functional.conv2d`."""
        self.weight, self.bias, self._shape = weight, bias, tuple(weight.shape)
        self.products = weight[0].numel()  # for each output value
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.activation: str | None = None
        self.norm: tuple[Any, ...] | None = None  # mean, var, gamma, beta, eps of the batch norm that follows
        self.border = padding[0]
        self.window = Window(stride[0], padding[0], dilation[0] * (weight.shape[2] - 1) + 1)
        sizes = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        ]
        _check(x, x.shape[1] // groups, weight.shape[1], sizes)
        self.transformed = groups == 1 and transforms(weight.shape, stride, dilation)
        self._run: Convolve | None = None
        self._make([x], Value((1, weight.shape[0], *sizes), x.dtype, 2))

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        return self.window.of(r0, r1) if i == 0 else (r0, r1)

    def prepare(self) -> None:
        if self.heights:
            self._run = self._ready(self.heights)
            self.weight = self.bias = self.norm = None  # what runs holds what it needs

    def _ready(self, heights: Mapping[int, int]) -> Convolve:
        weight, bias = _in_dtype(self.weight, self.bias, self.norm, self.output.dtype)
        rest = (self.stride, self.padding[1], self.dilation, self.groups, self.activation, self.inputs[0].shape[3])
        return prepare_convolution(weight, bias, *rest, heights, self.transformed)

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        residual = channels_last(rows[1]) if len(rows) > 1 else None
        run = self._run or self._ready({})
        place = None if out is None else out if self.packs and out.stride(1) == 1 else as_channels_last(out)
        y = run(channels_last(rows[0]), residual, place)
        if out is None:
            return y
        return out if place is not None else out.copy_(y)

    @property
    def packs(self) -> bool:
        return packs(self.home, self.output.dtype, self.groups)

    @property
    def writes_out(self) -> bool:
        # The public operators make memory of their own, which would not be counted.
        return self.packs or prepares(self.home, self.output.dtype)

    @property
    def work(self) -> int:
        return self.output.shape[1] * self.output.shape[3] * self.products

    @property
    def weight_bytes(self) -> int:
        return prepared_bytes(self._shape, self.output.dtype, self.home, self.groups, self.transformed)

    def lighten(self) -> bool:
        """Takes weights of fewer bytes where those for speed are large; whether there are such."""
        light = prepared_bytes(self._shape, self.output.dtype, self.home, self.groups)
        if not self.transformed or self.weight_bytes - light < LIGHT:
            return False
        self.transformed = False
        return True


def _in_dtype(
    weight: torch.Tensor, bias: torch.Tensor | None, norm: tuple[Any, ...] | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and bias with the norm folded in."""
    if norm is not None:
        weight, bias = _folded(weight, bias, norm)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _folded(weight: torch.Tensor, bias: torch.Tensor | None, norm: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """`fold_batch_norm`, some output channels at a time: it makes float64 copies, which would be the plan's peak."""
    *vectors, eps = norm
    new_weight = torch.empty_like(weight, memory_format=torch.channels_last)
    new_bias = torch.empty(len(weight), dtype=weight.dtype, device=weight.device)
    each = max(1, (1 << 18) // weight[0].numel())
    for i in range(0, len(weight), each):
        part = slice(i, i + each)
        known = (None if t is None else t[part] for t in (bias, *vectors))
        new_weight[part], new_bias[part] = fold_batch_norm(weight[part], *known, eps)
    return new_weight, new_bias


class UpsampledConvolution(RowLocal):
    """A 3x3 convolution of a map that is doubled by nearest neighbours, without the doubled map.

    act(conv(cat(double(x), skip)) + bias), zeros around both. Rows 2i - 1, 2i and 2i + 1 of the doubled map are rows
    i - 1, i and i of x. So row 2i of the result is a convolution of rows i - 1 and i with the weights w0 and w1 + w2,
    row 2i + 1 one of rows i and i + 1 with w0 + w1 and w2, and columns alike: four 2x2 convolutions, with 4/9 of the
    products. Zeros beyond x are zeros beyond the doubled map.

    The two for odd and even columns are run as one with twice the channels: pixels 2j - 1 and 2j of the result look at
    the same columns j - 1 and j, and lie side by side in memory as channels do.

    Where convolutions are packed it is `xrk.kernels.PackedDoubledConv2d`, with 1/4 of the products.
    """

    label = "doubled aten::conv2d"
    border = 1
    bordered = frozenset([0, 1])
    writes_out = True

    def __init__(self, convolution: Convolution, x: Value, first: int, skip: Value | None) -> None:
        """``convolution``: takes its place; ``first``: the first channel of x in its input, skip's are all others."""
        self.weight, self.bias, self.norm = convolution.weight, convolution.bias, convolution.norm
        self.activation, self.first = convolution.activation, first
        self._runs: list[Convolve] = []
        self._packed: PackedDoubledConv2d | None = None
        self._make([x] if skip is None else [x, skip], convolution.output)
        self._outputs = self.weight.shape[0]

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        return ((r0 - 1) // 2, r1 // 2 + 1) if i == 0 else (r0 - 1, r1 + 1)

    def round_up(self, row: int) -> int:
        return row + row % 2

    def prepare(self) -> None:
        if not self.heights:
            return
        if self.packs:
            weight, bias = _in_dtype(self.weight, self.bias, self.norm, self.output.dtype)
            self._packed = PackedDoubledConv2d(weight, bias, self.first, self.inputs[0].shape[1], self.activation)
        else:
            self._runs = self._ready(self.heights)
        self.weight = self.bias = self.norm = None

    def _ready(self, heights: Mapping[int, int]) -> list[Convolve]:
        """For even rows, for odd rows, and for the skip."""
        weight, bias = _in_dtype(self.weight, self.bias, self.norm, self.output.dtype)
        first, after = self.first, self.first + self.inputs[0].shape[1]
        half: Counter[int] = Counter()
        for height, count in heights.items():
            half[-(-height // 2)] += count
            half[height // 2] += count
        half.pop(0, None)
        geometry, width = ((1, 1), 1, (1, 1), 1), self.inputs[0].shape[3]
        alone = len(self.inputs) == 1
        before, activation = (bias, self.activation) if alone else (None, None)
        made = []
        for odd in (False, True):
            part = _doubled(weight[:, first:after], odd)
            twice = before if before is None else before.repeat(2)
            made.append(prepare_convolution(part, twice, *geometry, activation, width, half))
        if not alone:
            part = torch.cat([weight[:, :first], weight[:, after:]], 1)
            made.append(prepare_convolution(part, bias, *geometry, self.activation, 2 * width, heights))
        return made

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        x, top = channels_last(rows[0]), self.need(0, r0, r1)[0]
        made = None if out is None else as_channels_last(out)
        if made is None:
            made = layout(self.output, r1 - r0, x.device)
        if self._packed is not None:
            skip = channels_last(rows[1]) if len(rows) > 1 else None
            self._packed(x, skip, r0 % 2 == 1, made)
            return _into(out, made)
        channels, width = made.shape[1], made.shape[3]
        runs = self._runs or self._ready({})
        for odd, run in enumerate(runs[:2]):
            i0, i1 = (r0 + 1 - odd) // 2, (r1 + 1 - odd) // 2  # rows 2i + odd from r0 up and below r1
            if i1 == i0:
                continue
            above = i0 - 1 + odd - top
            y = channels_last(run(x[:, :, above : above + i1 - i0 + 1], None, None))
            y = y.permute(0, 2, 3, 1).reshape(1, i1 - i0, width + 2, channels)[:, :, 1:-1]
            made[:, :, 2 * i0 + odd - r0 :: 2].copy_(y.permute(0, 3, 1, 2))
        if len(rows) > 1:
            runs[2](channels_last(rows[1]), made, made)
        return _into(out, made)

    @property
    def work(self) -> int:
        channels = 4 * self.inputs[0].shape[1] + (9 * self.inputs[1].shape[1] if len(self.inputs) > 1 else 0)
        return self.output.shape[1] * self.output.shape[3] * channels

    @property
    def packs(self) -> bool:
        return packs(self.home, self.output.dtype)

    @property
    def weight_bytes(self) -> int:
        channels, outputs = [v.shape[1] for v in self.inputs], self._outputs
        if self.packs:
            taps = zip(channels, (3, 4), strict=False)
            return 4 * sum(packed_values((outputs, c, k, k), panels=True) for c, k in taps)
        where = (self.output.dtype, self.home)
        held = 2 * prepared_bytes((2 * outputs, channels[0], 2, 2), *where)
        return held + sum(prepared_bytes((outputs, c, 3, 3), *where) for c in channels[1:])

    def scratch(self, r0: int, r1: int) -> int:
        if self.packs:
            return 0
        n, c, _, w = self.output.shape
        return n * c * (-(-(r1 - r0) // 2)) * (w + 2) * self.output.dtype.itemsize


def _into(out: torch.Tensor | None, made: torch.Tensor) -> torch.Tensor:
    if out is None:
        return made
    return out if made.data_ptr() == out.data_ptr() else out.copy_(made)


def _doubled(weight: torch.Tensor, odd: bool) -> torch.Tensor:
    """(O, C, 3, 3) -> (2 O, C, 2, 2): the weights on x for odd columns, then for even ones, of odd or even rows."""
    outputs, inputs = weight.shape[:2]
    made = torch.empty((2, outputs, inputs, 2, 2), dtype=weight.dtype, device=weight.device)
    each = max(1, (1 << 14) // inputs)
    for i in range(0, outputs, each):
        rows = _pairs(weight[i : i + each].double(), 2, odd)
        made[0, i : i + each] = _pairs(rows, 3, True)
        made[1, i : i + each] = _pairs(rows, 3, False)
    return made.flatten(0, 1)


def _pairs(weight: torch.Tensor, axis: int, odd: bool) -> torch.Tensor:
    before, at, after = weight.unbind(axis)
    return torch.stack([before + at, after] if odd else [before, at + after], axis)


class TransposedConvolution(RowLocal):
    """Output row o = i * stride - padding + dilation * k gets a share of input row i."""

    label = "aten::conv_transpose2d"

    def __init__(
        self,
        x: Value,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        output_padding: tuple[int, int],
        groups: int,
        dilation: tuple[int, int],
    ) -> None:
        """``weight``: (C, O / groups, K, L), known; the others as for `torch.nn.functional.conv_transpose2d`."""
        self.weight, self.bias, self.groups = weight, bias, groups
        self.stride, self.padding, self.output_padding, self.dilation = stride, padding, output_padding, dilation
        self.extent = dilation[0] * (weight.shape[2] - 1) + 1
        sizes = [
            (size - 1) * s - 2 * p + d * (k - 1) + extra + 1
            for size, k, s, p, d, extra in zip(
                x.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding, strict=True
            )
        ]
        _check(x, x.shape[1], weight.shape[0], sizes)
        self._make([x], Value((1, weight.shape[1] * groups, *sizes), x.dtype, 2))

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        s, p, height = self.stride[0], self.padding[0], self.inputs[0].rows
        # Rounded down, so that the band begins at or above r0 also where strides leave gaps between the shares.
        b = clip((r1 - 1 + p) // s + 1, 1, height)
        return clip((r0 + p - self.extent + 1) // s, 0, b - 1), b

    def prepare(self) -> None:
        dtype = self.output.dtype
        self._weight = self.weight.to(dtype)
        self._bias = None if self.bias is None else self.bias.to(dtype)

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        x = rows[0]
        s, p = self.stride[0], self.padding[0]
        first = self.need(0, r0, r1)[0] * s - p
        length = (x.shape[2] - 1) * s + self.extent
        missing = max(0, r1 - first - length)  # output padding: rows that no input row has a share in
        y = F.conv_transpose2d(
            x, self._weight, self._bias, self.stride, (0, self.padding[1]), (0, self.output_padding[1]),
            self.groups, self.dilation,
        )  # fmt: skip
        if missing:
            y = F.pad(y, (0, 0, 0, missing))
            if self._bias is not None:
                y[:, :, length:] = self._bias.view(1, -1, 1, 1)
        return y[:, :, r0 - first : r1 - first]

    def round_up(self, row: int) -> int:
        s, p = self.stride[0], self.padding[0]
        return min(-(-(row + p) // s) * s - p, self.output.rows)

    @property
    def work(self) -> int:
        return (
            self.inputs[0].shape[3]
            * self.weight.numel()
            * self.inputs[0].shape[1]
            // (self.weight.shape[0] * self.stride[0])
        )

    def scratch(self, r0: int, r1: int) -> int:
        a, b = self.need(0, r0, r1)
        extra = (b - a - 1) * self.stride[0] + self.extent - (r1 - r0)
        # Its weights are brought into the backend's layout for every call.
        return self.output.bytes_of(max(extra, 0)) + self.weight.numel() * self.output.dtype.itemsize


def _check(x: Value, channels: int, expected: int, sizes: list[int]) -> None:
    if channels != expected or min(sizes) < 1:
        raise ValueError(f"a map of shape {x.shape} meets a convolution that cannot take it")


def _two(value: Any) -> tuple[int, int]:
    items = [value] if isinstance(value, int) else list(value)
    return (items[0], items[0]) if len(items) == 1 else (items[0], items[1])


@register("aten::conv2d")
def _conv2d(call: Call) -> Any:
    x, weight = call["input"], call["weight"]
    if not is_map(x) or isinstance(weight, Value) or isinstance(call["bias"], Value):
        return None
    stride, dilation = _two(call["stride"]), _two(call["dilation"])
    padding = call["padding"]
    if isinstance(padding, str):
        return None  # "same" and "valid": torch takes them apart into the sizes
    return call.add(Convolution(x, weight, call["bias"], stride, _two(padding), dilation, call["groups"]))


@register("aten::convolution")
def _convolution(call: Call) -> Any:
    x, weight = call["input"], call["weight"]
    if not is_map(x) or isinstance(weight, Value) or isinstance(call["bias"], Value):
        return None
    stride, padding, dilation = (_two(call[n]) for n in ("stride", "padding", "dilation"))
    if call["transposed"]:
        extra = _two(call["output_padding"])
        node = TransposedConvolution(x, weight, call["bias"], stride, padding, extra, call["groups"], dilation)
        return call.add(node)
    return call.add(Convolution(x, weight, call["bias"], stride, padding, dilation, call["groups"]))


@register("aten::conv_transpose2d")
def _conv_transpose2d(call: Call) -> Any:
    x, weight = call["input"], call["weight"]
    if not is_map(x) or isinstance(weight, Value) or isinstance(call["bias"], Value):
        return None
    sizes = (_two(call[n]) for n in ("stride", "padding", "output_padding"))
    node = TransposedConvolution(x, weight, call["bias"], *sizes, call["groups"], _two(call["dilation"]))
    return call.add(node)


@register("xrk::conv2d")
def _xrk_conv2d(call: Call) -> Any:
    """The kernel's own convolution: taken apart into a convolution, an activation and a sum, which `fusion` joins."""
    x, weight, residual = call["x"], call["weight"], call["residual"]
    if not is_map(x) or isinstance(weight, Value) or isinstance(call["bias"], Value):
        return None
    if residual is not None and not is_map(residual):
        return None
    two = [(call[n], call[n]) for n in ("stride", "padding", "dilation")]
    y = call.add(Convolution(x, weight, call["bias"], *two, call["groups"]))
    add, act = torch.ops.aten.add.Tensor, call["activation"]
    if residual is not None and call["add_first"]:
        y = call.then(add, y, residual)
    if act == "leaky_relu":
        y = call.then(torch.ops.aten.leaky_relu.default, y, call["negative_slope"])
    elif act is not None:
        y = call.then(getattr(torch.ops.aten, act).default, y)
    if residual is not None and not call["add_first"]:
        y = call.then(add, y, residual)
    return y
