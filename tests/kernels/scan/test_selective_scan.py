"""The scan of sequences on the CPU against its definition in float64, in any order and in parts."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from xrk.kernels.scan.reference import selective_scan_reference

from xrk import _native, kernels


@pytest.fixture(params=_native.supported_simd())
def path(request):
    before = _native.simd()
    _native.set_simd(request.param)
    yield request.param
    _native.set_simd(before)


def make(batch, channels, length, states, groups=0, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows = (batch, groups, states, length) if groups else (batch, states, length)
    return {
        "u": normal(batch, channels, length),
        "delta": normal(batch, channels, length),
        "A": -torch.exp(normal(channels, states)),
        "B": normal(*rows),
        "C": normal(*rows),
        "D": normal(channels),
        "z": normal(batch, channels, length),
        "delta_bias": normal(channels) - 1,
        "initial_state": normal(batch, channels, states),
    }


def error(actual, expected):
    assert actual.shape == expected.shape
    return float((actual.double() - expected).abs().max() / expected.abs().max())


def to(inputs, dtype):
    return {name: t.to(dtype) for name, t in inputs.items()}


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 7, 3), (1, 16, 13, 16), (2, 34, 5, 64), (1, 12, 9, 2, 3)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 3e-6)])
def test_it_is_the_definition(path, shape, dtype, bound):
    inputs = make(*shape)
    expected, expected_state = selective_scan_reference(**inputs, delta_softplus=True)
    out, state = kernels.selective_scan(**to(inputs, dtype), delta_softplus=True, return_last_state=True)
    assert out.dtype == dtype and out.is_contiguous() and state.dtype == dtype
    assert error(out, expected) < bound and error(state, expected_state) < bound


@pytest.mark.parametrize("without", ["D", "z", "delta_bias", "initial_state"])
def test_what_is_optional_may_be_left_out(without):
    inputs = make(2, 9, 6, 4)
    del inputs[without]
    inputs["delta"] = inputs["delta"].abs()
    expected, _ = selective_scan_reference(**inputs)
    assert error(kernels.selective_scan(**inputs), expected) < 1e-14


@pytest.mark.parametrize("values", [1, 64 * 2 * 9])
@pytest.mark.parametrize("order", [None, "one", "per image"])
def test_pieces_are_the_whole(monkeypatch, values, order):
    """200 steps, 64 at a time: with their own order, gathered, and with channels or positions that lie together."""
    module = sys.modules["xrk.kernels.scan.selective_scan"]
    monkeypatch.setattr(module, "PIECE_VALUES", values)
    inputs = make(2, 9, 200, 3, 3)
    if order is not None:
        orders = torch.stack([torch.randperm(200, generator=torch.Generator().manual_seed(i)) for i in (0, 1)])
        inputs["order"] = orders if order == "per image" else orders[0]
    expected, expected_state = selective_scan_reference(**inputs, delta_softplus=True)
    for lie_together in (False, True):
        if lie_together:
            for name in ("u", "delta", "z"):
                inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
        out, state = kernels.selective_scan(**inputs, delta_softplus=True, return_last_state=True)
        assert out.stride() == inputs["u"].stride()
        assert error(out, expected) < 1e-13 and error(state, expected_state) < 1e-13


MEASURE = """
import sys, torch
from pathlib import Path
from xrk import kernels

def resident(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

dtype, length = getattr(torch, sys.argv[1]), int(sys.argv[2])
u, delta, z = (torch.ones(1, length, 64, dtype=dtype).transpose(1, 2) for _ in range(3))
B, C = (torch.ones(1, 2, length, dtype=dtype) for _ in range(2))
inputs = (u, delta, -torch.ones(64, 2), B, C, torch.ones(64), z, torch.ones(64), True)
kernels.selective_scan(*(t[..., :9] if isinstance(t, torch.Tensor) and t.shape[-1] == length else t for t in inputs))
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
out = kernels.selective_scan(*inputs)
print(resident("VmHWM") - before - out.nbytes)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from /proc")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_lies_beside_the_tensors_is_some_pieces(dtype):
    """In a new process; each of the four maps has 8 MiB in 16 bits, and a piece of one 1 MiB in float32."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, dtype, "65536"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 8 * 2**20, done.stdout


def test_growing_states_are_followed():
    inputs = make(1, 8, 6, 2)
    del inputs["delta_bias"]
    inputs["A"] = inputs["A"].abs()
    inputs["delta"] = inputs["delta"] * 2
    expected, _ = selective_scan_reference(**inputs)
    assert error(kernels.selective_scan(**inputs), expected) < 1e-12


def test_small_steps_keep_their_digits():
    """dt = softplus(delta) far below 1: with float32's log(1 + e) it would be wrong by more than a thousandth."""
    inputs = make(1, 8, 4, 1)
    del inputs["z"], inputs["D"], inputs["initial_state"], inputs["delta_bias"]
    inputs["delta"] = torch.linspace(-16, -6, 32, dtype=torch.float64).reshape(1, 8, 4)
    inputs = {name: t.float().double() for name, t in inputs.items()}
    expected, _ = selective_scan_reference(**inputs, delta_softplus=True)
    actual = kernels.selective_scan(**to(inputs, torch.float32), delta_softplus=True)
    torch.testing.assert_close(actual[..., 0].double(), expected[..., 0], rtol=2e-6, atol=0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_is_rounded_once_on_the_way_out(dtype, bound):
    inputs = make(1, 9, 12, 4)
    low = {name: t.to(dtype) if name in ("u", "delta", "z") else t.float() for name, t in inputs.items()}
    out, state = kernels.selective_scan(**low, delta_softplus=True, return_last_state=True)
    assert out.dtype == dtype and state.dtype == torch.float32
    expected, _ = selective_scan_reference(**to(low, torch.float64), delta_softplus=True)
    assert error(out, expected) < bound


@pytest.mark.parametrize("scan", [kernels.selective_scan, lambda **inputs: selective_scan_reference(**inputs)[0]])
@settings(max_examples=15)
@given(st.integers(1, 12), st.booleans(), st.integers(0, 99))
def test_a_permuted_order_is_the_scan_of_the_permuted_sequence(scan, length, per_image, seed):
    inputs = make(2, 5, length, 3, seed=seed)
    orders = torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 1)])
    order = orders if per_image else orders[0]
    gather = order.expand(2, length)[:, None]
    permuted = dict(inputs)
    for name in ("u", "delta", "B", "C", "z"):
        permuted[name] = inputs[name].gather(2, gather.expand(inputs[name].shape))
    expected = torch.empty_like(inputs["u"])
    expected.scatter_(2, gather.expand(inputs["u"].shape), scan(**permuted))
    assert error(scan(**inputs, order=order), expected) < 1e-13


