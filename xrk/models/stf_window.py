"""EDVR-STF and Swin-STF as networks of one image, so that they are planned and run in bands as all others are."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xrk.errors import InputError
from xrk.models.mambair import to_channels_first, to_channels_last
from xrk.models.stf import _HR_FRAMES, _SCALE, EDVRSTF
from xrk.models.swin_stf import SwinBlock, SwinSTF, WindowAttention, _joined, _kinds, _partition

__all__ = ["OneImage", "image_of", "pack", "sees_all_frames"]

_NEVER = -1e4  # what is added to the logits of pixels that must not be seen


def pack(lq: Tensor, hq: Tensor) -> Tensor:
    """The frames of a window as one image on the grid of the LR frames: the LR frames' channels, then the HR frames'.

    Each HR frame has 16 channels for each of its own, one for each of the pixels that lie in one LR pixel.

    Args:
        lq: (1, frames, C, h, w).
        hq: (1, 2, C, 4 h, 4 w).

    Returns:
        (1, C frames + 32 C, h, w).
    """
    return torch.cat([lq.flatten(1, 2), F.pixel_unshuffle(hq.flatten(1, 2), _SCALE)], 1)


class OneImage(nn.Module):
    """What a network for two cameras gives, of frames that `pack` has put together.

    (1, in_channels, h, w) -> (1, C, 4 h, 4 w). Frame after frame, not as a batch, because bands of rows are of one
    image; windows of the attention lie in strips of rows, not in a map that is rolled over.

    Args:
        network: an `EDVRSTF` or a `SwinSTF`, which is neither changed nor copied.

    Raises:
        InputError: another network; a Swin-STF whose windows have fewer frames than there are.
    """

    def __init__(self, network: EDVRSTF | SwinSTF) -> None:
        super().__init__()
        if not isinstance(network, EDVRSTF | SwinSTF):
            raise InputError(f"The network is a {type(network).__name__}; expected an EDVR-STF or a Swin-STF.")
        frames = network.lr_frames + _HR_FRAMES
        if isinstance(network, SwinSTF) and not sees_all_frames(network):
            raise InputError(f"The Swin-STF's windows have fewer than the {frames} frames; bands need all in each.")
        self.network, self.training = network, network.training
        self.in_channels = network.in_channels * (network.lr_frames + _HR_FRAMES * _SCALE**2)

    def forward(self, x: Tensor) -> Tensor:
        network, channels = self.network, self.network.in_channels
        # Each cut from the image itself: a part that frames had in common would be kept for all of them.
        first = network.lr_frames * channels
        lr = [x[:, i : i + channels] for i in range(0, first, channels)]
        step = channels * _SCALE**2
        hr = [F.pixel_shuffle(x[:, i : i + step], _SCALE) for i in range(first, self.in_channels, step)]
        frames = [network.lr_features(frame) for frame in lr] + [network.hr_features(frame) for frame in hr]
        if network.align:
            pyramids = [network.pyramid(frame) for frame in frames]
            frames = [network.pcd_align(pyramid, pyramids[network.centre]) for pyramid in pyramids]
        return image_of(network, frames, lr[network.centre])


def image_of(network: EDVRSTF | SwinSTF, frames: list[Tensor], middle: Tensor) -> Tensor:
    """The network's own ``image``, in operators that run in bands."""
    if isinstance(network, SwinSTF) and sees_all_frames(network):
        return _swin_image(network, frames)
    return network.image(frames, middle)


def sees_all_frames(network: SwinSTF) -> bool:
    """Whether a window of the attention is as deep as there are frames."""
    return network.layers[0].residual_group.blocks[0].window[0] >= network.lr_frames + _HR_FRAMES


# --- Swin-STF in strips -----------------------------------------------------------------------------------------------


