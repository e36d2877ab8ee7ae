"""What this machine can do at best, measured in the same run as everything else: copying, and multiplying matrices."""

import functools
import time

import torch
from contest import clock_for

COPIED = {"cpu": 2**28, "cuda": 2**32}
MATRIX = {"cpu": 2048, "cuda": 8192}


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of copying a tensor that no cache holds."""
    source = torch.ones(COPIED[device] // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


@functools.cache
def arithmetic_peak(device: str, dtype: str) -> float:
    """Operations a second (a multiplication and an addition are two) of a matrix product: its library's FMA peak.

    float32 on a CUDA device is that of its ordinary units, TF32 being off as it is in torch by default.
    """
    n = MATRIX[device]
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * n**3 / _fastest(lambda: a @ b, device)


def _fastest(run, device: str) -> float:
    clock = clock_for(device)
    best = float("inf")
    until = time.monotonic() + 2
    for number in range(20):
        start = clock()
        run()
        seconds = clock() - start
        if number > 0:  # the first run touches the memory
            best = min(best, seconds)
        if number >= 3 and time.monotonic() > until:
            break
    return best
