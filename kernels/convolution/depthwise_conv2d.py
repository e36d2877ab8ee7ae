"""Depthwise convolution with bias and SiLU in one pass, channels-last."""

import torch
import torch.nn.functional as F
from xrk.kernels import dispatch
from xrk.kernels.arguments import (
    check_channels_last,
    check_choice,
    check_map,
    check_parameter,
    check_tensor,
    compute_dtype,
)
from xrk.kernels.operators import operator

dispatch.register(
    "depthwise_conv2d",
    cpu=dispatch.Native("depthwise_conv2d"),
    cuda=dispatch.Triton("xrk.kernels.convolution.triton_depthwise_conv2d"),
)


def depthwise_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dilation: int = 1,
    activation: str | None = None,
) -> torch.Tensor:
    """Convolves each channel with a kernel of its own, zeros around the map, then SiLU where asked for.

        y[b, c, i, j] = act(bias[c] + sum_{u, v} weight[c, 0, u, v] * x[b, c, i + (u - r) d, j + (v - r) d])

    with r = (K - 1) / 2 and dilation d; the output has the input's size. Computed in float32 (float64 for float64).

    x: (B, C, H, W) of float16, bfloat16, float32 or float64, in channels_last memory format (a band of rows of one
        image is).
    weight: (C, 1, K, K), K = 3 or 5, of x's dtype or float32.  bias: (C), likewise, or None.
    dilation: 1 or 2.  activation: "silu" or None.
    Returns (B, C, H, W) of x's dtype, in channels_last memory format.
    Raises TypeError for another kind or dtype, ValueError for another shape, layout, device, dilation or activation.
    """
    _check(x, weight, bias, dilation, activation)
    return torch.ops.xrk.depthwise_conv2d(x, weight, bias, dilation, activation)


def depthwise_conv2d_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dilation: int = 1,
    activation: str | None = None,
) -> torch.Tensor:
    """`depthwise_conv2d` in plain torch."""
    dtype = compute_dtype(x.dtype)
    padding = (weight.shape[-1] - 1) // 2 * dilation
    bias = None if bias is None else bias.to(dtype)
    y = F.conv2d(x.to(dtype), weight.to(dtype), bias, padding=padding, dilation=dilation, groups=x.shape[1])
    y = F.silu(y) if activation == "silu" else y
    return _channels_last(x).copy_(y)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    """An empty map like x, with the strides of channels_last also where a size of 1 leaves them open."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _check(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int, activation: str | None
) -> None:
    check_map(x, "x", "B C H W")
    check_channels_last(x, "x")
    check_tensor(weight, "weight")
    kernel = weight.shape[-1] if weight.ndim == 4 else 0
    if kernel not in (3, 5) or tuple(weight.shape) != (x.shape[1], 1, kernel, kernel):
        c = x.shape[1]
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected ({c}, 1, 3, 3) or ({c}, 1, 5, 5)")
    check_parameter(weight, "weight", weight.shape, x)
    check_parameter(bias, "bias", (x.shape[1],), x)
    check_choice(dilation, "dilation", (1, 2))
    check_choice(activation, "activation", ("silu", None))


@operator("xrk::depthwise_conv2d")
def _depthwise_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int, activation: str | None
) -> torch.Tensor:
    _check(x, weight, bias, dilation, activation)
    path, code = dispatch.take("depthwise_conv2d", x.device, x.dtype)
    if path == "reference":
        return depthwise_conv2d_reference(x, weight, bias, dilation, activation)
    out = _channels_last(x)
    if path == "triton":
        code.depthwise_conv2d(x, weight, bias, dilation, activation == "silu", out)
        return out
    batch, channels, height, width = x.shape
    kernel = weight.shape[-1]
    padding = dispatch.native().CHANNEL_PADDING
    padded = -(-channels // padding) * padding
    # One row of channels for each tap, then the bias, with zeros beyond the channels.
    taps = torch.zeros(kernel * kernel + 1, padded, dtype=compute_dtype(x.dtype))
    taps[:-1, :channels] = weight.reshape(channels, -1).T
    if bias is not None:
        taps[-1, :channels] = bias
    code(
        x=x.data_ptr(),
        weight=taps.data_ptr(),
        bias=taps[-1].data_ptr(),
        out=out.data_ptr(),
        images=batch,
        height=height,
        width=width,
        channels=channels,
        padded_channels=padded,
        kernel=kernel,
        dilation=dilation,
        silu=activation == "silu",
        dtype=str(x.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )
    return out


@_depthwise_conv2d.register_fake
def _(x, weight, bias, dilation, activation):
    return _channels_last(x)


def _keep(ctx, inputs, output) -> None:
    x, weight, bias, ctx.dilation, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias)


def _back(ctx, out_grad):
    """What was before the activation is made again; a map's gradient is this convolution with the kernel turned."""
    x, weight, bias = ctx.saved_tensors
    dtype = compute_dtype(x.dtype)
    dilation, padding = ctx.dilation, (weight.shape[-1] - 1) // 2 * ctx.dilation
    y_grad = out_grad.to(dtype)
    if ctx.activation == "silu":
        y = torch.ops.xrk.depthwise_conv2d(x, weight, bias, dilation, None).to(dtype)
        y_grad = torch.ops.aten.silu_backward(y_grad, y)
    y_grad = y_grad.contiguous(memory_format=torch.channels_last)
    turned = weight.to(dtype).flip(2, 3)
    x_grad = torch.ops.xrk.depthwise_conv2d(y_grad, turned, None, dilation, None)
    _, weight_grad, _ = torch.ops.aten.convolution_backward(
        y_grad,
        x.to(dtype),
        weight.to(dtype),
        None,
        [1, 1],
        [padding, padding],
        [dilation, dilation],
        False,
        [0, 0],
        x.shape[1],
        [False, True, False],
    )
    bias_grad = None if bias is None else y_grad.sum((0, 2, 3)).to(bias.dtype)
    return x_grad.to(x.dtype), weight_grad.to(weight.dtype), bias_grad, None, None


_depthwise_conv2d.register_autograd(_back, setup_context=_keep)
