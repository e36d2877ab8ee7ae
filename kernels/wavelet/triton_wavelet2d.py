"""Triton kernels of wavelet2d and its inverse: each axis in a pass of its own, two outputs of a pass at once.

A pass takes maps as (outer, values along the axis, inner). Along H the inner ones are a row's columns, along W there is
one. Where maps are parts of (images, 4, h, w), every `rows` outer ones start `stride` values further on.
"""

import torch
import triton
import triton.language as tl
from xrk.kernels.launch import WAVELET
from xrk.kernels.wavelet.wavelet2d import taps


@triton.jit
def _block(program, count, inner, BLOCK: tl.constexpr):
    """The outer index of a program, and along the axis and beside it the indices of its block of values."""
    blocks = tl.cdiv(count * inner, BLOCK)
    i = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return (program // blocks).to(tl.int64), i // inner, i % inner


@triton.jit
def wavelet_analysis_kernel(
    x, filters, low, high, n, inner, rows, stride, lift, TAPS: tl.constexpr, BLOCK: tl.constexpr
):
    """`lift` is a multiple of 2n that no index is further below zero than."""
    m = (n + TAPS - 1) // 2
    outer, k, column = _block(tl.program_id(0), m, inner, BLOCK)
    inside = k < m
    source = x + outer * n * inner + column
    a = tl.zeros((BLOCK,), dtype=tl.float32)
    d = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(TAPS):
        at = (2 * k + 1 - j + lift) % (2 * n)
        at = tl.minimum(at, 2 * n - 1 - at)
        value = tl.load(source + at.to(tl.int64) * inner, mask=inside, other=0.0)
        a += tl.load(filters + j) * value
        d += tl.load(filters + TAPS + j) * value
    target = (outer // rows) * stride + (outer % rows) * m * inner + k.to(tl.int64) * inner + column
    tl.store(low + target, a, mask=inside)
    tl.store(high + target, d, mask=inside)


@triton.jit
def wavelet_synthesis_kernel(
    low, high, filters, out, m, inner, rows, stride, TAPS: tl.constexpr, BLOCK: tl.constexpr
):
    pairs = m - TAPS // 2 + 1
    outer, q, column = _block(tl.program_id(0), pairs, inner, BLOCK)
    inside = q < pairs
    source = (outer // rows) * stride + (outer % rows) * m * inner + column
    even = tl.zeros((BLOCK,), dtype=tl.float32)
    odd = tl.zeros((BLOCK,), dtype=tl.float32)
    for t in tl.static_range(TAPS // 2):
        at = source + (q + TAPS // 2 - 1 - t).to(tl.int64) * inner
        a = tl.load(low + at, mask=inside, other=0.0)
        d = tl.load(high + at, mask=inside, other=0.0)
        # The synthesis's filters are the analysis's reversed.
        even += tl.load(filters + TAPS - 1 - 2 * t) * a + tl.load(filters + 2 * TAPS - 1 - 2 * t) * d
        odd += tl.load(filters + TAPS - 2 - 2 * t) * a + tl.load(filters + 2 * TAPS - 2 - 2 * t) * d
    target = out + (outer * 2 * pairs + 2 * q) * inner + column
    tl.store(target, even, mask=inside)
    tl.store(target + inner, odd, mask=inside)


def _pass(kernel, outer: int, count: int, inner: int, *arguments, length: int) -> None:
    if 2 * count * inner >= 2**31:  # indices within one image are 32 bits wide
        raise ValueError(f"an image of {2 * count} x {inner} values; expected fewer than 2^31 in each")
    block = WAVELET["block"]
    programs = outer * triton.cdiv(count * inner, block)
    kernel[(programs,)](*arguments, TAPS=length, BLOCK=block, num_warps=WAVELET["num_warps"], enable_fp_fusion=True)


def wavelet2d(x: torch.Tensor, wavelet: str, images: int, out: torch.Tensor) -> None:
    """Launches the kernels; x (..., H, W) and out (..., 4, h, w) are contiguous float32."""
    height, width = x.shape[-2:]
    h, w = out.shape[-2:]
    filters = torch.stack(taps(wavelet)).to(x.device, torch.float32)
    length = filters.shape[1]
    halves = torch.empty(2, images, h, width, dtype=x.dtype, device=x.device)

    def lift(n: int) -> int:
        return 2 * n * -(-length // (2 * n))

    along = (height, width, 1, h * width, lift(height))
    _pass(wavelet_analysis_kernel, images, h, width, x, filters, halves[0], halves[1], *along, length=length)
    parts = out.view(images, 4, h, w)
    for half in range(2):  # averages and details across rows: parts 0 and 2, 1 and 3
        targets = (parts[:, half], parts[:, half + 2])
        along = (width, 1, h, 4 * h * w, lift(width))
        _pass(wavelet_analysis_kernel, images * h, w, 1, halves[half], filters, *targets, *along, length=length)


def wavelet2d_inverse(bands: torch.Tensor, wavelet: str, images: int, out: torch.Tensor) -> None:
    """Launches the kernels; bands (..., 4, h, w) and out (..., H, W) are contiguous float32."""
    h, w = bands.shape[-2:]
    height, width = out.shape[-2:]
    filters = torch.stack(taps(wavelet)).to(bands.device, torch.float32)
    length = filters.shape[1]
    parts = bands.view(images, 4, h, w)
    halves = torch.empty(2, images, height, w, dtype=bands.dtype, device=bands.device)
    for half in range(2):
        sources = (parts[:, 2 * half], parts[:, 2 * half + 1])
        along = (filters, halves[half], h, w, 1, 4 * h * w)
        _pass(wavelet_synthesis_kernel, images, height // 2, w, *sources, *along, length=length)
    along = (filters, out, w, 1, 1, w)
    _pass(wavelet_synthesis_kernel, images * height, width // 2, 1, halves[0], halves[1], *along, length=length)
