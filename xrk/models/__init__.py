"""The networks: one file each, a plain ``nn.Module`` that reads like its paper.

To add a network: write its module in a file of its own and name it in `ARCHITECTURES`. Then say in a file of
``xrk/checkpoints`` how its public checkpoints are told from others (see there).

A module of this table takes a batch (B, in_channels, H, W) in float32 (one of `VIDEO`: windows of two videos) and
needs nothing but its constructor's arguments and its state dict: no global state, and no buffer outside the state dict.
"""

from torch import nn

from xrk.models.blindspot import BlindSpot
from xrk.models.card import Card
from xrk.models.dncnn import DnCNN
from xrk.models.lxie import LXIENet
from xrk.models.mambair import MambaIR
from xrk.models.resnet18_unet import OriginalResNet18UNet, ResNet18UNet
from xrk.models.stf import EDVRSTF
from xrk.models.swin_stf import SwinSTF

__all__ = [
    "ARCHITECTURES",
    "EDVRSTF",
    "VIDEO",
    "BlindSpot",
    "Card",
    "DnCNN",
    "LXIENet",
    "MambaIR",
    "OriginalResNet18UNet",
    "ResNet18UNet",
    "SwinSTF",
]

ARCHITECTURES: dict[str, type[nn.Module]] = {
    "blindspot": BlindSpot,
    "dncnn": DnCNN,
    "edvr-stf": EDVRSTF,
    "lxie-net": LXIENet,
    "mambair": MambaIR,
    "resnet18-unet": ResNet18UNet,
    "resnet18-unet-original": OriginalResNet18UNet,
    "swin-stf": SwinSTF,
}

# These take a window of two videos, and no single image.
VIDEO = ("edvr-stf", "swin-stf")
