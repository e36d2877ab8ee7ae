"""A network with everything that looks at the whole image: a five-level U-Net with GroupNorm and squeeze-excite."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SqueezeExcite(nn.Module):
    """A gate for each channel, from the mean of the whole map (Hu et al. 2018)."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        squeeze, excite = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), squeeze, nn.SiLU(), excite, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class Block(nn.Module):
    """Two convolutions with GroupNorm, squeeze-excite, and an identity around them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(outputs // 4, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(outputs // 4, outputs)
        self.excite = SqueezeExcite(outputs)
        self.around = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.conv1(x)))
        y = self.excite(self.norm2(self.conv2(y)))
        return F.silu(y + self.around(x))


class GroupNormUNet(nn.Module):
    """(B, 1, H, W) -> (B, 1, H, W) for any H and W: the decoder resizes to each skip's own size.

    Five levels: strided convolutions down to 1/16, bilinear resizing up, a residual around everything.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        widths = [width, width, 2 * width, 2 * width, 4 * width]
        self.first = Block(1, widths[0])
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.encoder = nn.ModuleList(Block(w, w) for w in widths[1:])
        above = list(pairwise(widths))[::-1]
        self.decoder = nn.ModuleList(Block(skip + below, skip) for skip, below in above)
        self.last = nn.Conv2d(widths[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        skips = []
        for down, block in zip(self.down, self.encoder, strict=True):
            skips.append(y)
            y = block(down(y))
        for block in self.decoder:
            skip = skips.pop()
            y = F.interpolate(y, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            y = block(torch.cat([skip, y], dim=1))
        return x + self.last(y)


def seeded(make, seed: int = 0) -> nn.Module:
    """What ``make`` makes, the same for the same seed, in eval mode and without gradients.

    Norms with running statistics get random ones: those of a new module are the identity.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.5, 2.0)
            if isinstance(part, nn.modules.batchnorm._BatchNorm | nn.GroupNorm) and part.weight is not None:
                nn.init.normal_(part.weight, 1.0, 0.3)
                nn.init.normal_(part.bias, 0.0, 0.3)
    return module.eval().requires_grad_(False)
