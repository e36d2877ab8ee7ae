"""EDVR-STF, and what it shares with Swin-STF: a fast blurred and a slow sharp camera make one sharp frame (XFusion).

Both see a window of a video: low-resolution frames around the one that is wanted, the middle one, and the
high-resolution key frames before and after it, four times as large. They give the middle frame at four times its size.

EDVR-STF (Tang et al. 2025, J. Synchrotron Rad. 32, 432, figure 2; after EDVR, Wang et al. 2019, arXiv 1905.02716)::

    LR frames ── conv_first ─────────────────────────────┐
    HR frames ── conv_first_hi ─ conv1_hi /2 ─ conv2_hi /2 ─┴─ feature_extraction ─ PCD alignment ─ TSA fusion ─┐
    middle LR frame ── bilinear x4 ──(+)── conv_last ─ conv_hr ─ upconv2 x2 ─ upconv1 x2 ─ reconstruction ──────┘

What lies before the fusion, or before Swin-STF's transformer, is made of one frame at a time but for the alignment,
which sees two.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xrk import kernels
from xrk.errors import InputError

__all__ = ["EDVRSTF", "PCDAlignment", "TSAFusion", "TwoCameras"]

_SLOPE = 0.1
_SCALE = 4
_HR_FRAMES = 2
_LEVELS = ("l1", "l2", "l3")  # of the pyramid: at the LR frames' size, a half and a quarter of it

Pyramid = Sequence[Tensor]  # one (B, C, h / 2^n, w / 2^n) for each level


def _lrelu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, _SLOPE)


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2)


def _up(x: Tensor, scale: int = 2) -> Tensor:
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)


class ResidualBlock(nn.Module):
    """Two convolutions around an identity, without norms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels)
        self.conv2 = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class DeformableConv(nn.Module):
    """A modulated deformable convolution (`xrk.kernels.deform_conv2d`) whose offsets and masks another map gives."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.conv_offset = _conv(channels, groups * 3 * 9)
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        # Training begins with taps where they are and halves of their weights.
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor, motion: Tensor) -> Tensor:
        offset, mask = self.conv_offset(motion).split((self.groups * 18, self.groups * 9), 1)
        x = x.contiguous(memory_format=torch.channels_last)
        return kernels.deform_conv2d(x, offset, self.weight, self.bias, torch.sigmoid(mask), padding=1)


class PCDAlignment(nn.Module):
    """Moves a frame's features to where the reference has them: pyramid, cascade and deformable convolutions.

    Args:
        channels: C of the features.  groups: deformable groups.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        coarser_first = _LEVELS[::-1]

        def table(inputs: dict[str, int]) -> nn.ModuleDict:
            return nn.ModuleDict({level: _conv(n * channels, channels) for level, n in inputs.items()})

        self.offset_conv1 = table(dict.fromkeys(coarser_first, 2))
        self.offset_conv2 = table({"l3": 1, "l2": 2, "l1": 2})
        self.offset_conv3 = table({"l2": 1, "l1": 1})
        self.dcn_pack = nn.ModuleDict({level: DeformableConv(channels, groups) for level in coarser_first})
        self.feat_conv = table({"l2": 2, "l1": 2})
        self.cas_offset_conv1 = _conv(2 * channels, channels)
        self.cas_offset_conv2 = _conv(channels, channels)
        self.cas_dcnpack = DeformableConv(channels, groups)

    def forward(self, frame: Pyramid, reference: Pyramid) -> Tensor:
        """Both pyramids from fine to coarse; returns (B, C, h, w)."""
        motion = moved = None
        for level in (2, 1, 0):
            name = _LEVELS[level]
            both = torch.cat([frame[level], reference[level]], 1)
            found = _lrelu(self.offset_conv1[name](both))
            if motion is None:
                motion = _lrelu(self.offset_conv2[name](found))
                moved = self.dcn_pack[name](frame[level], motion)
            else:
                # A pixel of the coarser level is two of this one.
                found = torch.cat([found, _up(motion) * 2], 1)
                motion = _lrelu(self.offset_conv3[name](_lrelu(self.offset_conv2[name](found))))
                here = self.dcn_pack[name](frame[level], motion)
                moved = self.feat_conv[name](torch.cat([here, _up(moved)], 1))
            moved = _lrelu(moved) if level else moved
        motion = _lrelu(self.cas_offset_conv1(torch.cat([moved, reference[0]], 1)))
        return _lrelu(self.cas_dcnpack(moved, _lrelu(self.cas_offset_conv2(motion))))


