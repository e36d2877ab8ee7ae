"""The scans' Triton kernels under Triton's interpreter, against float64: run by the `interpreted` fixture with
TRITON_INTERPRET=1, in a process of its own, since that is decided when Triton is imported.

    python interpreted_scans.py NAME [ARGUMENT]        one of the functions below
"""

import sys

import torch
from conftest import _make, _public_module_error
from hypothesis import given, settings
from hypothesis import strategies as st
from xrk.kernels.scan import (
    launch,
    reference,
    selective_scan_2d,
    triton_selective_scan,
    triton_selective_scan_2d,
    triton_selective_scan_backward,
)

# Rows of projections are rounded to u's dtype, as on the device.
BOUND = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
few = settings(max_examples=4, deadline=None, derandomize=True, database=None)


def check(actual, expected, dtype, what):
    assert actual.shape == expected.shape, what
    error = float((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    assert error < BOUND[dtype], (what, dtype, error)


def image():
    cases = [((1, 1, 1, 1, 1, 1), torch.float32, 9), ((2, 2, 3, 5, 2, 1), torch.float32, 99)]
    cases += [((1, 1, 2, 97, 1, 7), torch.float16, 999), ((1, 2, 1, 3, 5, 2), torch.bfloat16, 99)]
    # In bands of two rows and a last one of one, the rows in halves.
    cases += [((1, 7, 4, 3, 1, 1), torch.float32, 0), ((2, 5, 4, 2, 2, 1), torch.float16, 0)]
    launch.SHORTEST_PIECE = 2
    for shape, dtype, launch.BANDED_VALUES in cases:
        inputs = _make(*shape)
        expected = reference.selective_scan_2d_reference(*inputs)
        x, *weights = (tensor.float() for tensor in inputs)
        actual = triton_selective_scan_2d.selective_scan_2d(x.to(dtype), *weights)
        assert actual.dtype == dtype
        check(actual, expected, dtype, shape)


def sequence():
    normal = torch.randn
    launch.SHORTEST_PIECE = 2
    for number, (batch, channels, length, states, groups) in enumerate(
        [(1, 1, 1, 1, 0), (2, 3, 7, 2, 0), (1, 6, 5, 3, 2), (1, 40, 3, 1, 0), (1, 2, 4, 1, 1), (2, 2, 2, 2, 1)]
    ):
        dtype = list(BOUND)[number % 3 if number > 1 else 0]
        all_options = number % 2 == 1
        rows = (batch, groups, states, length) if groups else (batch, states, length)
        shape = (batch, channels, length)
        maps = [normal(shape), normal(shape), -torch.exp(normal(channels, states)), normal(rows), normal(rows)]
        maps = [t.to(dtype) if i != 2 else t for i, t in enumerate(maps)]
        options = [normal(channels), normal(shape).to(dtype), normal(channels) - 1, True]
        order = torch.stack([torch.randperm(length) for _ in range(batch)])
        options += [order if number % 4 == 1 else order[0], normal(batch, channels, states)]
        if not all_options:
            options = [None, None, None, False, None, None]
            maps[1] = maps[1].abs()
        exact = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in maps + options]
        # With the channels of a position together, or the positions of a channel.
        out = torch.full((batch, length, channels), torch.nan, dtype=dtype).transpose(1, 2)
        out = out if number % 2 else out.contiguous()
        state = triton_selective_scan.selective_scan(*maps, *options, out)
        expected, expected_state = reference.selective_scan_reference(*exact)
        assert state.dtype == torch.float32
        check(out, expected, dtype, ("sequence", number))
        check(state, expected_state, dtype, ("state", number))


def gradients():
    """Against the plain loop in float64, whose own gradients test_gradients.py holds against finite differences."""
    normal = torch.randn
    launch.BACK["steps"] = 3
    launch.BACK["programs"] = 3
    launch.BACK["channels"] = 2
    for number, (batch, channels, length, states, groups) in enumerate(
        [(1, 1, 1, 1, 1), (2, 3, 7, 3, 1), (1, 6, 5, 2, 2), (1, 2, 4, 1, 1)]
    ):
        maps = [normal(batch, length, channels) for _ in range(3)]
        rows = [normal(batch, groups, length, states) for _ in range(2)]
        state = normal(batch, channels, states)
        order = torch.stack([torch.randperm(length) for _ in range(batch)])
        options = [normal(channels) - 1, True, order if number % 2 else None, normal(batch, channels, states)]
        if number == 0:
            options, state = [None, False, None, None], None
        arguments = [maps[0], state, *maps[1:], -torch.exp(normal(channels, states)), *rows, *options]
        exact = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]
        u_grad = normal(batch, length, channels)
        exact_u_grad = u_grad.double()
        expected = reference.scan_gradients_reference(*exact, exact_u_grad)
        actual = triton_selective_scan_backward.scan_gradients(*arguments, u_grad)
        for a, e in zip((u_grad, *actual), (exact_u_grad, *expected), strict=True):
            check(a, e, torch.float32, ("gradients", number))


@few
@given(st.lists(st.integers(1, 2), min_size=4, max_size=4), st.integers(1, 2), st.integers(0, 3), st.integers(0, 9))
def bands(heights, width, k, seed):
    """Phases band by band, from the states that the bands before them leave, are the whole: for each direction."""
    x, *weights = _make(1, sum(heights), width, 3, 2, 1, torch.float32, seed)
    parameters, logs = weights[:-1], weights[3]
    triton = triton_selective_scan_2d
    parts = list(zip(x.split(heights, 1), torch.zeros_like(x).split(heights, 1), strict=True))[:: 1 if k < 2 else -1]
    summaries = [triton.summarise_lines(part, *parameters, k) for part, _ in parts]
    outs = []
    if k % 2 == 1:
        A = -torch.exp(logs[3 * k : 3 * k + 3])
        sums, ends = summaries[0]
        for more, end in summaries[1:]:
            sums, ends = sums + more, torch.exp(more[..., None] * A) * ends + end
        starts, last = triton.carry_lines(sums, ends, logs, k, None)
    state = None
    for (part, out), (sums, ends) in zip(parts, summaries, strict=True):
        if k % 2 == 0:
            starts, state = triton.carry_lines(sums, ends, logs, k, state)
        out = out.contiguous()
        starts = triton.scan_lines(part, *weights, k, starts, out)
        outs.append(out)
    out = torch.cat(outs[:: 1 if k < 2 else -1], 1)
    inputs = [tensor.double() for tensor in (x, *weights)]
    expected_sums, expected_ends = reference.summarise_lines_reference(*inputs[:-1], k)
    carried = selective_scan_2d.carry_lines(expected_sums, expected_ends, inputs[4], k)
    expected = torch.zeros_like(inputs[0])
    reference.scan_lines_reference(*inputs, k, carried[0], expected)
    check(out, expected, torch.float32, ("bands", heights, width, k))
    check(state if k % 2 == 0 else last, carried[1], torch.float32, ("last state", heights, width, k))


def public_module(fixture):
    """One image of ss2d_48.npz, its 72 channels in one block: each operation takes the interpreter its time."""
    wide = {"WIDTH": 128, "BLOCKS": 1, "num_warps": 1}
    triton_selective_scan_2d.walk_configuration = lambda channels, states: wide
    error = _public_module_error(fixture, triton_selective_scan_2d.selective_scan_2d, images=1)
    assert error < 1e-5, error


if __name__ == "__main__":
    torch.manual_seed(0)
    functions = (image, sequence, gradients, bands, public_module)
    {f.__name__: f for f in functions}[sys.argv[1]](*sys.argv[2:])
    print("all equal")
