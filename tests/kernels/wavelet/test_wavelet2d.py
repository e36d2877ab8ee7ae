"""One level of the wavelet transform against PyWavelets, on every path."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from xrk.kernels import wavelet2d, wavelet2d_inverse
from xrk.kernels.wavelet.wavelet2d import wavelet2d_inverse_reference, wavelet2d_reference

import xrk

pywt = pytest.importorskip("pywt")

WAVELETS = ("db4", "haar")
sizes = st.integers(1, 40)


def expected(x, wavelet):
    a, (h, v, d) = pywt.dwt2(x, wavelet, "symmetric")
    return np.stack([a, h, v, d])


@settings(max_examples=60)
@given(sizes, sizes, st.sampled_from(WAVELETS), st.integers(0, 2**31))
def test_it_is_pywavelets(height, width, wavelet, seed):
    x = np.random.default_rng(seed).standard_normal((height, width))
    there = expected(x, wavelet)
    back = pywt.idwt2((there[0], tuple(there[1:])), wavelet, "symmetric")
    t = torch.from_numpy(x)
    for bands in (wavelet2d(t, wavelet), wavelet2d_reference(t, wavelet)):
        np.testing.assert_allclose(bands, there, rtol=0, atol=1e-13)
    for image in (wavelet2d_inverse(bands, wavelet), wavelet2d_inverse_reference(bands, wavelet)):
        np.testing.assert_allclose(image, back, rtol=0, atol=1e-13)
        np.testing.assert_allclose(image[:height, :width], x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_narrow_dtypes(wavelet, dtype):
    x = torch.rand(2, 3, 61, 130).to(dtype)
    bands = wavelet2d(x, wavelet)
    assert bands.dtype == dtype
    bound = {torch.float32: 2e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    there = wavelet2d_reference(x.double(), wavelet)
    assert (bands.double() - there).abs().max() <= 4 * bound * there.abs().max()
    back = wavelet2d_inverse_reference(bands.double(), wavelet)
    assert (wavelet2d_inverse(bands, wavelet).double() - back).abs().max() <= 4 * bound * back.abs().max()


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(wavelet):
    x = torch.rand(2, 300, 333)
    active, before = xrk._native.simd(), torch.get_num_threads()
    results = []
    try:
        for path in xrk._native.supported_simd():
            for threads in (1, 3):
                xrk._native.set_simd(path)
                torch.set_num_threads(threads)
                bands = wavelet2d(x, wavelet)
                results.append((bands, wavelet2d_inverse(bands, wavelet)))
    finally:
        xrk._native.set_simd(active)
        torch.set_num_threads(before)
    for bands, image in results[1:]:
        assert torch.equal(bands, results[0][0])
        assert torch.equal(image, results[0][1])


def test_it_is_a_good_custom_operator():
    torch.library.opcheck(torch.ops.xrk.wavelet2d.default, (torch.rand(2, 9, 12), "db4"))
    torch.library.opcheck(torch.ops.xrk.wavelet2d_inverse.default, (torch.rand(2, 4, 9, 12), "haar"))


@pytest.mark.parametrize(
    ("call", "error", "problem"),
    [
        (lambda: wavelet2d([1.0]), TypeError, "x is a list"),
        (lambda: wavelet2d(torch.zeros(4, 4, dtype=torch.int16)), TypeError, "dtype int16"),
        (lambda: wavelet2d(torch.zeros(4)), ValueError, r"shape \(4,\)"),
        (lambda: wavelet2d(torch.zeros(0, 4)), ValueError, "at least 1"),
        (lambda: wavelet2d(torch.zeros(4, 6).T), ValueError, "strides"),
        (lambda: wavelet2d(torch.zeros(4, 4), "db5"), ValueError, "'haar', 'db4'"),
        (lambda: wavelet2d_inverse(torch.zeros(3, 8, 8)), ValueError, r"\(\.\.\., 4, h, w\)"),
        (lambda: wavelet2d_inverse(torch.zeros(4, 3, 8)), ValueError, "at least 4 for db4"),
    ],
)
def test_bad_input(call, error, problem):
    with pytest.raises(error, match=problem):
        call()
