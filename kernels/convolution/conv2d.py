"""Convolution with bias, activation and residual, channels-last, and batch norm folded into its weights."""

import torch
import torch.nn.functional as F
from xrk.kernels import dispatch, launch
from xrk.kernels.arguments import (
    check_channels_last,
    check_choice,
    check_map,
    check_parameter,
    check_positive,
    check_tensor,
    compute_dtype,
)
from xrk.kernels.normalization import group_norm_summarise
from xrk.kernels.operators import operator

ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu", "sigmoid", None)

dispatch.register(
    "conv2d",
    cpu=dispatch.Torch("oneDNN's convolution, the epilogue in place on its output"),
    cuda=dispatch.Torch("cuDNN's convolution, the epilogue in place on its output"),
)
# The same operator where `launch.CONV2D_IN_TRITON` says so: 1 <-> C channels, and few.
dispatch.register(
    "conv2d_few_channels",
    cpu=dispatch.Torch("oneDNN's convolution, the epilogue in place on its output"),
    cuda=dispatch.Triton("xrk.kernels.convolution.triton_conv2d"),
)


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    add_first: bool = False,
    summaries: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Convolves, adds the bias, activates and adds a residual.

        y[b, o, i, j] = bias[o] + sum_{c, u, v} weight[o, c, u, v] * x[b, c, i s + u d - p, j s + v d - p]
        out = act(y) + residual, or act(y + residual) with add_first

    with stride s, dilation d and p zeros around the map.

    x: (B, C, H, W) of float16, bfloat16, float32 or float64, in channels_last memory format.
    weight: (O, C / groups, K, L) of x's dtype or float32.  bias: (O), likewise, or None.
    residual: of the output's shape and x's dtype, in channels_last memory format, or None.
    activation: "relu", "leaky_relu" (with negative_slope), "silu", "gelu" (with erf), "sigmoid" or None.
    summaries: None, or a number of groups G, a divisor of O: the output is summarised while it is at hand.
    Returns (B, O, H', W') of x's dtype, in channels_last memory format, H' = (H + 2 p - d (K - 1) - 1) // s + 1; with
    summaries, that and (B, G, 3) of float64, `group_norm_summarise(y, G)`, for `group_norm_apply`. Convolution, norm
    and activation then read and write each map once. `layer_norm` needs no such summary: its sums are over one pixel's
    channels, which its program holds together anyway, so that it reads and writes each value once, 2 s bytes at s bytes
    a value; mean and deviation of each pixel in float32 would add 16 bytes of a pixel and save none.
    Raises TypeError for another kind or dtype, ValueError for another shape, layout, device, number or activation.
    """
    _check(x, weight, bias, residual, stride, padding, dilation, groups, activation)
    numbers = (stride, padding, dilation, groups, activation, negative_slope, add_first)
    if summaries is None:
        return torch.ops.xrk.conv2d(x, weight, bias, residual, *numbers)
    _check_summaries(summaries, weight)
    return torch.ops.xrk.conv2d_summarised(x, weight, bias, residual, *numbers, summaries)


def conv2d_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    add_first: bool = False,
) -> torch.Tensor:
    """`conv2d` in plain torch, in float32 (float64 for float64) throughout."""
    dtype = compute_dtype(x.dtype)
    x_, weight_, bias_, residual_ = (None if t is None else t.to(dtype) for t in (x, weight, bias, residual))
    y = F.conv2d(x_, weight_, bias_, stride, padding, dilation, groups)
    if residual_ is not None and add_first:
        y = y + residual_
    y = _activate(y, activation, negative_slope)
    if residual_ is not None and not add_first:
        y = y + residual_
    return _as_channels_last(y.to(x.dtype))


def fold_batch_norm(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and bias of the one convolution that equals a convolution followed by batch norm in inference.

        weight' = weight * gamma / sqrt(var + eps),   bias' = (bias - mean) * gamma / sqrt(var + eps) + beta

    weight: (O, ...).  bias, mean, var, gamma, beta: (O); bias, gamma and beta may be None (0, 1, 0).
    Computed in float64, returned in weight's dtype. Raises TypeError or ValueError for another kind or shape.
    Ioffe, Szegedy 2015, arXiv 1502.03167.
    """
    check_tensor(weight, "weight")
    if weight.ndim < 1:
        raise ValueError("weight has shape (); expected (O, ...)")
    check_positive(eps, "eps")
    size = (weight.shape[0],)
    for name, vector in (("bias", bias), ("mean", mean), ("var", var), ("gamma", gamma), ("beta", beta)):
        if vector is None and name in ("bias", "gamma", "beta"):
            continue
        check_tensor(vector, name)
        if tuple(vector.shape) != size:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}; expected {size}")
    scale = torch.rsqrt(var.double() + eps)
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() if bias is None else bias.double() - mean.double()
    shift = shift * scale
    if beta is not None:
        shift = shift + beta.double()
    folded = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return folded.to(weight.dtype), shift.to(weight.dtype)


def _activate(y: torch.Tensor, activation: str | None, negative_slope: float, inplace: bool = False) -> torch.Tensor:
    if activation == "relu":
        return F.relu(y, inplace)
    if activation == "leaky_relu":
        return F.leaky_relu(y, negative_slope, inplace)
    if activation == "silu":
        return F.silu(y, inplace)
    if activation == "gelu":
        return F.gelu(y)
    if activation == "sigmoid":
        return y.sigmoid_() if inplace else y.sigmoid()
    return y


