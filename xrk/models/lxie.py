"""lxie-net: the U-shaped Mamba restoration network.

LXIE-net is the name of a Mamba network for low-dose radiographs of industrial parts (Ye, Yang et al., "LXIE-net and
HLXray"), of which neither code nor weights nor the architecture are public. This is not that network. It is the
nearest open one, the U-shaped network of MambaIR for real noise (MambaIRUNet; Guo et al. 2024, arXiv 2402.15648), for
one grey channel, with all its sizes as parameters: LXIE-net will be a configuration of it where it turns out to be one.

    image ─┬─ (unshuffle) ─ patch_embed ─ encoder_level1 ─────────────────────────────────┐
           │                                  └ encoder_level2 ─────────────────┐         │
           │                                       └ encoder_level3 ──┐         │         │
           │                                            └ latent ── decoder3 ─ decoder2 ─ decoder1
           │                                                                              │
           └──────────────── (+) ─ (shuffle) ─ output ─ refinement ───────────────────────┘

Every level is a row of `VSSBlock`, so every pixel depends on all others, at every level. On the way up the map gets
twice the size and half the channels, and the encoder's is appended. A 1x1 convolution, ``reduce_chan``, then halves
the channels, but not at level 1, whose decoder has twice as many as its encoder.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xrk.errors import InputError
from xrk.models.mambair import VSSBlock, to_channels_first, to_channels_last

__all__ = ["LXIENet"]


class PatchEmbed(nn.Module):
    """The first convolution, under the name that it has in the original."""

    def __init__(self, inputs: int, outputs: int, padding_mode: str) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, padding_mode=padding_mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Downsample(nn.Module):
    """Half the size and twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Upsample(nn.Module):
    """Twice the size and half the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels * 2, 3, padding=1, bias=False), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Stage(nn.Sequential):
    """Blocks one after the other, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, depth: int, d_state: int, expand: float) -> None:
        super().__init__(*(VSSBlock(channels, d_state, expand) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return to_channels_first(super().forward(to_channels_last(x)))


class LXIENet(nn.Module):
    """The U-shaped Mamba restoration network; (B, in_channels, H, W) -> the same shape.

    H and W must be multiples of `size_multiple`, ``unshuffle * 2 ** (levels - 1)``. With ``in_channels=3, width=48,
    depths=(4, 6, 6, 8), refinement=4, expand=1.5, d_state=16, unshuffle=1`` it is the published MambaIRUNet, tensor for
    tensor; the defaults are the size that fits 4096 x 4096 into 4 GiB.

    ``unshuffle = n > 1`` is xrk's own variant: each n x n pixels of the input become the channels of one, the network
    works on 1/n of the size, which allows it n^2 times the channels in the same memory, and what it adds to the image
    is shuffled back. The convolution that sees the image then pads by replication, so that with filters that sum to
    zero the network sees contrast only: adding a constant to the image adds the same constant to the result.

    Args:
        width: channels at the first level, even; each level down has twice as many.
        depths: blocks of the encoder at each level, the last of them of the ``latent``; a decoder has as many as the
            encoder beside it. Two levels or more.
        refinement: blocks after the last decoder.
        expand: channels inside `SS2D` over those outside.
        d_state: N, states per channel of the scans.
        unshuffle: side of the squares of pixels that become one; 1 leaves the image as it is.

    Raises:
        InputError: fewer than two levels, or an odd width.
    """

    def __init__(
        self,
        in_channels: int = 1,
        width: int = 24,
        depths: Sequence[int] = (1, 2, 4),
        refinement: int = 0,
        expand: float = 2.0,
        d_state: int = 8,
        unshuffle: int = 2,
    ) -> None:
        super().__init__()
        if len(depths) < 2 or width % 2 or width < 2 or unshuffle < 1:
            raise InputError(
                "An lxie-net has two levels or more, an even width and an unshuffle from 1 up, "
                f"got depths={tuple(depths)!r}, width={width!r}, unshuffle={unshuffle!r}."
            )
        self.in_channels = in_channels
        self.levels = len(depths)
        self.unshuffle = unshuffle
        self.size_multiple = unshuffle * 2 ** (self.levels - 1)

        def stage(channels: int, depth: int) -> Stage:
            return Stage(channels, depth, d_state, expand)

        seen = in_channels * unshuffle**2
        self.patch_embed = PatchEmbed(seen, width, "replicate" if unshuffle > 1 else "zeros")
        widths = [width << level for level in range(self.levels)]
        for level in range(1, self.levels):
            self.add_module(f"encoder_level{level}", stage(widths[level - 1], depths[level - 1]))
            self.add_module(f"down{level}_{level + 1}", Downsample(widths[level - 1]))
        self.latent = stage(widths[-1], depths[-1])
        for level in range(self.levels - 1, 0, -1):
            channels = widths[level - 1]
            self.add_module(f"up{level + 1}_{level}", Upsample(2 * channels))
            if level > 1:
                self.add_module(f"reduce_chan_level{level}", nn.Conv2d(2 * channels, channels, 1, bias=False))
            self.add_module(f"decoder_level{level}", stage(channels if level > 1 else 2 * channels, depths[level - 1]))
        self.refinement = stage(2 * width, refinement)
        self.output = nn.Conv2d(2 * width, seen, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch_embed(F.pixel_unshuffle(x, self.unshuffle) if self.unshuffle > 1 else x)
        skips = []
        for level in range(1, self.levels):
            y = self.get_submodule(f"encoder_level{level}")(y)
            skips.append(y)
            y = self.get_submodule(f"down{level}_{level + 1}")(y)
        y = self.latent(y)
        for level in range(self.levels - 1, 0, -1):
            y = torch.cat([self.get_submodule(f"up{level + 1}_{level}")(y), skips.pop()], 1)
            if level > 1:
                y = self.get_submodule(f"reduce_chan_level{level}")(y)
            y = self.get_submodule(f"decoder_level{level}")(y)
        y = self.output(self.refinement(y))
        return x + (F.pixel_shuffle(y, self.unshuffle) if self.unshuffle > 1 else y)
