"""DnCNN: a plain stack of 3x3 convolutions that predicts the noise (Zhang et al., IEEE TIP 26(7), 2017, figure 1).

    image ─┬─ conv ─ ReLU ─ [conv ─ (BN) ─ ReLU] x (depth - 2) ─ conv ─ noise ─┐
           └───────────────────────────────────────────────────────────────────┴─ image - noise

Released weights have the norms merged into the convolutions before them; training has them apart.
"""

from torch import Tensor, nn

__all__ = ["DnCNN"]


class DnCNN(nn.Module):
    """DnCNN; (B, in_channels, H, W) -> (B, out_channels, H, W), any H and W from 1 up.

    Image and result are on the [0, 1] scale that the noise level was trained on. The tensors are named as in KAIR
    (``model.0``, ``model.2``, ...), where the norms, too, count in the sequence.

    Args:
        features: channels between the layers.
        depth: number of convolutions, 17 for one known noise level and 20 for blind denoising in the paper.
        batch_norm: a batch norm after each convolution but the first and the last; False where they are merged.
        bias: the convolutions have a bias.
        norm_eps: the norms' epsilon: 1e-4 in KAIR, 1e-5 in most others. No tensor tells it.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        features: int = 64,
        depth: int = 17,
        batch_norm: bool = False,
        bias: bool = True,
        norm_eps: float = 1e-4,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, features, 3, padding=1, bias=bias), nn.ReLU()]
        for _ in range(depth - 2):
            layers.append(nn.Conv2d(features, features, 3, padding=1, bias=bias))
            if batch_norm:
                layers.append(nn.BatchNorm2d(features, eps=norm_eps))
            layers.append(nn.ReLU())
        layers.append(nn.Conv2d(features, out_channels, 3, padding=1, bias=bias))
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.model(x)
