"""Swin-STF: EDVR-STF's two cameras, with attention in windows of space and time in place of a fusion (XFusion).

Tang et al. 2025, Front. High Perform. Comput., 10.3389/fhpcp.2025.1537080; after Video Swin, Liu et al. 2022,
arXiv 2106.13230, and SwinIR, Liang et al. 2021, arXiv 2108.10257::

    as it up to the features ─ (extraction, PCD alignment) ─ (channel_projection) ─┬─ RSTB x n ─ norm ─ conv ─(+)─┐
                                                                                   └──────────────────────────┘   │
    middle frame ── conv_last ─ upsample x2 x2 ─ conv_before_upsample ─ middle one of the frames ─────────────────┘

    RSTB   ─┬─ SwinBlock x m ─ conv 3x3 on each frame ─(+)─
            └───────────────────────────────────────────┘
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xrk.errors import InputError
from xrk.models.mambair import to_channels_first, to_channels_last
from xrk.models.stf import TwoCameras, _conv

__all__ = ["SwinBlock", "SwinSTF", "WindowAttention"]


class WindowAttention(nn.Module):
    """Attention inside windows of D x H x W pixels, with a bias for each of their relative positions.

    Args:
        channels: C.  window: the largest one, (frames, rows, columns).  heads: of C / heads channels each.
    """

    def __init__(self, channels: int, window: Sequence[int], heads: int) -> None:
        super().__init__()
        self.heads = heads
        depth, height, width = window
        positions = (2 * depth - 1) * (2 * height - 1) * (2 * width - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(positions, heads))
        self.register_buffer("relative_position_index", _relative_positions(window))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
        """x: (B, D, H, W, C), of whole windows, rolled back by `shift`, which is 0 along axes that are not."""
        windows = _partition(x, window)
        # (3, B, windows along D, H, W, heads, pixels, channels)
        qkv = self.qkv(windows).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        pixels = windows.shape[4]
        # Of a window that is smaller than the table's, the original takes the table's upper left part as it is.
        index = self.relative_position_index[:pixels, :pixels]
        bias = self.relative_position_bias_table[index.reshape(-1)].view(pixels, pixels, -1).permute(2, 0, 1)
        out = torch.empty_like(windows)
        for where, regions in _kinds(windows.shape[1:4], window, shift, x.device):
            part = (slice(None), *where)
            mask = bias
            if regions is not None:
                mask = bias + (regions[:, None] != regions).to(bias.dtype) * -100.0
            q, k, v = (t[part].flatten(0, 3) for t in qkv.unbind(0))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None].to(q.dtype))
            out[part] = y.transpose(1, 2).reshape(out[part].shape)
        return _joined(self.proj(out), window, x.shape)


def _relative_positions(window: Sequence[int]) -> Tensor:
    """For each two pixels of a window the row of the bias table that belongs to their relative position."""
    axes = torch.meshgrid(*(torch.arange(n) for n in window), indexing="ij")
    index = torch.zeros((), dtype=torch.int64)
    for axis, n in zip(axes, window, strict=True):
        place = axis.reshape(-1)
        index = index * (2 * n - 1) + (place[:, None] - place[None, :] + n - 1)
    return index


def _partition(x: Tensor, window: Sequence[int]) -> Tensor:
    """(B, D, H, W, C) -> (B, windows along D, H, W, pixels of a window, C)."""
    for axis in (3, 2, 1):
        x = x.unflatten(axis, (-1, window[axis - 1]))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6)


def _joined(windows: Tensor, window: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The way back from `_partition`."""
    return windows.unflatten(4, tuple(window)).permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(shape)


def _kinds(
    counts: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device
) -> Iterator[tuple[tuple[slice, ...], Tensor | None]]:
    """Windows of one kind each: where they are, and their pixels' regions, which must not see each other, or None.

    Along a shifted axis the last window holds both ends of the map; all others hold one region.
    """
    choices = [
        [(slice(0, n - 1), False), (slice(n - 1, n), True)] if s else [(slice(0, n), False)]
        for n, s in zip(counts, shift, strict=True)
    ]
    for depth in choices[0]:
        for height in choices[1]:
            for width in choices[2]:
                kinds = (depth, height, width)
                regions = torch.zeros((), dtype=torch.int64, device=device)
                for (_, last), n, s in zip(kinds, window, shift, strict=True):
                    ends = (torch.arange(n, device=device) >= n - s) & last
                    regions = regions[..., None] * 2 + ends.long()
                where = tuple(part for part, _ in kinds)
                yield where, regions.reshape(-1) if any(last for _, last in kinds) else None


