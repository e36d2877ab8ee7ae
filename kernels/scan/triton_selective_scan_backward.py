"""Gradients of scans on CUDA: pieces side by side, each from its start and from the gradient of its end.

Both are carried from piece to piece: the states forwards, as in the scan itself, and what later steps ask of them
backwards, by the same decays. A piece's states are made again and lie in memory that the next piece uses too.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from xrk.kernels.scan.launch import BACK, walk_configuration
from xrk.kernels.scan.triton_recurrence import LOG2E, carry_states, packed_width, packing
from xrk.kernels.scan.triton_selective_scan import walk_pieces


@triton.jit
def _step(u, delta, bias, d, inside, place, D: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    """u, dt and its derivative by delta, of a block of channels at one place."""
    value = tl.load(u + place * D + d, mask=inside, other=0.0)
    z = tl.load(delta + place * D + d, mask=inside, other=0.0)
    if BIAS:
        z += bias
    slope = tl.full(z.shape, 1.0, tl.float32)
    if SOFTPLUS:
        e = tl.exp(-tl.abs(z))
        slope = tl.where(z >= 0, 1.0, e) / (1.0 + e)
        # log(1 + e) by its series where 1 + e has lost e's digits.
        z = tl.maximum(z, 0.0) + tl.where(e < 1e-3, e * (1.0 - e * (0.5 - e * 0.33333333)), tl.log(1.0 + e))
    return value, z, slope


@triton.jit
def walk_back(
    u,  # [images, L, D], as all maps float32
    delta,  # [images, L, D]
    b,  # [images, L, G, N]
    c,  # [images, L, G, N]
    a,  # [D, N]
    bias,  # [D], if BIAS
    order,  # [L] (order_stride 0) or [images, L] (order_stride L), if ORDER
    y_grad,  # [images, L, D]
    starts,  # [images, pieces, D, N]: the states that the pieces start from
    ends,  # [images, pieces, D, N]: the gradients of those that they end with; written by a summary
    u_grad,  # [images, L, D], added to
    delta_grad,  # [images, L, D]
    rows_grad,  # [parts, images, L, G, 2N]: of B and C, a block of channels' share
    a_grad,  # [images, pieces, D, N]
    kept,  # [programs, steps, ROWS, WIDTH]: the states of one piece
    images,
    pieces,
    length,
    steps,
    order_stride,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SUMMARY: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Back through pieces, one by one. A summary: what a piece's own outputs ask of the state that it starts from."""
    PARTS: tl.constexpr = (GROUP + WIDTH - 1) // WIDTH
    G: tl.constexpr = D // GROUP
    group = tl.program_id(1) // PARTS
    part = tl.program_id(1) % PARTS
    d = group * GROUP + part * WIDTH + tl.arange(0, WIDTH)
    inside = d < (group + 1) * GROUP
    n = tl.arange(0, ROWS)
    own = d[None, :] * N + n[:, None]
    both = inside[None, :] & (n < N)[:, None]
    rates = tl.load(a + own, mask=both, other=0.0)
    shift = tl.load(bias + d, mask=inside, other=0.0) if BIAS else 0.0
    program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    kept += program * steps * (ROWS * WIDTH) + n[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    for piece in range(tl.program_id(0), images * pieces, tl.num_programs(0)):
        image = (piece // pieces).to(tl.int64)
        state = tl.cast(piece, tl.int64) * (D * N) + own
        first = piece % pieces * steps
        count = tl.minimum(steps, length - first)
        where = image * order_stride + first
        if not SUMMARY:
            h = tl.load(starts + state, mask=both, other=0.0)
            for s in range(count):
                tl.store(kept + s * (ROWS * WIDTH), h)
                place = image * length + (tl.load(order + where + s) if ORDER else first + s)
                x, dt, _ = _step(u, delta, shift, d, inside, place, D, BIAS, SOFTPLUS)
                bs = tl.load(b + (place * G + group) * N + n, mask=n < N, other=0.0)
                h = tl.exp2(rates * (dt * LOG2E)[None, :]) * h + bs[:, None] * (dt * x)[None, :]
            tl.debug_barrier()
        grad = tl.zeros((ROWS, WIDTH), tl.float32)
        if not SUMMARY:
            grad = tl.load(ends + state, mask=both, other=0.0)
        to_a = tl.zeros((ROWS, WIDTH), tl.float32)
        for i in range(count):
            s = count - 1 - i
            place = image * length + (tl.load(order + where + s) if ORDER else first + s)
            x, dt, slope = _step(u, delta, shift, d, inside, place, D, BIAS, SOFTPLUS)
            asked = tl.load(y_grad + place * D + d, mask=inside, other=0.0)
            cs = tl.load(c + (place * G + group) * N + n, mask=n < N, other=0.0)
            decay = tl.exp2(rates * (dt * LOG2E)[None, :])
            grad += cs[:, None] * asked[None, :]
            if not SUMMARY:
                bs = tl.load(b + (place * G + group) * N + n, mask=n < N, other=0.0)
                before = tl.load(kept + s * (ROWS * WIDTH))
                after = decay * before + bs[:, None] * (dt * x)[None, :]
                by_b = tl.sum(grad * bs[:, None], 0)
                row = rows_grad + ((part * images + image) * length + (place - image * length)) * (G * 2 * N)
                row += group * (2 * N) + n
                tl.store(row, tl.sum(grad * (dt * x)[None, :], 1), mask=n < N)
                tl.store(row + N, tl.sum(after * asked[None, :], 1), mask=n < N)
                exponent = grad * decay * before
                to_a += exponent * dt[None, :]
                to_dt = x * by_b + tl.sum(exponent * rates, 0)
                so_far = tl.load(u_grad + place * D + d, mask=inside, other=0.0)
                tl.store(u_grad + place * D + d, so_far + dt * by_b, mask=inside)
                tl.store(delta_grad + place * D + d, to_dt * slope, mask=inside)
            grad *= decay
        if SUMMARY:
            tl.store(ends + state, grad, mask=both)
        else:
            tl.store(a_grad + state, to_a, mask=both)
            tl.debug_barrier()


def scan_gradients(
    out_grad, state_grad, u, delta, A, B, C, bias, softplus, order, state, u_grad
) -> tuple[torch.Tensor, ...]:
    """`xrk.kernels.scan.backward.scan_gradients` for float32."""
    batch, length, channels = u.shape
    groups, states = B.shape[1], A.shape[1]
    group = channels // groups
    out_grad, u, delta, A = (t.contiguous() for t in (out_grad, u, delta, A))
    B, C = (t.transpose(1, 2).contiguous() for t in (B, C))
    # What is not there is never read: any tensor stands for it.
    given_bias, places = (u if t is None else t.contiguous() for t in (bias, order))
    steps = min(BACK["steps"], length)
    pieces = triton.cdiv(length, steps)
    starts = u.new_empty(batch, pieces, channels, states)
    sums = u.new_empty(batch, pieces, channels)
    switches = {"BIAS": bias is not None, "SOFTPLUS": softplus, "ORDER": order is not None}
    stride = length if places.ndim == 2 and order is not None else 0
    # The states forwards: with the scan's own summaries.
    config = walk_configuration(group, states)
    rows = F.pad(torch.cat([B, C], -1), (0, packed_width(2 * states, u.dtype) - 2 * states)).contiguous()
    blocks = groups * triton.cdiv(group, config["WIDTH"] * config["BLOCKS"])
    constants = {"D": channels, "GROUP": group, "N": states} | packing(u.dtype) | config | switches
    walk_pieces[(batch * pieces, blocks)](
        *(u, delta, rows, A, u, given_bias, u, places, sums, starts, u),
        *(pieces, length, steps, stride),
        **constants,
        SUMMARY=True,
        SKIP=False,
        GATE=False,
        enable_fp_fusion=True,
    )
    carry_states(sums, starts, A, False, state)
    # What is asked of them backwards: summaries, carried from the last piece to the first.
    config = back_configuration(states)
    width = config["WIDTH"]
    parts = triton.cdiv(group, width)
    programs = min(batch * pieces, max(1, BACK["programs"] // (groups * parts)))
    ends = torch.empty_like(starts)
    delta_grad, a_grad = torch.empty_like(delta), torch.empty_like(starts)
    rows_grad = u.new_empty(parts, batch, length, groups, 2 * states)
    kept = u.new_empty(programs * groups * parts, steps, config["ROWS"], width)
    tensors = (u, delta, B, C, A, given_bias, places, out_grad, starts, ends, u_grad, delta_grad, rows_grad, a_grad)
    sizes = (batch, pieces, length, steps, stride)
    constants = {"D": channels, "GROUP": group, "N": states} | config | switches
    grid = (programs, groups * parts)
    walk_back[grid](*tensors, kept, *sizes, **constants, SUMMARY=True, enable_fp_fusion=True)
    turned = ends.flip(1).contiguous()
    start_grad = carry_states(sums.flip(1).contiguous(), turned, A, False, state_grad)
    ends = turned.flip(1).contiguous()
    tensors = (*tensors[:9], ends, *tensors[10:])
    walk_back[grid](*tensors, kept, *sizes, **constants, SUMMARY=False, enable_fp_fusion=True)
    B_grad, C_grad = rows_grad.sum(0).transpose(1, 2).split(states, -1)
    return delta_grad, a_grad.sum((0, 1)), B_grad, C_grad, start_grad


def back_configuration(states: int) -> dict[str, int]:
    """A program's block: all states (ROWS, a power of 2) of WIDTH channels."""
    rows = triton.next_power_of_2(states)
    width = min(BACK["channels"], BACK["values"] // rows)
    return {"ROWS": rows, "WIDTH": width, "num_warps": BACK["num_warps"]}
