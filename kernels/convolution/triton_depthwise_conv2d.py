"""Triton kernel of depthwise_conv2d: one program makes a block of pixels and channels of one output row."""

import torch
import triton
import triton.language as tl
from xrk.kernels.launch import DEPTHWISE, depthwise_blocks


@triton.jit
def depthwise_conv2d_kernel(
    x,
    taps,
    out,
    H,
    W,
    C,
    K: tl.constexpr,
    DILATION: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SILU: tl.constexpr,
):
    # One flat grid: its other axes end at 65535.
    program = tl.program_id(0)
    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks_w = tl.cdiv(W, BLOCK_W)
    c = (program % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    program = program // blocks_c
    w = (program % blocks_w) * BLOCK_W + tl.arange(0, BLOCK_W)
    line = program // blocks_w  # over the rows of all images
    h = line % H
    mask_c = c < C
    sums = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    sums += tl.load(taps + K * K * C + c, mask=mask_c, other=0.0)[None, :]
    for u in tl.static_range(K):
        offset = (u - K // 2) * DILATION
        # The row's own condition goes into the limit of the columns: outside the map there are none.
        limit = tl.where((h + offset >= 0) & (h + offset < H), W, 0)
        row = x + (line + offset).to(tl.int64) * W * C
        for v in tl.static_range(K):
            column = w + (v - K // 2) * DILATION
            mask = ((column >= 0) & (column < limit))[:, None] & mask_c[None, :]
            values = tl.load(row + column.to(tl.int64)[:, None] * C + c[None, :], mask=mask, other=0.0)
            tap = tl.load(taps + (u * K + v) * C + c, mask=mask_c, other=0.0)
            sums += values.to(tl.float32) * tap[None, :]
    if SILU:
        sums = sums / (1.0 + tl.exp(-sums))
    target = out + line.to(tl.int64) * W * C + w.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=(w < W)[:, None] & mask_c[None, :])


def depthwise_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int, silu: bool, out: torch.Tensor
) -> None:
    """Launches the kernel; the arguments have been checked, x and out are channels-last."""
    batch, channels, height, width = x.shape
    kernel = weight.shape[-1]
    # One row of channels for each tap, then the bias.
    taps = torch.zeros(kernel * kernel + 1, channels, dtype=torch.float32, device=x.device)
    taps[:-1] = weight.reshape(channels, -1).T
    if bias is not None:
        taps[-1] = bias
    block_c, block_w = depthwise_blocks(channels)
    programs = batch * height * triton.cdiv(width, block_w) * triton.cdiv(channels, block_c)
    depthwise_conv2d_kernel[(programs,)](
        x,
        taps,
        out,
        height,
        width,
        channels,
        K=kernel,
        DILATION=dilation,
        BLOCK_W=block_w,
        BLOCK_C=block_c,
        SILU=silu,
        num_warps=DEPTHWISE["num_warps"],
        enable_fp_fusion=True,
    )
