"""The gradients of the scans, for training and adaptation: states are not kept but made again, chunk by chunk.

    gradient of out ── C++ or Triton: back along the scan ── of u, dt, A, B, C ── torch's products ── of the projections

Importing this registers them with torch's autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import xrk.kernels.scan.selective_scan  # noqa: F401  one of the operators
from torch import Tensor
from xrk.kernels import dispatch
from xrk.kernels.arguments import compute_dtype
from xrk.kernels.scan.reference import scan_gradients_reference
from xrk.kernels.scan.selective_scan_2d import arrays, take

dispatch.register(
    "selective_scan_backward",
    cpu=dispatch.Native("selective_scan_backward"),
    cuda=dispatch.Triton("xrk.kernels.scan.triton_selective_scan_backward"),
)


def scan_gradients(
    out_grad: Tensor,
    state_grad: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    bias: Tensor | None,
    softplus: bool,
    order: Tensor | None,
    state: Tensor | None,
    u_grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Back along `xrk.kernels.selective_scan` without its D and z, channels last.

    out_grad, state_grad: of out and of the last state (None: zero). u, delta, u_grad: (batch, L, D); B, C:
    (batch, G, L, N); state: (batch, D, N), what the scan starts from (None: zero). All float32, or all float64.
    Adds to u_grad, which is contiguous; returns the gradients of delta, A, B, C and of the start.
    """
    path, code = take("selective_scan_backward", u)
    if path == "triton":
        return code.scan_gradients(out_grad, state_grad, u, delta, A, B, C, bias, softplus, order, state, u_grad)
    if path == "reference":
        return scan_gradients_reference(out_grad, state_grad, u, delta, A, B, C, bias, softplus, order, state, u_grad)
    dtype = u.dtype
    zero = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    start_grad = zero.clone() if state_grad is None else state_grad.clone(memory_format=torch.contiguous_format)
    grads = [torch.empty(t.shape, dtype=dtype) for t in (delta, A, B, C)]
    code(
        *arrays(dtype, out_grad, u, delta, A, B, C),
        None if bias is None else arrays(dtype, bias)[0],
        softplus,
        None if order is None else order.contiguous().numpy(),
        arrays(dtype, zero if state is None else state)[0],
        start_grad.numpy(),
        u_grad.numpy(),
        *(grad.numpy() for grad in grads),
        torch.get_num_threads(),
    )
    return *grads, start_grad


# --- selective_scan_2d ------------------------------------------------------------------------------------------------

_WEIGHTS = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
_SCHEMA = ", ".join(f"Tensor {name}" for name in ("out_grad", "x", *_WEIGHTS))


@torch.library.custom_op(
    "xrk::selective_scan_2d_backward",
    mutates_args=(),
    schema=f"({_SCHEMA}) -> ({', '.join(['Tensor'] * 6)})",
)
def _selective_scan_2d_backward(out_grad, x, *weights):
    dtype = compute_dtype(x.dtype)
    projections, dt_weights, dt_biases, a_logs, skips = (w.to(dtype) for w in weights)
    batch, height, width, channels = x.shape
    rank, states = dt_weights.shape[2], a_logs.shape[1]
    values, out_grad = (t.to(dtype).contiguous().reshape(batch, -1, channels) for t in (x, out_grad))
    a_logs = a_logs.reshape(4, channels, states)
    x_grad = out_grad * skips.reshape(4, channels).sum(0)
    grads = [torch.empty_like(w) for w in (projections, dt_weights, dt_biases, a_logs)]
    flat, flat_grad = values.reshape(-1, channels), x_grad.reshape(-1, channels)
    for k in range(4):
        low, b, c = (flat @ part.T for part in projections[k].split([rank, states, states]))
        A = -torch.exp(a_logs[k])
        delta_grad, A_grad, B_grad, C_grad, _ = scan_gradients(
            out_grad,
            None,
            values,
            (low @ dt_weights[k].T).reshape(values.shape),
            A,
            b.reshape(batch, 1, -1, states),
            c.reshape(batch, 1, -1, states),
            dt_biases[k],
            True,
            _raster(k, height, width, x.device),
            None,
            x_grad,
        )
        delta_grad = delta_grad.reshape(-1, channels)
        rows = torch.cat([delta_grad @ dt_weights[k], B_grad.reshape(-1, states), C_grad.reshape(-1, states)], 1)
        flat_grad.addmm_(rows, projections[k])
        for grad, of_k in zip(grads, (rows.T @ flat, delta_grad.T @ low, delta_grad.sum(0), A_grad * A), strict=True):
            grad[k] = of_k
    skip_grad = (out_grad * values).sum((0, 1)).repeat(4)
    grads[3] = grads[3].reshape(-1, states)
    whole = (x_grad.reshape(x.shape), *grads, skip_grad)
    return tuple(grad.to(t.dtype) for grad, t in zip(whole, (x, *weights), strict=True))


