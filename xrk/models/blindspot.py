"""The blind-spot network: an estimate of each pixel from its surroundings alone, so that noise cannot be copied.

    image ──┬─ branch, looking up ────┐
            ├─ branch, looking right ─┤ concatenate ── 1x1, 1x1 ──┬── loc: mean of what the pixel should be
            ├─ branch, looking down ──┤                           └── std: its standard deviation
            └─ branch, looking left ──┘

The branch of rotation 0 sees the rows above a pixel only. It is a U-shaped network of 3x3 convolutions that reach two
rows up and none down:

    x ── enc0 ── enc1 ─ pool ── p1 @1/2 ───────────────────────────────────────┐        (x) ──┐
           └ enc2 ─ pool ── p2 @1/4 ────────────────────────────────┐          │              │
              └ enc3 ─ pool ── p3 @1/8 ───────────────────┐         │          │              │
                 └ enc4 ─ pool ── p4 @1/16 ─────┐         │         │          │              │
                    └ enc5 ─ pool ─ enc6 @1/32 ── dec5, 5b ── dec4, 4b ── dec3, 3b ── dec2, 2b ── dec1a, 1b ─ shift
                                                @1/16     @1/8      @1/4       @1/2           @1

Each pooling shifts its input down by one row first, and the last shift leaves the pixel's own row out.

The other branches share its weights. The original turns the image by 90 degrees, runs the same branch and turns the
result back. Here the kernels, shifts and cropped borders are turned instead, which is the same and leaves every
operation local to rows: the network streams like any other.

The poolings ask for sides that are multiples of 32. Other frames are made longer for each branch on its own, behind its
back: copies of a pixel that lay before a branch would be seen by it, and the pixel's noise in them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BlindSpot", "Mean", "NoiseLine", "Posterior"]

# The branch of rotation 0 looks up, of 1 to the right, of 2 down, of 3 to the left: the image turned counter-clockwise.
UP, RIGHT, DOWN, LEFT = range(4)

# How far a branch's kernels reach to the left, to the right, up and down.
_SEEN = {UP: (1, 1, 2, 0), RIGHT: (0, 2, 1, 1), DOWN: (1, 1, 0, 2), LEFT: (2, 0, 1, 1)}

NOISES = ("poisson", "gaussian", "poisson-gaussian", "unit")

_SLOPE = 0.1
# Pixels of the image to one of the coarsest map.
_COARSEST = 32


def _seen_half(y: Tensor, rotation: int) -> Tensor:
    """Of a convolution padded by two on both sides, the part whose kernels end at the pixel itself."""
    if rotation == UP:
        return y[:, :, :-2]
    if rotation == DOWN:
        return y[:, :, 2:]
    return y[..., :-2] if rotation == LEFT else y[..., 2:]


def _shift(x: Tensor, rotation: int, steps: int = 1) -> Tensor:
    """So many rows or columns away from where the branch looks; zeros come in."""
    if steps == 0:
        return x
    if rotation == UP:
        return F.pad(x[:, :, :-steps], (0, 0, steps, 0))
    if rotation == DOWN:
        return F.pad(x[:, :, steps:], (0, 0, 0, steps))
    return F.pad(x[..., :-steps], (steps, 0)) if rotation == LEFT else F.pad(x[..., steps:], (0, steps))


def _beside(x: Tensor, rotation: int, steps: int) -> Tensor:
    """Of each pixel the one so many rows or columns away where the branch looks; beyond the border, opposite."""
    if steps == 0:
        return x
    axis = 2 if rotation in (UP, DOWN) else 3
    length = x.shape[axis]
    if rotation in (UP, LEFT):
        return torch.cat([x.narrow(axis, steps, steps), x.narrow(axis, 0, length - steps)], dim=axis)
    return torch.cat([x.narrow(axis, steps, length - steps), x.narrow(axis, length - 2 * steps, steps)], dim=axis)


def _behind(size: Sequence[int], rotation: int) -> list[int]:
    """What the sides lack of multiples of 32: (left, right, top, bottom), never where the branch looks."""
    down, across = (-side % _COARSEST for side in size)
    columns = [across, 0] if rotation == RIGHT else [0, across]
    return columns + ([down, 0] if rotation == DOWN else [0, down])


def _up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class NoiseLine(nn.Module):
    """The noise's variance as a function of the mean, as the calibrated models learn it (in their normalised units).

        poisson            max(mean, 0.001) (softplus(a - 4) + 0.001)
        gaussian           (softplus(b - 4) + 0.001)^2
        poisson-gaussian   max(max(mean, 0.001) (softplus(a - 4) + 0.001) + b, 0.001)
        unit               1, nothing to learn: the counts are variance-stabilised
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind not in NOISES:
            raise ValueError(f"noise is {kind!r}; expected one of {', '.join(map(repr, NOISES))}")
        self.a = nn.Parameter(torch.zeros(())) if kind.startswith("poisson") else None
        self.b = nn.Parameter(torch.zeros(())) if kind.endswith("gaussian") else None

    def forward(self, mean: Tensor) -> Tensor:
        if self.a is None and self.b is None:
            return torch.ones_like(mean)
        if self.a is None:
            return ((F.softplus(self.b - 4) + 1e-3) ** 2).expand_as(mean)
        variance = mean.clamp_min(1e-3) * (F.softplus(self.a - 4) + 1e-3)
        return variance if self.b is None else (variance + self.b).clamp_min(1e-3)