@settings(max_examples=15)
@given(st.integers(2, 14), st.data())
def test_two_parts_with_the_carried_state_are_the_whole(length, data):
    cut = data.draw(st.integers(1, length - 1))
    inputs = make(2, 9, length, 4)
    parts = []
    del inputs["z"]  # torch's own SiLU gives other last bits at another length
    state = inputs.pop("initial_state")
    whole, last = kernels.selective_scan(**inputs, initial_state=state, return_last_state=True)
    for part in (slice(0, cut), slice(cut, length)):
        own = {name: t[..., part] if name in ("u", "delta", "B", "C") else t for name, t in inputs.items()}
        out, state = kernels.selective_scan(**own, initial_state=state, return_last_state=True)
        parts.append(out)
    assert torch.equal(torch.cat(parts, 2), whole) and torch.equal(state, last)


def test_it_is_an_operator_of_torch():
    inputs = to(make(1, 5, 6, 2), torch.float32)
    order = torch.arange(5, -1, -1)
    arguments = [inputs[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    op = torch.ops.xrk.selective_scan.default
    torch.library.opcheck(op, (*arguments, True, order, inputs["initial_state"]))
    torch.library.opcheck(op, (*arguments[:5], None, None, None, False, None, None))


class Mixer(torch.nn.Module):
    def forward(self, u, delta, A, B, C):
        return kernels.selective_scan(u * 2, delta, A, B, C, delta_softplus=True) + 1


def test_it_is_exported_for_any_length_and_compiled():
    inputs = [to(make(1, 5, 6, 2), torch.float32)[name] for name in ("u", "delta", "A", "B", "C")]
    length = torch.export.Dim("L", min=2)
    sizes = {"u": {2: length}, "delta": {2: length}, "A": None, "B": {2: length}, "C": {2: length}}
    exported = torch.export.export(Mixer(), tuple(inputs), dynamic_shapes=sizes).module()
    other = [to(make(1, 5, 9, 2, seed=1), torch.float32)[name] for name in ("u", "delta", "A", "B", "C")]
    assert torch.equal(exported(*other), Mixer()(*other))
    compiled = torch.compile(Mixer(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), Mixer()(*inputs))


BAD = {
    "u": ({"u": torch.zeros(3, 4)}, ValueError, r"u has shape \(3, 4\); expected \(batch, D, L\)"),
    "delta": ({"delta": torch.zeros(1, 4, 6)}, ValueError, r"delta has shape \(1, 4, 6\); expected"),
    "A": ({"A": torch.zeros(5, 65)}, ValueError, "N 1 to 64"),
    "B": ({"B": torch.zeros(1, 2, 2, 6)}, ValueError, r"B has shape \(1, 2, 2, 6\); expected \(1, 2, 6\) or"),
    "C": ({"C": torch.zeros(1, 3, 6)}, ValueError, r"C has shape \(1, 3, 6\); expected \(1, 2, 6\)"),
    "groups": ({"C": torch.zeros(1, 5, 2, 6)}, ValueError, "as many groups as B"),
    "D": ({"D": torch.zeros(4)}, ValueError, r"D has shape \(4,\); expected \(5,\)"),
    "z": ({"z": torch.zeros(1, 5, 6).half()}, TypeError, "z has dtype float16"),
    "delta_bias": ({"delta_bias": torch.zeros(5).double()}, TypeError, "delta_bias has dtype float64"),
    "state": ({"initial_state": torch.zeros(1, 5, 3)}, ValueError, r"initial_state has shape \(1, 5, 3\)"),
    "order's dtype": ({"order": torch.zeros(6)}, TypeError, "order has dtype float32; expected int64"),
    "order's shape": ({"order": torch.arange(5)}, ValueError, r"order has shape \(5,\); expected \(6,\)"),
    "order": ({"order": torch.tensor([0, 1, 2, 3, 4, 4])}, ValueError, "each position 0 to 5 once"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_named(what):
    replaced, kind, message = BAD[what]
    inputs = to(make(1, 5, 6, 2), torch.float32) | replaced
    with pytest.raises(kind, match=message):
        kernels.selective_scan(**inputs)
