"""The scans in plain torch, written from their definitions: one step after the other. In float64 for float64."""

import torch
import torch.nn.functional as F
from xrk.kernels.arguments import compute_dtype


def selective_scan_reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    order: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`selective_scan` in plain torch: (out, last state)."""
    dtype = compute_dtype(u.dtype)
    batch, channels, length = u.shape
    B, C = (m.to(dtype).reshape(batch, -1, A.shape[1], length) for m in (B, C))
    B, C = (m.repeat_interleave(channels // m.shape[1], 1) for m in (B, C))
    values, dt, A = u.to(dtype), delta.to(dtype), A.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    if order is None:
        order = torch.arange(length, device=u.device)
    order = order.expand(batch, length)
    image = torch.arange(batch, device=u.device)
    h = torch.zeros(batch, channels, A.shape[1], dtype=dtype, device=u.device)
    if initial_state is not None:
        h = h + initial_state.to(dtype)
    y = torch.zeros(batch, channels, length, dtype=dtype, device=u.device)
    for t in range(length):
        p = order[:, t]
        step = dt[image, :, p]
        h = torch.exp(step[..., None] * A) * h + (step * values[image, :, p])[..., None] * B[image, :, :, p]
        y[image, :, p] = (h * C[image, :, :, p]).sum(-1)
    if D is not None:
        y = y + D.to(dtype)[:, None] * values
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), h


def scan_gradients_reference(
    out_grad: torch.Tensor,
    state_grad: torch.Tensor | None,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    bias: torch.Tensor | None,
    softplus: bool,
    order: torch.Tensor | None,
    state: torch.Tensor | None,
    u_grad: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """`xrk.kernels.scan.backward.scan_gradients` in plain torch, which keeps all states."""
    batch, length, channels = u.shape
    z = delta if bias is None else delta + bias
    dt = F.softplus(z) if softplus else z
    b, c = (m.repeat_interleave(channels // m.shape[1], 1) for m in (B, C))
    order = torch.arange(length, device=u.device) if order is None else order
    order = order.expand(batch, length)
    image = torch.arange(batch, device=u.device)
    h = [u.new_zeros(batch, channels, A.shape[1]) if state is None else state]
    for t in range(length):
        p = order[:, t]
        x = (dt * u)[image, p, :, None]
        h.append(torch.exp(dt[image, p, :, None] * A) * h[-1] + x * b[image, :, p])
    carried = torch.zeros_like(h[0]) if state_grad is None else state_grad
    dt_grad, A_grad = torch.zeros_like(u), torch.zeros_like(A)
    b_grad, c_grad = torch.zeros_like(b), torch.zeros_like(c)
    for t in reversed(range(length)):
        p = order[:, t]
        step, value, y = dt[image, p], u[image, p], out_grad[image, p]
        h_grad = carried + y[..., None] * c[image, :, p]
        carried = h_grad * torch.exp(step[..., None] * A)
        by_b, exponent = (h_grad * b[image, :, p]).sum(-1), carried * h[t]
        u_grad[image, p] += step * by_b
        dt_grad[image, p] = value * by_b + (exponent * A).sum(-1)
        A_grad += (exponent * step[..., None]).sum(0)
        b_grad[image, :, p] = h_grad * (step * value)[..., None]
        c_grad[image, :, p] = y[..., None] * h[t + 1]
    if softplus:
        dt_grad = dt_grad * torch.sigmoid(z)
    b_grad, c_grad = (grad.reshape(batch, B.shape[1], -1, *grad.shape[2:]).sum(2) for grad in (b_grad, c_grad))
    return dt_grad, A_grad, b_grad, c_grad, carried


def projected(
    x: torch.Tensor, x_proj_weight: torch.Tensor, dt_projs_weight: torch.Tensor, dt_projs_bias: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dt (..., D), B (..., N) and C (..., N) of direction k at every pixel of x (..., D), in x's dtype."""
    rank = dt_projs_weight.shape[2]
    states = (x_proj_weight.shape[1] - rank) // 2
    low, b, c = (x @ x_proj_weight[k].to(x.dtype).T).split([rank, states, states], -1)
    dt = F.softplus(low @ dt_projs_weight[k].to(x.dtype).T + dt_projs_bias[k].to(x.dtype))
    return dt, b, c


