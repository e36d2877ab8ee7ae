"""A blind-spot network run as its published code runs it: what earlier results were made with, not what is best.

The frame is mirrored (its edge row and column repeated) to whole tiles of 512 x 512 at the bottom and at the right.
Each tile stands for itself, zeros around it, in units n of 0 at black and 1 at white:

    a, b       the line under which the tile's n are most likely given the network's m, over the pixels whose n lies
               between its quantiles 0.02 and 0.97 (`xrk.posterior.fit_noise` with ``compat``)
    v          max(1e-3, a m + 10 b)       the 10 is in the code, and in no paper
    u          max(1e-4, s^2 - v)
    x          (m v + n u) / (v + u)

back in counts, clipped and truncated. Where tiles meet, the first column of the right one becomes the mean of the
columns beside it, truncated too.

The floors are variances of 1e-3 and 1e-4 of the whole range squared: a noise of 2072 counts in 16 bits, more than any
clean frame has.

Source: the public code of Sekhar, Deepthi and Rameshan, "X-ray image denoising for baggage screening", Electronic
Imaging 2024, IPAS-244.
"""

import numpy as np
import torch

from xrk.models.blindspot import BlindSpot
from xrk.posterior import combine, fit_noise, without_noise

__all__ = ["TILE", "enhance_in_tiles"]

TILE = 512


def enhance_in_tiles(network: BlindSpot, counts: np.ndarray, levels: tuple[float, float]) -> tuple[np.ndarray, int]:
    """The published code's result for one frame.

    Args:
        network: with a standard deviation, and without a noise of its own.
        counts: (H, W), integers.
        levels: (black, white); the published code's are (0, 65535).

    Returns:
        (H, W) of the same dtype, and how many pixels were clipped.
    """
    height, width = counts.shape
    black, white = levels
    low, high = np.iinfo(counts.dtype).min, np.iinfo(counts.dtype).max
    padded = np.pad(counts, ((0, -height % TILE), (0, -width % TILE)), mode="symmetric")
    out, clipped = np.empty_like(padded), 0
    for top in range(0, padded.shape[0], TILE):
        for left in range(0, padded.shape[1], TILE):
            tile = slice(top, top + TILE), slice(left, left + TILE)
            exact = _tile(network, (padded[tile] - black) / (white - black)) * (white - black) + black
            inside = exact[: height - top, : width - left]
            clipped += int(np.count_nonzero((inside < low) | (inside > high)))
            out[tile] = np.trunc(np.clip(exact, low, high))
    for seam in range(TILE, padded.shape[1], TILE):
        beside = out[:, seam - 1].astype(np.int64) + out[:, seam + 1]
        out[:, seam] = np.trunc(beside / 2)
    return out[:height, :width], clipped


def _tile(network: BlindSpot, n: np.ndarray) -> np.ndarray:
    device = next(network.parameters()).device
    with torch.inference_mode():
        answer = network(torch.from_numpy(n.astype(np.float32))[None, None].to(device))
    mean, std = answer[0].double().cpu().numpy()
    fit = fit_noise(n, mean, floor=1e-4, compat=True)
    variance = np.maximum(fit.slope * mean + 10 * fit.intercept, 1e-3)
    return combine(n, mean, without_noise(std, variance, 1e-4), variance)[0]
