"""16-bit frames on their way to a GPU and back, with the host in its place: the same counts as without."""

import ctypes

import numpy as np
import pytest
import torch
from torch import nn

from xrk import device_rows, io
from xrk.device_rows import DeviceRows
from xrk.enhancement import enhance, enhance_file
from xrk.errors import InputError
from xrk.loading import Model
from xrk.models import Card
from xrk.network import make_domain

_native = pytest.importorskip("xrk._native")


class Host:
    """The functions of `xrk._native.cuda` on addresses of the host's memory."""

    def __init__(self):
        self.sent = []  # bytes of what `normalise` was given

    @staticmethod
    def _array(address, count, dtype):
        size = np.dtype(dtype).itemsize * count
        return np.frombuffer((ctypes.c_char * size).from_address(address), dtype)

    def normalise(self, x, black, inverse_range, out, count, dtype, stream):
        counts, values = self._array(x, count, np.uint16), self._array(out, count, dtype)
        self.sent.append(counts.nbytes)
        exact = np.empty(count)
        _native.normalise(counts, black, inverse_range, exact)
        values[...] = exact

    def apply_residual(self, x, before, after, scale, out, count, dtype, limited, stream):
        counts, result = (self._array(address, count, np.uint16) for address in (x, out))
        low, high = (self._array(address, count, dtype).astype(np.float32) for address in (before, after))
        self._array(limited, 1, np.int64)[0] += _native.apply_residual(counts.copy(), low, high, scale, result)


@pytest.fixture
def host(monkeypatch):
    kernels = Host()
    monkeypatch.setattr(device_rows, "kernels_of", lambda device: kernels)
    return kernels


needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and _native.HAVE_CUDA), reason="there is no CUDA device, or no CUDA code"
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def way(request):
    device = torch.device(request.param)

    def make(dtype=torch.float32, shift=120.0, unit=60000.5):
        kernels = Host() if device.type == "cpu" else _native.cuda
        return DeviceRows(kernels, device, dtype, shift, unit)

    return make


def sharpened(gain=1.0):
    torch.manual_seed(3)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1)
    network = nn.Sequential(*layers)
    with torch.no_grad():
        network[-1].weight *= gain
    return Model(Card(name="small", architecture="dncnn", domain="unit", noise="none"), network.eval())


def counts_of(*shape):
    return np.random.default_rng(5).integers(0, 65536, shape).astype(np.uint16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_there_and_back(way, dtype):
    rows = way(dtype)
    parts = [counts_of(n, 37) for n in (16, 16, 3, 20)]
    values = [rows.up(part) for part in parts]  # more than are on their way at a time
    for part, value in zip(parts, values, strict=True):
        exact = (part.astype(np.float64) - 120.0) * (1 / 60000.5)
        np.testing.assert_array_equal(value.cpu().numpy(), exact.astype(np.dtype(str(dtype).removeprefix("torch."))))
        same, clipped = rows.down(part, rows.hand(value))
        np.testing.assert_array_equal(same, part)
        assert clipped == 0
    after = rows.up(parts[0]) + 0.25
    moved, clipped = rows.down(parts[0], rows.hand(after))
    before = values[0].float().cpu().numpy()
    expected = np.empty_like(parts[0])
    assert clipped == _native.apply_residual(parts[0], before, rows.to_host(rows.hand(after)), 60000.5, expected) > 0
    np.testing.assert_array_equal(moved, expected)


@pytest.mark.parametrize("domain", ["unit", "symmetric"])
@pytest.mark.parametrize("masked", [False, True])
def test_an_image_is_enhanced_to_the_same_counts(host, monkeypatch, domain, masked):
    model = sharpened(6.0)
    model = Model(Card(name="small", architecture="dncnn", domain=domain, noise="none"), model.module)
    image = counts_of(600, 45)
    mask = np.zeros(image.shape, bool)
    mask[280:290, 7] = masked
    options = {"levels": (100, 60000), "mask": mask if masked else None, "report": True}
    over_the_way, told = enhance(image, model, **options)
    assert sum(host.sent) >= image.nbytes
    monkeypatch.setattr(device_rows, "kernels_of", lambda device: None)
    expected, told_without = enhance(image, model, **options)
    np.testing.assert_array_equal(over_the_way, expected)
    assert told.frames == told_without.frames and told.frames[0].clipped > 0


def test_a_file_is_enhanced_to_the_same_file(host, monkeypatch, tmp_path):
    with io.create(tmp_path / "in.tif", shape=(2, 700, 130), dtype=">u2", tile=(64, 64), compression="lzw") as sink:
        for page in range(2):
            sink.write(slice(None), counts_of(700, 130) // (page + 1), page)
    for name in ("way.tif", "without.tif"):
        enhance_file(tmp_path / "in.tif", tmp_path / name, sharpened(), report=False)
        monkeypatch.setattr(device_rows, "kernels_of", lambda device: None)
    assert host.sent and (tmp_path / "way.tif").read_bytes() == (tmp_path / "without.tif").read_bytes()


def test_an_answer_that_is_not_finite_is_told_with_the_network_s_values(host):
    model = sharpened()
    with torch.no_grad():
        model.module[-1].bias.fill_(float("nan"))
    image = np.array([[100, 300], [200, 500]], np.uint16)
    with pytest.raises(InputError, match="its input lay between 0 and 4:"):
        enhance(image, model, levels=(100, 200))


def test_what_does_not_go_this_way(host):
    unit = make_domain("unit", (0.0, 65535.0), None, 1)
    cpu, shape = torch.device("cpu"), (unit.shift, unit.unit)
    assert device_rows.device_rows(cpu, torch.float32, np.dtype(">u2"), *shape) is not None
    for dtype, counts in ((torch.float64, "u2"), (torch.float32, "u1"), (torch.float32, "i2"), (torch.float32, "f4")):
        assert device_rows.device_rows(cpu, dtype, np.dtype(counts), *shape) is None


def test_without_the_device(monkeypatch):
    assert device_rows.kernels_of(torch.device("cpu")) is None
    monkeypatch.setattr(device_rows, "_native", None)
    assert device_rows.kernels_of(torch.device("cuda")) is None
