"""The original ResNet18-UNet of github kunwardhruv/Denoising-Low-dose-images- (no licence stated).

Its ``best_model.pth`` is a plain ``torch.save(model.state_dict())``.
"""

from typing import Any

from xrk.checkpoints.fitting import Format, Shapes, dimension, width

__all__ = ["FORMAT"]


_WIDTHS = {
    "encoder.enc1.0.weight": 1,
    "encoder.enc2.1.1.conv2.weight": 1,
    "encoder.enc3.1.conv2.weight": 2,
    "encoder.enc4.1.conv2.weight": 4,
    "encoder.enc5.1.conv2.weight": 8,
}


def _configuration(shapes: Shapes) -> dict[str, Any]:
    def channels(block: str, usual: int) -> int:
        return width(shapes, {f"{block}.block.{tensor}": 1 for tensor in ("0.bias", "2.weight", "2.bias")}, usual)

    usual = {"dec5": 256, "dec4": 128, "dec3": 64, "dec2": 64}
    return {
        "in_channels": dimension(shapes, "encoder.enc1.0.weight", 1, 1),
        "out_channels": dimension(shapes, "dec1.weight", 0, 1),
        "width": width(shapes, _WIDTHS, 64),
        "decoder_channels": [channels(block, number) for block, number in usual.items()],
    }


def _conventions(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "domain": "symmetric",
        "noise": "none",
        "size_multiple": 32,
        "output_scale": 0.5,
        "limits": "The network works at half resolution; detail finer than two pixels is lost. "
        "It was trained on chest X-rays of 8 bit and 256 x 256 pixels.",
    }


FORMAT = Format("the original ResNet18_UNet", "resnet18-unet-original", _configuration, _conventions)
