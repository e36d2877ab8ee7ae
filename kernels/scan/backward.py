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
from xrk.kernels.operators import operator
from xrk.kernels.scan.reference import scan_gradients_reference
from xrk.kernels.scan.selective_scan_2d import arrays

_TRITON = dispatch.Triton("xrk.kernels.scan.triton_selective_scan_backward")
for _name in ("selective_scan_backward", "projected_scan_backward"):
    dispatch.register(_name, cpu=dispatch.Native(_name), cuda=_TRITON)


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
    path, code = dispatch.take("selective_scan_backward", u.device, u.dtype)
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


@operator(
    "xrk::selective_scan_2d_backward",
    forward_only=True,
    schema=f"({_SCHEMA}) -> ({', '.join(['Tensor'] * 6)})",
)
def _selective_scan_2d_backward(out_grad, x, *weights):
    stored, dtype = x.dtype, compute_dtype(x.dtype)
    projections, dt_weights, dt_biases, a_logs, skips = (w.to(dtype) for w in weights)
    batch, height, width, channels = x.shape
    states = a_logs.shape[1]
    a_logs = a_logs.reshape(4, channels, states)
    grads = [torch.empty_like(w) for w in (projections, dt_weights, dt_biases, a_logs)]
    x, out_grad = (t.to(dtype).contiguous() for t in (x, out_grad))
    skip = skips.reshape(4, channels).sum(0)
    skip_grad = (out_grad * x).sum((0, 1, 2)).repeat(4)
    x_grad = out_grad * skip
    for columns in (False, True):
        # Columns become rows once and for all: pixels of a column are a whole row of the image apart.
        values, given = (t.transpose(1, 2) if columns else t for t in (x, out_grad))
        values, given = (t.reshape(batch, -1, channels).contiguous() for t in (values, given))
        own = torch.zeros_like(values) if columns else x_grad.reshape(values.shape)
        for k in (1, 3) if columns else (0, 2):
            rows = values @ projections[k].T
            A = -torch.exp(a_logs[k])
            rows_grad, dt_weight_grad, bias_grad, A_grad = _direction_gradients(
                given, values, rows, dt_weights[k], dt_biases[k], A, k > 1, own
            )
            rows_grad = rows_grad.reshape(-1, rows.shape[-1])
            own.reshape(-1, channels).addmm_(rows_grad, projections[k])
            projection_grad = rows_grad.T @ values.reshape(-1, channels)
            whole = (projection_grad, dt_weight_grad, bias_grad, A_grad * A)
            for grad, of_k in zip(grads, whole, strict=True):
                grad[k] = of_k
        if columns:
            x_grad += own.reshape(batch, width, height, channels).transpose(1, 2)
        else:
            x_grad = own.reshape(x.shape)
    grads[3] = grads[3].reshape(-1, states)
    return x_grad.to(stored), *(g.to(w.dtype) for g, w in zip((*grads, skip_grad), weights, strict=True))


def _direction_gradients(
    out_grad: Tensor,
    values: Tensor,
    rows: Tensor,
    dt_weight: Tensor,
    bias: Tensor,
    A: Tensor,
    backwards: bool,
    values_grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Back along one direction: adds to values_grad, returns the gradients of rows, dt_weight, bias and A.

    values: (batch, L, D); rows, the projections of them: (batch, L, R + 2N), the low-rank dt, B and C.
    """
    path, code = dispatch.take("projected_scan_backward", values.device, values.dtype)
    if path == "native":
        grads = [torch.empty_like(t) for t in (rows, dt_weight, bias, A)]
        dtype = values.dtype
        inputs = arrays(dtype, out_grad, values, rows, dt_weight, bias, A)
        outputs = (values_grad, *grads)
        code(*inputs, backwards, *(t.numpy() for t in outputs), torch.get_num_threads())
        return tuple(grads)
    rank, states = dt_weight.shape[1], A.shape[1]
    low, B, C = rows.split([rank, states, states], -1)
    order = torch.arange(rows.shape[1] - 1, -1, -1, device=rows.device) if backwards else None
    delta_grad, A_grad, B_grad, C_grad, _ = scan_gradients(
        out_grad, None, values, low @ dt_weight.T, A, B[:, None], C[:, None], bias, True, order, None, values_grad
    )
    rows_grad = torch.cat([delta_grad @ dt_weight, B_grad[:, 0], C_grad[:, 0]], -1)
    dt_weight_grad = delta_grad.flatten(0, 1).T @ low.flatten(0, 1)
    return rows_grad, dt_weight_grad, delta_grad.sum((0, 1)), A_grad


@_selective_scan_2d_backward.register_fake
def _(out_grad, *inputs):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs)


def _keep_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _back_2d(ctx, out_grad):
    return torch.ops.xrk.selective_scan_2d_backward(out_grad, *ctx.saved_tensors)


torch.library.register_autograd("xrk::selective_scan_2d", _back_2d, setup_context=_keep_inputs)


# --- selective_scan ---------------------------------------------------------------------------------------------------


@operator("xrk::selective_scan_backward", forward_only=True)
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
        gate = z.to(dtype)
        out, _ = torch.ops.xrk.selective_scan(
            u, delta, A, B, C, D, None, delta_bias, delta_softplus, order, initial_state
        )
        z_grad = torch.ops.aten.silu_backward(out_grad * out.to(dtype), gate)
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
