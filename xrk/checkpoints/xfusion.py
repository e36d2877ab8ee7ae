"""EDVR-STF and Swin-STF of github xray-imaging/XFusion (BSD-3-style), as BasicSR writes them: ``{"params": ...}`` or
``{"params_ema": ...}``.

All sizes but one follow from the shapes. A Swin-STF's file does not tell how many low-resolution frames it sees: the
original makes its windows as deep as there are frames, the two high-resolution ones among them.
"""

import math
from typing import Any

from xrk.checkpoints.fitting import Format, Shapes, dimension, vote, width
from xrk.checkpoints.state_space import count

__all__ = ["EDVR_FORMAT", "SWIN_FORMAT"]

_HR_FRAMES = 2
_WIDEST_WINDOW = 64


def _edvr_configuration(shapes: Shapes) -> dict[str, Any]:
    multiples = dict.fromkeys(("conv_first", "conv_first_hi", "conv1_hi", "conv_l2_1", "fusion.feat_fusion"), 1)
    channels = width(shapes, {f"{name}.weight": n for name, n in (multiples | {"upconv1": 4}).items()}, 128)
    fusions = [dimension(shapes, f"fusion.{name}.weight", 1, 0) for name in ("feat_fusion", "spatial_attn1")]
    tails = [dimension(shapes, "conv_hr.weight", 0, 0), dimension(shapes, "conv_last.weight", 1, 0)]
    return {
        "in_channels": _in_channels(shapes),
        "width": channels,
        "lr_frames": _odd(vote((n // channels for n in fusions if n % channels == 0), 5) - _HR_FRAMES),
        "deformable_groups": _deformable_groups(shapes),
        "extraction_blocks": count(shapes, "feature_extraction."),
        "reconstruction_blocks": count(shapes, "reconstruction."),
        "tail": vote((dimension(shapes, "upconv2.weight", 0, 0) // 4, *tails), 64),
        # No file of XFusion's has it; xrk's own weights do.
        "detail": any(name.startswith("conv_detail_hi.") for name in shapes),
    }


def _swin_configuration(shapes: Shapes) -> dict[str, Any]:
    norms = [name for name in shapes if name.endswith((".norm1.weight", ".norm2.weight"))]
    ends = ["norm.weight", "conv_after_body.weight"]
    channels = vote((dimension(shapes, name, 0, 0) for name in [*ends, *norms]), 192)
    tables = [name for name in shapes if name.endswith("relative_position_bias_table")]
    heads = vote((dimension(shapes, name, 1, 0) for name in tables), 3)
    rows = vote((dimension(shapes, name, 0, 0) for name in tables), 0)
    indices = [name for name in shapes if name.endswith("relative_position_index")]
    window = _window(vote((dimension(shapes, name, 0, 0) for name in indices), 0), rows)
    groups = [count(shapes, f"layers.{i}.residual_group.blocks.") for i in range(count(shapes, "layers."))]
    usual = vote(groups, 2)
    hidden = [name for name in shapes if name.endswith(".mlp.fc1.weight")]
    tails = [dimension(shapes, "conv_before_upsample.0.weight", 0, 0), dimension(shapes, "conv_last.weight", 1, 0)]
    tails += [dimension(shapes, f"upsample.{i}.weight", 1, 0) for i in (0, 2)]
    projects = any(name.startswith("channel_projection.") for name in shapes)
    seen = ("conv_first.weight", "conv_first_hi.weight", "conv1_hi.weight", "conv2_hi.weight")
    align = any(name.startswith("pcd_align.") for name in shapes)
    return {
        "in_channels": _in_channels(shapes),
        "width": channels,
        "window": list(window),
        "heads": heads if channels % heads == 0 else 1,
        "depths": [group or usual for group in groups] or [1],
        "hidden": vote((dimension(shapes, name, 0, 0) for name in hidden), 2 * channels),
        "lr_frames": _odd(window[0] - _HR_FRAMES),
        "tail": vote(tails, 64),
        "features": width(shapes, dict.fromkeys(seen, 1), channels) if projects else None,
        "align": align,
        "deformable_groups": _deformable_groups(shapes),
        "extraction_blocks": count(shapes, "feature_extraction.") if align else 5,
    }


def _in_channels(shapes: Shapes) -> int:
    seen = [dimension(shapes, name, 1, 0) for name in ("conv_first.weight", "conv_first_hi.weight")]
    return vote((*seen, dimension(shapes, "conv_last.weight", 0, 0)), 1)


def _odd(frames: int) -> int:
    """A number of low-resolution frames that a window can have."""
    return frames if frames > 0 and frames % 2 else 3


def _deformable_groups(shapes: Shapes) -> int:
    """An offset down and one to the right, and a weight, for each of nine taps."""
    offsets = (name for name in shapes if name.endswith(".conv_offset.weight"))
    return vote((dimension(shapes, name, 0, 0) // 27 for name in offsets), 8)


def _window(pixels: int, rows: int) -> tuple[int, int, int]:
    """Frames, rows and columns (as many) of a window, from its pixels and from how many positions they have."""
    for side in range(1, min(math.isqrt(pixels), _WIDEST_WINDOW) + 1):
        depth = pixels // side**2
        if depth * side**2 == pixels and (2 * depth - 1) * (2 * side - 1) ** 2 == rows:
            return depth, side, side
    return 5, 8, 8


def _conventions(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "domain": "unit",
        "noise": "none",
        "size_multiple": 4 if config.get("align", True) else 1,
        "output_scale": 4.0,
        "limits": f"For video of two cameras: {config['lr_frames']} low-resolution frames and the two high-resolution "
        "frames around them, four times as large, make one frame. The file does not say which camera or process its "
        "network was trained on.",
    }


EDVR_FORMAT = Format("EDVR-STF of XFusion", "edvr-stf", _edvr_configuration, _conventions)
SWIN_FORMAT = Format("Swin-STF of XFusion", "swin-stf", _swin_configuration, _conventions)