class BlindSpot(nn.Module):
    """The "uncalibrated" network of Khademi et al. 2021; (B, in_channels, H, W) -> (B, 2 or 1, H, W).

    Channel 0 of the output is the mean, channel 1 the standard deviation of what a pixel's surroundings say about it:
    about the pixel with its noise, or, in a network with a ``noise`` of its own, about its noise-free value. The
    deviation's sign means nothing, only its square is used. H and W may be any; the original's are multiples of 32.

    Branches with the same rotation compute the same. They are run once, and the 1x1 convolution behind them reads
    their sum: with ``rotations = (3, 3, 3, 3)`` the network is four times cheaper than the original's, and equal.

    Source: Khademi, Rao, Minnerath, Hagen, Ventura, "Self-supervised Poisson-Gaussian denoising", WACV 2021, figure 2,
    and their public code. The rotations (3, 3, 3, 3) are what that code becomes under TensorFlow 2: weights that were
    trained there see the columns to the left of a pixel only.

    Args:
        rotations: of the branches, in the order in which they are concatenated, each 0 to 3 quarter turns.
        features: channels of the encoder's convolutions; the decoder's have twice as many.
        std: False leaves the second head out (weights trained on the mean squared error).
        noise: the calibrated models' noise: "poisson", "gaussian" or "poisson-gaussian", learnt along with the weights,
            or "unit"; None for the uncalibrated one. See `NoiseLine`.
        spot: half the side of what is blind: 1 hides the pixel alone, 2 the 3x3 pixels around it, n the 2n - 1 by
            2n - 1, for detectors whose noise is correlated between neighbours. 0 hides nothing: the network that
            a blind one of the same size is compared with. It has neither ``std`` nor ``noise``.
        centre, unit: the network works on (x - centre) / unit and answers in x's units.
        residual: the branches see differences of pixels only, and what they say is added to the mean of the nearest
            pixels that are seen (``spot`` away, one a branch): the network then commutes with adding a constant to
            the image, so that what it learnt at one level holds at all. Not in the original. Images of fewer than
            2 ``spot`` pixels each way have no such pixels; there it is the pixel itself.

    Raises:
        ValueError: ``rotations`` is empty or names others than 0, 1, 2, 3; ``spot`` is negative; an unknown ``noise``.
    """

    def __init__(
        self,
        in_channels: int = 1,
        rotations: Sequence[int] = (0, 1, 2, 3),
        features: int = 48,
        std: bool = True,
        noise: str | None = None,
        spot: int = 1,
        centre: float = 0.0,
        unit: float = 1.0,
        residual: bool = False,
    ) -> None:
        super().__init__()
        if spot < 0:
            raise ValueError(f"spot is {spot}; expected 0 or more")
        if not rotations or any(r not in (UP, RIGHT, DOWN, LEFT) for r in rotations):
            raise ValueError(f"rotations is {tuple(rotations)!r}; expected quarter turns, each 0, 1, 2 or 3")
        self.rotations = tuple(dict.fromkeys(rotations))
        self.spot, self.centre, self.unit, self.residual = spot, centre, unit, residual
        for level in range(7):
            self.add_module(f"enc_conv{level}", nn.Conv2d(features if level else in_channels, features, 3))
        for level in (5, 4, 3, 2, 1):
            below = features if level == 5 else 2 * features
            skip = features if level > 1 else in_channels
            first, second = ("1a", "1b") if level == 1 else (f"{level}", f"{level}b")
            self.add_module(f"dec_conv{first}", nn.Conv2d(below + skip, 2 * features, 3))
            self.add_module(f"dec_conv{second}", nn.Conv2d(2 * features, 2 * features, 3))
        self.conv1x1_1 = nn.Conv2d(2 * features * len(self.rotations), 8 * features, 1)
        self.conv1x1_2 = nn.Conv2d(8 * features, 2 * features, 1)
        self.loc = nn.Conv2d(2 * features, 1, 1)
        self.std = nn.Conv2d(2 * features, 1, 1) if std and spot else None
        self.noise = NoiseLine(noise) if noise is not None and spot else None

    def forward(self, x: Tensor) -> Tensor:
        if (self.centre, self.unit) != (0.0, 1.0):
            x = (x - self.centre) * (1 / self.unit)
        y = torch.cat([self.branch(x, rotation) for rotation in self.rotations], dim=1)
        y = F.leaky_relu(self.conv1x1_1(y), _SLOPE)
        y = F.leaky_relu(self.conv1x1_2(y), _SLOPE)
        mean = self.loc(y)
        if self.residual:
            long_enough = [r for r in self.rotations if x.shape[2 if r in (UP, DOWN) else 3] >= 2 * self.spot]
            beside = [_beside(x[:, :1], rotation, self.spot) for rotation in long_enough] or [x[:, :1]]
            mean = mean + sum(beside[1:], start=beside[0]) * (1 / len(beside))
        mean = mean * self.unit + self.centre
        return mean if self.std is None else torch.cat([mean, self.std(y) * self.unit], dim=1)

    def branch(self, x: Tensor, rotation: int) -> Tensor:
        """What one side of each pixel says about it: (B, in_channels, H, W) -> (B, 2 features, H, W)."""

        def conv(y: Tensor, name: str) -> Tensor:
            layer = self.get_submodule(f"{name[:3]}_conv{name[3:]}")
            weight = torch.rot90(layer.weight, -rotation, (2, 3))
            if self.residual and name in ("enc0", "dec1a"):  # the image is the last of what they see
                *features, image = weight.split([weight.shape[1] - x.shape[1], x.shape[1]], dim=1)
                weight = torch.cat([*features, image - image.mean((1, 2, 3), keepdim=True)], dim=1)
                y = F.pad(y, _SEEN[rotation], mode="replicate")  # nothing comes in that is not there
                return F.leaky_relu(F.conv2d(y, weight, layer.bias), _SLOPE)
            padding = (2, 1) if rotation in (UP, DOWN) else (1, 2)
            y = F.conv2d(y, weight, layer.bias, padding=padding)
            return F.leaky_relu(_seen_half(y, rotation), _SLOPE)

        def pool(y: Tensor) -> Tensor:
            return F.max_pool2d(_shift(y, rotation), 2)

        lacking = _behind(x.shape[2:], rotation)
        if any(lacking):
            x = F.pad(x, lacking, mode="replicate")
        p1 = pool(conv(conv(x, "enc0"), "enc1"))
        p2 = pool(conv(p1, "enc2"))
        p3 = pool(conv(p2, "enc3"))
        p4 = pool(conv(p3, "enc4"))
        y = conv(pool(conv(p4, "enc5")), "enc6")
        y = conv(conv(torch.cat([_up(y), p4], dim=1), "dec5"), "dec5b")
        y = conv(conv(torch.cat([_up(y), p3], dim=1), "dec4"), "dec4b")
        y = conv(conv(torch.cat([_up(y), p2], dim=1), "dec3"), "dec3b")
        y = conv(conv(torch.cat([_up(y), p1], dim=1), "dec2"), "dec2b")
        y = conv(conv(torch.cat([_up(y), x], dim=1), "dec1a"), "dec1b")
        y = _shift(y, rotation, self.spot)
        return F.pad(y, [-side for side in lacking]) if any(lacking) else y


