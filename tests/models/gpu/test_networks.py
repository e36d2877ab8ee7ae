"""Whole networks on a CUDA device, whole and in bands, against float64 on the CPU; and the speed of the shipped ones.

Each is skipped where there is no GPU. `benchmarks/run_on_gpu.sh` runs them; XRK_GPU_TESTS_DEVICE=cpu runs them on the
CPU, at small sizes: it checks the checks.
"""

import copy
import os
import time

import numpy as np
import pytest
import torch

import xrk
from xrk.models import EDVRSTF, BlindSpot, DnCNN, LXIENet, MambaIR, ResNet18UNet, SwinSTF
from xrk.runtime.planner import make_plan

DEVICE = os.environ.get("XRK_GPU_TESTS_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device")

IMAGES = {
    "dncnn": (lambda: DnCNN(features=16, depth=6), (65, 90)),
    "resnet18-unet": (lambda: ResNet18UNet(width=8, decoder_channels=(32, 24, 16, 12, 8)), (64, 96)),
    "lxie-net": (lambda: LXIENet(width=16, depths=(1, 2), d_state=8), (68, 52)),
    "lxie-net at full size": (lambda: LXIENet(width=8, depths=(1, 1, 1), d_state=16, unshuffle=1), (44, 60)),
    "mambair": (lambda: MambaIR(width=18, depths=(1, 1), d_state=4), (31, 45)),
    "blindspot": (lambda: BlindSpot(features=8), (64, 96)),
}
VIDEOS = {
    "edvr-stf": lambda: EDVRSTF(width=16, deformable_groups=2, extraction_blocks=1, reconstruction_blocks=2, tail=8),
    "swin-stf": lambda: SwinSTF(width=24, window=(5, 4, 4), heads=3, depths=(2, 1), hidden=40, tail=8),
    "swin-stf, aligned": lambda: SwinSTF(
        width=24, window=(5, 4, 4), heads=3, depths=(2,), hidden=40, tail=8, align=True, deformable_groups=3
    ),
}


@pytest.fixture(autouse=True)
def full_float32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def seeded(make):
    torch.manual_seed(4)
    return make().eval().requires_grad_(False)


class Reference:
    """The module in float64 on the CPU, and how far from it float32 on the device may be: some times float32's own."""

    def __init__(self, module, *inputs):
        with torch.inference_mode():
            self.expected = copy.deepcopy(module).double()(*(x.double() for x in inputs))
            own = float((module(*inputs).double() - self.expected).abs().max())
        self.allowed = max(1e-5 * float(self.expected.abs().max()), 8 * own)

    def check(self, y, what):
        error = float((y.double().cpu() - self.expected).abs().max())
        assert error <= self.allowed, f"{what}: {error:.1e} off, {self.allowed:.1e} allowed"


@pytest.mark.parametrize("name", IMAGES)
def test_an_image(name):
    make, size = IMAGES[name]
    module, x = seeded(make), torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(5))
    reference = Reference(module, x)
    module, x = module.to(DEVICE), x.to(DEVICE)
    with torch.inference_mode():
        reference.check(module(x), "whole")
    for band in (8, 32):
        plan = make_plan(module, tuple(x.shape), band=band)
        y = plan.run(x)
        reference.check(y, f"bands of {band}")
        assert torch.equal(plan.run(x), y)


@pytest.mark.parametrize("name", VIDEOS)
def test_a_window_of_two_videos(name):
    module, generator = seeded(VIDEOS[name]), torch.Generator().manual_seed(5)
    lq, hq = (torch.rand(1, n, 1, *size, generator=generator) for n, size in ((3, (20, 28)), (2, (80, 112))))
    reference = Reference(module, lq, hq)
    with torch.inference_mode():
        reference.check(module.to(DEVICE)(lq.to(DEVICE), hq.to(DEVICE)), name)


@pytest.mark.parametrize("name", sorted(card.name for card in xrk.list_models()))
def test_shipped_weights(name):
    """The same counts as on the CPU within one; what a megapixel takes, read, copied and written, is printed."""
    generator = np.random.default_rng(3)
    row, column = np.mgrid[:192, :256]
    frame = generator.poisson(800 + 300 * ((row // 31 + column // 23) % 3)).astype(np.uint16)
    options = {"model": name, "levels": (0, 4000), "memory": "1GiB"}
    here, there = (xrk.enhance(frame, device=device, **options).astype(np.int64) for device in ("cpu", DEVICE))
    assert np.abs(here - there).max() <= 1
    side = 2048 if DEVICE == "cuda" else 128
    large = np.tile(frame, (11, 8))[:side, :side]
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        xrk.enhance(large, device=DEVICE, **options | {"memory": "8GiB"})
        seconds.append(time.perf_counter() - begun)
    print(f"\n{name}: {min(seconds):.3f} s of {side} x {side}, {min(seconds) / side**2 * 1e6:.3f} s a megapixel")
