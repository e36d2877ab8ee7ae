"""Triton kernel of deform_conv2d: a program makes a block of output pixels and of outputs, and holds no column.

For each tap and each run of channels that one offset moves, the four pixels around every position are gathered, put
together in float32 and multiplied with the tap's weights on the tensor cores.
"""

import torch
import triton
import triton.language as tl
from xrk.kernels.convolution.triton_conv2d import operand
from xrk.kernels.launch import DEFORM, deform_blocks


@triton.jit
def _whole(moved):
    """Whole pixels and the rest; what is further than any map is large is outside, what is no number stays so."""
    floor = tl.floor(moved)
    rest = tl.where(tl.abs(moved) >= 1073741824.0, 0.0, moved - floor)
    return tl.minimum(tl.maximum(floor, -1073741824.0), 1073741824.0).to(tl.int32), rest


@triton.jit
def _corner(source, row, column, share, H, W, C, c, real, inside):
    """[BLOCK_P, BLOCK_C]: the values of one pixel for each position, times its share."""
    there = inside & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    at = (row.to(tl.int64) * W + column) * C
    values = tl.load(source[:, None] + at[:, None] + c[None, :], mask=there[:, None] & real[None, :], other=0.0)
    return values.to(tl.float32) * share[:, None]


@triton.jit
def deform_conv2d_kernel(
    x,
    offset,
    mask,
    weight,  # (outputs, taps, channels of a group)
    bias,
    out,
    pixels,  # of all images
    H,
    W,
    C,
    HO,
    WO,
    first_row,
    offset_image,
    offset_row,
    offset_pixel,
    mask_image,
    mask_row,
    mask_pixel,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    KW: tl.constexpr,
    TAPS: tl.constexpr,
    OUT: tl.constexpr,  # outputs of a group
    INPUTS: tl.constexpr,  # channels of a group
    MOVED: tl.constexpr,  # channels of a deformable group
    RUN: tl.constexpr,  # channels that one offset moves and one group sees, or a part of them
    GROUPS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One flat grid: its other axes end at 65535.
    program = tl.program_id(0)
    blocks_o = tl.cdiv(OUT, BLOCK_O)
    o = (program % blocks_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    program = program // blocks_o
    group = program % GROUPS
    p = (program // GROUPS).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < pixels
    image, place = p // (HO * WO), p % (HO * WO)
    i, j = (place // WO).to(tl.int32), (place % WO).to(tl.int32)
    offset += image * offset_image + i.to(tl.int64) * offset_row + j.to(tl.int64) * offset_pixel
    if HAS_MASK:
        mask += image * mask_image + i.to(tl.int64) * mask_row + j.to(tl.int64) * mask_pixel
    source = x + image * H * W * C
    weight += group * OUT * TAPS * INPUTS
    lane = tl.arange(0, BLOCK_C)
    real_o = o < OUT
    sums = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for tap in range(TAPS):
        row = i * STRIDE + first_row - PADDING + (tap // KW) * DILATION
        column = j * STRIDE - PADDING + (tap % KW) * DILATION
        for run in range(INPUTS // RUN):
            channel = group * INPUTS + run * RUN
            number = (channel // MOVED) * TAPS + tap
            down, y = _whole(tl.load(offset + 2 * number, mask=inside, other=0.0).to(tl.float32))
            right, z = _whole(tl.load(offset + 2 * number + 1, mask=inside, other=0.0).to(tl.float32))
            top, left = row + down, column + right
            share = tl.full((BLOCK_P,), 1.0, tl.float32)
            if HAS_MASK:
                share = tl.load(mask + number, mask=inside, other=0.0).to(tl.float32)
            for first in tl.static_range(0, RUN, BLOCK_C):
                real = first + lane < RUN
                c = channel + first + lane
                sample = _corner(source, top, left, (1.0 - y) * (1.0 - z) * share, H, W, C, c, real, inside)
                sample += _corner(source, top, left + 1, (1.0 - y) * z * share, H, W, C, c, real, inside)
                sample += _corner(source, top + 1, left, y * (1.0 - z) * share, H, W, C, c, real, inside)
                sample += _corner(source, top + 1, left + 1, y * z * share, H, W, C, c, real, inside)
                taps = weight + o[None, :] * (TAPS * INPUTS) + tap * INPUTS + run * RUN + (first + lane)[:, None]
                w = tl.load(taps, mask=real[:, None] & real_o[None, :], other=0.0)
                sums = tl.dot(sample.to(OPERAND), w.to(OPERAND), sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias + group * OUT + o, mask=real_o, other=0.0).to(tl.float32)[None, :]
    target = out + p[:, None] * (GROUPS * OUT) + group * OUT + o[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=inside[:, None] & real_o[None, :])


def deform_conv2d(
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    first: int,
    out: torch.Tensor,
) -> None:
    """Launches the kernel; the arguments have been checked, x and out are channels-last, offset's and mask's channels
    lie together.
    """
    batch, channels, height, width = x.shape
    outputs, inputs, kh, kw = weight.shape
    taps, groups = kh * kw, channels // inputs
    moved = channels // (offset.shape[1] // (2 * taps))
    blocks = deform_blocks(inputs, moved, outputs // groups)
    pixels = batch * out.shape[2] * out.shape[3]
    programs = triton.cdiv(pixels, blocks["BLOCK_P"]) * groups * triton.cdiv(outputs // groups, blocks["BLOCK_O"])
    given = offset if mask is None else mask
    deform_conv2d_kernel[(programs,)](
        x,
        offset,
        given,
        weight.flatten(2).transpose(1, 2).contiguous(),
        weight if bias is None else bias.contiguous(),
        out,
        pixels,
        height,
        width,
        channels,
        out.shape[2],
        out.shape[3],
        first,
        *(offset.stride(axis) for axis in (0, 2, 3)),
        *(given.stride(axis) for axis in (0, 2, 3)),
        STRIDE=stride,
        PADDING=padding,
        DILATION=dilation,
        KW=kw,
        TAPS=taps,
        OUT=outputs // groups,
        INPUTS=inputs,
        MOVED=moved,
        GROUPS=groups,
        HAS_MASK=mask is not None,
        HAS_BIAS=bias is not None,
        OPERAND=operand(x, deform_conv2d_kernel),
        **blocks,
        num_warps=DEFORM["num_warps"],
        num_stages=1,
        enable_fp_fusion=True,
    )
