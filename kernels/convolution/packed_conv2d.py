"""Convolution of bands of rows on a CPU, its weights packed once for many bands: bias, sum and ReLU inside."""

from collections.abc import Callable, Sequence

import torch
from xrk.kernels import dispatch

__all__ = ["PackedConv2d", "PackedDoubledConv2d", "packed_values"]


class PackedConv2d:
    """y = act(conv(rows) + bias + residual) in float32 on a CPU.

        conv[o, i, j] = sum_{c, u, v} weight[o, c, u, v] * rows[c, i s + u d, j t + v e - left]

    with strides (s, t), dilations (d, e) and columns of zeros on both sides; there are no rows of zeros.
    Every value is summed in the same order, however many rows there are at a time and whatever the threads; only where
    the kernel is 3 x 3 and `transformed`, an odd number of rows above it in the band may change its last bits.

    Args:
        weight: (O, C, K, L) of float32, with any strides.
        bias: (O) of float32, or None.
        padding: columns of zeros to the left and to the right.
        activation: "relu" or None.
        transformed: products in Winograd's F(2 x 2, 3 x 3): 16 rather than 36 for four pixels, by weights of 16/9 of
            the bytes (Lavin, Gray 2015, arXiv 1509.09308). Only for 3 x 3 kernels without stride and dilation.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        activation: str | None = None,
        transformed: bool = False,
    ) -> None:
        module = dispatch.native()
        self._run = module.packed_conv2d
        self.outputs, self.channels, *self.kernel = weight.shape
        self.stride, self.padding, self.dilation = tuple(stride), tuple(padding), tuple(dilation)
        self.relu, self.transformed = activation == "relu", transformed
        self._weight = _packed(weight, transform if transformed else None)
        self._bias = _packed_bias(bias, self.outputs)
        self._extent = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]

    def __call__(
        self, rows: torch.Tensor, residual: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The result for rows (1, C, h, W), channels-last; residual and out have its shape and channels side by side.

        ``out``: memory for it, with any strides of rows and columns; it may be the residual's own.
        """
        _, channels, height, width = rows.shape
        rows = _dense(rows)
        lines = (height - self._extent[0]) // self.stride[0] + 1
        columns = (width + sum(self.padding) - self._extent[1]) // self.stride[1] + 1
        if out is None:
            out = torch.empty(1, lines, columns, self.outputs).permute(0, 3, 1, 2)
        beside = out if residual is None else residual
        self._run(
            rows.data_ptr(),
            self._weight.data_ptr(),
            self._bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            out.data_ptr(),
            channels,
            self.outputs,
            width,
            lines,
            columns,
            self.kernel,
            self.stride,
            self.dilation,
            self.padding[0],
            rows.stride(2),
            out.stride()[2:],
            beside.stride()[2:],
            self.relu,
            self.transformed,
            torch.get_num_threads(),
        )
        return out


class PackedDoubledConv2d:
    """y = act(conv(cat(double(x), skip)) + bias): 3 x 3, zeros around both, x doubled by nearest neighbours.

    In Winograd's F(2 x 2, 3 x 3), as `PackedConv2d` does it. The four pixels that each value of x becomes make 7 of the
    16 products vanish: 9 of the doubled map's 36 are left for four pixels of the result. Float32 on a CPU.

    Args:
        weight: (O, C + D, 3, 3) of float32; its input channels are x's C from ``first`` on, all others skip's D.
        bias: (O) of float32, or None.
        first, channels: where x's channels begin, and how many they are.
        activation: "relu" or None.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, first: int, channels: int, activation: str | None = None
    ) -> None:
        self._run = dispatch.native().packed_doubled_conv2d
        self.outputs, self.channels, self.relu = weight.shape[0], channels, activation == "relu"
        after = first + channels
        self._doubled = _packed(weight[:, first:after], transform_doubled)
        self._beside = None
        if weight.shape[1] > channels:
            self._beside = _packed(torch.cat([weight[:, :first], weight[:, after:]], 1), transform)
        self._bias = _packed_bias(bias, self.outputs)

    def __call__(self, x: torch.Tensor, skip: torch.Tensor | None, odd: bool, out: torch.Tensor) -> torch.Tensor:
        """Rows [r, r + h) of the result, into ``out`` (1, O, h, 2 W), channels side by side.

        x: (1, C, n, W), channels-last, from row (r - 1) // 2 to (r + h) // 2, zeros where these are beyond the map.
        skip: (1, D, h + 2, 2 W), likewise, from row r - 1 on, or None.
        odd: whether r is.
        """
        x, beside = _dense(x), None if skip is None else _dense(skip)
        self._run(
            x.data_ptr(),
            self._doubled.data_ptr(),
            0 if beside is None else beside.data_ptr(),
            0 if beside is None else self._beside.data_ptr(),
            self._bias.data_ptr(),
            out.data_ptr(),
            self.channels,
            0 if beside is None else beside.shape[1],
            self.outputs,
            x.shape[2:],
            out.shape[2],
            int(odd),
            x.stride(2),
            0 if beside is None else beside.stride(2),
            out.stride()[2:],
            self.relu,
            torch.get_num_threads(),
        )
        return out


def _packed(weight: torch.Tensor, prepare: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
    """(O, C, K, L) -> (panel of outputs, tap, channel, output of the panel): in the order in which they are read."""
    module, made = dispatch.native(), None
    if prepare is None and len(weight) <= module.CONV_FEW:
        return weight.permute(0, 2, 3, 1).contiguous()
    panel = module.CONV_PANEL
    for i, part in enumerate(weight.split(panel)):
        part = part if prepare is None else prepare(part)
        if made is None:
            made = torch.zeros(-(-len(weight) // panel), *part.shape[2:], part.shape[1], panel)
        made[i, ..., : len(part)].copy_(part.permute(2, 3, 1, 0))
    return made


def _packed_bias(bias: torch.Tensor | None, outputs: int) -> torch.Tensor:
    panel = dispatch.native().CONV_PANEL
    made = torch.zeros(-(-outputs // panel) * panel)
    if bias is not None:
        made[:outputs] = bias
    return made


def _dense(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where its pixels follow each other, else a copy that is channels-last."""
    _, channels, height, width = x.shape
    near = (channels == 1 or x.stride(1) == 1) and (width == 1 or x.stride(3) == channels)
    if near and (height == 1 or x.stride(2) >= channels * width):
        return x
    return torch.empty(1, height, width, channels).permute(0, 3, 1, 2).copy_(x)


def transform(weight: torch.Tensor) -> torch.Tensor:
    """(O, C, 3, 3) -> (O, C, 4, 4): G w G^T, in float64 until the end."""
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    return (g @ weight.double() @ g.T).to(weight.dtype)


def transform_doubled(weight: torch.Tensor) -> torch.Tensor:
    """(O, C, 3, 3) -> (O, C, 3, 3): `transform` without the third row and column, twice the second of each."""
    g = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 1]], dtype=torch.float64)
    return (g @ weight.double() @ g.T).to(weight.dtype)


def packed_values(weight: Sequence[int], transformed: bool = False, panels: bool = False) -> int:
    """Values of the packed weights and bias for a weight of this shape.

    ``transformed``: as `PackedConv2d` has it. ``panels``: few outputs lie in panels too, as in `PackedDoubledConv2d`.
    """
    outputs, channels, height, width = weight
    module = dispatch.native()
    padded = -(-outputs // module.CONV_PANEL) * module.CONV_PANEL
    few = outputs <= module.CONV_FEW and not transformed and not panels
    return (outputs if few else padded) * channels * (16 if transformed else height * width) + padded
