"""MambaIR: residual groups of state-space blocks (Guo et al., ECCV 2024, arXiv 2402.15648, figure 2).

    image ── conv_first ─┬─ LayerNorm ─ RSSG x n ─ LayerNorm ─ conv_after_body ─(+)─ head ── image
                         └───────────────────────────────────────────────────────┘

    RSSG      ─┬─ VSSBlock x m ─ conv 3x3 ─(+)─
               └────────────────────────────┘
    VSSBlock  ─┬─ LayerNorm ─ SS2D ─(+)─┬─ LayerNorm ─ CAB ─(+)─
               └─ x skip_scale ─────┘   └─ x skip_scale2 ───┘

CAB is two convolutions whose result is weighted channel by channel, with weights that come from its average over the
whole image. Inside a block a map is (B, H, W, C), at convolutions it is (B, C, H, W) with the same memory.

The network sees the whole image at once. The published figures were taken by cutting images into overlapping parts,
so they are not reproduced to the last digit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xrk.errors import InputError
from xrk.models.ss2d import SS2D

__all__ = ["CAB", "HEADS", "MambaIR", "VSSBlock", "to_channels_first", "to_channels_last"]

HEADS = ("denoise", "classic-sr", "light-sr")

# Of the training images of DIV2K; not part of the state dict. Grey networks subtract nothing.
_RGB_MEAN = (0.4488, 0.4371, 0.4040)
_UPSAMPLING_CHANNELS = 64


class ChannelAttention(nn.Module):
    """x times a weight in (0, 1) for each channel, made of the channels' averages over the image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(channels // 30, 1)
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.attention(x)


