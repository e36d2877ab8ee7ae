"""Packed convolutions against float64, on every path that this processor runs."""

import pytest
import torch
import torch.nn.functional as F
from xrk.kernels import PackedConv2d, PackedDoubledConv2d

from xrk import _native


@pytest.fixture(params=_native.supported_simd())
def path(request):
    before = _native.simd()
    _native.set_simd(request.param)
    yield request.param
    _native.set_simd(before)


def channels_last(*shape):
    return torch.randn(shape).to(memory_format=torch.channels_last)


def oracle(x, weight, bias, residual, stride, padding, dilation, activation):
    x, weight = F.pad(x.double(), padding), weight.double()
    y = F.conv2d(x, weight, None if bias is None else bias.double(), stride, 0, dilation)
    y = y if residual is None else y + residual.double()
    return y.relu() if activation else y


PLAIN = ((1, 1), (1, 1), (1, 1))
CASES = [
    # channels, outputs, kernel, stride, padding, dilation, transformed, rows, columns
    (1, 64, (7, 7), (2, 2), (3, 3), (1, 1), False, 13, 50),
    (16, 1, (3, 3), *PLAIN, False, 9, 61),
    (40, 24, (3, 3), *PLAIN, False, 5, 31),
    (5, 3, (3, 3), (1, 2), (0, 1), (1, 1), False, 6, 17),
    (3, 17, (2, 3), (1, 1), (2, 0), (2, 3), False, 7, 19),
    (130, 16, (3, 3), (1, 1), (4, 4), (4, 4), False, 10, 130),
    (300, 33, (1, 1), (2, 1), (0, 0), (1, 1), False, 5, 200),
    (64, 32, (2, 2), (1, 1), (0, 1), (1, 1), False, 4, 8),
    (32, 8, (5, 5), (1, 1), (5, 6), (1, 1), False, 5, 1),
    (16, 16, (3, 3), *PLAIN, True, 10, 64),
    (24, 40, (3, 3), *PLAIN, True, 7, 33),
    (17, 5, (3, 3), *PLAIN, True, 3, 1),
    (32, 16, (3, 3), (1, 1), (0, 2), (1, 1), True, 35, 18),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_float64_convolution(path, case, threads, monkeypatch):
    channels, outputs, kernel, stride, padding, dilation, transformed, height, width = case
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, channels, *kernel), torch.randn(outputs)
    # Rows out of a longer buffer.
    x = channels_last(1, channels, height + 3, width)[:, :, 2:-1]
    for given, activation in ((None, None), (bias, "relu")):
        run = PackedConv2d(weight, given, stride, padding, dilation, activation, transformed)
        expected = oracle(x, weight, given, None, stride, padding, dilation, activation)
        allowed = 2e-6 * float(expected.abs().max())
        y = run(x)
        assert y.shape == expected.shape
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=allowed)
        residual = channels_last(*y.shape)
        expected = oracle(x, weight, given, residual, stride, padding, dilation, activation)
        torch.testing.assert_close(run(x, residual).double(), expected, rtol=0, atol=allowed)
        assert run(x, residual, residual) is residual
        torch.testing.assert_close(residual.double(), expected, rtol=0, atol=allowed)


def test_results_go_where_they_are_wanted(path):
    """Every other row and column of a wider map, and nothing beside them."""
    torch.manual_seed(0)
    weight, x = torch.randn(20, 8, 2, 2), channels_last(1, 8, 6, 9)
    run = PackedConv2d(weight, padding=(1, 0))
    wide = torch.full((1, 10, 18, 24), torch.nan).permute(0, 3, 1, 2)
    place = wide[:, 4:, ::2, 1::2]
    place = place[:, :20]
    assert run(x, None, place) is place
    assert torch.equal(place, run(x))
    assert int(wide.isnan().sum()) == wide.numel() - place.numel()


@pytest.mark.parametrize("transformed", [False, True])
def test_bands_and_threads_change_no_bit(path, transformed, monkeypatch):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 40, 3, 3), torch.randn(48), channels_last(1, 40, 26, 45)
    run = PackedConv2d(weight, bias, padding=(1, 1), activation="relu", transformed=transformed)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    whole = run(x)
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for height in (2, 6, 24):
            bands = [run(x[:, :, i : i + height + 2]) for i in range(0, 24, height)]
            assert torch.equal(torch.cat(bands, 2), whole)


def test_values_that_are_no_numbers_stay_so(path):
    x = channels_last(1, 16, 5, 12)
    x[:, :, 2, 6] = torch.nan
    for transformed in (False, True):
        y = PackedConv2d(torch.ones(16, 16, 3, 3), activation="relu", transformed=transformed)(x)
        assert y[0, :, 0, 4].isnan().all()


@pytest.mark.parametrize(("channels", "beside", "outputs"), [(24, 0, 16), (40, 17, 35), (7, 64, 3)])
@pytest.mark.parametrize("first", [0, 5])
def test_a_doubled_map_gives_what_the_doubled_map_gives(path, channels, beside, outputs, first):
    torch.manual_seed(0)
    first = min(first, beside)
    height, width = 9, 14
    x, skip = channels_last(1, channels, height, width), torch.randn(1, beside, 2 * height, 2 * width)
    weight, bias = torch.randn(outputs, channels + beside, 3, 3), torch.randn(outputs)
    doubled = F.interpolate(x, scale_factor=2, mode="nearest")
    joined = torch.cat([skip[:, :first], doubled, skip[:, first:]], 1)
    expected = F.conv2d(joined.double(), weight.double(), bias.double(), padding=1).relu()
    run = PackedDoubledConv2d(weight, bias, first, channels, "relu")
    x, skip = F.pad(x, (0, 0, 1, 1)), F.pad(skip, (0, 0, 1, 1)).to(memory_format=torch.channels_last)
    for r0, r1 in ((0, 18), (0, 6), (4, 5), (6, 18), (5, 12), (3, 4), (17, 18)):
        place = torch.full((1, r1 - r0, 2 * width, outputs), torch.nan).permute(0, 3, 1, 2)
        rows = x[:, :, (r0 - 1) // 2 + 1 : r1 // 2 + 2]
        run(rows, skip[:, :, r0 : r1 + 2] if beside else None, r0 % 2 == 1, place)
        allowed = 3e-6 * float(expected.abs().max())
        torch.testing.assert_close(place.double(), expected[:, :, r0:r1], rtol=0, atol=allowed)
