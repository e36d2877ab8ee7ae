"""MambaIR of github csguoh/MambaIR (Apache-2.0), as BasicSR writes it: ``{"params": ...}`` or ``{"params_ema": ...}``.

The head and the kind of CAB are told by the names; ``img_range`` is 1 in every published configuration, and the mean
that is subtracted follows from the number of channels.
"""

import math
from typing import Any

from xrk.checkpoints.fitting import Format, Shapes, dimension, vote
from xrk.checkpoints.state_space import count, expansion, rename, reshape, states

__all__ = ["FORMAT"]

_UPSAMPLED = {4 * 64: 2, 9 * 64: 3}


def _configuration(shapes: Shapes) -> dict[str, Any]:
    norms = [name for name in shapes if name.endswith((".ln_1.weight", ".ln_2.weight"))]
    width = vote((dimension(shapes, name, 0, 0) for name in ["norm.weight", "conv_first.weight", *norms]), 180)
    groups = [count(shapes, f"layers.{i}.residual_group.blocks.") for i in range(count(shapes, "layers."))]
    usual = vote(groups, 1)
    in_channels = dimension(shapes, "conv_first.weight", 1, 1)
    head, scale = _head(shapes, in_channels)
    return {
        "in_channels": in_channels,
        "width": width,
        "depths": [group or usual for group in groups] or [1],
        "d_state": states(shapes, 16),
        "expand": expansion(shapes, {"layers.": width}, 1.2),
        "head": head,
        "scale": scale,
    }


def _head(shapes: Shapes, in_channels: int) -> tuple[str, int]:
    if any(".conv_blk.cab.4." in name for name in shapes):
        return "light-sr", max(math.isqrt(dimension(shapes, "upsample.0.weight", 0, 4) // in_channels), 1)
    if not any(name.startswith(("upsample.", "conv_before_upsample.")) for name in shapes):
        return "denoise", 1
    convolutions = [f"upsample.{2 * i}.weight" for i in range(3)]
    factors = [_UPSAMPLED.get(dimension(shapes, name, 0, 0), 2) for name in convolutions if name in shapes]
    return "classic-sr", 3 if factors == [3] else 2 ** max(len(factors), 1)


def _conventions(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "domain": "unit",
        "noise": "none",
        "size_multiple": 1,
        "output_scale": float(config["scale"]),
        "limits": "The file does not say what its network was trained against (the grey ones of the paper: JPEG "
        "artefacts of photographs); levels are mapped to [0, 1], and nothing is clipped to them.",
    }


FORMAT = Format("MambaIR", "mambair", _configuration, _conventions, rename, reshape, colour=True)