class TSAFusion(nn.Module):
    """Fuses aligned frames, each weighted pixel by pixel by its likeness to the reference, and the sum by its place.

    Args:
        channels: C of each frame.  frames: how many there are.
    """

    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.temporal_attn1 = _conv(channels, channels)
        self.temporal_attn2 = _conv(channels, channels)
        self.feat_fusion = _conv(frames * channels, channels, 1)
        self.spatial_attn1 = _conv(frames * channels, channels, 1)
        self.spatial_attn2 = _conv(2 * channels, channels, 1)
        self.spatial_attn3 = _conv(channels, channels)
        self.spatial_attn4 = _conv(channels, channels, 1)
        self.spatial_attn5 = _conv(channels, channels)
        self.spatial_attn_l1 = _conv(channels, channels, 1)
        self.spatial_attn_l2 = _conv(2 * channels, channels)
        self.spatial_attn_l3 = _conv(channels, channels)
        self.spatial_attn_add1 = _conv(channels, channels, 1)
        self.spatial_attn_add2 = _conv(channels, channels, 1)

    def forward(self, aligned: Sequence[Tensor], reference: int) -> Tensor:
        """`aligned`: (B, C, h, w) for each frame, h and w multiples of 4; `reference`: the number of one of them."""
        wanted = self.temporal_attn1(aligned[reference])
        likeness = (torch.sigmoid((self.temporal_attn2(x) * wanted).sum(1, keepdim=True)) for x in aligned)
        frames = torch.cat([x * weight for x, weight in zip(aligned, likeness, strict=True)], 1)
        features = _lrelu(self.feat_fusion(frames))

        attention = _lrelu(self.spatial_attn1(frames))
        attention = _lrelu(self.spatial_attn2(_pooled(attention)))
        level = _lrelu(self.spatial_attn_l1(attention))
        level = _lrelu(self.spatial_attn_l2(_pooled(level)))
        level = _up(_lrelu(self.spatial_attn_l3(level)))
        attention = _lrelu(self.spatial_attn3(attention)) + level
        attention = self.spatial_attn5(_up(_lrelu(self.spatial_attn4(attention))))
        added = self.spatial_attn_add2(_lrelu(self.spatial_attn_add1(attention)))
        return features * torch.sigmoid(attention) * 2 + added


def _pooled(x: Tensor) -> Tensor:
    return torch.cat([F.max_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 3, 2, 1)], 1)


class TwoCameras(nn.Module):
    """What both networks begin with: the features of a window's frames, one by one, on the grid of the LR frames.

    The HR frames come after the LR frames; the middle LR frame is the reference. `size_multiple` is what the height
    and width of LR frames must be multiples of.

    The published networks shrink an HR frame by two poolings, which keep the largest of neighbours: where inside a LR
    pixel an edge lies must be learnt around them. With ``detail`` (xrk's own) a convolution of three by three LR
    pixels, one LR pixel a step, adds all that an HR frame holds there.
    """

    def __init__(
        self,
        in_channels: int,
        features: int,
        lr_frames: int,
        align: bool,
        groups: int,
        blocks: int,
        detail: bool = False,
    ) -> None:
        super().__init__()
        if lr_frames < 1 or lr_frames % 2 == 0:
            raise InputError(f"A window has an odd number of low-resolution frames, got lr_frames={lr_frames!r}.")
        self.in_channels = in_channels
        self.lr_frames = lr_frames
        self.align = align
        self.size_multiple = 4 if align else 1
        self.conv_first = _conv(in_channels, features)
        self.conv_first_hi = _conv(in_channels, features)
        self.conv1_hi = _conv(features, features)
        self.conv2_hi = _conv(features, features)
        self.detail = detail
        if detail:
            self.conv_detail_hi = nn.Conv2d(in_channels, features, 3 * _SCALE, _SCALE, _SCALE, padding_mode="replicate")
        if align:
            self.feature_extraction = nn.Sequential(*(ResidualBlock(features) for _ in range(blocks)))
            self.conv_l2_1 = _conv(features, features, stride=2)
            self.conv_l2_2 = _conv(features, features)
            self.conv_l3_1 = _conv(features, features, stride=2)
            self.conv_l3_2 = _conv(features, features)
            self.pcd_align = PCDAlignment(features, groups)

    @property
    def centre(self) -> int:
        """The number of the reference among a window's frames."""
        return self.lr_frames // 2

    def lr_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, h, w) -> (N, features, h, w)."""
        return _lrelu(self.conv_first(x))

    def hr_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, 4 h, 4 w) -> (N, features, h, w)."""
        y = _lrelu(self.conv1_hi(_lrelu(self.conv_first_hi(x))))
        y = F.max_pool2d(_lrelu(self.conv2_hi(F.max_pool2d(y, 3, 2, 1))), 3, 2, 1)
        return y + self.conv_detail_hi(x) if self.detail else y

    def pyramid(self, features: Tensor) -> Pyramid:
        """What the alignment takes of one frame or several, given their features."""
        one = self.feature_extraction(features)
        two = _lrelu(self.conv_l2_2(_lrelu(self.conv_l2_1(one))))
        return one, two, _lrelu(self.conv_l3_2(_lrelu(self.conv_l3_1(two))))

    def lr_pyramid(self, x: Tensor) -> Pyramid:
        """All that a window needs of an LR frame, whatever the frames around it: (N, in_channels, h, w) -> levels.

        One level, the features, where nothing is aligned.
        """
        return self._pyramid(self.lr_features(x))

    def hr_pyramid(self, x: Tensor) -> Pyramid:
        """The same of an HR frame, (N, in_channels, 4 h, 4 w)."""
        return self._pyramid(self.hr_features(x))

    def _pyramid(self, features: Tensor) -> Pyramid:
        return self.pyramid(features) if self.align else (features,)

    def frames(self, lq: Tensor, hq: Tensor) -> list[Tensor]:
        """The features of a window's frames, aligned to the reference where the network does so: (B, C, h, w) each.

        Raises:
            InputError: the sizes are not those of a window.
        """
        self._check(lq, hq)
        levels = [self.lr_pyramid(lq.flatten(0, 1)), self.hr_pyramid(hq.flatten(0, 1))]
        pyramids = []
        for frames, count in zip(levels, (self.lr_frames, _HR_FRAMES), strict=True):
            split = [level.unflatten(0, (-1, count)) for level in frames]
            pyramids += [tuple(level[:, i] for level in split) for i in range(count)]
        if not self.align:
            return [frame[0] for frame in pyramids]
        return [self.pcd_align(frame, pyramids[self.centre]) for frame in pyramids]

    def _check(self, lq: Tensor, hq: Tensor) -> None:
        count, channels, multiple = self.lr_frames, self.in_channels, self.size_multiple
        given = tuple(lq.shape)
        if lq.ndim != 5 or given[1:3] != (count, channels) or given[3] % multiple or given[4] % multiple:
            raise InputError(
                f"The low-resolution frames have the shape {given}, expected (B, {count}, {channels}, h, w)"
                + (f", h and w multiples of {multiple}." if multiple > 1 else ".")
            )
        batch, _, _, height, width = lq.shape
        expected = (batch, _HR_FRAMES, self.in_channels, _SCALE * height, _SCALE * width)
        if tuple(hq.shape) != expected:
            raise InputError(f"The high-resolution frames have the shape {tuple(hq.shape)}, expected {expected}.")


