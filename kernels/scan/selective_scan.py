"""The selective scan of sequences, in their own order or in a given one."""

import torch
import torch.nn.functional as F
from xrk.kernels import dispatch
from xrk.kernels.arguments import check_device, check_like, check_map, check_parameter, check_tensor, compute_dtype
from xrk.kernels.operators import operator
from xrk.kernels.scan.reference import selective_scan_reference
from xrk.kernels.scan.selective_scan_2d import arrays, check_states

__all__ = ["selective_scan", "selective_scan_reference"]

# On a CPU, so many values of a map are taken at a time, in whole chunks of the C++ kernels' steps: what is converted,
# gathered and gated stays in the cache, and so much and no more lies beside the tensors.
PIECE_VALUES = 2**18
CHUNK_STEPS = 64

dispatch.register(
    "selective_scan",
    cpu=dispatch.Native("selective_scan"),
    cuda=dispatch.Triton("xrk.kernels.scan.triton_selective_scan"),
)


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    order: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The selective state-space model along sequences. At step t, at position p = order[t] (or t):

        dt = delta[p] + delta_bias, then log(1 + exp(dt)) with delta_softplus
        h_t[d, n] = exp(dt[d] A[d, n]) h_{t-1}[d, n] + dt[d] B[n, p] u[d, p]
        out[d, p] = (sum over n of C[n, p] h_t[d, n] + D[d] u[d, p]) * SiLU(z[d, p])

    u, delta, z: (batch, D, L) of float16, bfloat16, float32 or float64, of one dtype; fastest with D contiguous, that
        is as `features.transpose(1, 2)` of channels-last features.
    A: (D, N), N from 1 to 64. B, C: (batch, N, L), or (batch, G, N, L) where each of G groups of channels has its own.
    D, delta_bias: (D) or None. Parameters are of u's dtype or float32.
    order: (L) or (batch, L) int64, each position once: where the scan goes. Everything, the result too, stays at its
        position. initial_state: (batch, D, N) or None (zero).
    Returns out (batch, D, L) of u's dtype, with D contiguous where u's is, else contiguous; with return_last_state also
    the state after the last step, (batch, D, N), float32 (float64 for float64). float64 on a CUDA device runs as the
    reference, and the first such call warns. Differentiable, once.
    Raises TypeError for another kind or dtype, ValueError for another shape or device, or an order that does not hold
    each position once.
    Gu, Dao 2023, Mamba, arXiv 2312.00752, section 3.3; the arguments as in that paper's public code.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, order, initial_state)
    out, last_state = torch.ops.xrk.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, order, initial_state
    )
    return (out, last_state) if return_last_state else out


@operator("xrk::selective_scan")
def _selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    order: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(u, delta, A, B, C, D, z, delta_bias, order, initial_state)
    if order is not None and not torch.equal(
        order.sort(-1).values, torch.arange(u.shape[2], device=u.device).expand(order.shape)
    ):
        raise ValueError(f"order has shape {tuple(order.shape)}; expected each position 0 to {u.shape[2] - 1} once")
    path, code = dispatch.take("selective_scan", u.device, u.dtype)
    out = _empty_result(u)
    arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, order)
    if path == "triton":
        return out, code.selective_scan(*arguments, initial_state, out)
    if path == "reference":
        y, state = selective_scan_reference(*arguments, initial_state)
        return out.copy_(y), state
    state = torch.zeros(u.shape[0], u.shape[1], A.shape[1], dtype=compute_dtype(u.dtype))
    if initial_state is not None:
        state.copy_(initial_state)
    _scan_pieces(code, *arguments, state, out)
    return out, state


