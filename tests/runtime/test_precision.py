"""Networks whose maps are in 16 bits, while their ends are not."""

import pytest
import torch
from fixed_networks import GroupNormUNet, seeded
from networks import Exactness
from torch import nn
from torch.nn import functional as F

import xrk
from xrk.models import DnCNN
from xrk.models.resnet18_unet import ResNet18UNet
from xrk.runtime.planner import make_plan


class Tail(nn.Module):
    """Convolution, shuffle and a residual from a resized input, as super-resolution networks end."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.norm, self.scale = nn.LayerNorm(8), nn.Parameter(torch.full((8, 1, 1), 0.7))

    def forward(self, x):
        y = self.first(x) * self.scale
        y = y + self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.pixel_shuffle(self.last(F.silu(y)), 2) + F.interpolate(x, scale_factor=2.0, mode="nearest")


NETWORKS = {
    "dncnn": (lambda: DnCNN(features=16, depth=6), (45, 37)),
    "resnet18-unet": (lambda: ResNet18UNet(width=8, decoder_channels=(32, 24, 16, 12, 8)), (64, 32)),
    "group norm and squeeze-excite": (lambda: GroupNormUNet(8), (50, 61)),
    "super-resolution": (Tail, (30, 20)),
}


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float16, 4e-3), (torch.bfloat16, 32e-3)])
@pytest.mark.parametrize("name", NETWORKS)
def test_close_to_float64(name, dtype, allowed):
    make, size = NETWORKS[name]
    module = seeded(make)
    x = torch.rand((1, 1, *size), generator=torch.Generator().manual_seed(5))
    plan = make_plan(module, tuple(x.shape), dtype=dtype, band=8)
    y, exact = plan.run(x), Exactness(module, x)
    assert (plan.dtype, plan.compute_dtype, y.dtype) == (torch.float32, dtype, torch.float32)
    assert exact.allowed < exact.distance(y) < allowed * exact.scale
    assert torch.equal(plan.run(x), y)
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert f"float32 ({str(dtype)[6:]} within)" in str(plan)


def test_the_residual_keeps_all_digits_of_the_input():
    """A network that adds next to nothing gives its input back, though float16 has only 11 bits of it."""
    module = seeded(lambda: DnCNN(features=8, depth=4))
    last = [m for m in module.modules() if isinstance(m, nn.Conv2d)][-1]
    nn.init.zeros_(last.weight)
    x = torch.rand(1, 1, 20, 24)
    plan = xrk.plan(module, (20, 24), dtype=torch.float16)
    assert torch.equal(plan.run(x), module(x))
    assert not torch.equal(x.half().float(), x)


def test_maps_take_half_the_memory():
    network = seeded(lambda: GroupNormUNet(8))
    single, half = (make_plan(network, (1, 1, 256, 256), dtype=dtype, band=16) for dtype in (None, torch.float16))
    for part in ("line buffers", "maps kept whole"):
        assert half.parts[part] < 0.56 * single.parts[part], part


def test_sums_over_the_image_do_not_overflow():
    """65504 is the largest float16: the sum of 40 x 2000 pixels near 1 is beyond it, their mean is not."""
    module = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1)))
    x = torch.rand(1, 1, 80, 2000) + 0.5
    y = make_plan(module, tuple(x.shape), dtype=torch.float16, band=40).run(x)
    torch.testing.assert_close(y, module(x), atol=3e-3, rtol=3e-3, check_dtype=False)


def test_a_wider_dtype_than_the_modules():
    module = seeded(lambda: DnCNN(features=8, depth=4))
    x = torch.rand(1, 1, 20, 24, dtype=torch.float64)
    y = xrk.plan(module, (20, 24), dtype=torch.float64).run(x)
    torch.testing.assert_close(y, module.double()(x), atol=1e-12, rtol=0)
