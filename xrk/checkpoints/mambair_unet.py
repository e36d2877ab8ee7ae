"""MambaIRUNet of github csguoh/MambaIR (Apache-2.0; real noise, BasicSR's ``{"params": ...}``), and xrk's lxie-net.

Every level's depth, the widths and the side of the unshuffled squares follow from the shapes: a first convolution that
sees 4 channels sees 2 x 2 pixels of a grey image, one that sees 12 those of a colour image.
"""

import math
import re
from typing import Any

from xrk.checkpoints.fitting import Format, Shapes, dimension, vote
from xrk.checkpoints.state_space import count, expansion, rename, reshape, states

__all__ = ["FORMAT"]

_MOST_LEVELS = 8

_NAME = (
    "The network of the paper on LXIE-net is not public. What xrk calls so is the U-shaped network of MambaIR for one "
    "grey channel, and says nothing of that paper's results."
)


def _configuration(shapes: Shapes) -> dict[str, Any]:
    levels = _levels(shapes)
    encoders = [f"encoder_level{level}." for level in range(1, levels)]
    decoders = [f"decoder_level{level}." for level in range(1, levels)]
    # The first decoder has twice the channels of its encoder, and so has the refinement; the latent 2^(levels - 1).
    multiples = {prefix: 1 << i for i, prefix in enumerate(encoders)}
    multiples |= {prefix: max(1 << i, 2 if i == 0 else 0) for i, prefix in enumerate(decoders)}
    multiples |= {"latent.": 1 << (levels - 1), "refinement.": 2}
    width = _width(shapes, multiples)
    seen = vote((dimension(shapes, "patch_embed.proj.weight", 1, 0), dimension(shapes, "output.weight", 0, 0)), 1)
    in_channels, unshuffle = _unshuffled(seen)
    beside = zip(encoders, decoders, strict=True)
    return {
        "in_channels": in_channels,
        "width": width,
        # At least one block each: where a file has none, loading names what it lacks.
        "depths": [*(max(count(shapes, e), count(shapes, d), 1) for e, d in beside), max(count(shapes, "latent."), 1)],
        "refinement": count(shapes, "refinement."),
        "expand": expansion(shapes, {prefix: times * width for prefix, times in multiples.items()}, 1.5),
        "d_state": states(shapes, 16),
        "unshuffle": unshuffle,
    }


def _levels(shapes: Shapes) -> int:
    pattern = re.compile(r"(?:encoder|decoder|reduce_chan)_level([1-9])\.")
    found = [int(match[1]) for name in shapes if (match := pattern.match(name))]
    return min(max(found, default=1) + 1, _MOST_LEVELS)


def _width(shapes: Shapes, multiples: dict[str, int]) -> int:
    votes = [dimension(shapes, "patch_embed.proj.weight", 0, 0)]
    for prefix, times in multiples.items():
        norms = (name for name in shapes if name.startswith(prefix) and name.endswith((".ln_1.weight", ".ln_2.weight")))
        votes += [dimension(shapes, name, 0, 0) // times for name in norms]
    found = vote(votes, 24)
    return found if found % 2 == 0 else found + 1


def _unshuffled(seen: int) -> tuple[int, int]:
    """Channels of the image and side of the squares, from what the first convolution sees."""
    for channels in (1, 3):
        side = math.isqrt(seen // channels)
        if channels * side * side == seen:
            return channels, side
    return seen, 1


def _conventions(config: dict[str, Any]) -> dict[str, Any]:
    own = config["unshuffle"] > 1
    return {
        "domain": "stabilised" if own else "unit",
        "noise": "estimate" if own else "none",
        "size_multiple": config["unshuffle"] * 2 ** (len(config["depths"]) - 1),
        "output_scale": 1.0,
        "limits": _NAME
        if own
        else "The file does not say what its network was trained against (the original: noise of mobile phones' "
        "cameras); levels are mapped to [0, 1], and nothing is clipped to them, as the original's test code does.",
    }


FORMAT = Format(
    "MambaIRUNet, or xrk's lxie-net", "lxie-net", _configuration, _conventions, rename, reshape, colour=True
)
