"""Triton kernel of layer_norm: one program normalises a block of pixels, each read once and written once."""

import torch
import triton
import triton.language as tl
from xrk.kernels.launch import LAYER_NORM, layer_norm_blocks


@triton.jit
def layer_norm_kernel(
    x,
    weight,
    bias,
    gate,
    out,
    pixels,
    x_stride,
    gate_stride,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    inside = (p < pixels)[:, None] & (c < C)[None, :]
    v = tl.load(x + p[:, None] * x_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    # Deviations from the first channel are as exact as the values, however large their common mean is.
    base = tl.load(x + p * x_stride, mask=p < pixels, other=0.0).to(tl.float32)
    d = tl.where(inside, v - base[:, None], 0.0)
    d = tl.where(inside, d - (tl.sum(d, 1) / C)[:, None], 0.0)
    y = d * (1.0 / tl.sqrt(tl.sum(d * d, 1) / C + eps))[:, None]
    if HAS_WEIGHT:
        y = y * tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y = y + tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE:
        z = tl.load(gate + p[:, None] * gate_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
        y = y * (z / (1.0 + tl.exp(-z)))
    tl.store(out + p[:, None] * C + c[None, :], y.to(out.dtype.element_ty), mask=inside)


def layer_norm(
    rows: torch.Tensor,
    stride: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_stride: int,
    eps: float,
    out: torch.Tensor,
) -> None:
    """Launches the kernel on rows that start `stride` values apart; the arguments have been checked."""
    channels = rows.shape[-1]
    pixels = rows.numel() // channels
    block_c, block_p = layer_norm_blocks(channels)
    layer_norm_kernel[(triton.cdiv(pixels, block_p),)](
        rows,
        weight if weight is not None else rows,
        bias if bias is not None else rows,
        gate if gate is not None else rows,
        out,
        pixels,
        stride,
        gate_stride,
        eps,
        C=channels,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None,
        num_warps=LAYER_NORM["num_warps"],
        enable_fp_fusion=True,
    )
