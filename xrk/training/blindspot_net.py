"""How a ``blindspot`` is trained: on noisy patches alone, simulated ones and those of real frames.

The loss begins as that of the calibrated models (Khademi et al., WACV 2021, equation 7) for noise of variance 1:

    n = (y - m)^2 / (s^2 + 1) + log(s^2 + 1)

m and s are what the network says of a pixel y that it has not seen. Summed as it is, rough patches of high dose decide,
and smooth ones of low dose, where most is to be won, hardly count. So a patch counts inversely to the error that the
network itself expects there, and a pixel as its error in counts does, as in the other recipes:

    mean over patches of  mean[k n] / (mean[k s^2 / (s^2 + 1)] + floor)        k = m^2 / mean[m^2]

Both are taken as constants. The published 0.1 |s| is left out: where the surroundings tell the pixel to a third of the
noise or better, it keeps s at 0. No clean image is in this; the simulated ones' are looked at for the logged gain
only. With ``--spot 0`` nothing is blind and the same network learns from clean images,
as the others do: what it is compared with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xrk.models.blindspot import BlindSpot, Mean, Posterior
from xrk.training import resnet18_unet

CONFIG = {"rotations": (0, 1, 2, 3), "features": 12, "noise": "unit", "spot": 1, "residual": True}
# What of that the command line may change.
ARGUMENTS: dict[str, dict[str, Any]] = {"features": {"type": int}, "spot": {"type": int}}
SIZE, BATCH = 128, 4
# What is correlated between pixels, or stands far above the noise, is object for a network that learns from noise.
WHITE = True
EXACT = ()
WEIGHT_DECAY = 0.0
# Of a whole radiograph's error, in variances of the noise: no patch counts as much as if it had none.
FLOOR = 0.02
DESCRIPTION = (
    "Blind-spot network that learnt from noisy frames alone, without a clean image: for white Poisson-Gaussian noise at"
    " 15 to 12000 quanta per pixel; the result is the posterior mean, and how sure it is comes with it."
)
# Of the network that sees every pixel and learnt from clean images (``spot`` 0).
SEEING_DESCRIPTION = (
    "A network of the blind-spot network's shape in which nothing is blind, for white Poisson-Gaussian noise at 15 to"
    " 12000 quanta per pixel; it learnt from simulated frames and what they would be without noise."
)
SEEING_LIMITS = (
    "Noise must be independent from pixel to pixel: what a scintillator correlates, and white spots, are taken for"
    " object and stay. Trained on simulated radiographs only. Structure as weak and as small as the noise itself can be"
    " smoothed away or, rarely, invented: look at the standardised residual in the report. Research use; not a medical"
    " device."
)

LIMITS = (
    "Noise must be independent from pixel to pixel: what a scintillator correlates, and white spots, are taken for"
    " object and stay (xrk.adapt makes a network that is blind for the neighbours too). Structure as weak as the noise"
    " can be smoothed away; the uncertainty says where the surroundings and the pixel disagree. Research use; not a"
    " medical device."
)


def build(config: dict[str, Any]) -> BlindSpot:
    return BlindSpot(**config)


def size_multiple(config: dict[str, Any]) -> int:
    return 1


def is_matrix(name: str, parameter: Tensor) -> bool:
    return resnet18_unet.is_matrix(name, parameter)


def initialise(network: BlindSpot) -> None:
    """He initialisation; it starts as the mean of the nearest pixels, and not sure of it."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=0.1)
            nn.init.zeros_(module.bias)
    network.loc.weight.data *= 0.05
    if network.std is not None:
        network.std.weight.data *= 0.05
        network.std.bias.data.fill_(1.0)


def contrast_only(network: BlindSpot) -> None:
    """Nothing to do: a residual network takes the mean off its filters itself."""


def grow(network: BlindSpot, state: dict[str, Tensor]) -> None:
    """Begin from weights of the same size.

    Raises:
        RuntimeError: they are of another size.
    """
    network.load_state_dict(state)


def loss(network: BlindSpot, noisy: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The loss above; ``target`` and ``weight`` are for ``spot`` 0 alone."""
    if network.std is None:
        return resnet18_unet.loss(network, noisy, target, weight)
    mean, std = network(noisy).split(1, dim=1)
    rest, noise = std.square(), network.noise(mean)
    variance = rest + noise
    pixels = (noisy - mean) ** 2 / variance + variance.log()
    with torch.no_grad():
        linear = mean.square() / mean.square().mean((1, 2, 3), keepdim=True)
        expected = (linear * rest * noise / variance).mean((1, 2, 3))
    return ((linear * pixels).mean((1, 2, 3)) / (expected + FLOOR)).mean()


def surprise(network: BlindSpot, noisy: Tensor) -> Tensor:
    """How badly a network with a ``noise`` of its own predicts noisy pixels from their surroundings.

    mean[(y - m)^2 / (s^2 + v) + log(s^2 + v) + 0.1 |s|], v the noise's variance: Khademi et al., equations 7 and 8.
    """
    mean, std = network(noisy).split(1, dim=1)
    variance = std.square() + network.noise(mean)
    return ((noisy - mean) ** 2 / variance + variance.log() + 0.1 * std.abs()).mean()


def uncalibrated(network: BlindSpot, noisy: Tensor, floor: float = 1e-3) -> Tensor:
    """As `surprise`, of a network without a noise: mean[(y - m)^2 / (s^2 + floor) + log(s^2 + floor)].

    Here s is the deviation of the pixel with its noise. Khademi et al., the uncalibrated model, and their code's floor.
    """
    mean, std = network(noisy).split(1, dim=1)
    variance = std.square() + floor
    return ((noisy - mean) ** 2 / variance + variance.log()).mean()


def answer(network: BlindSpot) -> nn.Module:
    """What runs on a frame: the posterior mean."""
    return Mean(network) if network.std is None else Posterior(network)
