"""The scan of sequences on CUDA: each is cut in pieces that are summarised side by side, carried, and walked again."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from xrk.kernels.arguments import compute_dtype
from xrk.kernels.scan.launch import piece_length, walk_configuration
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
def walk_pieces(
    u,  # [images, L, D]
    delta,  # [images, L, D]
    rows,  # [images, L, G, 2N and padding], of u's dtype: B and C of each group of channels
    a,  # [D, N]
    skip,  # [D], if SKIP
    bias,  # [D], if BIAS
    z,  # [images, L, D], if GATE
    order,  # [L] (order_stride 0) or [images, L] (order_stride L), if ORDER
    sums,  # [images, pieces, D]: written by a summary
    states,  # [images, pieces, D, N]: the starts, then the ends; a summary writes the ends only
    y,  # [images, L, D]
    pieces,
    length,
    steps,
    order_stride,
    D: tl.constexpr,
    GROUP: tl.constexpr,  # channels of a group, D / G
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    BFLOAT: tl.constexpr,
    SUMMARY: tl.constexpr,
    SKIP: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATE: tl.constexpr,
    ORDER: tl.constexpr,
):
    """One piece of one sequence, step by step: its values from its start (or its summary from zero)."""
    WORDS: tl.constexpr = (2 * N * BITS + 63) // 64
    FULL: tl.constexpr = GROUP % (WIDTH * BLOCKS) == 0
    PARTS: tl.constexpr = (GROUP + WIDTH * BLOCKS - 1) // (WIDTH * BLOCKS)
    piece = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) // PARTS
    channel = tl.program_id(1) % PARTS * (WIDTH * BLOCKS)
    end = (group + 1) * GROUP
    d = ()
    b = ()
    skips = ()
    total = ()
    for j in tl.static_range(BLOCKS):
        d += (group * GROUP + channel + j * WIDTH + tl.arange(0, WIDTH),)
        total += (tl.zeros((WIDTH,), tl.float32),)
        if BIAS:
            b += (tl.load(bias + d[j], mask=d[j] < end, other=0.0).to(tl.float32) * LOG2E,)
        if SKIP:
            skips += (tl.load(skip + d[j], mask=d[j] < end, other=0.0).to(tl.float32),)
    rates = ()
    h = ()
    states += piece * (D * N)
    for n in tl.static_range(N):
        for j in tl.static_range(BLOCKS):
            rates += (tl.load(a + d[j] * N + n, mask=d[j] < end, other=0.0).to(tl.float32),)
            if SUMMARY:
                h += (tl.zeros((WIDTH,), tl.float32),)
            else:
                h += (tl.load(states + d[j] * N + n, mask=d[j] < end, other=0.0),)
    image = piece // pieces
    first = piece % pieces * steps
    row = rows.to(tl.pointer_type(tl.int64)) + group * WORDS
    for s in range(first, tl.minimum(first + steps, length)):
        place = s
        if ORDER:
            place = tl.load(order + image * order_stride + s)
        place += image * length
        values = load_row(row + place * (D // GROUP * WORDS), 2 * N, BITS, BFLOAT)
        x = ()
        t = ()
        out = ()
        for j in tl.static_range(BLOCKS):
            x += (tl.load(u + place * D + d[j], mask=None if FULL else d[j] < end).to(tl.float32),)
            step = tl.load(delta + place * D + d[j], mask=None if FULL else d[j] < end).to(tl.float32) * LOG2E
            if BIAS:
                step += b[j]
            if SOFTPLUS:
                step = log2_1p_exp2(step, BITS == 32)
            t += (step,)
            out += (x[j] * skips[j] if SKIP else tl.zeros((WIDTH,), tl.float32),)
        h, out = advance(h, rates, t, x, out, values, 0, N, BLOCKS, not SUMMARY)
        if SUMMARY:
            more = ()
            for j in tl.static_range(BLOCKS):
                more += (total[j] + t[j],)
            total = more
        else:
            for j in tl.static_range(BLOCKS):
                value = out[j]
                if GATE:
                    gate = tl.load(z + place * D + d[j], mask=None if FULL else d[j] < end).to(tl.float32)
                    value *= gate / (1.0 + tl.exp2(gate * -LOG2E))
                tl.store(y + place * D + d[j], value.to(y.dtype.element_ty), mask=None if FULL else d[j] < end)
    for n in tl.static_range(N):
        for j in tl.static_range(BLOCKS):
            tl.store(states + d[j] * N + n, h[n * BLOCKS + j], mask=d[j] < end)
    if SUMMARY:
        for j in tl.static_range(BLOCKS):
            tl.store(sums + piece * D + d[j], total[j] * LN2, mask=d[j] < end)


def selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, order, initial_state, out) -> torch.Tensor:
    """Fills out, and returns the last state, of `xrk.kernels.selective_scan` for checked arguments of 16 or 32 bits."""
    batch, channels, length = u.shape
    states = A.shape[1]
    dtype = compute_dtype(u.dtype)
    values, steps, gates = (None if t is None else t.transpose(1, 2).contiguous() for t in (u, delta, z))
    B, C = (m.to(u.dtype).reshape(batch, -1, states, length).permute(0, 3, 1, 2) for m in (B, C))
    groups = B.shape[2]
    padding = packed_width(2 * states, u.dtype) - 2 * states
    rows = F.pad(torch.cat([B, C], -1), (0, padding)).contiguous()  # cat may answer in channels_last
    config = walk_configuration(channels // groups, states)
    blocks = groups * triton.cdiv(channels // groups, config["WIDTH"] * config["BLOCKS"])
    piece = piece_length(length, batch * blocks)
    pieces = triton.cdiv(length, piece)
    sums = torch.empty(batch, pieces, channels, dtype=dtype, device=u.device)
    line_states = sums.new_empty(batch, pieces, channels, states)
    target = out.transpose(1, 2)
    y = target if target.is_contiguous() else torch.empty_like(values)
    # What is not there is never read: any tensor stands for it.
    skip, bias, gate, places = (values if t is None else t.contiguous() for t in (D, delta_bias, gates, order))
    tensors = (values, steps, rows, A.contiguous(), skip, bias, gate, places, sums, line_states, y)
    sizes = (pieces, length, piece, length if places.ndim == 2 else 0)
    constants = {"D": channels, "GROUP": channels // groups, "N": states, "BIAS": delta_bias is not None}
    constants |= {"SOFTPLUS": delta_softplus, "ORDER": order is not None} | packing(u.dtype) | config
    summary = {"SUMMARY": True, "SKIP": False, "GATE": False}
    final = {"SUMMARY": False, "SKIP": D is not None, "GATE": z is not None}
    if pieces == 1:
        line_states.zero_() if initial_state is None else line_states.copy_(initial_state[:, None])
    else:
        walk_pieces[(batch * pieces, blocks)](*tensors, *sizes, **constants, **summary, enable_fp_fusion=True)
        last = carry_states(sums, line_states, A, False, initial_state)
    walk_pieces[(batch * pieces, blocks)](*tensors, *sizes, **constants, **final, enable_fp_fusion=True)
    if y is not target:
        target.copy_(y)
    return line_states[:, 0] if pieces == 1 else last