class Mean(nn.Module):
    """The mean alone of a blind-spot network, (B, in_channels, H, W) -> (B, 1, H, W): the pixel itself has no say."""

    def __init__(self, network: BlindSpot) -> None:
        super().__init__()
        self.network = network
        self.train(network.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[:, :1]


class Posterior(nn.Module):
    """What a blind-spot network's answer and the pixel itself say together, (B, 1, H, W) -> (B, 1, H, W).

    See `xrk.posterior` for the formula. Every operation is local to rows, so that it streams as the network does.

    Args:
        network: with a standard deviation.
        line: (slope, intercept, floor) of the noise's variance over the mean, in the network's units, and the least
            variance of either kind; None for the noise that is the network's own. The deviation of a network that has
            one is without noise.
        worth: give the posterior's standard deviation instead of its mean, in other units: a step of one from the mean
            x is worth max(slope x + constant, least) of them, (slope, constant, least).
    """

    def __init__(
        self,
        network: BlindSpot,
        line: tuple[float, float, float] | None = None,
        worth: tuple[float, float, float] | None = None,
    ) -> None:
        super().__init__()
        if network.std is None or (line is None and network.noise is None):
            raise ValueError("this network does not tell how sure it is of its mean; expected one with a std head")
        self.network, self.line, self.worth = network, line, worth
        self.train(network.training)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.network(x).split(1, dim=1)
        if self.line is None:
            variance, rest = self.network.noise(mean), std * std
        else:
            slope, intercept, floor = self.line
            variance = (mean * slope + intercept).clamp_min(floor)
            rest = std * std if self.network.noise is not None else (std * std - variance).clamp_min(floor)
        both = variance + rest
        best = (mean * variance + x * rest) / both
        if self.worth is None:
            return best
        slope, constant, least = self.worth
        return (variance * rest / both).sqrt() * (best * slope + constant).clamp_min(least)
