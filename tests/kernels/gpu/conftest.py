"""Tests that need a CUDA device; without one they are skipped. `benchmarks/run_on_gpu.sh` runs them first.

XRK_GPU_TESTS_DEVICE=cpu runs them on the CPU, on small shapes: it checks the checks where there is no GPU.
"""

import os
from pathlib import Path

import pytest
import torch

# Read by cuBLAS at its start; torch asks for it where algorithms are to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items):
    # `poisoned` below makes torch name its operators that are not deterministic; xrk's own are not meant.
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"))


@pytest.fixture(autouse=True)
def device():
    name = os.environ.get("XRK_GPU_TESTS_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return name


@pytest.fixture(autouse=True)
def poisoned(device):
    """Memory that nobody has written to yet holds NaN, and float32 convolutions are in float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert bool(torch.empty(64, device=device).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = before