def _scan_pieces(code, u, delta, A, B, C, D, z, delta_bias, delta_softplus, order, state, out) -> None:
    """The C++ scan, piece after piece of the sequences: fills out, and turns the start in `state` into the end."""
    dtype = state.dtype
    batch, channels, length = u.shape
    A, D, delta_bias = (None if t is None else arrays(dtype, t)[0] for t in (A, D, delta_bias))
    u, delta, z, out = (None if t is None else t.transpose(1, 2) for t in (u, delta, z, out))
    B, C = (t.reshape(batch, -1, state.shape[2], length).permute(0, 3, 1, 2) for t in (B, C))
    if order is not None:
        # Gathered rows must lie together: a position's N values would be as many cache lines.
        B, C = B.contiguous(), C.contiguous()
    image = torch.arange(batch)[:, None]
    steps = max(1, PIECE_VALUES // (batch * channels * CHUNK_STEPS)) * CHUNK_STEPS
    for first in range(0, length, steps):
        part = slice(first, min(length, first + steps))
        place = (slice(None), part) if order is None else (image, order.expand(batch, length)[:, part])
        y = torch.empty(batch, part.stop - part.start, channels, dtype=dtype)
        code(
            *arrays(dtype, u[place], delta[place]),
            A,
            *arrays(dtype, B[place].transpose(1, 2), C[place].transpose(1, 2)),
            D,
            delta_bias,
            delta_softplus,
            None,
            state.numpy(),
            y.numpy(),
            torch.get_num_threads(),
        )
        if z is not None:
            y *= F.silu(z[place].to(dtype))
        out[place] = y.to(out.dtype)


def _empty_result(u: torch.Tensor) -> torch.Tensor:
    """(batch, D, L) as u: a position's channels lie together where u's do."""
    channels_last = u.transpose(1, 2)
    if channels_last.is_contiguous():
        return torch.empty_like(channels_last).transpose(1, 2)
    return torch.empty(u.shape, dtype=u.dtype, device=u.device)


@_selective_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, order, initial_state):
    state = torch.empty(u.shape[0], u.shape[1], A.shape[1], dtype=compute_dtype(u.dtype), device=u.device)
    return _empty_result(u), state


def _check(u, delta, A, B, C, D, z, delta_bias, order, initial_state) -> None:
    check_map(u, "u", "batch D L")
    check_like(delta, "delta", u)
    check_tensor(delta, "delta")
    batch, channels, length = u.shape
    check_tensor(A, "A")
    if A.ndim != 2:
        raise ValueError(f"A has shape {tuple(A.shape)}; expected ({channels}, N)")
    check_states(A, "A", f"({channels}, N)")
    states = A.shape[1]
    check_parameter(A, "A", (channels, states), u)
    groups = []
    for name, tensor in (("B", B), ("C", C)):
        check_tensor(tensor, name)
        if tensor.ndim == 4 and tensor.shape[1] > 0 and channels % tensor.shape[1] == 0:
            shape = (batch, tensor.shape[1], states, length)
            groups.append(tensor.shape[1])
        elif tensor.ndim == 3:
            shape = (batch, states, length)
            groups.append(1)
        else:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected ({batch}, {states}, {length}) or "
                f"({batch}, G, {states}, {length}) with G a divisor of {channels}"
            )
        check_parameter(tensor, name, shape, u)
    if groups[0] != groups[1]:
        raise ValueError(f"C has shape {tuple(C.shape)}; expected as many groups as B, {tuple(B.shape)}")
    check_parameter(D, "D", (channels,), u)
    check_like(z, "z", u)
    check_parameter(delta_bias, "delta_bias", (channels,), u)
    check_parameter(initial_state, "initial_state", (batch, channels, states), u)
    if order is not None:
        check_tensor(order, "order")
        if order.dtype != torch.int64:
            raise TypeError(f"order has dtype {str(order.dtype).removeprefix('torch.')}; expected int64")
        if tuple(order.shape) not in ((length,), (batch, length)):
            raise ValueError(f"order has shape {tuple(order.shape)}; expected ({length},) or ({batch}, {length})")
        check_device(order, "order", u)
