"""segmentation_models_pytorch's ``Unet("resnet18")``, and xrk's own variant of it (design of 0.6.0; licence MIT).

The variant is told by ``input_skip.weight``, the convolution that brings the image itself to the last decoder block;
its dilated blocks are counted (the n-th has dilation 2 << n).
A network without batch norms is told by the lack of their running means.
"""

from typing import Any

from xrk.checkpoints.fitting import Format, Shapes, dimension, width
from xrk.checkpoints.state_space import count

__all__ = ["FORMAT"]


_WIDTHS = {"encoder.conv1.weight": 1} | {f"encoder.layer{i + 1}.1.conv2.weight": 1 << i for i in range(4)}


def _configuration(shapes: Shapes) -> dict[str, Any]:
    def channels(block: int) -> int:
        tensors = ("conv1.0.weight", "conv1.0.bias", "conv1.1.weight", "conv2.0.weight")
        return width(shapes, {f"decoder.blocks.{block}.{tensor}": 1 for tensor in tensors}, 256 >> block)

    return {
        "in_channels": dimension(shapes, "encoder.conv1.weight", 1, 1),
        "out_channels": dimension(shapes, "segmentation_head.0.weight", 0, 1),
        "width": width(shapes, _WIDTHS, 64),
        "decoder_channels": [channels(block) for block in range(5)],
        "full_resolution_skip": dimension(shapes, "input_skip.weight", 0, 0),
        "input_blocks": count(shapes, "input_blocks."),
        "batch_norm": any(name.endswith(".running_mean") for name in shapes),
    }


def _conventions(config: dict[str, Any]) -> dict[str, Any]:
    variant = config["full_resolution_skip"] > 0
    return {
        "domain": "stabilised" if variant else "unit",
        "noise": "estimate" if variant else "none",
        "size_multiple": 32,
        "output_scale": 1.0,
        "limits": "" if variant else "The file does not say how its network was trained; levels are mapped to [0, 1].",
    }


FORMAT = Format("segmentation_models_pytorch Unet('resnet18')", "resnet18-unet", _configuration, _conventions)
