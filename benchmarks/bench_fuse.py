"""xrk.fuse of a dual-energy pair of uint16, the wavelet rule, from counts to counts.

Ours looks for a shift between the frames as well; the peer is the published rule as PyWavelets computes it.
"""

import numpy as np
import torch
from contest import Contest, imported, path_of

import xrk

OP = "fuse"
OPS = ("wavelet2d", "wavelet2d_inverse")
LEVELS, TAPS = 4, 8


def _case(size):
    return [{"H": size, "W": size, "dtype": dtype} for dtype in ("float64", "float32")]


CASES = {
    ("cpu", "tiny"): [{"H": 128, "W": 96, "dtype": "float64"}],
    ("cpu", "quick"): _case(1024),
    ("cpu", "full"): _case(4096),
}


def contest(case, device):
    low, high = _pair(case["H"], case["W"])
    pixels, precision = low.size, case["dtype"]
    # Two passes of 2 TAPS products a pixel and level, both ways, over frames that shrink to a quarter each time.
    products = sum(2 * 2 * TAPS * pixels // 4**level for level in range(LEVELS)) * 2
    return Contest(
        ops=OPS,
        ours=lambda: _counts(xrk.fuse(low, high, precision=precision)),
        peers={"PyWavelets": _pywavelets(low, high, precision)},
        bytes=3 * 2 * pixels,
        flops=2 * products,
        flops_dtype=precision,
        path=path_of(OPS, device),
    )


def _pair(height, width):
    rng = np.random.default_rng(0)
    rows, columns = (np.arange(n) for n in (height, width))
    scene = np.hypot(*np.meshgrid(rows - height / 3, columns - width / 2, indexing="ij")) < min(height, width) / 3
    noise = (rng.standard_normal((height, width), dtype=np.float32) for _ in range(2))
    parts = zip((9000, 15000), (300, 250), noise, strict=True)
    return [np.rint(20000 + a * scene + b * n).astype(np.uint16) for a, b, n in parts]


def _counts(fused):
    return torch.from_numpy(fused.astype(np.int32))


def _pywavelets(low, high, precision):
    pywt = imported("pywt")
    if isinstance(pywt, str):
        return pywt
    corner, edge, centre = 0.077847, 0.123317, 0.195346
    kernel = ((corner, edge, corner), (edge, centre, edge), (corner, edge, corner))

    def smoothed(x):
        padded = np.pad(x, 1, mode="reflect")
        h, w = x.shape
        return sum(kernel[i][j] * padded[i : i + h, j : j + w] for i in range(3) for j in range(3))

    def run() -> torch.Tensor:
        first, second = (pywt.wavedec2(frame.astype(precision), "db4", level=LEVELS) for frame in (low, high))
        parts = [smoothed(first[0]) / 2 + smoothed(second[0]) / 2]
        for a, b in zip(first[1:], second[1:], strict=True):
            parts.append(tuple(x + y for x, y in zip(a, b, strict=True)))
        fused = pywt.waverec2(parts, "db4")[: low.shape[0], : low.shape[1]]
        return _counts(np.clip(np.rint(fused), 0, 65535).astype(np.uint16))

    return run


def test_fuse(compete):
    compete()
