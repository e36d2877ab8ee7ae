"""SS2D: the selective scan of an image in four directions, and its phases line by line."""

import inspect
from typing import Any

import torch
from xrk.kernels import dispatch
from xrk.kernels.arguments import check_choice, check_map, check_parameter, check_tensor, compute_dtype
from xrk.kernels.operators import operator
from xrk.kernels.scan.reference import (
    scan_lines_reference,
    selective_scan_2d_reference,
    summarise_lines_reference,
)

__all__ = [
    "carry_lines",
    "scan_lines",
    "selective_scan_2d",
    "selective_scan_2d_reference",
    "summarise_lines",
]

_TRITON = dispatch.Triton("xrk.kernels.scan.triton_selective_scan_2d")
for _name in ("selective_scan_2d", "summarise_lines", "scan_lines"):
    dispatch.register(_name, cpu=dispatch.Native(_name), cuda=_TRITON)
dispatch.register("carry_lines", cpu=dispatch.Torch("one step a line, of few values beside a scan's"), cuda=_TRITON)

MOST_STATES = 64
LARGEST_RANK = 256


def selective_scan_2d(
    x: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_projs_weight: torch.Tensor,
    dt_projs_bias: torch.Tensor,
    A_logs: torch.Tensor,
    Ds: torch.Tensor,
) -> torch.Tensor:
    """The sum of four selective scans of the whole image, each along another flattening of it.

    Direction k = 0 goes row by row, 1 column by column, 2 and 3 are these two reversed; the state goes on from the end
    of one line into the start of the next. At step t of direction k, with x_t the pixel there:

        (low, B_t, C_t) = x_proj_weight[k] x_t                              R, N and N values
        dt_t = log(1 + exp(dt_projs_weight[k] low + dt_projs_bias[k]))
        h_t[d, n] = exp(dt_t[d] A[d, n]) h_{t-1}[d, n] + dt_t[d] B_t[n] x_t[d],   A = -exp(A_logs[kD + d, n])
        y_t[d] = sum over n of C_t[n] h_t[d, n] + Ds[kD + d] x_t[d]

    x: (B, H, W, D) of float16, bfloat16, float32 or float64, D contiguous.
    x_proj_weight: (4, R + 2N, D); dt_projs_weight: (4, D, R); dt_projs_bias: (4, D); A_logs: (4D, N); Ds: (4D); all of
        x's dtype or float32. N from 1 to 64, R from 1 to 256.
    Returns (B, H, W, D), contiguous, of x's dtype. States and decays are float32 (float64 for float64). On a CPU the
    bytes do not depend on the number of threads. float64 on a CUDA device runs as the reference, and the
    first such call warns. Differentiable, once.
    Raises TypeError for another kind or dtype, ValueError for another shape, stride or device.
    Liu et al. 2024, VMamba, arXiv 2401.10166, section 4; Guo et al. 2024, MambaIR, arXiv 2402.15648, section 3.3.
    """
    check_tensor(Ds, "Ds")
    _check(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    return torch.ops.xrk.selective_scan_2d(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)


_SCHEMA = ", ".join(f"Tensor {name}" for name in inspect.signature(selective_scan_2d).parameters)


@operator("xrk::selective_scan_2d", schema=f"({_SCHEMA}) -> Tensor")
def _selective_scan_2d(x, *weights):
    _check(x, *weights)
    path, code = dispatch.take("selective_scan_2d", x.device, x.dtype)
    if path == "triton":
        return code.selective_scan_2d(x, *weights)
    if path == "reference":
        return selective_scan_2d_reference(x, *weights).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    code(map_array(x), *arrays(compute_dtype(x.dtype), *weights), map_array(out), torch.get_num_threads())
    return out


@_selective_scan_2d.register_fake
def _(x, *weights):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def summarise_lines(
    x: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_projs_weight: torch.Tensor,
    dt_projs_bias: torch.Tensor,
    A_logs: torch.Tensor,
    direction: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Phase 1 of SS2D, for a band: what each line of one direction does to the state that enters it.

    A line is a row of the band for directions 0 and 2, a column (the part of it inside the band) for 1 and 3. A state h
    that enters line l leaves it as exp(A sums[l]) h + ends[l].

    x: a band (B, h, W, D); the parameters as in `selective_scan_2d`. direction: 0, 1, 2 or 3.
    Returns sums (B, lines, D), the line's sum of dt, and ends (B, lines, D, N), the state at its end from a start of
    zero; float32 (float64 for float64), in the order in which the direction visits the lines: the last row or column
    first for 2 and 3. What has decayed below exp(-25) (exp(-45) in float64) is left out.
    Raises as `selective_scan_2d`, and ValueError for another direction.
    """
    _check(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, None)
    check_choice(direction, "direction", (0, 1, 2, 3))
    path, code = dispatch.take("summarise_lines", x.device, x.dtype)
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs)
    if path == "triton":
        return code.summarise_lines(x, *parameters, direction)
    if path == "reference":
        return summarise_lines_reference(x, *parameters, direction)
    dtype = compute_dtype(x.dtype)
    batch, height, width, channels = x.shape
    lines = height if direction % 2 == 0 else width
    sums = torch.empty(batch, lines, channels, dtype=dtype)
    ends = torch.empty(batch, lines, channels, A_logs.shape[1], dtype=dtype)
    no_skip = torch.zeros(4 * channels, dtype=dtype)
    weights = (*parameters, no_skip)
    threads = torch.get_num_threads()
    code(map_array(x), *arrays(dtype, *weights), direction, sums.numpy(), ends.numpy(), threads)
    return sums, ends


def carry_lines(
    sums: torch.Tensor,
    ends: torch.Tensor,
    A_logs: torch.Tensor,
    direction: int,
    initial: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Phase 2 of SS2D: the state at the start of every line, from the lines' summaries in the order of the direction.

        start[0] = initial (or 0),   start[l + 1] = exp(A sums[l]) start[l] + ends[l]

    sums: (B, lines, D); ends: (B, lines, D, N), of sums' dtype; A_logs: (4D, N). initial: (B, D, N) or None.
    Returns the starts (B, lines, D, N) and the state after the last line (B, D, N).
    Raises TypeError for another kind or dtype, ValueError for another shape, device or direction.
    """
    check_map(sums, "sums", "B lines D")
    check_tensor(ends, "ends")
    check_tensor(A_logs, "A_logs")
    channels = sums.shape[2]
    if A_logs.ndim != 2 or A_logs.shape[0] != 4 * channels:
        raise ValueError(f"A_logs has shape {tuple(A_logs.shape)}; expected ({4 * channels}, N)")
    check_choice(direction, "direction", (0, 1, 2, 3))
    check_parameter(ends, "ends", (*sums.shape, A_logs.shape[1]), sums)
    check_parameter(A_logs, "A_logs", A_logs.shape, sums)
    check_parameter(initial, "initial", (sums.shape[0], *ends.shape[2:]), sums)
    path, code = dispatch.take("carry_lines", sums.device, sums.dtype)
    if path == "triton":
        return code.carry_lines(sums, ends, A_logs, direction, initial)
    A = -torch.exp(A_logs[direction * channels : (direction + 1) * channels].to(sums.dtype))
    state = torch.zeros_like(ends[:, 0]) if initial is None else initial
    # All decays at once, where the starts will lie: a call of torch costs more than the values of a line.
    starts = (sums[..., None] * A).exp_()
    for start, end in zip(starts.unbind(1), ends.unbind(1), strict=True):
        after = torch.addcmul(end, start, state)
        start.copy_(state)
        state = after
    return starts, state


def scan_lines(
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
    """Phase 3 of SS2D, for a band: adds one direction's values to `out`, every line from its own start.

    x, direction and the parameters as in `summarise_lines`; Ds: (4D). starts: (B, lines, D, N), float32 (float64 for
    float64), in the order of the direction. out: contiguous, of x's shape, float32 (float64 for float64).
    Returns the state at the end of every line, (B, lines, D, N): for a column, the start of its part in the next band.
    Raises as `summarise_lines`.
    """
    check_tensor(Ds, "Ds")
    _check(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    check_choice(direction, "direction", (0, 1, 2, 3))
    dtype = compute_dtype(x.dtype)
    batch, height, width, channels = x.shape
    lines = height if direction % 2 == 0 else width
    for tensor, name, shape in (
        (starts, "starts", (batch, lines, channels, A_logs.shape[1])),
        (out, "out", tuple(x.shape)),
    ):
        check_tensor(tensor, name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor.dtype != dtype:
            given, expected = (str(t).removeprefix("torch.") for t in (tensor.dtype, dtype))
            raise TypeError(f"{name} has dtype {given}; expected {expected}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected x's device, {x.device}")
    if not out.is_contiguous():
        raise ValueError(f"out has shape {tuple(out.shape)} and strides {out.stride()}; expected it to be contiguous")
    path, code = dispatch.take("scan_lines", x.device, x.dtype)
    weights = (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    if path == "triton":
        return code.scan_lines(x, *weights, direction, starts, out)
    if path == "reference":
        return scan_lines_reference(x, *weights, direction, starts, out)
    states = starts.clone(memory_format=torch.contiguous_format)
    threads = torch.get_num_threads()
    code(map_array(x), *arrays(dtype, *weights), direction, states.numpy(), out.detach().numpy(), threads)
    return states


def arrays(dtype: torch.dtype, *tensors: torch.Tensor) -> list[Any]:
    """Each tensor as a C-contiguous numpy array of this dtype: the tensor's own memory wherever that fits."""
    return [tensor.detach().to(dtype).contiguous().numpy() for tensor in tensors]


def map_array(x: torch.Tensor) -> Any:
    """A map as a C-contiguous numpy array of its own dtype, bfloat16 as uint16: its own memory where contiguous."""
    x = x.detach().contiguous()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def _check(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds) -> None:
    check_map(x, "x", "B H W D")
    check_contiguous_last(x, "x")
    channels = x.shape[3]
    given = [(x_proj_weight, "x_proj_weight"), (dt_projs_weight, "dt_projs_weight"), (dt_projs_bias, "dt_projs_bias")]
    for tensor, name in (*given, (A_logs, "A_logs")):
        check_tensor(tensor, name)
    if dt_projs_weight.ndim != 3:
        raise ValueError(f"dt_projs_weight has shape {tuple(dt_projs_weight.shape)}; expected (4, {channels}, R)")
    if A_logs.ndim != 2:
        raise ValueError(f"A_logs has shape {tuple(A_logs.shape)}; expected ({4 * channels}, N)")
    rank, states = dt_projs_weight.shape[2], A_logs.shape[1]
    if not 1 <= rank <= LARGEST_RANK:
        shape = tuple(dt_projs_weight.shape)
        raise ValueError(f"dt_projs_weight has shape {shape}; expected (4, {channels}, R) with R 1 to {LARGEST_RANK}")
    check_states(A_logs, "A_logs", f"({4 * channels}, N)")
    check_parameter(dt_projs_weight, "dt_projs_weight", (4, channels, rank), x)
    check_parameter(A_logs, "A_logs", (4 * channels, states), x)
    check_parameter(x_proj_weight, "x_proj_weight", (4, rank + 2 * states, channels), x)
    check_parameter(dt_projs_bias, "dt_projs_bias", (4, channels), x)
    check_parameter(Ds, "Ds", (4 * channels,), x)


def check_states(A: torch.Tensor, name: str, shape: str) -> None:
    if not 1 <= A.shape[1] <= MOST_STATES:
        raise ValueError(f"{name} has shape {tuple(A.shape)}; expected {shape} with N 1 to {MOST_STATES}")


def check_contiguous_last(x: torch.Tensor, name: str) -> None:
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and strides {tuple(x.stride())}; expected its last dimension contiguous"
        )
