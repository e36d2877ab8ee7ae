"""The networks: one file each, a plain ``nn.Module`` that reads like its paper.

To add a network: write its module in a file of its own and name it in `ARCHITECTURES`. Then say in a file of
``xrk/checkpoints`` how its public checkpoints are told from others (see there).

A module of this table takes a batch (B, in_channels, H, W) in float32 and needs nothing but its constructor's
arguments and its state dict: no global state, and no buffer outside the state dict.
"""

from torch import nn

from xrk.models.card import Card
from xrk.models.dncnn import DnCNN
from xrk.models.lxie import LXIENet
from xrk.models.mambair import MambaIR
from xrk.models.resnet18_unet import OriginalResNet18UNet, ResNet18UNet

__all__ = ["ARCHITECTURES", "Card", "DnCNN", "LXIENet", "MambaIR", "OriginalResNet18UNet", "ResNet18UNet"]

ARCHITECTURES: dict[str, type[nn.Module]] = {
    "dncnn": DnCNN,
    "lxie-net": LXIENet,
    "mambair": MambaIR,
    "resnet18-unet": ResNet18UNet,
    "resnet18-unet-original": OriginalResNet18UNet,
}
