"""Layer normalisation over the channels of each pixel, with the gate of a state-space block."""

import torch
import torch.nn.functional as F
from xrk.kernels import dispatch
from xrk.kernels.arguments import check_like, check_map, check_parameter, check_positive, compute_dtype
from xrk.kernels.operators import operator

dispatch.register(
    "layer_norm",
    cpu=dispatch.Native("layer_norm"),
    cuda=dispatch.Triton("xrk.kernels.normalization.triton_layer_norm"),
)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Normalises each pixel's channels, then multiplies by SiLU(gate).

        y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias,   out = y * gate / (1 + exp(-gate))

    mean and var (biased) are over the last dimension. Computed in float32 (float64 for float64) from deviations from
    the first channel, so that a large common mean costs no digits.

    x: (..., C) of float16, bfloat16, float32 or float64; C contiguous. Other strides are free: half of a projection's
        output is taken as it lies, as long as its leading dimensions are evenly spaced; otherwise it is copied.
    weight, bias: (C) of x's dtype or float32, or None.
    gate: of x's shape, dtype and device, C contiguous, or None.
    Returns a contiguous tensor of x's shape and dtype.
    Raises TypeError for another kind or dtype, ValueError for another shape, stride, device or an eps that is not
    positive.
    Ba, Kiros, Hinton 2016, arXiv 1607.06450; the gate as in VMamba's SS2D, Liu et al. 2024, arXiv 2401.10166.
    """
    _check(x, weight, bias, gate, eps)
    for name, tensor in (("x", x), ("gate", gate)):
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            strides = tuple(tensor.stride())
            raise ValueError(f"{name} has strides {strides}; expected the last dimension, C, to be contiguous")
    return torch.ops.xrk.layer_norm(x, weight, bias, gate, eps)


def layer_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`layer_norm` in plain torch."""
    dtype = compute_dtype(x.dtype)
    d = x.to(dtype) - x[..., :1].to(dtype)
    d = d - d.mean(-1, keepdim=True)
    y = d * torch.rsqrt(d.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    if gate is not None:
        y = y * F.silu(gate.to(dtype))
    return y.to(x.dtype).contiguous()


def _check(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    eps: float,
) -> None:
    check_map(x, "x", "... C")
    check_parameter(weight, "weight", x.shape[-1:], x)
    check_parameter(bias, "bias", x.shape[-1:], x)
    check_like(gate, "gate", x)
    check_positive(eps, "eps")


@operator("xrk::layer_norm")
def _layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, gate: torch.Tensor | None, eps: float
) -> torch.Tensor:
    _check(x, weight, bias, gate, eps)
    path, code = dispatch.take("layer_norm", x.device, x.dtype)
    if path == "reference":
        return layer_norm_reference(x, weight, bias, gate, eps)
    rows, stride = evenly_spaced_rows(x)
    gate_rows, gate_stride = (None, 0) if gate is None else evenly_spaced_rows(gate)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if path == "triton":
        weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
        code.layer_norm(rows, stride, weight, bias, gate_rows, gate_stride, eps, out)
        return out
    dtype = compute_dtype(x.dtype)
    weight, bias = (None if p is None else p.to(dtype).contiguous() for p in (weight, bias))
    code(
        x=rows.data_ptr(),
        weight=0 if weight is None else weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        gate=0 if gate_rows is None else gate_rows.data_ptr(),
        out=out.data_ptr(),
        pixels=x.numel() // x.shape[-1],
        channels=x.shape[-1],
        x_stride=stride,
        gate_stride=gate_stride,
        eps=eps,
        dtype=str(x.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )
    return out


@_layer_norm.register_fake
def _(x, weight, bias, gate, eps):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _back(ctx, out_grad):
    """By torch's own layer normalisation, made again."""
    x, weight, bias, gate = ctx.saved_tensors
    dtype = compute_dtype(x.dtype)
    values, w, b, g = (None if t is None else t.to(dtype) for t in (x, weight, bias, gate))
    y_grad, shape = out_grad.to(dtype), [x.shape[-1]]
    y, mean, scale = torch.native_layer_norm(values, shape, w, b, ctx.eps)
    gate_grad = None
    if g is not None:
        gate_grad = torch.ops.aten.silu_backward(y_grad * y, g).to(gate.dtype)
        y_grad = y_grad * F.silu(g)
    wanted = [True, weight is not None, bias is not None]
    grads = torch.ops.aten.native_layer_norm_backward(y_grad, values, shape, mean, scale, w, b, wanted)
    given = (None if t is None else grad.to(t.dtype) for grad, t in zip(grads, (x, weight, bias), strict=True))
    return *given, gate_grad, None


_layer_norm.register_autograd(_back, setup_context=_keep)


def evenly_spaced_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A tensor with x's values, whose rows (last dimension) start evenly spaced, and their spacing in values.

    It is `x` itself where that is so, else a contiguous copy.
    """
    channels = x.shape[-1]
    if channels > 1 and x.stride(-1) != 1:  # a plan may hold a whole map otherwise than the network would
        return x.contiguous(), channels
    spacing = None
    expected = 0
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if spacing is None:
            spacing = stride
        elif stride != expected:
            return x.contiguous(), channels
        expected = stride * size
    if spacing is None:
        return x, channels
    return x, spacing
