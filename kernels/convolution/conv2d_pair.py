"""Two 3x3 convolutions in a row, with what follows each, as one operator: the map between them need not be stored."""

import torch
from xrk.kernels import dispatch, launch
from xrk.kernels.arguments import check_channels_last, check_choice, check_map, check_parameter, check_tensor
from xrk.kernels.convolution.conv2d import ACTIVATIONS, conv2d, conv2d_reference
from xrk.kernels.operators import operator

dispatch.register(
    "conv2d_pair",
    cpu=dispatch.Torch("conv2d twice"),
    cuda=dispatch.Triton("xrk.kernels.convolution.triton_conv2d"),
)


def conv2d_pair(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    activation1: str | None = "relu",
    activation2: str | None = None,
    negative_slope: float = 0.01,
    add_first: bool = False,
) -> torch.Tensor:
    """Two 3x3 convolutions of stride 1 with zeros around each map, as `conv2d` twice with padding=1.

        out = act2(conv(act1(conv(x, weight1) + bias1), weight2) + bias2) + residual,
        or act2(... + residual) with add_first

    The map between them is rounded to x's dtype, as where it is stored.

    x: (B, C, H, W) of float16, bfloat16, float32 or float64, in channels_last memory format.
    weight1: (M, C, 3, 3), weight2: (O, M, 3, 3) of x's dtype or float32.  bias1: (M), bias2: (O), likewise, or None.
    residual: (B, O, H, W) of x's dtype, in channels_last memory format, or None.
    activation1, activation2: as `conv2d`'s, with one negative_slope for both.
    Returns (B, O, H, W) of x's dtype, in channels_last memory format.
    Raises TypeError for another kind or dtype, ValueError for another shape, layout, device or activation.
    """
    _check(x, weight1, bias1, weight2, bias2, residual, activation1, activation2)
    return torch.ops.xrk.conv2d_pair(
        x, weight1, bias1, weight2, bias2, residual, activation1, activation2, negative_slope, add_first
    )


def conv2d_pair_reference(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    activation1: str | None = "relu",
    activation2: str | None = None,
    negative_slope: float = 0.01,
    add_first: bool = False,
) -> torch.Tensor:
    """`conv2d_pair` in plain torch."""
    rest = (activation1, activation2, negative_slope, add_first)
    return _twice(conv2d_reference, x, weight1, bias1, weight2, bias2, residual, *rest)


def _twice(conv, x, weight1, bias1, weight2, bias2, residual, activation1, activation2, negative_slope, add_first):
    more = {"padding": 1, "negative_slope": negative_slope}
    between = conv(x, weight1, bias1, activation=activation1, **more)
    return conv(between, weight2, bias2, residual, activation=activation2, add_first=add_first, **more)


def _check(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation1: str | None,
    activation2: str | None,
) -> None:
    check_map(x, "x", "B C H W")
    check_channels_last(x, "x")
    channels = x.shape[1]
    for number, weight, bias in (("1", weight1, bias1), ("2", weight2, bias2)):
        check_tensor(weight, f"weight{number}")
        if weight.ndim != 4 or weight.shape[0] == 0 or tuple(weight.shape[1:]) != (channels, 3, 3):
            shape = tuple(weight.shape)
            raise ValueError(f"weight{number} has shape {shape}; expected ({'MO'[number == '2']}, {channels}, 3, 3)")
        check_parameter(weight, f"weight{number}", weight.shape, x)
        channels = weight.shape[0]
        check_parameter(bias, f"bias{number}", (channels,), x)
    if residual is not None:
        check_tensor(residual, "residual")
        shape = (x.shape[0], channels, *x.shape[2:])
        if tuple(residual.shape) != shape:
            raise ValueError(f"residual has shape {tuple(residual.shape)}; expected the output's, {shape}")
        check_parameter(residual, "residual", shape, x)
        if residual.dtype != x.dtype:
            raise TypeError(f"residual has dtype {str(residual.dtype).removeprefix('torch.')}; expected x's")
        check_channels_last(residual, "residual")
    check_choice(activation1, "activation1", ACTIVATIONS)
    check_choice(activation2, "activation2", ACTIVATIONS)


@operator("xrk::conv2d_pair", forward_only=True)
def _conv2d_pair(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation1: str | None,
    activation2: str | None,
    negative_slope: float,
    add_first: bool,
) -> torch.Tensor:
    _check(x, weight1, bias1, weight2, bias2, residual, activation1, activation2)
    channels = (x.shape[1], weight1.shape[0], weight2.shape[0])
    path, code = "torch", None
    if not x.is_cuda or launch.conv2d_pair_in_triton(channels, str(x.dtype).removeprefix("torch.")):
        path, code = dispatch.take("conv2d_pair", x.device, x.dtype)
    if path != "triton":
        conv = conv2d_reference if path == "reference" else conv2d
        return _twice(
            conv, x, weight1, bias1, weight2, bias2, residual, activation1, activation2, negative_slope, add_first
        )
    out = _empty(x, weight2)
    weights, biases, activations = (weight1, weight2), (bias1, bias2), (activation1, activation2)
    code.conv2d_pair(x, weights, biases, residual, activations, negative_slope, add_first, out)
    return out


def _empty(x: torch.Tensor, weight2: torch.Tensor) -> torch.Tensor:
    size = (x.shape[0], weight2.shape[0], *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@_conv2d_pair.register_fake
def _(x, weight1, bias1, weight2, bias2, residual, activation1, activation2, negative_slope, add_first):
    return _empty(x, weight2)
