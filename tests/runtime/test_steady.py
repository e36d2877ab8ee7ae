"""Bands that are recorded and played again: the same result, from fixed memory. On the CPU, by a recorder of ours."""

import pytest
import torch
from fixed_networks import GroupNormUNet, seeded
from networks import Exactness
from test_plan import small
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from xrk.models.resnet18_unet import ResNet18UNet
from xrk.runtime import nodes_convolution, prepared
from xrk.runtime.executor import execute
from xrk.runtime.planner import make_plan
from xrk.runtime.schedule import schedule
from xrk.runtime.steady import Steady, bands, window_bytes


class Taken(TorchDispatchMode):
    """Takes down every operator with the very tensors that it was given, as a CUDA graph does with addresses."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Tape:
    """What was taken down; the first replay does nothing, for on the CPU taking down has run it."""

    recordings = 0
    replays = 0

    def __init__(self, run):
        type(self).recordings += 1
        self.ran = True
        with Taken() as taken:
            run()
        self.calls = taken.calls

    def replay(self):
        type(self).replays += 1
        if self.ran:
            self.ran = False
            return
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            if isinstance(again, torch.Tensor) and again.data_ptr() != result.data_ptr():
                result.copy_(again)  # operators give new memory here, and the same memory on a GPU


@pytest.fixture(autouse=True)
def convolutions_of_torch(monkeypatch):
    """As on a GPU: xrk's own convolutions on a CPU are no operators of torch that could be taken down."""
    for module in (prepared, nodes_convolution):
        monkeypatch.setattr(module, "packs", lambda *_: False)


def unet():
    return ResNet18UNet(width=8, decoder_channels=(16, 16, 8, 8, 8))


def transposed():
    up = nn.ConvTranspose2d(12, 8, 2, stride=2)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 4, 2, 1), nn.ReLU(), up, nn.Conv2d(8, 1, 3))


def shuffled():
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4, 8, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(2, 1, 3))


NETWORKS = {
    "dncnn": (lambda: small(depth=5), (150, 24), 8),
    "u-net": (unet, (1536, 32), 32),
    "transposed": (transposed, (130, 20), 8),
    "shuffled": (shuffled, (130, 20), 8),
    "norms": (lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 1, 3)), (140, 24), 8),
}


def run(plan, x, record, **options):
    passes = [schedule(p.segment, p.band, p.least, repeat=True) for p in plan._passes]
    with torch.inference_mode():
        return execute(plan._graph, passes, x, record=record, **options)[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_recording_gives_the_same_bits(name, monkeypatch):
    make, size, band = NETWORKS[name]
    module = seeded(make)
    x = torch.randn((1, 1, *size), generator=torch.Generator().manual_seed(3))
    plan = make_plan(module, tuple(x.shape), band=band)
    monkeypatch.setattr(Tape, "recordings", 0)
    monkeypatch.setattr(Tape, "replays", 0)
    y = run(plan, x, Tape)
    assert torch.equal(y, plan.run(x))
    assert Exactness(module, x).distance(y) <= Exactness(module, x).allowed
    # Most bands are played from a few recordings.
    count = len(bands(plan._passes[-1]))
    assert 0 < Tape.recordings <= 16
    assert Tape.replays > count / 2, (Tape.replays, count)


def test_every_address_of_a_recording_is_its_own():
    """Whole maps are not touched by a recording: it sees windows of them."""
    plan = make_plan(small(depth=5), (1, 1, 150, 24), band=8)
    x = torch.randn(1, 1, 150, 24)
    seen = []

    class Watched(Tape):
        def __init__(self, run):
            super().__init__(run)
            leaves = [t for c in self.calls for t in torch.utils._pytree.tree_leaves(c[1:]) if torch.is_tensor(t)]
            seen.append({t.untyped_storage().data_ptr() for t in leaves if t.layout == torch.strided})

    y = run(plan, x, Watched)
    assert seen
    assert all(t.untyped_storage().data_ptr() not in s for s in seen for t in (x, y))


def test_what_depends_on_its_place_is_run_as_it_is(monkeypatch):
    monkeypatch.setattr(Tape, "replays", 0)
    module = seeded(lambda: GroupNormUNet(4))
    x = torch.randn(1, 1, 96, 40)
    plan = make_plan(module, tuple(x.shape), band=8)
    assert torch.equal(run(plan, x, Tape), plan.run(x))
    steps = sum(len(bands(p)) for p in plan._passes)
    assert Tape.replays < steps / 2  # every segment but the last has summaries, and bilinear weights go on


def test_memory_that_runs_out_while_recording(monkeypatch):
    module, x = seeded(unet), torch.randn(1, 1, 1024, 32)
    plan = make_plan(module, tuple(x.shape), band=32)

    class Failing(Tape):
        """As on a GPU, nothing has run of what could not be taken down to its end."""

        def __init__(self, run):
            if Failing.recordings == 1:
                Failing.recordings += 1
                memory = {id(t): t for rows in stores[-1] for t in [rows.memory] if t is not None}
                kept = {i: t.clone() for i, t in memory.items()}
                run()
                for i, t in memory.items():
                    t.copy_(kept[i])
                raise torch.OutOfMemoryError("while recording")
            super().__init__(run)

    stores, begin = [], Steady.__init__
    monkeypatch.setattr(Steady, "__init__", lambda self, p, s, *rest: (stores.append(s), begin(self, p, s, *rest))[1])
    shrunk = []
    y = run(plan, x, Failing, shrunk=shrunk)
    torch.testing.assert_close(y, plan.run(x), atol=1e-5, rtol=0)
    assert len(shrunk) == 1


def test_windows_are_as_high_as_a_band_and_its_context():
    plan = make_plan(small(depth=5), (1, 1, 150, 24), band=8)
    assert 2 * 8 * 24 * 4 <= window_bytes(plan._passes[0]) <= 4 * 16 * 24 * 4
