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


def oracle(x, weight, bias, stride, padding, dilation, groups, activation, residual):
    y = F.conv2d(*(None if t is None else t.double() for t in (x, weight, bias)), stride, padding, dilation, groups)
    y = y if residual is None else y + residual.double()
    return y.relu() if activation else y


@pytest.mark.parametrize("public", [False, True], ids=["private", "public"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "stride", "padding", "dilation", "groups"),
    [
        (1, 16, 7, (2, 2), (0, 3), (1, 1), 1),
        (16, 1, 3, (1, 1), (0, 1), (1, 1), 1),
        (40, 16, 3, (1, 1), (0, 1), (1, 1), 1),
        (5, 3, 3, (1, 2), (0, 0), (1, 1), 1),
        (8, 8, 3, (1, 1), (0, 2), (2, 2), 8),
        (24, 12, 1, (2, 1), (0, 0), (1, 1), 4),
    ],
)
def test_the_float64_convolution(
    monkeypatch, inputs, outputs, kernel, stride, padding, dilation, groups, activation, residual, public
):
    if public:
        monkeypatch.setattr(prepared, "_checked", False)
    elif not prepared._usable():
        pytest.skip("this torch has no oneDNN, or other private operators")
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, inputs // groups, kernel, kernel) * 0.2, torch.randn(outputs)
    geometry = (stride, padding, dilation, groups)
    run, _ = prepare_convolution(weight, bias, *geometry, activation, (1, inputs, 16, 30))
    for height in (16, 9, 23):
        # Rows out of a longer buffer, and channels out of a wider one: what a band of a concatenation looks like.
        x = torch.randn(1, inputs + 3, height + 4, 30).to(memory_format=torch.channels_last)[:, :inputs, 2:-2]
        shape = F.conv2d(x, weight, None, *geometry).shape
        other = torch.randn(shape).to(memory_format=torch.channels_last) if residual else None
        y = run(x, other)
        expected = oracle(x, weight, bias, *geometry, activation, other)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        torch.testing.assert_close(run(x, other), y, rtol=0, atol=0)


def test_without_a_bias():
    weight = torch.randn(16, 8, 3, 3)
    run, _ = prepare_convolution(weight, None, (1, 1), (0, 1), (1, 1), 1, None, (1, 8, 8, 8))
    x = torch.randn(1, 8, 8, 8)
    torch.testing.assert_close(run(x, None), F.conv2d(x, weight, padding=(0, 1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_take_the_public_operators(dtype):
    weight, x = torch.randn(4, 3, 3, 3, dtype=dtype), torch.randn(1, 3, 5, 7, dtype=dtype)
    run, held = prepare_convolution(weight, None, (1, 1), (0, 1), (1, 1), 1, "relu", tuple(x.shape))
    assert held == 0
    torch.testing.assert_close(run(x, None), F.conv2d(x, weight, padding=(0, 1)).relu(), rtol=1e-2, atol=1e-2)


def test_operators_that_went_away_are_not_used(monkeypatch):
    def gone(*_):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(prepared, "_fused", gone)
    monkeypatch.setattr(prepared, "_checked", None)
    assert not prepared._usable()
