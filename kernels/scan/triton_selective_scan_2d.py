"""SS2D on CUDA: lines in parallel, in three phases. Nothing is transposed or flipped: a direction is two strides.

The projections of all pixels come from one matrix product for each direction.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from xrk.kernels.arguments import compute_dtype
from xrk.kernels.scan.launch import walk_configuration
from xrk.kernels.scan.triton_recurrence import (
    LN2,
    LOG2E,
    advance,
    carry_states,
    load_row,
    log2_1p_exp2,
    packed_width,
    packing,
)


@triton.jit
def walk_lines(
    u,  # [images, pixels, D]
    rows,  # [images, pixels, R + 2N and padding], of u's dtype
    dt_weight,  # [D, R]
    bias,  # [D]
    a_logs,  # [D, N]
    skip,  # [D]
    sums,  # [images, lines, D]: written by a summary
    states,  # [images, lines, D, N]: the starts, then the ends; a summary writes the ends only
    y,  # [images, pixels, D], fp32: the values, or += the values if ADD; not touched by a summary
    lines,
    pixels,
    steps,
    first,
    line_stride,
    step_stride,
    D: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    BFLOAT: tl.constexpr,
    SUMMARY: tl.constexpr,
    SKIP: tl.constexpr,
    ADD: tl.constexpr,
):
    """One line of one direction, step by step: its values from its start (or its summary from zero)."""
    WORDS: tl.constexpr = ((R + 2 * N) * BITS + 63) // 64
    FULL: tl.constexpr = D % (WIDTH * BLOCKS) == 0
    line = tl.program_id(0).to(tl.int64)
    d = ()
    b = ()
    skips = ()
    total = ()
    for j in tl.static_range(BLOCKS):
        d += (tl.program_id(1) * (WIDTH * BLOCKS) + j * WIDTH + tl.arange(0, WIDTH),)
        b += (tl.load(bias + d[j], mask=d[j] < D, other=0.0).to(tl.float32) * LOG2E,)
        total += (tl.zeros((WIDTH,), tl.float32),)
        if SKIP:
            skips += (tl.load(skip + d[j], mask=d[j] < D, other=0.0).to(tl.float32),)
    w = ()
    for r in tl.static_range(R):
        for j in tl.static_range(BLOCKS):
            w += (tl.load(dt_weight + d[j] * R + r, mask=d[j] < D, other=0.0).to(tl.float32) * LOG2E,)
    a = ()
    h = ()
    states += line * (D * N)
    for n in tl.static_range(N):
        for j in tl.static_range(BLOCKS):
            log = tl.load(a_logs + d[j] * N + n, mask=d[j] < D, other=0.0).to(tl.float32)
            a += (tl.exp(log) * -1.0,)
            if SUMMARY:
                h += (tl.zeros((WIDTH,), tl.float32),)
            else:
                h += (tl.load(states + d[j] * N + n, mask=d[j] < D, other=0.0),)
    pixel = line // lines * pixels + first + line % lines * line_stride
    step = tl.cast(step_stride, tl.int64)  # a stride of 1 is a constant of the compiled kernel
    u += pixel * D
    y += pixel * D
    row = rows.to(tl.pointer_type(tl.int64)) + pixel * WORDS
    for _ in range(steps):
        values = load_row(row, R + 2 * N, BITS, BFLOAT)
        x = ()
        out = ()
        for j in tl.static_range(BLOCKS):
            x += (tl.load(u + d[j], mask=None if FULL else d[j] < D).to(tl.float32),)
            if ADD:
                out += (tl.load(y + d[j], mask=None if FULL else d[j] < D),)
            else:
                out += (tl.zeros((WIDTH,), tl.float32),)
        z = b
        for r in tl.static_range(R):
            more = ()
            for j in tl.static_range(BLOCKS):
                more += (z[j] + values[r] * w[r * BLOCKS + j],)
            z = more
        t = ()
        for j in tl.static_range(BLOCKS):
            t += (log2_1p_exp2(z[j], BITS == 32),)
        h, out = advance(h, a, t, x, out, values, R, N, BLOCKS, not SUMMARY)
        if SUMMARY:
            more = ()
            for j in tl.static_range(BLOCKS):
                more += (total[j] + t[j],)
            total = more
        else:
            for j in tl.static_range(BLOCKS):
                sum = out[j] + x[j] * skips[j] if SKIP else out[j]
                tl.store(y + d[j], sum, mask=None if FULL else d[j] < D)
        u += step * D
        y += step * D
        row += step * WORDS
    for n in tl.static_range(N):
        for j in tl.static_range(BLOCKS):
            tl.store(states + d[j] * N + n, h[n * BLOCKS + j], mask=d[j] < D)
    if SUMMARY:
        for j in tl.static_range(BLOCKS):
            tl.store(sums + line * D + d[j], total[j] * LN2, mask=d[j] < D)


class Direction:
    """One direction k of maps x (B, H, W, D): its packed projections and its parameters, and the walks along it."""

    def __init__(self, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, k):
        self.x = x.contiguous()
        batch, height, width, channels = x.shape
        rank, states = dt_projs_weight.shape[2], A_logs.shape[1]
        padding = packed_width(rank + 2 * states, x.dtype) - rank - 2 * states
        weight = F.pad(x_proj_weight[k].to(x.dtype), (0, 0, 0, padding))
        self.rows = self.x.reshape(-1, channels) @ weight.T
        self.k, self.channels = k, slice(k * channels, (k + 1) * channels)
        self.parameters = [p.contiguous() for p in (dt_projs_weight[k], dt_projs_bias[k], A_logs[self.channels])]
        self.lines, self.steps = (height, width) if k % 2 == 0 else (width, height)
        line_stride, step_stride = (width, 1) if k % 2 == 0 else (1, width)
        first = 0
        if k >= 2:
            first, line_stride, step_stride = height * width - 1, -line_stride, -step_stride
        self.where = (self.lines, height * width, self.steps, first, line_stride, step_stride)
        config = walk_configuration(channels, states)
        self.constants = {"D": channels, "R": rank, "N": states} | packing(x.dtype) | config
        self.grid = (batch * self.lines, triton.cdiv(channels, config["WIDTH"] * config["BLOCKS"]))

    def summaries(self):
        """(sums, ends) of the lines, as of `xrk.kernels.summarise_lines`."""
        shape = (self.x.shape[0], self.lines, self.constants["D"])
        sums = torch.empty(shape, dtype=compute_dtype(self.x.dtype), device=self.x.device)
        ends = sums.new_empty(*shape, self.constants["N"])
        self._walk(sums, sums, ends, sums, SUMMARY=True, SKIP=False, ADD=False)
        return sums, ends

    def values(self, states, skip, y, add):
        """Writes (or adds) to y; `states`, the lines' starts, become their ends. skip: (D) or None."""
        given = y if skip is None else skip.contiguous()
        self._walk(given, y, states, y, SUMMARY=False, SKIP=skip is not None, ADD=add)

    def _walk(self, skip, sums, states, y, **switches):
        tensors = (self.x, self.rows, *self.parameters, skip, sums, states, y)
        walk_lines[self.grid](*tensors, *self.where, **self.constants, **switches, enable_fp_fusion=True)


