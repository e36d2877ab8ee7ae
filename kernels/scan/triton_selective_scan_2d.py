"""SS2D on CUDA: lines in parallel, in three phases. Nothing is transposed or flipped: a direction is two strides.

The projections of all pixels come from one matrix product for each direction.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from xrk.kernels.arguments import compute_dtype
from xrk.kernels.scan.launch import bands_of, walk_configuration
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
    rows,  # [images, pixels, PITCH words of 64 bits], of u's dtype: R + 2N values of this direction, perhaps others'
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
    PITCH: tl.constexpr,
    BITS: tl.constexpr,
    BFLOAT: tl.constexpr,
    SUMMARY: tl.constexpr,
    SKIP: tl.constexpr,
    ADD: tl.constexpr,
):
    """One line of one direction, step by step: its values from its start (or its summary from zero)."""
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
    row = rows.to(tl.pointer_type(tl.int64)) + pixel * PITCH
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
        row += step * PITCH
    for n in tl.static_range(N):
        for j in tl.static_range(BLOCKS):
            tl.store(states + d[j] * N + n, h[n * BLOCKS + j], mask=d[j] < D)
    if SUMMARY:
        for j in tl.static_range(BLOCKS):
            tl.store(sums + line * D + d[j], total[j] * LN2, mask=d[j] < D)


class Direction:
    """One direction k of maps x (B, H, W, D): its packed projections and its parameters, and the walks along it.

    rows: `project`'s of several directions at once, this one's at `place`, where they are there. segments: how many
    lines a row is cut into for directions 0 and 2, a divisor of W.
    """

    def __init__(self, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, k, rows=None, place=0, segments=1):
        self.x = x.contiguous()
        batch, height, width, channels = x.shape
        rank, states = dt_projs_weight.shape[2], A_logs.shape[1]
        rows = project(self.x, x_proj_weight[k : k + 1]) if rows is None else rows
        self.rows = rows[:, place]
        self.k, self.channels = k, slice(k * channels, (k + 1) * channels)
        self.parameters = [p.contiguous() for p in (dt_projs_weight[k], dt_projs_bias[k], A_logs[self.channels])]
        if k % 2 == 0:
            self.lines, self.steps = height * segments, width // segments
            line_stride, step_stride = self.steps, 1
        else:
            self.lines, self.steps, line_stride, step_stride = width, height, 1, width
        first = 0
        if k >= 2:
            first, line_stride, step_stride = height * width - 1, -line_stride, -step_stride
        self.where = (self.lines, height * width, self.steps, first, line_stride, step_stride)
        config = walk_configuration(channels, states)
        pitch = rows.stride(0) * rows.element_size() // 8
        self.constants = {"D": channels, "R": rank, "N": states, "PITCH": pitch} | packing(x.dtype) | config
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


def project(x: torch.Tensor, x_proj_weight: torch.Tensor) -> torch.Tensor:
    """[pixels, directions, packed width] of x's dtype: the projections of contiguous x, in one product."""
    directions, values, channels = x_proj_weight.shape
    width = packed_width(values, x.dtype)
    weight = F.pad(x_proj_weight.to(x.dtype), (0, 0, 0, width - values)).reshape(-1, channels)
    return (x.reshape(-1, channels) @ weight.T).reshape(-1, directions, width)


def selective_scan_2d(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """`xrk.kernels.selective_scan_2d` for checked tensors on one device, float16, bfloat16 or float32.

    In bands of rows: a sweep for the summaries, one for the values. Of the whole map there are x, the result and the
    lines' states alone; projections, made in each sweep and for all directions from one reading of x, and the float32
    sum of the directions are a band's. For maps of 16 bits at 4096 x 4096, D = 192, N = 16, R = 12, four bands:

        x 6.4 GB, result 6.4 GB, sum 3.2 GB (it was 12.9), projections 1.5 GB, states of columns 0.4 and of rows 0.2 GB

    18 GB, and 12 GB of them beside x, where four copies of the map and their scan take 114 GB beside it.
    """
    *parameters, Ds = weights
    dtype = compute_dtype(x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    height, segments = bands_of(x.shape, parameters[-1].shape[1])
    bands = x.split(height, 1)
    summaries = [[d.summaries() for d in _directions(band.contiguous(), parameters, segments)] for band in bands]
    starts = [_band_starts([of[k] for of in summaries], parameters[-1].chunk(4)[k], k, segments) for k in range(4)]
    del summaries
    # The first direction writes y, with the skips of all four; no other needs its own.
    skip = Ds.to(dtype).reshape(4, -1).sum(0)
    for i, (band, target) in enumerate(zip(bands, out.split(height, 1), strict=True)):
        y = target
        if target.dtype != dtype or not target.is_contiguous():
            y = torch.empty(band.shape, dtype=dtype, device=x.device)
        directions = _directions(band.contiguous(), parameters, segments)
        for k in (0, 2, 1, 3):
            directions[k].values(starts[k][i].contiguous(), skip if k == 0 else None, y, add=k != 0)
        if y is not target:
            target.copy_(y)
        del y, directions  # before the next band's are made
    return out


def _directions(band: torch.Tensor, parameters: list[torch.Tensor], segments: int) -> list[Direction]:
    """All four of a contiguous band, whose projections are made in one product."""
    rows = project(band, parameters[0])
    return [Direction(band, *parameters, k, rows, k, segments) for k in range(4)]


def _band_starts(
    summaries: list[tuple[torch.Tensor, torch.Tensor]], logs: torch.Tensor, k: int, segments: int
) -> list[torch.Tensor]:
    """The states at the start of every line of every band, from the summaries that the bands have of direction k."""
    backwards = 1 if k < 2 else -1
    sums, states = zip(*summaries[::backwards], strict=True)
    if k % 2 == 0:
        lines = [part.shape[1] for part in sums]
        sums, states = (torch.cat(parts, 1).unflatten(1, (-1, segments)) for parts in (sums, states))
        carry_groups(sums, states, logs)
        starts = states.flatten(1, 2).split(lines, 1)
    else:
        sums, states = (torch.stack(parts, 2) for parts in (sums, states))
        carry_groups(sums, states, logs)
        starts = states.unbind(2)
    return list(starts[::backwards])


def carry_groups(sums: torch.Tensor, states: torch.Tensor, logs: torch.Tensor) -> None:
    """Turns the ends of lines in groups, `states` (images, groups, lines, D, N), into their starts.

    The groups follow each other, and the lines of each: a carry within all groups at once makes one line of each, one
    over the groups their starts, and from these one within all at once the lines'.
    """
    each, ends = sums.flatten(0, 1), states.flatten(0, 1)
    starts = ends if sums.shape[2] == 1 else carry_states(each, ends.clone(), logs, True, None)
    starts = starts.view(*sums.shape[:2], *states.shape[3:])
    carry_states(sums.sum(2), starts, logs, True, None)
    if sums.shape[2] > 1:
        carry_states(each, ends, logs, True, starts.flatten(0, 1))


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
