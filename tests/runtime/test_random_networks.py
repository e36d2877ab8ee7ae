"""Random networks through plans: exact against the float64 module, for any size and any height of bands.

The cases are the same on every machine and every day. ``XRK_EXPLORE=1000 pytest tests/runtime/test_random_networks.py``
draws as many others, new ones every time; a failure prints the case, and pasting it after ``@example`` keeps it.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from networks import cases, check

from xrk.runtime.planner import make_plan

EXPLORED = int(os.environ.get("XRK_EXPLORE", "0"))

pytestmark = [
    # Torch says this of the networks themselves, on the whole image too.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:The default behavior for interpolate"),
]


def drawn(number):
    """So many cases, or those that are asked for; a network with few steps left over is no fault of a test."""
    return settings(
        max_examples=EXPLORED or number,
        derandomize=not EXPLORED,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads cost more than they bring on maps of a few pixels."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def banded(module, shape, band):
    return make_plan(module, shape, band=band).run


@drawn(320)
@given(cases(bands=2))
def test_row_local_networks(case):
    assume(check(case, banded))


@drawn(200)
@given(cases(row_global=True, bands=2))
def test_networks_that_look_at_the_whole_image(case):
    assume(check(case, banded))
