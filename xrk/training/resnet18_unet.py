"""How a ``resnet18-unet`` is trained: its size, how it starts, how it grows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xrk.models.resnet18_unet import ResNet18UNet

CONFIG = {
    "width": 20,
    "decoder_channels": (64, 48, 64, 40, 20),
    "full_resolution_skip": 16,
    "batch_norm": False,
    "input_blocks": 3,
}
# What of that the command line may change.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "width": {"type": int},
    "decoder_channels": {"type": int, "nargs": 5},
    "full_resolution_skip": {"type": int},
    "input_blocks": {"type": int},
}
WHITE = False
# Patches: many, for few pixels see all that a pixel depends on.
SIZE, BATCH = 192, 8
# Stored in float32: the sums of zero of these filters would not survive rounding.
EXACT = ("encoder.conv1.weight", "input_skip.weight")
WEIGHT_DECAY = 0.01
DESCRIPTION = (
    "Residual ResNet18-UNet with a skip of the input at full resolution, for Poisson-Gaussian noise, white or"
    " correlated by a scintillator, at 15 to 12000 quanta per pixel."
)


def build(config: dict[str, Any]) -> ResNet18UNet:
    return ResNet18UNet(**config)


def size_multiple(config: dict[str, Any]) -> int:
    return 32


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon moves it: kernels with more than a few inputs and outputs."""
    return parameter.ndim == 4 and min(parameter.shape[0], parameter[0].numel()) > 8


def initialise(network: ResNet18UNet) -> None:
    """He initialisation; every residual branch and the head start near zero, so that the network starts as identity."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, module in network.named_modules():
        if name.startswith("encoder.layer") and name.endswith("conv2"):
            module.weight.data *= 0.2
    for block in network.input_blocks:
        block.conv.weight.data *= 0.2
    network.segmentation_head[0].weight.data *= 0.05
    contrast_only(network)


def contrast_only(network: ResNet18UNet) -> None:
    """Make every filter that sees the image sum to zero: noise has unit variance at every level, so the level is noise.

    With replicated borders this makes the network commute with adding a constant to the image, exactly.
    """
    for module in (network.encoder.conv1, network.input_skip):
        module.weight.data -= module.weight.data.mean((1, 2, 3), keepdim=True)


def loss(network: nn.Module, noisy: Tensor, target: Tensor, weight: Tensor, floor: float = 0.02) -> Tensor:
    """Mean over patches of log(weighted mean squared error + floor)."""
    return torch.log((weight * (network(noisy) - target) ** 2).mean((1, 2, 3)) + floor).mean()


def answer(network: nn.Module) -> nn.Module:
    """What runs on a frame."""
    return network


@torch.no_grad()
def grow(network: ResNet18UNet, state: dict[str, Tensor]) -> None:
    """Give ``network`` the weights of one with fewer channels or blocks: it computes the same, and can learn more.

    New channels keep their initial filters, but nothing that was there listens to them yet; new blocks add nothing yet
    (Chen et al., "Net2Net: Accelerating Learning via Knowledge Transfer", 2016, by zeros instead of by copies).

    Raises:
        ValueError: a tensor of ``state`` is larger than the network's, or the network has none of that name.
    """
    own = network.state_dict()
    for name, value in own.items():
        if name.startswith("input_blocks") and name not in state:
            value.zero_()
    for name, old in state.items():
        new = own.get(name)
        if new is None or new.ndim != old.ndim or any(a > b for a, b in zip(old.shape, new.shape, strict=True)):
            found = "none" if new is None else tuple(new.shape)
            raise ValueError(f"{name}: a tensor {tuple(old.shape)} does not fit into the network's, {found}")
        if old.ndim < 2:
            new[: len(old)] = old
            continue
        inputs = torch.arange(old.shape[1])
        if name.startswith("decoder.blocks") and name.endswith("conv1.0.weight"):  # reads [the level below | the skip]
            level = int(name.split(".")[2])
            below, grown = (
                s[f"decoder.blocks.{level - 1}.conv2.0.weight" if level else "encoder.layer4.1.conv2.weight"].shape[0]
                for s in (state, own)
            )
            inputs[below:] += grown - below
        new[: len(old)] = 0
        new[: len(old), inputs] = old.to(new.dtype)
