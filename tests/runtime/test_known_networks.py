"""Whole networks through plans: xrk's own, a U-Net with everything global, and networks that nobody here wrote."""

import pytest
import torch
from fixed_networks import GroupNormUNet, seeded
from networks import Exactness

from xrk.models.dncnn import DnCNN
from xrk.models.resnet18_unet import OriginalResNet18UNet, ResNet18UNet
from xrk.runtime.planner import make_plan

NARROW = {"width": 8, "decoder_channels": (32, 24, 16, 12, 8)}
OURS = {
    "resnet18-unet": (lambda: ResNet18UNet(**NARROW), (96, 64)),
    "resnet18-unet residual": (lambda: ResNet18UNet(**NARROW, full_resolution_skip=4), (64, 160)),
    "resnet18-unet without norms": (lambda: ResNet18UNet(**NARROW, batch_norm=False), (32, 32)),
    "resnet18-unet original": (lambda: OriginalResNet18UNet(width=8, decoder_channels=(32, 24, 16, 8)), (128, 96)),
    "dncnn": (DnCNN, (45, 37)),
    "dncnn, low frame": (DnCNN, (3, 50)),
    "group norm and squeeze-excite": (GroupNormUNet, (75, 61)),
    "group norm and squeeze-excite, wide": (lambda: GroupNormUNet(4), (17, 130)),
}


def monai(name, *args, **options):
    def make():
        networks = pytest.importorskip("monai.networks.nets", reason="monai is not installed (pip install monai)")
        return getattr(networks, name)(2, *args, **options)

    return make


SIX = (8, 8, 12, 16, 16, 8)
THEIRS = {
    "UNet": monai("UNet", 1, 1, (8, 12, 16), (2, 2), num_res_units=2),
    "UNet, batch norm": monai("UNet", 1, 1, (8, 12, 16, 16), (2, 2, 2), norm="batch"),
    "BasicUNet": monai("BasicUNet", 1, 1, SIX),
    "BasicUNet, batch norm": monai("BasicUNet", 1, 1, SIX, norm="batch", upsample="nontrainable"),
    "SegResNet": monai("SegResNet", 8, 1, 1),
    "SegResNet, batch norm": monai("SegResNet", 8, 1, 1, norm="batch", upsample_mode="deconv"),
    "AttentionUnet": monai("AttentionUnet", 1, 1, (8, 12, 16), (2, 2)),
    "DynUNet": monai("DynUNet", 1, 1, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 12, 16]),
}


def assert_exact(module, size, bands):
    x = torch.randn((1, 1, *size), generator=torch.Generator().manual_seed(5))
    exact = Exactness(module, x)
    for band in bands:
        plan = make_plan(module, tuple(x.shape), band=band)
        y = plan.run(x)
        assert y.shape == exact.whole.shape
        distance = exact.distance(y)
        assert distance <= exact.allowed, f"bands of {band}: {distance:.3g}, {exact.allowed:.3g} allowed"
        assert torch.equal(plan.run(x), y)
    return exact, y


@pytest.mark.parametrize("name", OURS)
def test_our_networks(name):
    make, size = OURS[name]
    exact, y = assert_exact(seeded(make), size, (1, 5, 32))
    assert exact.scale > 0.01
    # Rounded as a 16-bit frame is, the plan and the whole image differ by a count at most.
    counts = [torch.round(t.double() / exact.scale * 32767) for t in (y, exact.whole)]
    assert (counts[0] - counts[1]).abs().max() <= 1


@pytest.mark.parametrize("name", THEIRS)
def test_networks_that_nobody_here_wrote(name):
    assert_exact(seeded(THEIRS[name]), (64, 48), (2, 16))


def test_one_seed_one_network():
    a, b = (seeded(GroupNormUNet, 3).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