class Mlp(nn.Module):
    """Two linear layers on every pixel."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """A block of the 3-D shifted-window transformer, (B, D, H, W, C) -> the same, any D, H and W.

    Args:
        window: (frames, rows, columns); where the map is no larger along an axis, all of it is one window there.
        heads: of the attention.  hidden: channels inside the second half.
        shifted: whether windows begin half a window further on, and the last ones hold both ends of the map.
    """

    def __init__(self, channels: int, window: Sequence[int], heads: int, hidden: int, shifted: bool) -> None:
        super().__init__()
        self.window = tuple(window)
        self.shifted = shifted
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, window, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attention(self, x: Tensor) -> Tensor:
        size = x.shape[1:4]
        window = [min(n, w) for n, w in zip(size, self.window, strict=True)]
        shift = [w // 2 if self.shifted and n > w else 0 for n, w in zip(size, self.window, strict=True)]
        # Zeros after the norm: they are seen like any pixel.
        missing = [-n % w for n, w in zip(size, window, strict=True)]
        x = F.pad(x, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0])) if any(missing) else x
        if any(shift):
            x = torch.roll(x, [-s for s in shift], (1, 2, 3))
        x = self.attn(x, window, shift)
        if any(shift):
            x = torch.roll(x, shift, (1, 2, 3))
        return x[:, : size[0], : size[1], : size[2]]


class RSTB(nn.Module):
    """A residual group of blocks, (B, D, H, W, C) -> the same; its blocks lie in ``residual_group.blocks``."""

    def __init__(self, channels: int, depth: int, window: Sequence[int], heads: int, hidden: int) -> None:
        super().__init__()
        self.residual_group = nn.Module()
        blocks = (SwinBlock(channels, window, heads, hidden, i % 2 == 1) for i in range(depth))
        self.residual_group.blocks = nn.Sequential(*blocks)
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = to_channels_first(self.residual_group.blocks(x).flatten(0, 1))
        return x + to_channels_last(self.conv(y)).view(x.shape)


class SwinSTF(TwoCameras):
    """Swin-STF: lq (B, lr_frames, in_channels, h, w), hq (B, 2, in_channels, 4h, 4w) -> (B, in_channels, 4h, 4w).

    Any h and w, multiples of 4 with `align`; values in [0, 1]. The defaults are the published network, whose tensors
    have the same names. Nothing is added to the network's answer.

    Args:
        width: E, channels of the transformer.
        window: (frames, rows, columns) of the attention.
        heads: of the attention, of E / heads channels each.
        depths: blocks of each residual group.
        hidden: channels inside the blocks' second half.
        lr_frames: low-resolution frames of a window, an odd number.
        tail: channels after the transformer.
        features: channels before a 1x1 convolution, ``channel_projection``, that makes them E; None: they are E, and
            there is no such convolution.
        align: whether the frames' features are aligned to the middle one's, as in EDVR-STF.
        deformable_groups, extraction_blocks: of the alignment, as in EDVR-STF.

    Raises:
        InputError: an even number of frames, or channels that the heads do not divide; frames of other sizes.
    """

    def __init__(
        self,
        in_channels: int = 1,
        width: int = 192,
        window: Sequence[int] = (5, 8, 8),
        heads: int = 3,
        depths: Sequence[int] = (2, 2, 18, 2),
        hidden: int = 384,
        lr_frames: int = 3,
        tail: int = 64,
        features: int | None = None,
        align: bool = False,
        deformable_groups: int = 8,
        extraction_blocks: int = 5,
    ) -> None:
        found = width if features is None else features
        super().__init__(in_channels, found, lr_frames, align, deformable_groups, extraction_blocks)
        if heads < 1 or width % heads or len(window) != 3:
            raise InputError(
                f"A Swin-STF has a width that is a multiple of its heads and windows of three axes, "
                f"got width={width!r}, heads={heads!r}, window={tuple(window)!r}."
            )
        if features is not None:
            self.channel_projection = _conv(found, width, 1)
        self.projects = features is not None
        self.layers = nn.Sequential(*(RSTB(width, depth, window, heads, hidden) for depth in depths))
        self.norm = nn.LayerNorm(width)
        self.conv_after_body = _conv(width, width)
        self.conv_before_upsample = nn.Sequential(_conv(width, tail), nn.LeakyReLU(0.01))
        self.upsample = nn.Sequential(
            _conv(tail, 4 * tail), nn.PixelShuffle(2), _conv(tail, 4 * tail), nn.PixelShuffle(2)
        )
        self.conv_last = _conv(tail, in_channels)

    def forward(self, lq: Tensor, hq: Tensor) -> Tensor:
        return self.image(self.frames(lq, hq), lq[:, self.centre])

    def image(self, frames: Sequence[Tensor], middle: Tensor) -> Tensor:
        """The wanted frame, of what `frames` gives; ``middle``, the middle LR frame, is not looked at again."""
        if self.projects:
            frames = [self.channel_projection(x) for x in frames]
        y = self.layers(torch.stack([to_channels_last(x) for x in frames], 1))
        # Nothing after the transformer sees another frame than the middle one.
        y = to_channels_first(self.norm(y[:, self.centre]))
        y = self.conv_after_body(y) + frames[self.centre]
        return self.conv_last(self.upsample(self.conv_before_upsample(y)))
