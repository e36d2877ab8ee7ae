"""Convolution and transposed convolution."""

from typing import Any

import torch
import torch.nn.functional as F

from xrk.kernels.convolution.conv2d import fold_batch_norm
from xrk.runtime.capture import Call, register
from xrk.runtime.graph import Node, RowLocal, Value
from xrk.runtime.prepared import prepare_convolution
from xrk.runtime.rows import Window, channels_last, clip, is_map

__all__ = ["Convolution", "TransposedConvolution"]


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
        self.weight, self.bias = weight, bias
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
        self._make([x], Value((1, weight.shape[0], *sizes), x.dtype, 2))

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        return self.window.of(r0, r1) if i == 0 else (r0, r1)

    def prepare(self) -> None:
        weight, bias = self.weight, self.bias
        if self.norm is not None:
            weight, bias = _folded(weight, bias, self.norm)
        x, dtype = self.inputs[0], self.output.dtype
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        usual = (*x.shape[:2], min(x.rows + 2 * self.border, self.window.extent + 15 * self.stride[0]), x.shape[3])
        geometry = (self.stride, (0, self.padding[1]), self.dilation, self.groups)
        self._run, packed = prepare_convolution(weight, bias, *geometry, self.activation, usual)
        self._held = packed or (0 if weight is self.weight else weight.nbytes)
        self.weight = self.bias = self.norm = None  # what runs holds what it needs

    def adopt(self, other: Node) -> None:
        self._run, self._held = other._run, 0

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        residual = rows[1] if len(rows) > 1 else None
        return self._run(channels_last(rows[0]), residual if residual is None else channels_last(residual))

    @property
    def work(self) -> int:
        return self.output.shape[1] * self.output.shape[3] * self.products

    @property
    def weight_bytes(self) -> int:
        return self._held


def _folded(weight: torch.Tensor, bias: torch.Tensor | None, norm: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """`fold_batch_norm`, some output channels at a time: it makes float64 copies, which would be the plan's peak."""
    *vectors, eps = norm
    new_weight, new_bias = torch.empty_like(weight), torch.empty(len(weight), dtype=weight.dtype, device=weight.device)
    each = max(1, (1 << 18) // weight[0].numel())
    for i in range(0, len(weight), each):
        part = slice(i, i + each)
        known = (None if t is None else t[part] for t in (bias, *vectors))
        new_weight[part], new_bias[part] = fold_batch_norm(weight[part], *known, eps)
    return new_weight, new_bias


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
        return self.output.bytes_of(max(extra, 0))


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