def selective_scan_2d(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """`xrk.kernels.selective_scan_2d` for checked tensors on one device, float16, bfloat16 or float32."""
    *parameters, Ds = weights
    y = torch.empty(x.shape, dtype=compute_dtype(x.dtype), device=x.device)
    # The first direction writes y, with the skips of all four; no other needs its own.
    skip = Ds.to(y.dtype).reshape(4, -1).sum(0)
    for k in (0, 2, 1, 3):
        direction = Direction(x, *parameters, k)
        sums, states = direction.summaries()
        carry_states(sums, states, direction.parameters[-1], True, None)
        direction.values(states, skip if k == 0 else None, y, add=k != 0)
    return y.to(x.dtype)


def summarise_lines(x: torch.Tensor, *parameters_and_direction) -> tuple[torch.Tensor, torch.Tensor]:
    """`xrk.kernels.summarise_lines` for checked arguments."""
    return Direction(x, *parameters_and_direction).summaries()


def carry_lines(
    sums: torch.Tensor, ends: torch.Tensor, A_logs: torch.Tensor, direction: int, initial: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`xrk.kernels.carry_lines` for checked arguments."""
    channels = sums.shape[2]
    starts = ends.clone(memory_format=torch.contiguous_format)
    logs = A_logs[direction * channels : (direction + 1) * channels]
    return starts, carry_states(sums.contiguous(), starts, logs, True, initial)


def scan_lines(x: torch.Tensor, *weights_and_where) -> torch.Tensor:
    """`xrk.kernels.scan_lines` for checked arguments."""
    *parameters, Ds, k, starts, out = weights_and_where
    states = starts.clone(memory_format=torch.contiguous_format)
    direction = Direction(x, *parameters, k)
    direction.values(states, Ds[direction.channels], out, add=True)
    return states
