"""Triton kernels of conv2d and conv2d_pair: a program makes a tile of pixels with all their channels, and what follows.

Few channels make a convolution a matter of memory: each map is read once and written once here, the neighbours of a
pixel coming from the first-level cache. Many input and output channels go through the tensor cores.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from xrk.kernels.launch import CONV2D, CONV2D_PAIR, conv2d_blocks, conv2d_pair_warps
from xrk.kernels.normalization.triton_group_norm import merge

__all__ = ["conv2d", "conv2d_pair", "merge"]


@triton.jit
def _correlate(
    source,  # [rows, columns, C] around the tile's first pixel
    offset,  # [PIXELS]: of each pixel from that one
    i,  # [PIXELS]: its row, of `rows`
    j,  # [PIXELS]: its column, of `columns`
    rows,
    columns,
    weight,  # [OUT, K, K, C]
    C: tl.constexpr,
    OUT: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PIXELS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """[PIXELS, BLOCK_O]: each pixel's neighbours times the taps, zeros beyond the rows and columns."""
    o = tl.arange(0, BLOCK_O)
    c = tl.arange(0, BLOCK_C)
    sums = tl.zeros((PIXELS, BLOCK_C if OUT == 1 else BLOCK_O), tl.float32)
    for u in range(K):
        for v in tl.static_range(K):
            row, column = i + (u - K // 2), j + (v - K // 2)
            inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
            at = source + (offset + (u - K // 2) * columns + (v - K // 2)) * C
            taps = weight + (u * K + v) * C
            if C == 1:
                value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                tap = tl.load(taps + o * (K * K), mask=o < OUT, other=0.0).to(tl.float32)
                sums += value[:, None] * tap[None, :]
            else:
                for first in tl.static_range(0, C, BLOCK_C):
                    real = first + c < C
                    mask = inside[:, None] & real[None, :]
                    value = tl.load(at[:, None] + first + c[None, :], mask=mask, other=0.0)
                    if OUT == 1:
                        tap = tl.load(taps + first + c, mask=real, other=0.0).to(tl.float32)
                        sums += value.to(tl.float32) * tap[None, :]
                    else:
                        mask = real[:, None] & (o < OUT)[None, :]
                        tap = tl.load(taps + first + c[:, None] + o[None, :] * (K * K * C), mask=mask, other=0.0)
                        sums = tl.dot(value.to(OPERAND), tap.to(OPERAND), sums, input_precision="ieee")
    if OUT == 1:
        sums = tl.sum(sums, 1)[:, None]
    return sums


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr, negative_slope):
    if ACTIVATION == "relu":
        y = tl.where(y < 0.0, 0.0, y)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(y < 0.0, y * negative_slope, y)
    elif ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "sigmoid":
        y = 1.0 / (1.0 + tl.exp(-y))
    return y


@triton.jit
def _finish(
    sums,
    bias,
    residual,
    at,  # [PIXELS, BLOCK_O]: where the tile's values lie in a map of the output's shape
    mask,
    negative_slope,
    OUT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ADD_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The sums with bias, activation and residual."""
    o = tl.arange(0, BLOCK_O)
    if HAS_BIAS:
        sums += tl.load(bias + o, mask=o < OUT, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL and ADD_FIRST:
        sums += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    y = _activate(sums, ACTIVATION, negative_slope)
    if HAS_RESIDUAL and not ADD_FIRST:
        y += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def conv2d_kernel(
    x,
    weight,
    bias,
    residual,
    out,
    parts,  # [images, tiles, OUT, 4] of float32, as group_norm's
    H,
    W,
    tiles_h,
    tiles_w,
    negative_slope,
    C: tl.constexpr,
    OUT: tl.constexpr,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ADD_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SUMMARISE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    tile = tl.program_id(0)
    first_j = (tile % tiles_w) * BLOCK_W
    first_i = (tile // tiles_w) % tiles_h * BLOCK_H
    image = tile // (tiles_w * tiles_h)
    start = (image.to(tl.int64) * H + first_i) * W + first_j
    p = tl.arange(0, BLOCK_H * BLOCK_W)
    i, j = first_i + p // BLOCK_W, first_j + p % BLOCK_W
    offset = p // BLOCK_W * W + p % BLOCK_W
    sums = _correlate(
        x + start * C, offset, i, j, H, W, weight, C, OUT, K, BLOCK_C, BLOCK_O, BLOCK_H * BLOCK_W, OPERAND
    )
    o = tl.arange(0, BLOCK_O)
    real = (i < H) & (j < W)
    mask = real[:, None] & (o < OUT)[None, :]
    at = start * OUT + offset[:, None] * OUT + o[None, :]
    y = _finish(
        sums, bias, residual, at, mask, negative_slope, OUT, BLOCK_O, HAS_BIAS, HAS_RESIDUAL, ADD_FIRST, ACTIVATION
    )
    stored = y.to(out.dtype.element_ty)
    tl.store(out + at, stored, mask=mask)
    if SUMMARISE:
        # Of what is stored, as if it were read again. The mean of deviations from the mean is what its rounding left.
        value = stored.to(tl.float32)
        count = (tl.minimum(BLOCK_H, H - first_i) * tl.minimum(BLOCK_W, W - first_j)).to(tl.float32)
        mean = tl.sum(tl.where(mask, value, 0.0), 0) / count
        d = tl.where(mask, value - mean[None, :], 0.0)
        rest = tl.sum(d, 0) / count
        target = parts + (tile.to(tl.int64) * OUT + o) * 4
        tl.store(target, tl.zeros((BLOCK_O,), tl.float32) + count, mask=o < OUT)
        tl.store(target + 1, mean, mask=o < OUT)
        tl.store(target + 2, rest, mask=o < OUT)
        tl.store(target + 3, tl.sum(d * d, 0) - count * rest * rest, mask=o < OUT)


@triton.jit
def conv2d_pair_kernel(
    x,
    weight1,
    bias1,
    weight2,
    bias2,
    residual,
    out,
    scratch,  # [programs, (BLOCK_H + 2) * (BLOCK_W + 2), M]
    H,
    W,
    tiles,
    tiles_h,
    tiles_w,
    negative_slope,
    C: tl.constexpr,
    M: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    HAS_BIAS1: tl.constexpr,
    HAS_BIAS2: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ADD_FIRST: tl.constexpr,
    ACTIVATION1: tl.constexpr,
    ACTIVATION2: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Two 3x3 in a row. The map between them is made tile by tile, a border of one pixel twice, and never leaves the
    cache: each program has a place for one tile of it and goes from tile to tile."""
    high: tl.constexpr = BLOCK_H + 2
    wide: tl.constexpr = BLOCK_W + 2
    place = scratch + tl.program_id(0).to(tl.int64) * (high * wide * M)
    q = tl.arange(0, PIXELS)
    m = tl.arange(0, BLOCK_M)
    o = tl.arange(0, BLOCK_O)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first_j = (tile % tiles_w) * BLOCK_W
        first_i = (tile // tiles_w) % tiles_h * BLOCK_H
        image = tl.cast(tile // (tiles_w * tiles_h), tl.int64)
        start = (image * H + first_i) * W + first_j
        for first in range(0, high * wide, PIXELS):
            row, column = (first + q) // wide - 1, (first + q) % wide - 1
            i, j = first_i + row, first_j + column
            sums = _correlate(
                x + start * C, row * W + column, i, j, H, W, weight1, C, M, 3, BLOCK_C, BLOCK_M, PIXELS, OPERAND
            )
            y = _finish(sums, bias1, x, q, m, negative_slope, M, BLOCK_M, HAS_BIAS1, False, False, ACTIVATION1)
            # Beyond the image are the zeros that the second convolution pads with.
            real = (i >= 0) & (i < H) & (j >= 0) & (j < W)
            y = tl.where(real[:, None], y, 0.0).to(scratch.dtype.element_ty)
            mask = (first + q < high * wide)[:, None] & (m < M)[None, :]
            tl.store(place + (first + q)[:, None] * M + m[None, :], y, mask=mask)
        tl.debug_barrier()
        for first in range(0, BLOCK_H * BLOCK_W, PIXELS):
            row, column = (first + q) // BLOCK_W, (first + q) % BLOCK_W
            local = (row + 1) * wide + column + 1
            sums = _correlate(
                place, local, row + 1, column + 1, high, wide, weight2, M, OUT, 3, BLOCK_K, BLOCK_O, PIXELS, OPERAND
            )
            mask = ((first_i + row < H) & (first_j + column < W))[:, None] & (o < OUT)[None, :]
            at = start * OUT + (row * W + column)[:, None] * OUT + o[None, :]
            y = _finish(
                sums,
                bias2,
                residual,
                at,
                mask,
                negative_slope,
                OUT,
                BLOCK_O,
                HAS_BIAS2,
                HAS_RESIDUAL,
                ADD_FIRST,
                ACTIVATION2,
            )
            tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)
        tl.debug_barrier()


def operand(x: torch.Tensor, kernel: Any) -> Any:
    """What the products' factors are: x's dtype, but float32 for bfloat16 where Triton's interpreter multiplies."""
    if x.dtype == torch.float16:
        return tl.float16
    compiles = isinstance(kernel, triton.JITFunction)
    return tl.bfloat16 if x.dtype == torch.bfloat16 and compiles else tl.float32


def taps(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The weights as [OUT, K, K, C] in memory, of x's dtype: weights that lie so already are not copied."""
    return weight.to(x.dtype).permute(0, 2, 3, 1).contiguous()


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
    add_first: bool,
    out: torch.Tensor,
    summarise: bool,
) -> torch.Tensor | None:
    """Launches the kernel; the arguments have been checked, the maps are channels-last, the output of x's size.

    Returns the summaries of the output's tiles and channels for `triton_group_norm.merge`, where asked for.
    """
    batch, channels, height, width = x.shape
    outputs, kernel = weight.shape[0], weight.shape[2]
    blocks = conv2d_blocks(channels, outputs)
    tiles_h, tiles_w = triton.cdiv(height, blocks["BLOCK_H"]), triton.cdiv(width, blocks["BLOCK_W"])
    parts = None
    if summarise:
        parts = torch.empty(batch, tiles_h * tiles_w, outputs, 4, dtype=torch.float32, device=x.device)
    conv2d_kernel[(batch * tiles_h * tiles_w,)](
        x,
        taps(weight, x),
        bias.contiguous() if bias is not None else x,
        residual if residual is not None else x,
        out,
        parts if parts is not None else x,
        height,
        width,
        tiles_h,
        tiles_w,
        negative_slope,
        C=channels,
        OUT=outputs,
        K=kernel,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ADD_FIRST=add_first,
        ACTIVATION=activation,
        SUMMARISE=summarise,
        OPERAND=operand(x, conv2d_kernel),
        num_warps=CONV2D["num_warps"],
        num_stages=1,
        enable_fp_fusion=True,
        **blocks,
    )
    return parts


def conv2d_pair(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    residual: torch.Tensor | None,
    activations: tuple[str | None, str | None],
    negative_slope: float,
    add_first: bool,
    out: torch.Tensor,
) -> None:
    """Launches the kernel; the arguments have been checked, the maps are channels-last."""
    batch, channels, height, width = x.shape
    between, outputs = weights[0].shape[0], weights[1].shape[0]
    high, wide = CONV2D_PAIR["BLOCK_H"], CONV2D_PAIR["BLOCK_W"]
    tiles_h, tiles_w = triton.cdiv(height, high), triton.cdiv(width, wide)
    tiles = batch * tiles_h * tiles_w
    programs = min(tiles, CONV2D_PAIR["programs"])
    scratch = torch.empty(programs, (high + 2) * (wide + 2), between, dtype=x.dtype, device=x.device)
    first, second = conv2d_blocks(channels, between), conv2d_blocks(between, outputs)
    conv2d_pair_kernel[(programs,)](
        x,
        taps(weights[0], x),
        biases[0].contiguous() if biases[0] is not None else x,
        taps(weights[1], x),
        biases[1].contiguous() if biases[1] is not None else x,
        residual if residual is not None else x,
        out,
        scratch,
        height,
        width,
        tiles,
        tiles_h,
        tiles_w,
        negative_slope,
        C=channels,
        M=between,
        OUT=outputs,
        BLOCK_H=high,
        BLOCK_W=wide,
        PIXELS=CONV2D_PAIR["PIXELS"],
        BLOCK_C=first["BLOCK_C"],
        BLOCK_K=second["BLOCK_C"],
        BLOCK_M=first["BLOCK_O"],
        BLOCK_O=second["BLOCK_O"],
        HAS_BIAS1=biases[0] is not None,
        HAS_BIAS2=biases[1] is not None,
        HAS_RESIDUAL=residual is not None,
        ADD_FIRST=add_first,
        ACTIVATION1=activations[0],
        ACTIVATION2=activations[1],
        OPERAND=operand(x, conv2d_pair_kernel),
        num_warps=conv2d_pair_warps(between, outputs),
        # The scratch is read after a barrier: no load of it may be moved ahead as a loop's next stage.
        num_stages=1,
        enable_fp_fusion=True,
    )
