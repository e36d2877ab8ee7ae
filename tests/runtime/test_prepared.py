"""Prepared convolutions give what torch's public operators give, for every shape that a network may ask for."""

import pytest
import torch
import torch.nn.functional as F

from xrk.runtime import prepared
from xrk.runtime.prepared import prepare_convolution


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def without_packing(monkeypatch):
    """As on a CPU without wide vectors."""
    monkeypatch.setattr(prepared, "packs", lambda *_: False)


def oracle(x, weight, bias, stride, padding, dilation, groups, activation, residual):
    y = F.conv2d(*(None if t is None else t.double() for t in (x, weight, bias)), stride, padding, dilation, groups)
    y = y if residual is None else y + residual.double()
    return y.relu() if activation else y


@pytest.mark.parametrize("operators", ["packed", "private", "public"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "stride", "padding", "dilation", "groups"),
    [
        (1, 16, 7, (2, 2), 3, (1, 1), 1),
        (16, 1, 3, (1, 1), 1, (1, 1), 1),
        (40, 16, 3, (1, 1), 1, (1, 1), 1),
        (5, 3, 3, (1, 2), 0, (1, 1), 1),
        (8, 8, 3, (1, 1), 2, (2, 2), 8),
        (24, 12, 1, (2, 1), 0, (1, 1), 4),
    ],
)
def test_the_float64_convolution(
    monkeypatch, inputs, outputs, kernel, stride, padding, dilation, groups, activation, residual, operators
):
    if operators != "packed":
        without_packing(monkeypatch)
    if operators == "public":
        monkeypatch.setattr(prepared, "_checked", False)
    elif operators == "private" and not prepared._usable():
        pytest.skip("this torch has no oneDNN, or other private operators")
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, inputs // groups, kernel, kernel) * 0.2, torch.randn(outputs)
    run = prepare_convolution(weight, bias, stride, padding, dilation, groups, activation, 30, {5: 3, 2: 1})
    geometry = (stride, (0, padding), dilation, groups)
    for height in (16, 9, 23):
        # Rows out of a longer buffer, and channels out of a wider one: what a band of a concatenation looks like.
        x = torch.randn(1, inputs + 3, height + 4, 30).to(memory_format=torch.channels_last)[:, :inputs, 2:-2]
        shape = F.conv2d(x, weight, None, *geometry).shape
        other = torch.randn(shape).to(memory_format=torch.channels_last) if residual else None
        y = run(x, other, None)
        expected = oracle(x, weight, bias, *geometry, activation, other)
        allowed = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=allowed)
        torch.testing.assert_close(run(x, other, None), y, rtol=0, atol=0)
        # Into memory that is given, which may be the residual's own.
        memory = torch.full(shape, torch.nan).to(memory_format=torch.channels_last)
        for place in [memory] if other is None else [memory, other]:
            run(x, other, place)
            torch.testing.assert_close(place.double(), expected, rtol=0, atol=allowed)


def test_without_a_bias():
    weight = torch.randn(16, 8, 3, 3)
    run = prepare_convolution(weight, None, (1, 1), 1, (1, 1), 1, None, 8, {6: 1})
    x = torch.randn(1, 8, 8, 8)
    torch.testing.assert_close(run(x, None, None), F.conv2d(x, weight, padding=(0, 1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_take_the_public_operators(dtype):
    weight, x = torch.randn(4, 3, 3, 3, dtype=dtype), torch.randn(1, 3, 5, 7, dtype=dtype)
    run = prepare_convolution(weight, None, (1, 1), 1, (1, 1), 1, "relu", 7, {3: 1})
    torch.testing.assert_close(run(x, None, None), F.conv2d(x, weight, padding=(0, 1)).relu(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_heights_whose_layout_differs_are_taken_in_parts(monkeypatch, residual, given):
    """As if oneDNN had one layout for 4 and for 1 rows and another for all else."""
    if not prepared._usable():
        pytest.skip("this torch has no oneDNN, or other private operators")

    def layout(weight, geometry, groups, rows, threads):
        return b"same" if rows[2] - 2 in (1, 4) else b"other"

    without_packing(monkeypatch)
    monkeypatch.setattr(prepared, "_layout", layout)
    torch.manual_seed(1)
    weight, bias = torch.randn(16, 8, 3, 3) * 0.2, torch.randn(16)
    run = prepare_convolution(weight, bias, (1, 1), 1, (1, 1), 1, "relu", 12, {4: 9, 7: 1, 3: 1})
    assert prepared._split(7, lambda n: n in (1, 4)) == [4, 1, 1, 1]
    assert prepared._split(3, lambda n: False) == [3]
    for height in (4, 7, 3):
        x = torch.randn(1, 8, height + 2, 12).to(memory_format=torch.channels_last)
        other = torch.randn(1, 16, height, 12).to(memory_format=torch.channels_last) if residual else None
        expected = oracle(x, weight, bias, (1, 1), (0, 1), (1, 1), 1, "relu", other)
        place = torch.empty(1, height, 12, 16).permute(0, 3, 1, 2) if given else None
        y = run(x, other, place)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        assert not given or torch.equal(place, y)


@pytest.mark.parametrize("shape", [(1, 16, 3, 3), (12, 8, 3, 3), (100, 64, 2, 2), (64, 1, 7, 7)])
def test_bytes_of_prepared_weights(shape, monkeypatch):
    here = (torch.float32, torch.device("cpu"))
    if prepared.packs(here[1], here[0]):
        run = prepare_convolution(torch.randn(shape), None, (1, 1), 1, (1, 1), 1, None, 512, {16: 1})
        assert run._weight.nbytes + run._bias.nbytes == prepared.prepared_bytes(shape, *here)
    without_packing(monkeypatch)
    if not prepared._usable():
        pytest.skip("this torch has no oneDNN, or other private operators")
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        torch.randn(shape), [0, 1], [1, 1], [1, 1], 1, (1, shape[1], 18, 512)
    )
    actual = torch.ops.mkldnn._nbytes(packed)
    assert actual <= prepared.prepared_bytes(shape, *here) <= 2 * actual


def test_operators_that_went_away_are_not_used(monkeypatch):
    def gone(*_):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(prepared, "_fused", gone)
    monkeypatch.setattr(prepared, "_checked", None)
    assert not prepared._usable()