def _as_channels_last(y: torch.Tensor) -> torch.Tensor:
    """`y` itself where its strides are those of channels_last in every dimension, else a copy that has them."""
    channels, height, width = y.shape[1:]
    if y.stride() == (height * width * channels, 1, width * channels, channels):
        return y
    return torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last).copy_(y)


def _output_shape(
    x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int, dilation: int
) -> tuple[int, int, int, int]:
    height, width = (
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel in zip(x.shape[2:], weight.shape[2:], strict=True)
    )
    return x.shape[0], weight.shape[0], height, width


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    activation: str | None,
) -> None:
    check_map(x, "x", "B C H W")
    check_channels_last(x, "x")
    for name, value, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
        ("groups", groups, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} is a {type(value).__name__}; expected an int")
        if value < least:
            raise ValueError(f"{name} is {value}; expected {least} or more")
    channels = x.shape[1]
    if channels % groups:
        raise ValueError(f"groups is {groups}; expected a divisor of x's channels, {channels}")
    check_map(weight, "weight", "O I K L")
    if weight.shape[1] != channels // groups or weight.shape[0] % groups:
        expected = f"(O, {channels // groups}, K, L), O a multiple of {groups}"
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected {expected}")
    check_parameter(weight, "weight", weight.shape, x)
    check_parameter(bias, "bias", (weight.shape[0],), x)
    shape = _output_shape(x, weight, stride, padding, dilation)
    if shape[2] < 1 or shape[3] < 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected a map of the kernel's size at least, "
            f"{tuple(weight.shape[2:])} at dilation {dilation} with padding {padding}"
        )
    if residual is not None:
        check_tensor(residual, "residual")
        if tuple(residual.shape) != shape:
            raise ValueError(f"residual has shape {tuple(residual.shape)}; expected the output's, {shape}")
        check_parameter(residual, "residual", shape, x)
        if residual.dtype != x.dtype:
            raise TypeError(f"residual has dtype {str(residual.dtype).removeprefix('torch.')}; expected x's")
        check_channels_last(residual, "residual")
    check_choice(activation, "activation", ACTIVATIONS)


def _check_summaries(summaries: int, weight: torch.Tensor) -> None:
    if not isinstance(summaries, int) or isinstance(summaries, bool):
        raise TypeError(f"summaries is a {type(summaries).__name__}; expected an int or None")
    if summaries < 1 or weight.shape[0] % summaries:
        raise ValueError(f"summaries is {summaries}; expected a divisor of the output's channels, {weight.shape[0]}")


@operator("xrk::conv2d", forward_only=True)
def _conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    activation: str | None,
    negative_slope: float,
    add_first: bool,
) -> torch.Tensor:
    _check(x, weight, bias, residual, stride, padding, dilation, groups, activation)
    numbers = (stride, padding, dilation, groups)
    return _convolve(x, weight, bias, residual, numbers, activation, negative_slope, add_first, None)[0]


@operator("xrk::conv2d_summarised", forward_only=True)
def _conv2d_summarised(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    activation: str | None,
    negative_slope: float,
    add_first: bool,
    summaries: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, weight, bias, residual, stride, padding, dilation, groups, activation)
    _check_summaries(summaries, weight)
    numbers = (stride, padding, dilation, groups)
    y, state = _convolve(x, weight, bias, residual, numbers, activation, negative_slope, add_first, summaries)
    return y, group_norm_summarise(y, summaries) if state is None else state


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    numbers: tuple[int, int, int, int],
    activation: str | None,
    negative_slope: float,
    add_first: bool,
    summaries: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output, and its summary where the kernel makes it on the way and it was asked for."""
    kernel, dtype = tuple(weight.shape[2:]), str(x.dtype).removeprefix("torch.")
    few = launch.conv2d_in_triton(x.shape[1], weight.shape[0], kernel, numbers, dtype)
    path, code = dispatch.take("conv2d_few_channels" if few else "conv2d", x.device, x.dtype)
    if path == "reference":
        y = conv2d_reference(x, weight, bias, residual, *numbers, activation, negative_slope, add_first)
        return y, None
    if path == "triton":
        size = (x.shape[0], weight.shape[0], *x.shape[2:])
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        parts = code.conv2d(
            x, weight, bias, residual, activation, negative_slope, add_first, y, summaries is not None
        )
        return y, None if parts is None else code.merge(parts, summaries)
    bias = None if bias is None else bias.to(x.dtype)
    y = _as_channels_last(F.conv2d(x, weight.to(x.dtype), bias, *numbers))
    if residual is not None and add_first:
        y += residual
    if y.dtype == torch.float16 and activation in ("silu", "gelu"):
        # A sum below float16's range is -inf here, of which both make NaN; their value there is 0.
        y.clamp_(min=torch.finfo(y.dtype).min)
    y = _activate(y, activation, negative_slope, inplace=True)
    if residual is not None and not add_first:
        y += residual
    return y, None


@_conv2d.register_fake
def _(x, weight, bias, residual, stride, padding, dilation, groups, activation, negative_slope, add_first):
    shape = _output_shape(x, weight, stride, padding, dilation)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@_conv2d_summarised.register_fake
def _(x, weight, bias, residual, stride, padding, dilation, groups, activation, negative_slope, add_first, summaries):
    shape = _output_shape(x, weight, stride, padding, dilation)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, torch.empty(shape[0], summaries, 3, dtype=torch.float64, device=x.device)
