"""ResNet18-UNet: a ResNet-18 encoder and a U-shaped decoder, in its two public forms and xrk's own variant.

`ResNet18UNet` has the layout of segmentation_models_pytorch's ``Unet("resnet18")``, tensor for tensor:

    image ── (input_skip, input_blocks: the variant only) ──────────────────────────────┐
      └ conv1 7x7 /2 ── w @1/2 ───────────────────────────────────────────────┐         │
          └ maxpool ── layer1 ── w @1/4 ────────────────────────────┐         │         │
              └ layer2 ── 2w @1/8 ────────────────────────┐         │         │         │
                  └ layer3 ── 4w @1/16 ─────────┐         │         │         │         │
                      └ layer4 ── 8w @1/32 ── block0 ── block1 ── block2 ── block3 ── block4 ── head
                                              @1/16     @1/8      @1/4      @1/2      @1

Each decoder block doubles the size by nearest neighbours, appends the skip, and applies two 3x3 convolutions.

`OriginalResNet18UNet` is the network of "CNN-Based Low-Dose X-Ray Image Denoising" (github
kunwardhruv/Denoising-Low-dose-images-). It has the same encoder, shallower decoder blocks without norms, and ends at
half resolution:

    image
      └ enc1: conv 7x7 /2 ── w @1/2 ──────────────────────────────────────────┐
          └ enc2: maxpool, blocks ── w @1/4 ──────────────────────────┐       │
              └ enc3 ── 2w @1/8 ──────────────────────────────┐       │       │
                  └ enc4 ── 4w @1/16 ─────────────────┐       │       │       │
                      └ enc5 ── 8w @1/32 ── dec5 ── dec4 ── dec3 ── dec2 ── dec1 ── tanh
                                            @1/16   @1/8    @1/4    @1/2    @1/2
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["OriginalResNet18UNet", "ResNet18UNet"]


def _convolution(
    inputs: int, outputs: int, size: int, stride: int = 1, *, bias: bool, padding_mode: str = "zeros"
) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=bias, padding_mode=padding_mode)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an identity (He et al. 2016, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, *, batch_norm: bool = True) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if batch_norm else nn.Identity
        self.conv1 = _convolution(inputs, outputs, 3, stride, bias=not batch_norm)
        self.bn1 = norm(outputs)
        self.conv2 = _convolution(outputs, outputs, 3, bias=not batch_norm)
        self.bn2 = norm(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                _convolution(inputs, outputs, 1, stride, bias=not batch_norm), norm(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + identity)


class ResNet18Encoder(nn.Module):
    """ResNet-18 without its classifier; returns the features at 1/2, 1/4, 1/8, 1/16 and 1/32."""

    def __init__(self, in_channels: int, width: int, *, batch_norm: bool, padding_mode: str) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, width, 7, 2, bias=not batch_norm, padding_mode=padding_mode)
        self.bn1 = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = width
        for level in range(4):
            outputs = width << level
            stride = 1 if level == 0 else 2
            blocks = nn.Sequential(
                BasicBlock(inputs, outputs, stride, batch_norm=batch_norm),
                BasicBlock(outputs, outputs, batch_norm=batch_norm),
            )
            self.add_module(f"layer{level + 1}", blocks)
            inputs = outputs

    def forward(self, x: Tensor) -> list[Tensor]:
        half = F.relu(self.bn1(self.conv1(x)))
        quarter = self.layer1(self.maxpool(half))
        eighth = self.layer2(quarter)
        sixteenth = self.layer3(eighth)
        return [half, quarter, eighth, sixteenth, self.layer4(sixteenth)]


class DecoderBlock(nn.Module):
    """Up by two, append the skip, two 3x3 convolutions with ReLU."""

    def __init__(self, inputs: int, skip: int, outputs: int, *, batch_norm: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if batch_norm else nn.Identity
        self.conv1 = nn.Sequential(
            _convolution(inputs + skip, outputs, 3, bias=not batch_norm), norm(outputs), nn.ReLU()
        )
        self.conv2 = nn.Sequential(_convolution(outputs, outputs, 3, bias=not batch_norm), norm(outputs), nn.ReLU())

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        return self.conv2(self.conv1(x))


class Decoder(nn.Module):
    def __init__(self, encoder_channels: Sequence[int], channels: Sequence[int], full_skip: int, *, batch_norm: bool):
        super().__init__()
        inputs = [encoder_channels[-1], *channels[:-1]]
        skips = [*encoder_channels[-2::-1], full_skip]
        self.blocks = nn.ModuleList(
            DecoderBlock(i, s, o, batch_norm=batch_norm) for i, s, o in zip(inputs, skips, channels, strict=True)
        )

    def forward(self, features: list[Tensor], full_skip: Tensor | None) -> Tensor:
        x = features[-1]
        for block, skip in zip(self.blocks, [*features[-2::-1], full_skip], strict=True):
            x = block(x, skip)
        return x


class InputBlock(nn.Module):
    """A dilated 3x3 convolution beside the identity: sees along edges and lines far away at full resolution."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(x))


