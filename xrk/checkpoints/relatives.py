"""Families whose tensors look much like those of networks that xrk has, and which it does not run.

They are told by a name of their own, so that the answer is the family's name and not a list of a thousand tensors.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["RELATIVES", "Relative", "relative"]


@dataclass(frozen=True)
class Relative:
    """A family that is known and not run: what it is called, a name that only it has, and why it is not run."""

    title: str
    mark: str
    reason: str


RELATIVES = (
    Relative(
        "MambaIRv2",
        r"(^|\.)(assm\.selectiveScan\.|relative_position_index_SA$)",
        "it sorts the pixels by random numbers drawn at every run, so no result could be repeated",
    ),
    Relative(
        "Wave-Mamba",
        r"(^|\.)(down|up)_group\d\.(l_blk|h_blk|h_fusion)\.",
        "it matches channels by their nearest neighbour over the whole image, and its weights are for "
        "non-commercial use only",
    ),
    Relative("VM-UNet", r"(^|\.)layers_up\.\d+\.", "it segments, and gives no image back"),
    Relative(
        "VMamba",
        r"^(\w+\.)?layers\.\d+\.blocks\.\d+\.op\.",
        "it classifies, and gives no image back; xrk.checkpoints.state_space.ss2d reads a block of it",
    ),
    Relative(
        "a network of one-dimensional Mamba mixers, as DenoMamba or Vision Mamba are",
        r"(^|\.)A(_b)?_log$",
        "xrk runs networks of two-dimensional scans (SS2D) only",
    ),
)


def relative(names: Iterable[str]) -> Relative | None:
    """The family that these names of tensors give away, if it is one of `RELATIVES`."""
    names = list(names)
    for family in RELATIVES:
        pattern = re.compile(family.mark)
        if any(pattern.search(name) for name in names):
            return family
    return None