class EDVRSTF(TwoCameras):
    """EDVR-STF: lq (B, lr_frames, in_channels, h, w), hq (B, 2, in_channels, 4h, 4w) -> (B, in_channels, 4h, 4w).

    h and w are multiples of 4; values in [0, 1]. The defaults are the published network, whose tensors have the same
    names.

    Args:
        width: F, channels of the features.
        lr_frames: low-resolution frames of a window, an odd number.
        deformable_groups: of the alignment's convolutions.
        extraction_blocks, reconstruction_blocks: residual blocks before and after alignment and fusion.
        tail: channels before the last two convolutions.
        detail: whether an HR frame's features are also made past the poolings, see `TwoCameras`.

    Raises:
        InputError: an even number of frames; frames of other sizes.
    """

    def __init__(
        self,
        in_channels: int = 1,
        width: int = 128,
        lr_frames: int = 3,
        deformable_groups: int = 8,
        extraction_blocks: int = 5,
        reconstruction_blocks: int = 40,
        tail: int = 64,
        detail: bool = False,
    ) -> None:
        super().__init__(in_channels, width, lr_frames, True, deformable_groups, extraction_blocks, detail)
        self.fusion = TSAFusion(width, lr_frames + _HR_FRAMES)
        self.reconstruction = nn.Sequential(*(ResidualBlock(width) for _ in range(reconstruction_blocks)))
        self.upconv1 = _conv(width, 4 * width)
        self.upconv2 = _conv(width, 4 * tail)
        self.conv_hr = _conv(tail, tail)
        self.conv_last = _conv(tail, in_channels)

    def forward(self, lq: Tensor, hq: Tensor) -> Tensor:
        return self.image(self.frames(lq, hq), lq[:, self.centre])

    def image(self, frames: Sequence[Tensor], middle: Tensor) -> Tensor:
        """The wanted frame, of what `frames` gives and the middle LR frame."""
        y = self.reconstruction(self.fusion(frames, self.centre))
        y = _lrelu(F.pixel_shuffle(self.upconv1(y), 2))
        y = _lrelu(F.pixel_shuffle(self.upconv2(y), 2))
        return self.conv_last(_lrelu(self.conv_hr(y))) + _up(middle, _SCALE)