class ResNet18UNet(nn.Module):
    """ResNet-18 U-Net in the segmentation_models_pytorch layout; (B, in_channels, H, W) -> (B, out_channels, H, W).

    H and W must be multiples of 32. With ``full_resolution_skip = n > 0`` it is xrk's residual variant: a 3x3
    convolution of the image itself (n channels) enters the last decoder block as the skip that the layout lacks, and
    the output is the input plus what the network adds. On their way those channels may pass residual blocks with
    dilations 2, 4, 8 ... Both convolutions that see the image pad by replication, so that with filters that sum to
    zero (as the shipped weights have) the network sees contrast only: adding a constant to the image adds the same
    constant to the result, at the border too.

    Args:
        width: channels after the first convolution and ``layer1``; ``layer2..4`` have 2, 4 and 8 times as many.
        decoder_channels: outputs of the five decoder blocks, from 1/16 to full resolution.
        full_resolution_skip: channels of the skip at full resolution; 0 is the plain layout without it.
        input_blocks: dilated residual blocks in that skip.
        batch_norm: False leaves the norms out and gives every convolution a bias instead.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        width: int = 64,
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
        full_resolution_skip: int = 0,
        batch_norm: bool = True,
        input_blocks: int = 0,
    ) -> None:
        super().__init__()
        self.residual = full_resolution_skip > 0
        padding_mode = "replicate" if self.residual else "zeros"
        self.encoder = ResNet18Encoder(in_channels, width, batch_norm=batch_norm, padding_mode=padding_mode)
        encoder_channels = [width, width, 2 * width, 4 * width, 8 * width]
        self.decoder = Decoder(encoder_channels, decoder_channels, full_resolution_skip, batch_norm=batch_norm)
        self.input_skip = None
        if self.residual:
            self.input_skip = _convolution(in_channels, full_resolution_skip, 3, bias=False, padding_mode=padding_mode)
        elif input_blocks:
            raise ValueError(f"input_blocks = {input_blocks} needs full_resolution_skip above 0")
        self.input_blocks = nn.Sequential(*(InputBlock(full_resolution_skip, 2 << n) for n in range(input_blocks)))
        self.segmentation_head = nn.Sequential(_convolution(decoder_channels[-1], out_channels, 3, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        full_skip = self.input_blocks(self.input_skip(x)) if self.residual else None
        y = self.segmentation_head(self.decoder(self.encoder(x), full_skip))
        return x + y if self.residual else y


class OriginalEncoder(nn.Module):
    """The encoder of the original, ``enc1`` to ``enc5``; returns the features at 1/2, 1/4, 1/8, 1/16 and 1/32."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.enc1 = nn.Sequential(_convolution(in_channels, width, 7, 2, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
        self.enc2 = nn.Sequential(nn.MaxPool2d(3, stride=2, padding=1), blocks)
        self.enc3 = nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width))
        self.enc4 = nn.Sequential(BasicBlock(2 * width, 4 * width, 2), BasicBlock(4 * width, 4 * width))
        self.enc5 = nn.Sequential(BasicBlock(4 * width, 8 * width, 2), BasicBlock(8 * width, 8 * width))

    def forward(self, x: Tensor) -> list[Tensor]:
        half = self.enc1(x)
        quarter = self.enc2(half)
        eighth = self.enc3(quarter)
        sixteenth = self.enc4(eighth)
        return [half, quarter, eighth, sixteenth, self.enc5(sixteenth)]


class OriginalDecoderBlock(nn.Module):
    """Up by two with a transposed convolution, then a 3x3 convolution, both with ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.ConvTranspose2d(inputs, outputs, 2, stride=2),
            nn.ReLU(),
            _convolution(outputs, outputs, 3, bias=True),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class OriginalResNet18UNet(nn.Module):
    """The original ResNet18-UNet; (B, in_channels, H, W) in [-1, 1] -> (B, out_channels, H/2, W/2) in [-1, 1].

    H and W must be multiples of 32. The result has half the size, as in the original; whoever calls the network
    resizes it (the original's inference: to 8 bit, then Pillow's bicubic, a = -0.5).

    Args:
        width: channels after the first convolution and ``enc2``; ``enc3..5`` have 2, 4 and 8 times as many.
        decoder_channels: outputs of ``dec5``, ``dec4``, ``dec3`` and ``dec2``.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        width: int = 64,
        decoder_channels: Sequence[int] = (256, 128, 64, 64),
    ) -> None:
        super().__init__()
        at_16, at_8, at_4, at_2 = decoder_channels
        self.encoder = OriginalEncoder(in_channels, width)
        self.dec5 = OriginalDecoderBlock(8 * width, at_16)
        self.dec4 = OriginalDecoderBlock(at_16 + 4 * width, at_8)
        self.dec3 = OriginalDecoderBlock(at_8 + 2 * width, at_4)
        self.dec2 = OriginalDecoderBlock(at_4 + width, at_2)
        self.dec1 = _convolution(at_2 + width, out_channels, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        half, quarter, eighth, sixteenth, y = self.encoder(x)
        y = torch.cat([self.dec5(y), sixteenth], dim=1)
        y = torch.cat([self.dec4(y), eighth], dim=1)
        y = torch.cat([self.dec3(y), quarter], dim=1)
        y = torch.cat([self.dec2(y), half], dim=1)
        return torch.tanh(self.dec1(y))
