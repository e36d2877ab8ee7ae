"""SS2D on CUDA: lines in parallel, in three phases. Nothing is transposed or flipped: a direction is two strides.

The state is a tuple of N tensors (lines, channels), so that the sum over states stays inside a thread: no shared
memory, no barrier, no shuffle. The projections of all pixels come from one matrix product for each direction.
"""

# Triton compiles `t + (x,)` but not `(*t, x)`.
# ruff: noqa: RUF005

import torch
import triton
import triton.language as tl
from xrk.kernels.arguments import compute_dtype
from xrk.kernels.scan.launch import walk_lines_configuration

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(z):
    """log(1 + exp(z)); below -4 by its series, where 1 + e would lose e's digits."""
    e = tl.exp2(z * LOG2E)
    series = e * (1.0 - e * (0.5 - e * (0.33333334 - e * 0.25)))
    log = tl.log2(1.0 + tl.minimum(e, 1e9)) * LN2
    return tl.where(z > 20.0, z, tl.where(z < -4.0, series, log))


@triton.jit
def walk_lines(
    u,  # [pixels, D]
    rows,  # [pixels, R + 2N]
    dt_weight,  # [R, D]
    bias,  # [D]
    a2,  # [N, D], A / ln 2
    skip,  # [D]
    sums,  # [lines, D]: written by a summary
    states,  # [lines, N, D]: the starts, then the ends; a summary writes the ends only
    y,  # [pixels, D], fp32: += the values, not touched by a summary
    lines,
    steps,
    first,
    line_stride,
    step_stride,
    D: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    LINES: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUMMARY: tl.constexpr,
):
    """Every line of one direction, step by step: its values from its start (or its summary from zero)."""
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_lines = line < lines
    in_d = d < D
    mask = in_lines[:, None] & in_d[None, :]
    b0 = tl.load(bias + d, mask=in_d, other=0.0)
    own_skip = tl.load(skip + d, mask=in_d, other=0.0)
    w = ()
    for r in tl.static_range(R):
        w = w + (tl.load(dt_weight + r * D + d, mask=in_d, other=0.0),)
    a = ()
    h = ()
    state_at = (line.to(tl.int64)[:, None] * N) * D + d[None, :]
    for n in tl.static_range(N):
        a = a + (tl.load(a2 + n * D + d, mask=in_d, other=0.0),)
        if SUMMARY:
            h = h + (tl.zeros((LINES, CHANNELS), tl.float32),)
        else:
            h = h + (tl.load(states + state_at + n * D, mask=mask, other=0.0),)
    total = tl.zeros((LINES, CHANNELS), tl.float32)
    pixel = first + line.to(tl.int64) * line_stride
    for _ in range(steps):
        value = tl.load(u + pixel[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        row = rows + pixel * (R + 2 * N)
        z = b0[None, :] + tl.zeros((LINES, CHANNELS), tl.float32)
        for r in tl.static_range(R):
            z += tl.load(row + r, mask=in_lines, other=0.0).to(tl.float32)[:, None] * w[r][None, :]
        dt = _softplus(z)
        x = dt * value
        out = value * own_skip[None, :]
        new = ()
        for n in tl.static_range(N):
            b = tl.load(row + R + n, mask=in_lines, other=0.0).to(tl.float32)
            state = tl.exp2(dt * a[n][None, :]) * h[n] + x * b[:, None]
            if not SUMMARY:
                c = tl.load(row + R + N + n, mask=in_lines, other=0.0).to(tl.float32)
                out += state * c[:, None]
            new = new + (state,)
        h = new
        if SUMMARY:
            total += dt
        else:
            at = y + pixel[:, None] * D + d[None, :]
            tl.store(at, tl.load(at, mask=mask, other=0.0) + out, mask=mask)
        pixel += step_stride
    for n in tl.static_range(N):
        tl.store(states + state_at + n * D, h[n], mask=mask)
    if SUMMARY:
        tl.store(sums + line.to(tl.int64)[:, None] * D + d[None, :], total, mask=mask)


@triton.jit
def carry(
    sums,  # [lines, D]
    states,  # [lines, N, D]: ends from zero, which become the starts
    a2,  # [N, D]
    lines,
    D: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The state at the start of every line, for one state n and a block of channels."""
    n = tl.program_id(0)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = d < D
    a = tl.load(a2 + n * D + d, mask=mask, other=0.0)
    h = tl.zeros((CHANNELS,), tl.float32)
    at = (n * D + d).to(tl.int64)
    for line in range(lines):
        end = tl.load(states + at, mask=mask, other=0.0)
        total = tl.load(sums + tl.cast(line, tl.int64) * D + d, mask=mask, other=0.0)
        tl.store(states + at, h, mask=mask)
        h = tl.exp2(total * a) * h + end
        at += N * D


def selective_scan_2d(
    x: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_projs_weight: torch.Tensor,
    dt_projs_bias: torch.Tensor,
    A_logs: torch.Tensor,
    Ds: torch.Tensor,
) -> torch.Tensor:
    """`xrk.kernels.selective_scan_2d` for checked tensors on one device, float16, bfloat16 or float32."""
    x = x.contiguous()
    batch, height, width, channels = x.shape
    rank, states = dt_projs_weight.shape[2], A_logs.shape[1]
    dtype = compute_dtype(x.dtype)
    y = torch.zeros(x.shape, dtype=dtype, device=x.device)
    config = walk_lines_configuration(states)
    for k in (0, 2, 1, 3):
        lines, steps = (height, width) if k % 2 == 0 else (width, height)
        line_stride, step_stride = (width, 1) if k % 2 == 0 else (1, width)
        first = 0
        if k >= 2:
            first, line_stride, step_stride = height * width - 1, -line_stride, -step_stride
        rows = x.reshape(-1, channels) @ x_proj_weight[k].to(x.dtype).T
        rows = rows.reshape(batch, height * width, rank + 2 * states)
        dt_weight = dt_projs_weight[k].to(dtype).T.contiguous()
        bias = dt_projs_bias[k].to(dtype).contiguous()
        part = slice(k * channels, (k + 1) * channels)
        a2 = (torch.exp(A_logs[part].to(dtype)) * -1.4426950408889634).T.contiguous()
        skip = Ds[part].to(dtype).contiguous()
        sums = torch.empty(lines, channels, dtype=dtype, device=x.device)
        line_states = torch.empty(lines, states, channels, dtype=dtype, device=x.device)
        grid = (triton.cdiv(lines, config["LINES"]), triton.cdiv(channels, config["CHANNELS"]))
        for i in range(batch):
            arguments = (x[i], rows[i], dt_weight, bias, a2, skip, sums, line_states, y[i], lines, steps, first)
            strides = (line_stride, step_stride)
            for summary in (True, False):
                walk_lines[grid](
                    *arguments, *strides, D=channels, R=rank, N=states, SUMMARY=summary, **config
                )
                if summary:
                    carry[(states, grid[1])](
                        sums, line_states, a2, lines, D=channels, N=states, CHANNELS=config["CHANNELS"]
                    )
    return y.to(x.dtype)
