"""The conversions of uint16 frames on the device: the same integers as the CPU's, value for value."""

import numpy as np
import pytest
import torch

from xrk import _native

BLACK, INVERSE, SCALE = 123.25, 1 / 60001.5, 60001.5


@pytest.fixture(autouse=True)
def compiled_in(device):
    if device == "cpu" or not _native.HAVE_CUDA:
        pytest.skip("xrk._native was built without CUDA, or the CPU stands in for the device")


def on_device(array, offset=0):
    """A uint16 array or a map in device memory, `offset` items after an aligned address."""
    host = torch.from_numpy(np.concatenate([np.zeros(offset, array.dtype), array.ravel()]))
    return host.cuda()[offset:]


def stream():
    return torch.cuda.current_stream().cuda_stream


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("count", "offset"), [(65536, 0), (1, 0), (255, 1), (100_003, 3)])
def test_normalise(dtype, count, offset):
    x = np.arange(count).astype(np.uint16)
    out = torch.full((count + 1,), torch.nan, dtype=getattr(torch, dtype), device="cuda")
    source = on_device(x, offset)
    _native.cuda.normalise(source.data_ptr(), BLACK, INVERSE, out.data_ptr(), count, dtype, stream())
    expected = np.empty(count, np.float64)
    _native.normalise(x, BLACK, INVERSE, expected)
    assert np.array_equal(out[:-1].cpu().numpy(), expected.astype(dtype))
    assert bool(out[-1].isnan())  # nothing is written past the end


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("count", [1, 255, 1_000_003])
def test_apply_residual(dtype, count):
    generator = np.random.default_rng(count)
    x = generator.integers(0, 65536, count).astype(np.uint16)
    before, after = (generator.normal(0.5, 0.4, count).astype(dtype) for _ in range(2))
    after[::97] = np.nan
    after[1::89] = np.inf
    out = torch.full((count + 1,), 7, dtype=torch.uint16, device="cuda")
    limited = torch.full((2,), 5, dtype=torch.int64, device="cuda")
    source, low, high = on_device(x), on_device(before), on_device(after)
    addresses = (source.data_ptr(), low.data_ptr(), high.data_ptr(), SCALE, out.data_ptr())
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    _native.cuda.apply_residual(*addresses, count, dtype, limited.data_ptr(), other.cuda_stream)
    other.synchronize()
    expected = np.empty_like(x)
    count_expected = _native.apply_residual(x, before.astype(np.float32), after.astype(np.float32), SCALE, expected)
    assert np.array_equal(out[:-1].cpu().numpy(), expected)
    assert limited.tolist() == [5 + count_expected, 5]  # it adds to what is there, and writes no further
    assert int(out[-1].to(torch.int32)) == 7


def test_in_place():
    x = np.arange(4096).astype(np.uint16)
    before, after = np.zeros(4096, np.float32), np.full(4096, 1 / 3, np.float32)
    frame, limited = on_device(x), torch.zeros(1, dtype=torch.int64, device="cuda")
    low, high = on_device(before), on_device(after)
    maps = (low.data_ptr(), high.data_ptr())
    _native.cuda.apply_residual(
        frame.data_ptr(), *maps, SCALE, frame.data_ptr(), 4096, "float32", limited.data_ptr(), stream()
    )
    expected = np.empty_like(x)
    _native.apply_residual(x, before, after, SCALE, expected)
    assert np.array_equal(frame.cpu().numpy(), expected)


def test_more_than_2_to_the_31_pixels():
    count = 2**31 + 12345
    free, _ = torch.cuda.mem_get_info()
    if free < 20 * 2**30:
        pytest.skip("needs 20 GiB of free device memory")
    x = torch.randint(0, 65536, (2**20,), device="cuda").to(torch.uint16).repeat(count // 2**20 + 1)[:count]
    out = torch.full((count,), torch.nan, dtype=torch.float16, device="cuda")
    _native.cuda.normalise(x.data_ptr(), BLACK, INVERSE, out.data_ptr(), count, "float16", stream())
    for part in (slice(0, 1000), slice(2**31 - 500, 2**31 + 500), slice(count - 1000, count)):
        expected = (x[part].cpu().numpy().astype(np.float64) - BLACK) * INVERSE
        assert np.array_equal(out[part].cpu().numpy(), expected.astype(np.float16))
    torch.cuda.empty_cache()


def test_bad_arguments_are_named():
    one = torch.zeros(1, dtype=torch.uint16, device="cuda")
    with pytest.raises(ValueError, match="dtype is 'float64'; expected 'float16' or 'float32'"):
        _native.cuda.normalise(one.data_ptr(), 0.0, 1.0, one.data_ptr(), 1, "float64", stream())
    with pytest.raises(ValueError, match="out is a null pointer"):
        _native.cuda.normalise(one.data_ptr(), 0.0, 1.0, 0, 1, "float32", stream())
    _native.cuda.normalise(0, 0.0, 1.0, 0, 0, "float32", stream())  # nothing to do