class CAB(nn.Module):
    """Convolutions with channel attention, (B, C, H, W) -> (B, C, H, W).

    Args:
        light: depthwise and 1x1 convolutions over C / 2 channels, as in the light super-resolution network, instead of
            3x3 convolutions over C / 3.
    """

    def __init__(self, channels: int, light: bool = False) -> None:
        super().__init__()
        half, third = max(channels // 2, 1), max(channels // 3, 1)
        if light:
            layers = [
                nn.Conv2d(channels, half, 1),
                nn.Conv2d(half, half, 3, padding=1, groups=half),
                nn.GELU(),
                nn.Conv2d(half, channels, 1),
                nn.Conv2d(channels, channels, 3, padding=2, dilation=2, groups=channels),
            ]
        else:
            layers = [nn.Conv2d(channels, third, 3, padding=1), nn.GELU(), nn.Conv2d(third, channels, 3, padding=1)]
        self.cab = nn.Sequential(*layers, ChannelAttention(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.cab(x)


class VSSBlock(nn.Module):
    """A state-space block, (B, H, W, C) -> (B, H, W, C): SS2D for the whole image, CAB for the neighbourhood.

    Args:
        d_state, expand: of `SS2D`.  light: of `CAB`.
    """

    def __init__(self, channels: int, d_state: int, expand: float, light: bool = False) -> None:
        super().__init__()
        self.skip_scale = nn.Parameter(torch.ones(channels))
        self.skip_scale2 = nn.Parameter(torch.ones(channels))
        self.ln_1 = nn.LayerNorm(channels)
        self.self_attention = SS2D(channels, d_state, expand)
        self.conv_blk = CAB(channels, light)
        self.ln_2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.skip_scale + self.self_attention(self.ln_1(x))
        y = self.conv_blk(to_channels_first(self.ln_2(x)))
        return x * self.skip_scale2 + to_channels_last(y)


class RSSG(nn.Module):
    """A residual state-space group, (B, H, W, C) -> (B, H, W, C); its blocks lie in ``residual_group.blocks``."""

    def __init__(self, channels: int, depth: int, d_state: int, expand: float, light: bool) -> None:
        super().__init__()
        self.residual_group = nn.Module()
        self.residual_group.blocks = nn.Sequential(*(VSSBlock(channels, d_state, expand, light) for _ in range(depth)))
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(to_channels_first(self.residual_group.blocks(x)))
        return x + to_channels_last(y)


class MambaIR(nn.Module):
    """MambaIR; (B, in_channels, H, W) in [0, 1] -> (B, in_channels, scale * H, scale * W), any H and W from 1 up.

    The defaults are the published network for grey images with JPEG artefacts; its tensors are named as there.

    Args:
        width: channels between the layers.
        depths: blocks of each residual group.
        d_state: N, states per channel of the scans.
        expand: channels inside SS2D over ``width`` (``mlp_ratio`` in the original).
        head: what turns the features into the image:

            * ``"denoise"``: a convolution, added to the input; denoising and JPEG artefacts;
            * ``"classic-sr"``: up to ``scale`` by 2 or 3 at a time, then a convolution;
            * ``"light-sr"``: one convolution and one shuffle; the blocks have the light CAB.
        scale: output size over input size: 1 for ``"denoise"``; 3 or a power of two for ``"classic-sr"``.

    Raises:
        InputError: no such head, or a scale that it cannot have.
    """

    def __init__(
        self,
        in_channels: int = 1,
        width: int = 180,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        d_state: int = 16,
        expand: float = 1.2,
        head: str = "denoise",
        scale: int = 1,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise InputError(f"The head of a MambaIR is one of {', '.join(HEADS)}, got {head!r}.")
        if head == "denoise" and scale != 1:
            raise InputError(f"A MambaIR for denoising keeps the size of its input, got scale={scale!r}.")
        self.in_channels = in_channels
        self.head = head
        self.conv_first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.patch_embed = nn.Module()
        self.patch_embed.norm = nn.LayerNorm(width)
        light = head == "light-sr"
        self.layers = nn.Sequential(*(RSSG(width, depth, d_state, expand, light) for depth in depths))
        self.norm = nn.LayerNorm(width)
        self.conv_after_body = nn.Conv2d(width, width, 3, padding=1)
        if head == "classic-sr":
            self.conv_before_upsample = nn.Sequential(
                nn.Conv2d(width, _UPSAMPLING_CHANNELS, 3, padding=1), nn.LeakyReLU(0.01)
            )
            self.upsample = _upsampling(scale)
            self.conv_last = nn.Conv2d(_UPSAMPLING_CHANNELS, in_channels, 3, padding=1)
        elif head == "light-sr":
            self.upsample = nn.Sequential(
                nn.Conv2d(width, scale * scale * in_channels, 3, padding=1), nn.PixelShuffle(scale)
            )
        else:
            self.conv_last = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        mean = 0.0
        if x.shape[1] == 3:
            mean = torch.tensor(_RGB_MEAN, dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
            x = x - mean
        shallow = self.conv_first(x)
        features = self.patch_embed.norm(to_channels_last(shallow))
        features = self.norm(self.layers(features))
        features = self.conv_after_body(to_channels_first(features)) + shallow
        if self.head == "classic-sr":
            y = self.conv_last(self.upsample(self.conv_before_upsample(features)))
        elif self.head == "light-sr":
            y = self.upsample(features)
        else:
            y = x + self.conv_last(features)
        return y + mean


def to_channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) as dense (B, H, W, C): a copy only where a convolution of one channel chose the other layout."""
    return x.permute(0, 2, 3, 1).contiguous()


def to_channels_first(x: Tensor) -> Tensor:
    """(B, H, W, C) as (B, C, H, W) in the same memory, which is the channels_last format."""
    return x.permute(0, 3, 1, 2)


def _upsampling(scale: int) -> nn.Sequential:
    """Convolutions and shuffles up to ``scale``, two or three at a time."""
    factors = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
    if scale < 2 or (scale != 3 and scale & (scale - 1)):
        raise InputError(f"A MambaIR for classic super-resolution has a scale of 3 or a power of two, got {scale!r}.")
    layers: list[nn.Module] = []
    for factor in factors:
        layers.append(nn.Conv2d(_UPSAMPLING_CHANNELS, factor * factor * _UPSAMPLING_CHANNELS, 3, padding=1))
        layers.append(nn.PixelShuffle(factor))
    return nn.Sequential(*layers)