@_selective_scan_2d_backward.register_fake
def _(out_grad, *inputs):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs)


def _raster(k: int, height: int, width: int, device: torch.device) -> Tensor | None:
    """The pixels in the order in which direction k visits them."""
    if k == 0:
        return None
    order = torch.arange(height * width, device=device)
    if k % 2:
        order = order.reshape(height, width).T.flatten()
    return order.flip(0) if k > 1 else order


def _keep_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _back_2d(ctx, out_grad):
    return torch.ops.xrk.selective_scan_2d_backward(out_grad, *ctx.saved_tensors)


torch.library.register_autograd("xrk::selective_scan_2d", _back_2d, setup_context=_keep_inputs)


# --- selective_scan ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("xrk::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
    out_grad: Tensor,
    state_grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, empty for what is None."""
    dtype = compute_dtype(u.dtype)
    batch, _, length = u.shape
    z_grad, out_grad = None, out_grad.to(dtype)
    if z is not None:
        gate, share = z.to(dtype), torch.sigmoid(z.to(dtype))
        out, _ = torch.ops.xrk.selective_scan(
            u, delta, A, B, C, D, None, delta_bias, delta_softplus, order, initial_state
        )
        z_grad = out_grad * out.to(dtype) * share * (1 + gate * (1 - share))
        out_grad = out_grad * F.silu(gate)
    out_grad, values, steps = (t.to(dtype).transpose(1, 2).contiguous() for t in (out_grad, u, delta))
    rows = [t.to(dtype).reshape(batch, -1, A.shape[1], length).transpose(2, 3).contiguous() for t in (B, C)]
    u_grad = torch.zeros_like(out_grad) if D is None else out_grad * D.to(dtype)
    bias, state = (None if t is None else t.to(dtype) for t in (delta_bias, initial_state))
    delta_grad, A_grad, B_grad, C_grad, start_grad = scan_gradients(
        out_grad, state_grad.to(dtype), values, steps, A.to(dtype), *rows, bias, delta_softplus, order, state, u_grad
    )
    whole = (
        u_grad.transpose(1, 2),
        delta_grad.transpose(1, 2),
        A_grad,
        *(grad.transpose(2, 3).reshape(t.shape) for grad, t in ((B_grad, B), (C_grad, C))),
        None if D is None else (out_grad * values).sum((0, 1)),
        z_grad,
        None if delta_bias is None else delta_grad.sum((0, 1)),
        None if initial_state is None else start_grad,
    )
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    given = zip(whole, inputs, strict=True)
    return tuple(u.new_empty(0) if t is None else grad.to(t.dtype).contiguous() for grad, t in given)


@_selective_scan_backward.register_fake
def _(out_grad, state_grad, u, delta, A, B, C, D, z, delta_bias, delta_softplus, order, initial_state):
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return tuple(u.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs)


def _keep_sequence(ctx, inputs, output) -> None:
    *first, softplus, order, state = inputs
    ctx.save_for_backward(*first, order, state)
    ctx.softplus = softplus


def _back_1d(ctx, out_grad, state_grad):
    *first, order, state = ctx.saved_tensors
    *grads, start_grad = torch.ops.xrk.selective_scan_backward(out_grad, state_grad, *first, ctx.softplus, order, state)
    given = (None if t is None else grad for t, grad in zip(first, grads, strict=True))
    return *given, None, None, None if state is None else start_grad


torch.library.register_autograd("xrk::selective_scan", _back_1d, setup_context=_keep_sequence)
