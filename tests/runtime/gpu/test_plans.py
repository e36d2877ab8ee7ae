"""Plans on a CUDA device: exact in float32, the same bits twice, within what they predict; and the speed of float16.

Each is skipped where there is no GPU. `benchmarks/run_on_gpu.sh` runs them.
"""

import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from fixed_networks import GroupNormUNet, seeded
from networks import Exactness

from xrk.models import DnCNN
from xrk.models.resnet18_unet import ResNet18UNet
from xrk.runtime.executor import execute
from xrk.runtime.planner import make_plan
from xrk.runtime.search import BACKEND
from xrk.runtime.steady import CudaRecorder, Steady

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

NARROW = {"width": 8, "decoder_channels": (32, 24, 16, 12, 8)}
NETWORKS = {
    "dncnn": (lambda: DnCNN(features=16, depth=8), (513, 300)),
    "resnet18-unet": (lambda: ResNet18UNet(**NARROW), (1536, 256)),
    "group norm and squeeze-excite": (lambda: GroupNormUNet(8), (301, 250)),
}


def on_gpu(name):
    make, size = NETWORKS[name]
    module = seeded(make).cuda()
    return module, torch.randn((1, 1, *size), generator=torch.Generator().manual_seed(5)).cuda()


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_in_float32(name):
    module, x = on_gpu(name)
    exact = Exactness(module, x)
    for band in (8, 32):
        plan = make_plan(module, tuple(x.shape), band=band)
        y = plan.run(x)
        assert exact.distance(y) <= exact.allowed, f"bands of {band}"
        assert torch.equal(plan.run(x), y)


@pytest.mark.parametrize("name", ["dncnn", "resnet18-unet"])
def test_bands_played_from_recordings_give_the_same_bits(name, monkeypatch):
    module, x = on_gpu(name)
    plan, played = make_plan(module, tuple(x.shape), band=16), []
    run = Steady.run
    monkeypatch.setattr(Steady, "run", lambda self, steps: [*run(self, steps), played.append(self.played)][:-1])
    y = plan.run(x)
    assert played[-1] > len(played) / 3

    class Never(CudaRecorder):
        def __call__(self, run):
            raise AssertionError

    monkeypatch.setattr("xrk.runtime.steady.MOST", 0)
    with torch.inference_mode():
        assert torch.equal(execute(plan._graph, plan._passes, x, record=Never())[0], y)


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("name", NETWORKS)
def test_memory_is_as_predicted(name, dtype):
    module, x = on_gpu(name)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    plan = make_plan(module, tuple(x.shape), dtype=dtype, band=16)
    plan.run(x)
    taken = torch.cuda.max_memory_allocated() - before
    print(f"\n{name} {dtype}: {taken / 2**20:.1f} of {plan.peak_bytes / 2**20:.1f} MiB, backend {BACKEND / 2**20:.0f}")
    assert taken <= plan.peak_bytes


def test_real_memory_that_runs_out():
    """A limit below what high bands take: the run goes on in lower ones."""
    module = seeded(lambda: nn.Sequential(nn.Conv2d(1, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 1, 3, padding=1)))
    module, x = module.cuda(), torch.randn(1, 1, 1024, 4096, device="cuda")
    plan = make_plan(module, tuple(x.shape), band=256)
    expected = make_plan(module, tuple(x.shape), band=16).run(x)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 768 * 2**20) / total)
    try:
        y = plan.run(x)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert plan.shrunk, f"{free} bytes were enough"
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=0)


def test_float16_in_a_gibibyte_is_as_fast_as_the_whole_image():
    """4096 x 4096 within 1 GiB, against the same module in float16 on the whole image."""
    module = seeded(ResNet18UNet).cuda()
    x = torch.rand(1, 1, 4096, 4096, device="cuda")
    plan = make_plan(module, tuple(x.shape), memory="1GiB", dtype=torch.float16)
    half = seeded(ResNet18UNet).half().cuda().to(memory_format=torch.channels_last)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    banded = _seconds(lambda: plan.run(x))
    peak = torch.cuda.max_memory_allocated() - before
    with torch.inference_mode():
        whole = _seconds(lambda: half(x.half()))
    ratio = whole / banded
    print(f"\nbands of {plan.band}: {banded * 1e3:.1f} ms, {peak / 2**20:.0f} MiB; whole image: {whole * 1e3:.1f} ms")
    print(f"{ratio:.2f} of the whole image's throughput")
    assert peak <= 2**30
    assert ratio >= 0.9


def _seconds(run):
    for _ in range(3):
        run()
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return best
