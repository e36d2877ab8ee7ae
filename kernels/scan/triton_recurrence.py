"""What the scans' Triton kernels share: one step of the recurrence, and the carry of states over lines.

The state of a block of channels is a tuple of N tensors, so that the sum over states stays inside a thread: no shared
memory, no barrier, no shuffle. Steps are kept in units of ln 2 (log2(1 + 2^z) for softplus), where every exponential is
one instruction. B and C come in packed rows, 64 bits a load.
"""

import torch
import triton
import triton.language as tl
from xrk.kernels.scan.launch import CARRY

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log2_1p_exp2(z, EXACT: tl.constexpr):
    """log2(1 + 2^z) = max(z, 0) + e P(e) with e = 2^-|z|: no digits are lost where it is small, and nothing overflows.

    P is log2(1 + e) / e on [0, 1], by least relative error: 1.5e-7 if EXACT, else 8.5e-6, below what 16 bits tell.
    """
    e = tl.exp2(tl.abs(z) * -1.0)  # not -tl.abs(z): 0 - |z| costs an instruction, a factor of -1 is a sign
    if EXACT:
        p = 0.00754917802 * e - 0.0425670455
        p = p * e + 0.112856166
        p = p * e - 0.197118947
        p = p * e + 0.275641402
        p = p * e - 0.35840847
        p = p * e + 0.480692957
        p = p * e - 0.721340208
        p = p * e + 1.442695
    else:
        p = 0.146032845 - 0.0344358895 * e
        p = p * e - 0.303036165
        p = p * e + 0.469174051
        p = p * e - 0.720426163
        p = p * e + 1.44268292
    return p * e + tl.maximum(z, 0.0)


@triton.jit
def load_row(row, COUNT: tl.constexpr, BITS: tl.constexpr, BFLOAT: tl.constexpr):
    """The first COUNT values of a packed row, as fp32."""
    values = ()
    for i in tl.static_range((COUNT * BITS + 63) // 64):
        both = tl.load(row + i)
        for half in tl.static_range(2):
            word = (both >> (32 * half)).to(tl.int32)
            if BITS == 32:
                values += (word.to(tl.float32, bitcast=True),)
            elif BFLOAT:
                values += ((word << 16).to(tl.float32, bitcast=True),)
                values += ((word >> 16 << 16).to(tl.float32, bitcast=True),)
            else:
                values += (word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),)
                values += ((word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),)
    return values


@triton.jit
def advance(
    h,
    a,
    t,
    u,
    out,
    row,
    FIRST: tl.constexpr,
    N: tl.constexpr,
    BLOCKS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """One step: the new states, and `out` + C h if VALUES.

    Of every block of channels j: steps t[j], inputs u[j], sums out[j]; states h and A in a at n * BLOCKS + j. B and C
    are values FIRST and FIRST + N of `row` on.
    """
    x = ()
    for j in tl.static_range(BLOCKS):
        # dt is t ln 2; with one state, its B is what takes the fewest products.
        x += (t[j] * u[j] if N == 1 else t[j] * u[j] * LN2,)
    new = ()
    for n in tl.static_range(N):
        b = row[FIRST + n]
        if N == 1:
            b *= LN2
        for j in tl.static_range(BLOCKS):
            new += (tl.exp2(t[j] * a[n * BLOCKS + j]) * h[n * BLOCKS + j] + x[j] * b,)
        if VALUES:
            c = row[FIRST + N + n]
            sums = ()
            for j in tl.static_range(BLOCKS):
                sums += (out[j] + new[n * BLOCKS + j] * c,)
            out = sums
    return new, out


@triton.jit
def carry(
    sums,  # [images, lines, D]
    states,  # [images, lines, D, N]: ends from zero, which become the starts
    initial,  # [images, D, N], where there is one
    last,  # [images, D, N]: the state after the last line
    a,  # [D, N], logarithms of -A if LOGS
    lines,
    D: tl.constexpr,
    N: tl.constexpr,
    LOGS: tl.constexpr,
    INITIAL: tl.constexpr,
    VALUES: tl.constexpr,
    LINES: tl.constexpr,
):
    """The state at the start of every line, for a block of states. Lines are loaded ahead: only the products wait."""
    image = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    inside = i < D * N
    rate = tl.load(a + i, mask=inside, other=0.0).to(tl.float32)
    if LOGS:
        rate = -tl.exp(rate)
    rate *= LOG2E
    h = tl.zeros((VALUES,), tl.float32)
    if INITIAL:
        h = tl.load(initial + image * (D * N) + i, mask=inside, other=0.0).to(tl.float32)
    sums += image * lines * D + i // N
    states += image * lines * (D * N) + i
    for first in range(0, lines, LINES):
        ends = ()
        totals = ()
        for k in tl.static_range(LINES):
            there = inside & (i < tl.where(first + k < lines, D * N, 0))
            ends += (tl.load(states + k * (D * N), mask=there, other=0.0),)
            totals += (tl.load(sums + k * D, mask=there, other=0.0),)
        for k in tl.static_range(LINES):
            tl.store(states + k * (D * N), h, mask=i < tl.where(first + k < lines, D * N, 0))
            h = tl.exp2(totals[k] * rate) * h + ends[k]
        sums += LINES * D
        states += LINES * (D * N)
    tl.store(last + image * (D * N) + i, h, mask=inside)


def carry_states(
    sums: torch.Tensor, states: torch.Tensor, a: torch.Tensor, logs: bool, initial: torch.Tensor | None
) -> torch.Tensor:
    """Turns the ends of lines, `states` (images, lines, D, N), into their starts; returns the state after the last."""
    images, lines, channels, n = states.shape
    last = states.new_empty(images, channels, n)
    grid = (images, triton.cdiv(channels * n, CARRY["VALUES"]))
    given = last if initial is None else initial.contiguous()
    constants = {"D": channels, "N": n, "LOGS": logs, "INITIAL": initial is not None}
    carry[grid](sums, states, given, last, a.contiguous(), lines, **constants, **CARRY, enable_fp_fusion=True)
    return last


def packing(dtype: torch.dtype) -> dict[str, object]:
    """How the kernels read packed rows of this dtype."""
    return {"BITS": 8 * dtype.itemsize, "BFLOAT": dtype == torch.bfloat16}


def packed_width(values: int, dtype: torch.dtype) -> int:
    """The length of a row of this many values that fills whole 64-bit words."""
    each = 8 // dtype.itemsize
    return -(-values // each) * each
