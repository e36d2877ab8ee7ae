"""The memory that a plan promises: kept to, the same however many rows the image has, and measured in new processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixed_networks import SqueezeExcite, seeded
from networks import Exactness
from torch import nn

import xrk
from xrk.errors import MemoryBudgetError
from xrk.models.dncnn import DnCNN
from xrk.models.resnet18_unet import ResNet18UNet
from xrk.runtime.budget import parse_memory
from xrk.runtime.planner import _graph
from xrk.runtime.search import STEP, Search

NARROW = {"width": 8, "decoder_channels": (32, 24, 16, 12, 8)}


def normed():
    """Two norms and a gate, each over the whole image, on maps that are large beside the weights."""
    middle = [nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1), nn.InstanceNorm2d(16), SqueezeExcite(16)]
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), *middle, nn.Conv2d(16, 1, 3, padding=1))


NETWORKS = {
    "resnet18-unet": lambda: ResNet18UNet(**NARROW),
    "dncnn": DnCNN,
    "norms and squeeze-excite": normed,
}


def smallest_budget(module, size):
    """Bytes, as the error of a budget that is too small names them."""
    with pytest.raises(MemoryBudgetError, match="smallest plan") as caught:
        xrk.plan(module, size, memory=parse_memory("1MiB"))
    return int(re.search(r"memory=(\d+)\.$", str(caught.value))[1])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_budget_is_kept_and_the_smallest_that_is_named_works(name):
    module, size = seeded(NETWORKS[name]), (256, 512)
    smallest = smallest_budget(module, size)
    assert xrk.plan(module, size, memory=smallest).peak_bytes <= smallest
    with pytest.raises(MemoryBudgetError, match=str(smallest)):
        xrk.plan(module, size, memory=smallest - 1)
    peaks = [xrk.plan(module, size, memory=int(smallest * factor)).peak_bytes for factor in (1.3, 2, 8)]
    assert all(peak <= smallest * factor for peak, factor in zip(peaks, (1.3, 2, 8), strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_budget_gives_the_same_plan_and_the_same_bits(name):
    module, size = seeded(NETWORKS[name]), (160, 96)
    memory = int(smallest_budget(module, size) * 1.2)
    x = torch.randn((1, 1, *size), generator=torch.Generator().manual_seed(2))
    plans = [xrk.plan(module, size, memory=memory) for _ in range(2)]
    assert str(plans[0]) == str(plans[1])
    assert torch.equal(plans[0].run(x), plans[1].run(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_budget_is_exact(name):
    module, size = seeded(NETWORKS[name]), (192, 64)
    smallest = smallest_budget(module, size)
    x = torch.randn((1, 1, *size), generator=torch.Generator().manual_seed(2))
    exact = Exactness(module, x)
    for memory in (smallest, int(1.5 * smallest), None):
        assert exact.distance(xrk.plan(module, size, memory=memory).run(x)) <= exact.allowed


@pytest.mark.parametrize("name", ["resnet18-unet", "dncnn"])
def test_memory_does_not_grow_with_the_rows_but_for_the_output(name):
    module, width = seeded(NETWORKS[name]), 256
    low, high = (xrk.plan(module, (rows, width), memory="1GiB").peak_bytes - rows * width * 4 for rows in (2048, 8192))
    assert high <= 1.1 * low


MEASURED = """
import json, sys
sys.path[:0] = [{benchmarks!r}]
import torch
torch.set_num_threads(1)
import bench_runtime
print(json.dumps(bench_runtime.measure(json.loads(sys.argv[1]))))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from /proc")
@pytest.mark.parametrize(
    ("network", "size", "contestant"),
    [("resnet18-unet", (512, 512), "xrk:none"), ("dncnn", (256, 256), "xrk:none")],
)
def test_the_measured_peak_is_what_was_predicted(network, size, contestant):
    """In a new process: what the test's own process has allocated and freed would hide a peak."""
    benchmarks = str(Path(__file__).parents[2] / "benchmarks")
    task = {"network": network, "size": size, "contestant": contestant, "threads": 1, "work": "", "repeats": 1}
    command = [sys.executable, "-c", MEASURED.format(benchmarks=benchmarks), json.dumps(task)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert 0.7 * result["predicted_mib"] <= result["peak_mib"] <= result["predicted_mib"]


SMALLEST = """
import torch
from torch import nn
import xrk.planning
torch.set_num_threads(1)
torch.manual_seed(1)
layers = [nn.Conv2d(1, 24, 3, padding=1), nn.GELU(), nn.Conv2d(24, 24, 7, padding=3), nn.PReLU()]
module, size = nn.Sequential(*layers, nn.Conv2d(24, 1, 3, padding=1)).eval(), (200, 300)
x = torch.rand(1, 1, *size)
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
try:
    xrk.planning.plan(module, size, memory="1MiB")
except xrk.errors.MemoryBudgetError as error:
    smallest = error.smallest
plan = xrk.planning.plan(module, size, memory=smallest)
y = plan.run(x)
print(status("VmHWM") - before, plan.peak_bytes)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from /proc")
def test_the_smallest_plan_keeps_to_its_budget_with_the_search_for_it():
    """The code of operators that only the check calls, and what it leaves, is most of such a plan."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SMALLEST], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured, predicted = map(int, done.stdout.split())
    assert 0.5 * predicted <= measured <= predicted


def test_the_search_holds_no_orders_that_do_not_fit():
    graph = _graph(seeded(DnCNN), (1, 1, 256, 64), torch.float32, torch.device("cpu"), "refuse")
    search = Search(graph, None, lambda: graph, False)
    smallest = search.first_within(1)
    assert len(search.sized) > 3
    assert not any(sized.passes for sized in search.sized.values())
    assert sum(len(p.steps) for p in search.laid_out(smallest).passes) * STEP == smallest.order