def _swin_image(network: SwinSTF, frames: list[Tensor]) -> Tensor:
    if network.projects:
        frames = [network.channel_projection(frame) for frame in frames]
    y = torch.stack([to_channels_last(frame) for frame in frames], 1)
    for group in network.layers:
        z = y
        for block in group.residual_group.blocks:
            z = z + _attention(block, block.norm1(z))
            z = z + block.mlp(block.norm2(z))
        convolved = [to_channels_last(group.conv(to_channels_first(frame))) for frame in z.unbind(1)]
        y = y + torch.stack(convolved, 1)
    y = to_channels_first(network.norm(y[:, network.centre]))
    y = network.conv_after_body(y) + frames[network.centre]
    return network.conv_last(network.upsample(network.conv_before_upsample(y)))


def _attention(block: SwinBlock, x: Tensor) -> Tensor:
    """The block's attention, (1, D, H, W, C) -> the same.

    The network rolls a shifted map by half a window; its last windows then hold the last rows and the first ones, which
    must not see each other. Here both have a window of their own, filled up with rows that nobody sees.
    """
    depth, height, width = x.shape[1:4]
    window = [depth, *(min(n, w) for n, w in zip((height, width), block.window[1:], strict=True))]
    down, right = (w // 2 if block.shifted and n > w else 0 for n, w in zip((height, width), window[1:], strict=True))
    below, beside = -height % window[1], -width % window[2]
    top = window[1] - down if down else 0
    rows = (top, below + down)

    channels_first = x.permute(0, 1, 4, 2, 3)
    y = F.pad(channels_first.flatten(1, 2), (0, beside, *rows)).unflatten(1, (depth, -1)).permute(0, 1, 3, 4, 2)
    y = torch.roll(y, -right, 3) if right else y
    windows = _partition(y, window)
    unseen = None
    if down:
        seen = F.pad(torch.zeros_like(channels_first[:, :, 0]), (0, beside, 0, below))
        unseen = _partition(F.pad(seen, (0, 0, top, down), value=_NEVER).unsqueeze(4), window)
    y = _joined(block.attn.proj(_attend(block.attn, windows, unseen, window, right)), window, y.shape)
    y = torch.roll(y, right, 3) if right else y
    return y[:, :, top : top + height, :width]


def _attend(
    attention: WindowAttention, windows: Tensor, unseen: Tensor | None, window: list[int], right: int
) -> Tensor:
    """(1, 1, strips, windows of a strip, pixels, C) -> the same; ``unseen``: (..., 1), added to the logits of a key."""
    heads, pixels = attention.heads, windows.shape[4]
    q, k, v = attention.qkv(windows).unflatten(-1, (3, heads, -1)).movedim(-3, 0).transpose(-3, -2).unbind(0)
    scale, size = q.shape[-1] ** -0.5, v.shape[-1]
    if unseen is not None:
        # q k / sqrt(c) + unseen as one product, with a channel more.
        unseen = unseen.unsqueeze(4).expand(*k.shape[:4], heads, pixels, 1)
        q, k = torch.cat([q * scale, torch.ones_like(q[..., :1])], -1), torch.cat([k, unseen], -1)
        v, scale = F.pad(v, (0, 1)), 1.0
    index = attention.relative_position_index[:pixels, :pixels]
    bias = attention.relative_position_bias_table[index.reshape(-1)].view(pixels, pixels, -1).permute(2, 0, 1)
    parts = []
    for (_, _, where), regions in _kinds((1, 1, windows.shape[3]), window, (0, 0, right), windows.device):
        mask = bias if regions is None else bias + (regions[:, None] != regions).to(bias.dtype) * -100.0
        if where.stop <= where.start:
            continue
        part = [t[:, :, :, where] for t in (q, k, v)]
        y = F.scaled_dot_product_attention(*(t.flatten(0, 3) for t in part), attn_mask=mask.to(q.dtype), scale=scale)
        parts.append(y[..., :size].transpose(1, 2).flatten(2).unflatten(0, part[0].shape[:4]))
    return torch.cat(parts, 3) if len(parts) > 1 else parts[0]
