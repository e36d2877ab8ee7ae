"""Networks that name axes anew: maps with channels last, tokens, windows, shuffles written out by hand."""

import pytest
import torch
from fixed_networks import seeded
from networks import Exactness
from torch import Tensor, nn
from torch.nn import functional as F

from xrk.runtime.planner import make_plan


class Around(nn.Module):
    """A convolution, a function of the map and modules, and a convolution."""

    def __init__(self, function, *parts, channels=8, outputs=None):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, channels, 3, padding=1), nn.Conv2d(outputs or channels, 2, 3, padding=1)
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x), *self.parts))


def channels_last(x, norm, up, down):
    """A ConvNeXt block's second half (Liu et al. 2022, figure 4)."""
    y = x.permute(0, 2, 3, 1)
    y = down(F.gelu(up(norm(y))))
    return x + y.permute(0, 3, 1, 2)


def tokens(x, norm, up, depthwise, down):
    """A feed-forward with a convolution among its tokens (Xie et al. 2021, equation 3)."""
    b, _, h, w = x.shape
    y = x.flatten(2).transpose(1, 2)
    y = up(norm(y))
    z = depthwise(y.transpose(1, 2).view(b, -1, h, w)).flatten(2).transpose(1, 2)
    y = (y + down(F.gelu(z))).softmax(-1)
    return y.permute(0, 2, 1).reshape(b, -1, h, w)


def flat_tokens(x, up):
    b, c, h, w = x.shape
    y = up(x.permute(0, 2, 3, 1).reshape(-1, c))
    return torch.tanh(y).view(b, h, w, c).permute(0, 3, 1, 2)


def positions(x, norm):
    h, w = x.shape[2:]
    table = torch.linspace(-1, 1, h * w, device=x.device)[None, :, None]
    y = norm(x.flatten(2).transpose(1, 2) + table) * (1 - table)
    return y.transpose(1, 2).unflatten(2, (h, w))


def columns(x, up):
    """Tokens column after column."""
    b, c, h, w = x.shape
    y = up(x.transpose(2, 3).flatten(2).transpose(1, 2))
    return y.transpose(1, 2).view(b, c, w, h).transpose(2, 3)


def sideways(x, up):
    """The axes in an order that is no map's: (B, H, C, W) and (B, W, H, C)."""
    y = up(x.permute(0, 2, 3, 1).transpose(1, 2)).permute(0, 3, 1, 2)
    return y.transpose(2, 3) + x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)


def shuffled(x):
    b, c, h, w = x.shape
    y = x.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(b, c // 4, 2 * h, 2 * w)


def unshuffled(x):
    b, c, h, w = x.shape
    y = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return y.reshape(b, 4 * c, h // 2, w // 2)


def channel_shuffle(x):
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2)


def padded(x):
    y = F.pad(x, (0, 0, 0, 0, 2, 3), value=0.5)
    y = y + F.pad(x[:, :5], (1, -1, 2, -2, 4, 4))
    return F.pad(y.permute(0, 2, 3, 1), (0, 0, 1, 2, 2, 1)).permute(0, 3, 1, 2)[:, :, 1:-2, 2:]


def windows(x, norm, qkv, project, shift=0):
    """Attention within windows of 4 x 4 (Liu et al. 2021, section 3.2), without the bias."""
    b, c, h, w = x.shape
    y = norm(x.permute(0, 2, 3, 1))
    y = torch.roll(y, (-shift, -shift), (1, 2)) if shift else y
    y = y.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
    q, k, v = qkv(y).reshape(-1, 16, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
    if shift:
        scores = (q @ k.transpose(-2, -1)).view(b, -1, 2, 16, 16) + torch.eye(16, device=x.device)
        y = scores.view(-1, 2, 16, 16).softmax(-1) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v)
    y = project(y.transpose(1, 2).reshape(-1, 16, c))
    y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
    y = torch.roll(y, (shift, shift), (1, 2)) if shift else y
    return x + y.permute(0, 3, 1, 2)


def gram(x, scale):
    """Attention between channels (Zamir et al. 2022, Restormer, equation 1)."""
    b, c, h, w = x.shape
    q, k, v = (t.reshape(b, 2, c // 2, h * w) for t in (x, x.sin(), x.cos()))
    attention = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)) * scale(x.new_ones(1))
    return (attention.softmax(-1) @ v).reshape(b, c, h, w)


def linear_attention(x):
    """Attention whose context is summed over all pixels (Shen et al. 2021, equation 6), softmax over channels."""
    b, c, h, w = x.shape
    q, k, v = (t.reshape(b, 2, c // 2, h * w).softmax(2) for t in (x, x.sin(), x.cos()))
    context = torch.einsum("bhdn,bhen->bhde", k, v) / (h * w)
    return torch.einsum("bhde,bhdn->bhen", context, q).reshape(b, c, h, w)


def two_windows(x):
    """Windows of two heights side by side, and a table that a module keeps in a dtype of its own."""
    b, c, h, w = x.shape
    y = x.permute(0, 2, 3, 1)
    low, high = (y.reshape(b, h // n, n, w, c).sin().reshape(b, h * w, c) for n in (2, 8))
    y = torch.cat([low + high, low], 2).reshape(b, h, w, 2 * c)
    return y.permute(0, 3, 1, 2) * torch.arange(2.0, dtype=torch.float64).type_as(x).view(1, 2, 1, 1).repeat(1, c, 1, 1)


NETWORKS = {
    "channels last": lambda: Around(channels_last, nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)),
    "tokens": lambda: Around(
        tokens, nn.LayerNorm(8), nn.Linear(8, 6), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Linear(6, 6), outputs=6
    ),
    "flat tokens": lambda: Around(flat_tokens, nn.Linear(8, 8)),
    "positions": lambda: Around(positions, nn.LayerNorm(8)),
    "columns": lambda: Around(columns, nn.Linear(8, 8)),
    "sideways": lambda: Around(sideways, nn.Linear(8, 8)),
    "shuffled": lambda: Around(shuffled, outputs=2),
    "unshuffled": lambda: Around(unshuffled, outputs=32),
    "there and back": lambda: Around(lambda x: x + unshuffled(shuffled(x).sin())),
    "channel shuffle": lambda: Around(channel_shuffle),
    "padded channels": lambda: Around(padded, outputs=13),
    "stacked": lambda: Around(lambda x: torch.stack([x, x.sin()], 2).amax(2).repeat(1, 2, 1, 1), outputs=16),
    "windows": lambda: Around(windows, nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)),
    "shifted windows": lambda: Around(
        lambda *parts: windows(*parts, shift=2), nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
    ),
    "attention between channels": lambda: Around(gram, nn.Linear(1, 1)),
    "linear attention": lambda: Around(linear_attention),
    "two heights of windows": lambda: Around(two_windows, outputs=16),
    "prelu on tokens": lambda: Around(lambda x, p: p(x.flatten(2)).view(x.shape), nn.PReLU()),
}


@pytest.mark.parametrize("size", [(24, 16), (8, 4), (40, 8)])
@pytest.mark.parametrize("name", NETWORKS)
def test_in_bands(name, size):
    module = seeded(NETWORKS[name])
    x = torch.randn((1, 1, *size), generator=torch.Generator().manual_seed(5))
    exact = Exactness(module, x)
    for band in (1, 3, 16):
        plan = make_plan(module, tuple(x.shape), band=band)
        y = plan.run(x)
        assert y.shape == exact.whole.shape
        assert exact.distance(y) <= exact.allowed, f"bands of {band}"
        assert torch.equal(plan.run(x), y)
        assert plan.arithmetic == 1.0
