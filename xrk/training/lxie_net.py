"""How an ``lxie-net`` is trained: its size, how it starts, and patches large enough for scans to learn long ranges."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from xrk.models.lxie import LXIENet
from xrk.training.resnet18_unet import answer, loss

__all__ = ["answer", "loss"]

CONFIG = {"width": 24, "depths": (1, 2, 4), "refinement": 0, "expand": 2.0, "d_state": 8, "unshuffle": 2}
# What of that the command line may change.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "width": {"type": int},
    "depths": {"type": int, "nargs": "+"},
    "refinement": {"type": int},
    "expand": {"type": float},
    "d_state": {"type": int},
    "unshuffle": {"type": int},
}
SIZE, BATCH = 256, 2
WHITE = False
# Stored in float32: the sums of zero of these filters would not survive rounding.
EXACT = ("patch_embed.proj.weight",)
# What AdamW moves here are scales, biases and the scans' rates and steps, none of which should tend to zero.
WEIGHT_DECAY = 0.0
DESCRIPTION = (
    "U-shaped Mamba restoration network (MambaIRUNet of one grey channel on 2x2 squares of pixels; not the unpublished"
    " LXIE-net) for Poisson-Gaussian noise, white or correlated by a scintillator, at 15 to 12000 quanta per pixel."
)


def build(config: dict[str, Any]) -> LXIENet:
    return LXIENet(**config)


def size_multiple(config: dict[str, Any]) -> int:
    return build(config).size_multiple


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon moves it: the products by weights of their own, not the depthwise kernels nor the scans' stacks."""
    products = ("in_proj.weight", "out_proj.weight")
    kernel = parameter.ndim == 4 and not name.endswith("self_attention.conv2d.weight")
    return (kernel or name.endswith(products)) and min(parameter.shape[0], parameter[0].numel()) > 8


def initialise(network: LXIENet) -> None:
    """Changes of size keep the variance; the last convolution starts near zero, so that the network is identity."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1 and ".conv_blk." not in f".{name}":
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    network.output.weight.data *= 0.05
    contrast_only(network)


def contrast_only(network: LXIENet) -> None:
    """Make every filter that sees the image sum to zero: noise has unit variance at every level, so the level is noise.

    Where it pads by replication (``unshuffle`` above 1) the network then commutes with adding a constant to the image.
    """
    weight = network.patch_embed.proj.weight
    weight.data -= weight.data.mean((1, 2, 3), keepdim=True)


def grow(network: LXIENet, state: dict[str, Tensor]) -> None:
    """Begin from weights of the same size.

    Raises:
        RuntimeError: they are of another size.
    """
    network.load_state_dict(state)
