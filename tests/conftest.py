"""What the tests of the whole tree share."""

from pathlib import Path

import hypothesis
import pytest
import torch

# Small frames gain nothing from many threads, and the tests' time must not depend on a machine's number of cores.
torch.set_num_threads(min(2, torch.get_num_threads()))

# A busy machine is slow now and then: that says nothing about the code.
hypothesis.settings.register_profile(
    "xrk", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("xrk")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real radiographs, checkpoints and fixtures that lies beside the checkout on some machines."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data is not beside this checkout (../shared/data)")
    return folder
