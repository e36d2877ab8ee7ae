"""Windows of a file's pixels and their way back on the device: the same values as numpy's, and the CPU's integers."""

import numpy as np
import pytest
import torch

from xrk import _native

BLACK, INVERSE = 123.25, 1 / 60001.5


@pytest.fixture(autouse=True)
def compiled_in(device):
    if device == "cpu" or not _native.HAVE_CUDA:
        pytest.skip("xrk._native was built without CUDA, or the CPU stands in for the device")


def packed(image, bits):
    """Rows of `bits` bits a pixel, from each byte's highest on, every row beginning with a byte."""
    if bits == 16:
        return image.view(np.uint8)
    binary = np.unpackbits(image.astype(">u2").view(np.uint8).reshape(*image.shape, 2), axis=-1)[..., 16 - bits :]
    return np.packbits(binary.reshape(len(image), -1), axis=1)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("border", ["reflect", "symmetric", "edge", "constant"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("shape", "halo"), [((40, 53), (3, 5)), ((1, 1), (4, 2)), ((3, 70), (9, 80)), ((33, 1), (0, 3))]
)
def test_read_window(bits, border, dtype, shape, halo):
    image = np.random.default_rng(bits).integers(0, 2**bits, shape).astype(np.uint16)
    above, beside = halo
    exact = (image.astype(np.float64) - BLACK) * INVERSE
    expected = np.pad(exact, ((above, above), (beside, beside)), mode=border).astype(dtype)
    rows = torch.from_numpy(packed(image, bits)).cuda()
    out = torch.full((expected.size + 1,), torch.nan, dtype=getattr(torch, dtype), device="cuda")
    _native.cuda.read_window(
        x=rows.data_ptr(), stride=rows.shape[1], first=0, rows=shape[0], height=shape[0], width=shape[1], bits=bits,
        top=-above, left=-beside, border=border, black=BLACK, inverse_range=INVERSE, out=out.data_ptr(),
        out_rows=expected.shape[0], out_columns=expected.shape[1], dtype=dtype,
        stream=torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    np.testing.assert_array_equal(out[:-1].cpu().numpy().reshape(expected.shape), expected)
    assert bool(out[-1].isnan())


def test_a_window_of_some_rows():
    image = np.arange(50 * 20).astype(np.uint16).reshape(50, 20)
    rows = torch.from_numpy(image[30:]).cuda()
    out = torch.empty((12, 9), dtype=torch.float32, device="cuda")
    _native.cuda.read_window(
        x=rows.data_ptr(), stride=40, first=30, rows=20, height=50, width=20, bits=16, top=43, left=4, border="reflect",
        black=0.0, inverse_range=1.0, out=out.data_ptr(), out_rows=12, out_columns=9, dtype="float32",
        stream=torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    np.testing.assert_array_equal(out.cpu().numpy(), np.pad(image, ((0, 5), (0, 0)), mode="reflect")[43:55, 4:13])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("count", [1, 255, 100_003])
def test_round_counts(dtype, count):
    values = np.random.default_rng(count).normal(0.5, 0.4, count).astype(dtype)
    values[::97], values[1::89] = np.nan, np.inf
    scale, offset = 60001.5, -7.0
    geometry = _native.TiffGeometry(
        width=count, height=1, segment_width=count, segment_height=1, tiled=False, bits=16, format=1, compression=1,
        predictor=1, big_endian=False,
    )  # fmt: skip
    expected = np.empty((1, count), np.uint16)
    limited, absent = _native.tiff_convert(values.astype(np.float32)[None], expected, geometry, scale, offset)
    given, out = torch.from_numpy(values).cuda(), torch.full((count + 1,), 7, dtype=torch.uint16, device="cuda")
    misfits = torch.full((3,), 5, dtype=torch.int64, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    _native.cuda.round_counts(
        given.data_ptr(), scale, offset, out.data_ptr(), count, dtype, misfits.data_ptr(), stream
    )  # fmt: skip
    np.testing.assert_array_equal(out[:-1].cpu().numpy(), expected[0])
    assert misfits.tolist() == [5 + limited, 5 + absent, 5] and int(out[-1].to(torch.int32)) == 7
