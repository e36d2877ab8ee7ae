"""Triton kernels of group_norm: partial summaries of chunks of pixels, their merging into groups, and the application.

One program for each (image, group) would leave most of a device idle where a batch is one image; a chunk of pixels has
a program of its own instead, so that the map is read by all multiprocessors at once.
"""

import torch
import triton
import triton.language as tl
from xrk.kernels.launch import GROUP_NORM, group_norm_blocks, group_norm_chunk


@triton.jit
def group_norm_partial_kernel(
    x,  # [images, pixels, C]
    parts,  # [images, chunks, C, 4] of float32: count, mean, what its rounding left, squared deviations
    pixels,
    chunks,
    chunk,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    program = tl.program_id(0)
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = (program % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    program = program // blocks_c
    first = (program % chunks).to(tl.int64) * chunk
    here = tl.minimum(chunk, pixels - first).to(tl.int32)
    start = x + ((program // chunks).to(tl.int64) * pixels + first) * C
    rows = tl.arange(0, BLOCK_P)
    mask_c = c < C
    # Deviations from a pixel nearby are as exact as the values, however large their common mean is; Welford's update
    # in each lane then costs no digits where that pixel is a dead one.
    base = tl.load(start + c, mask=mask_c, other=0.0).to(tl.float32)
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    seen = 0.0
    for done in range(0, here, BLOCK_P):
        inside = (rows < here - done)[:, None] & mask_c[None, :]
        block = start + tl.cast(done, tl.int64) * C
        v = tl.load(block + rows[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32) - base[None, :]
        seen += 1.0
        d = tl.where(inside, v - mean, 0.0)
        mean += d * (1.0 / seen)
        squares += d * (v - mean)
    count = tl.where(rows < here, (here - rows + BLOCK_P - 1) // BLOCK_P, 0).to(tl.float32)[:, None]
    total = tl.zeros((BLOCK_C,), tl.float32) + here
    middle = tl.sum(mean * count, 0) / total
    off = mean - middle[None, :]
    squares = tl.sum(squares + off * off * count, 0)
    whole = base.to(tl.float64) + middle.to(tl.float64)
    rounded = whole.to(tl.float32)
    at = parts + (program.to(tl.int64) * C + c) * 4
    tl.store(at, total, mask=mask_c)
    tl.store(at + 1, rounded, mask=mask_c)
    tl.store(at + 2, (whole - rounded.to(tl.float64)).to(tl.float32), mask=mask_c)
    tl.store(at + 3, squares, mask=mask_c)


@triton.jit
def group_norm_merge_kernel(
    parts,  # [images, chunks, groups * PER_GROUP, 4] of float32, as above
    state,  # [images, groups, 3] of float64
    chunks,
    groups,
    PER_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One group of one image. In float64, from deviations from its first mean, sums of squares lose nothing."""
    program = tl.program_id(0)
    group = program % groups
    items = chunks * PER_GROUP
    start = parts + ((program // groups).to(tl.int64) * chunks * groups + group) * PER_GROUP * 4
    base = tl.load(start + 1).to(tl.float64)
    i = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.float64)
    sums = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    for done in range(0, items, BLOCK):
        item = done + i
        inside = item < items
        part = (item // PER_GROUP).to(tl.int64) * groups * PER_GROUP + item % PER_GROUP
        n = tl.load(start + part * 4, mask=inside, other=0.0).to(tl.float64)
        d = tl.load(start + part * 4 + 1, mask=inside, other=0.0).to(tl.float64) - base
        d += tl.load(start + part * 4 + 2, mask=inside, other=0.0).to(tl.float64)
        count += n
        sums += n * d
        squares += tl.load(start + part * 4 + 3, mask=inside, other=0.0).to(tl.float64) + n * d * d
    total = tl.sum(count, 0)
    shift = tl.sum(sums, 0) / total
    tl.store(state + program * 3, total)
    tl.store(state + program * 3 + 1, base + shift)
    tl.store(state + program * 3 + 2, tl.sum(squares, 0) - total * shift * shift)


@triton.jit
def group_norm_apply_kernel(
    x,
    state,  # [images, groups, 3] of float64
    weight,
    bias,
    out,
    pixels,
    chunks,
    eps,
    C: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    program = tl.program_id(0)
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = (program % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    program = program // blocks_c
    first = (program % chunks).to(tl.int64) * (BLOCKS * BLOCK_P)
    image = program // chunks
    mask_c = c < C
    at = state + (image * (C // PER_GROUP) + c // PER_GROUP) * 3
    count = tl.load(at, mask=mask_c, other=1.0).to(tl.float32)
    mean = tl.load(at + 1, mask=mask_c, other=0.0)
    rounded = mean.to(tl.float32)
    rest = (mean - rounded.to(tl.float64)).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.load(at + 2, mask=mask_c, other=0.0).to(tl.float32) / count + eps)
    if HAS_WEIGHT:
        scale *= tl.load(weight + c, mask=mask_c, other=0.0).to(tl.float32)
    shift = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_BIAS:
        shift += tl.load(bias + c, mask=mask_c, other=0.0).to(tl.float32)
    rows = tl.arange(0, BLOCK_P)
    start = (image.to(tl.int64) * pixels + first) * C
    here = rows[:, None] * C + c[None, :]
    for block in range(BLOCKS):
        inside = (rows < pixels - first - block * BLOCK_P)[:, None] & mask_c[None, :]
        v = tl.load(x + start + here, mask=inside, other=0.0).to(tl.float32)
        y = ((v - rounded[None, :]) - rest[None, :]) * scale[None, :] + shift[None, :]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(out + start + here, y.to(out.dtype.element_ty), mask=inside)
        start += BLOCK_P * C


def summarise(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """`group_norm_summarise`; the arguments have been checked, x is channels-last."""
    batch, channels, height, width = x.shape
    pixels = height * width
    block_c, block_p = group_norm_blocks(channels)
    chunk = group_norm_chunk(batch, pixels, channels)
    chunks = triton.cdiv(pixels, chunk)
    parts = torch.empty(batch, chunks, channels, 4, dtype=torch.float32, device=x.device)
    group_norm_partial_kernel[(batch * chunks * triton.cdiv(channels, block_c),)](
        x,
        parts,
        pixels,
        chunks,
        chunk,
        C=channels,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=GROUP_NORM["num_warps"],
        enable_fp_fusion=True,
    )
    return merge(parts, num_groups)


def merge(parts: torch.Tensor, num_groups: int) -> torch.Tensor:
    """The groups' summaries (B, G, 3) from those of chunks and channels (B, chunks, C, 4)."""
    batch, chunks, channels, _ = parts.shape
    state = torch.empty(batch, num_groups, 3, dtype=torch.float64, device=parts.device)
    group_norm_merge_kernel[(batch * num_groups,)](
        parts,
        state,
        chunks,
        num_groups,
        PER_GROUP=channels // num_groups,
        BLOCK=GROUP_NORM["merged"],
        num_warps=GROUP_NORM["num_warps"],
        enable_fp_fusion=True,
    )
    return state


def apply(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    silu: bool,
    out: torch.Tensor,
) -> None:
    """Launches `group_norm_apply` on a map or a band; the arguments have been checked, x and out are channels-last."""
    batch, channels, height, width = x.shape
    block_c, block_p = group_norm_blocks(channels)
    chunks = triton.cdiv(height * width, block_p * GROUP_NORM["blocks"])
    group_norm_apply_kernel[(batch * chunks * triton.cdiv(channels, block_c),)](
        x,
        state.contiguous(),
        weight.contiguous() if weight is not None else x,
        bias.contiguous() if bias is not None else x,
        out,
        height * width,
        chunks,
        eps,
        C=channels,
        PER_GROUP=channels // state.shape[1],
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        BLOCKS=GROUP_NORM["blocks"],
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        SILU=silu,
        num_warps=GROUP_NORM["num_warps"],
        enable_fp_fusion=True,
    )
