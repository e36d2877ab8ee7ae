"""Maps of more than 2^31 values, past what 32-bit offsets reach: parts of the result against float64."""

import pytest
import torch
import torch.nn.functional as F
from xrk.kernels import dispatch

from xrk import kernels

CHANNELS = 96


@pytest.fixture
def shape(device):
    """(height, width) of a map of CHANNELS channels with 2^31 values and some more."""
    if device == "cpu":
        return 96, 70
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 50 * 2**30:
        pytest.skip(f"needs 50 GiB of free device memory; there are {free / 2**30:.0f}")
    return 4096, 5504


@pytest.fixture
def rows(shape):
    """Starts of 16 rows: the first, those around the 2^31st value, the last."""
    height, width = shape
    return [0, min(2**31 // (width * CHANNELS), height // 2) - 8, height - 16]


def filled(*shape, device):
    """Random values of float16, drawn in parts so that the draw itself stays small."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.empty(*shape, dtype=torch.float16, device=device)
    for part in x.view(-1, shape[-1]).split(2**20):
        part.copy_(torch.randn(part.shape, generator=generator, device=device))
    return x


def close(actual, expected, bound=5e-3):
    assert actual.shape == expected.shape
    assert float((actual.double() - expected).abs().max() / expected.abs().max()) < bound


def test_layer_norm(shape, rows, device):
    x = filled(1, *shape, CHANNELS, device=device)
    y = kernels.layer_norm(x, gate=x)
    for start in rows:
        part = x[:, start : start + 16].double()
        close(y[:, start : start + 16], F.layer_norm(part, (CHANNELS,)) * F.silu(part))


def band(x, start, above=0):
    """Rows of a channels-last map, with `above` more on either side where the map has them; and where they begin."""
    first, last = max(0, start - above), min(x.shape[2], start + 16 + above)
    return x[:, :, first:last].double(), start - first


@pytest.mark.parametrize("dense", [False, True])
def test_convolutions(shape, rows, device, dense):
    x = filled(1, *shape, CHANNELS, device=device).permute(0, 3, 1, 2)
    weight = filled(8, CHANNELS, 3, 3, device=device) / 8 if dense else filled(CHANNELS, 1, 3, 3, device=device)
    bias = filled(weight.shape[0], device=device)
    if dense:
        y = kernels.conv2d(x, weight, bias, padding=1, activation="silu")
    else:
        y = kernels.depthwise_conv2d(x, weight, bias, activation="silu")
    for start in rows:
        part, offset = band(x, start, above=1)
        expected = F.conv2d(part, weight.double(), bias.double(), padding=1, groups=1 if dense else CHANNELS)
        close(y[:, :, start : start + 16], F.silu(expected)[:, :, offset : offset + 16])


def test_group_norm(shape, rows, device):
    groups = 4
    x = filled(1, *shape, CHANNELS, device=device).permute(0, 3, 1, 2)
    x[:, :24] += 100  # one group with a large mean
    sums = torch.zeros(2, groups, dtype=torch.float64, device=device)
    for part in x.split(64, 2):
        values = part.double().reshape(groups, -1)
        sums += torch.stack([values.sum(1), values.square().sum(1)])
    mean, square = sums / (x.numel() / groups)
    deviation = (square - mean.square() + 1e-5).sqrt()
    y = kernels.group_norm(x, groups, activation="silu")
    for start in rows:
        part, _ = band(x, start)
        expected = (part.reshape(groups, -1) - mean[:, None]) / deviation[:, None]
        close(y[:, :, start : start + 16], F.silu(expected).reshape(part.shape))


def test_selective_scan_2d(shape, rows, device):
    """Time steps of 3 and more forget what is ten pixels away: the middle of a crop is that of the whole map."""
    if dispatch.path_of("selective_scan_2d", device).path == "reference":
        pytest.skip("the reference would take days")
    x = filled(1, *shape, CHANNELS, device=device)
    generator = torch.Generator(device).manual_seed(1)

    def normal(*size):
        return torch.randn(*size, generator=generator, device=device)

    weights = [
        normal(4, 1 + 2 * 2, CHANNELS) / 10,
        normal(4, CHANNELS, 1) / 100,
        3 + normal(4, CHANNELS).abs(),
        normal(4 * CHANNELS, 2).abs(),
        normal(4 * CHANNELS),
    ]
    y = kernels.selective_scan_2d(x, *weights)
    height, width = shape
    for start in rows:
        top = min(max(0, start - 12), height - 40)
        for left in (0, width - 40):
            crop = x[:, top : top + 40, left : left + 40].double().cpu()
            expected = kernels.selective_scan_2d(crop, *(w.double().cpu() for w in weights))
            inside = (slice(None), slice(12, -12), slice(12, -12))
            close(y[:, top : top + 40, left : left + 40][inside].cpu(), expected[inside])


def test_selective_scan(shape, device):
    if dispatch.path_of("selective_scan", device).path == "reference":
        pytest.skip("the reference would take days")
    length = shape[0] * shape[1]
    u = filled(1, length, CHANNELS, device=device).transpose(1, 2)
    A = -torch.ones(CHANNELS, 2, device=device)
    bias = torch.full((CHANNELS,), 3.0, device=device)
    B, C = (filled(1, length, 2, device=device).transpose(1, 2) for _ in range(2))
    y = kernels.selective_scan(u, u, A, B, C, delta_bias=bias, delta_softplus=True)
    for end in (1000, min(2**31 // CHANNELS, length // 2) + 500, length):
        tail = [t[:, :, end - 1000 : end].double().cpu() for t in (u, u)]
        matrices = [t[:, :, end - 1000 : end].double().cpu() for t in (B, C)]
        expected = kernels.selective_scan(
            *tail, A.double().cpu(), *matrices, delta_bias=bias.double().cpu(), delta_softplus=True
        )
        close(y[:, :, end - 100 : end].cpu(), expected[:, :, -100:])