def lines_of(x: torch.Tensor, k: int) -> torch.Tensor:
    """x (B, H, W, ...) as (B, lines, steps, ...) in the order in which direction k visits them."""
    lines = x if k % 2 == 0 else x.transpose(1, 2)
    return lines if k < 2 else lines.flip(1, 2)


def image_of(lines: torch.Tensor, k: int) -> torch.Tensor:
    """The inverse of `lines_of`."""
    lines = lines if k < 2 else lines.flip(1, 2)
    return lines if k % 2 == 0 else lines.transpose(1, 2)


def selective_scan_2d_reference(
    x: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_projs_weight: torch.Tensor,
    dt_projs_bias: torch.Tensor,
    A_logs: torch.Tensor,
    Ds: torch.Tensor,
) -> torch.Tensor:
    """`selective_scan_2d` in plain torch: four flattened scans, added as ((k0 + k2) + k1) + k3."""
    values = x.to(compute_dtype(x.dtype))
    batch, _, _, channels = values.shape
    out = torch.zeros_like(values)
    for k in (0, 2, 1, 3):
        sequence = lines_of(values, k)
        shape = sequence.shape
        sequence = sequence.reshape(batch, -1, channels)
        dt, b, c = projected(sequence, x_proj_weight, dt_projs_weight, dt_projs_bias, k)
        A = -torch.exp(A_logs[k * channels : (k + 1) * channels].to(values.dtype))
        skip = Ds[k * channels : (k + 1) * channels].to(values.dtype)
        h = values.new_zeros(batch, channels, A.shape[1])
        y = []
        for t in range(sequence.shape[1]):
            h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * sequence[:, t])[..., None] * b[:, t, None]
            y.append((h * c[:, t, None]).sum(-1) + skip * sequence[:, t])
        out += image_of(torch.stack(y, 1).reshape(shape), k)
    return out.to(x.dtype)


def summarise_lines_reference(
    x: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_projs_weight: torch.Tensor,
    dt_projs_bias: torch.Tensor,
    A_logs: torch.Tensor,
    direction: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`summarise_lines` in plain torch."""
    lines = lines_of(x.to(compute_dtype(x.dtype)), direction)
    dt, b, _ = projected(lines, x_proj_weight, dt_projs_weight, dt_projs_bias, direction)
    channels = x.shape[-1]
    A = -torch.exp(A_logs[direction * channels : (direction + 1) * channels].to(lines.dtype))
    h = lines.new_zeros(*lines.shape[:2], channels, A.shape[1])
    for s in range(lines.shape[2]):
        h = torch.exp(dt[:, :, s, :, None] * A) * h + (dt[:, :, s] * lines[:, :, s])[..., None] * b[:, :, s, None]
    return dt.sum(2), h


def scan_lines_reference(
    x: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_projs_weight: torch.Tensor,
    dt_projs_bias: torch.Tensor,
    A_logs: torch.Tensor,
    Ds: torch.Tensor,
    direction: int,
    starts: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """`scan_lines` in plain torch."""
    lines = lines_of(x.to(compute_dtype(x.dtype)), direction)
    dt, b, c = projected(lines, x_proj_weight, dt_projs_weight, dt_projs_bias, direction)
    channels = x.shape[-1]
    A = -torch.exp(A_logs[direction * channels : (direction + 1) * channels].to(lines.dtype))
    skip = Ds[direction * channels : (direction + 1) * channels].to(lines.dtype)
    h = starts.to(lines.dtype)
    y = []
    for s in range(lines.shape[2]):
        h = torch.exp(dt[:, :, s, :, None] * A) * h + (dt[:, :, s] * lines[:, :, s])[..., None] * b[:, :, s, None]
        y.append((h * c[:, :, s, None]).sum(-1) + skip * lines[:, :, s])
    out += image_of(torch.stack(y, 2), direction)
    return h
