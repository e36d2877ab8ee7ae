"""BRISQUE: its parameters on samples of known distributions, and its score where the regression's package is."""

import importlib.util

import numpy as np
import pytest
from scipy import ndimage, special

from xrk import brisque, metrics
from xrk.errors import InputError

no_package = importlib.util.find_spec("brisque") is None


def test_the_shape_of_generalised_gaussians():
    rng = np.random.default_rng(0)
    for shape in (0.8, 2.0):
        scale = np.sqrt(special.gamma(1 / shape) / special.gamma(3 / shape))
        values = scale * rng.gamma(1 / shape, size=400_000) ** (1 / shape) * rng.choice([-1, 1], 400_000)
        found, variance = brisque._gaussian(values)
        assert found == pytest.approx(shape, rel=0.02)
        assert variance == pytest.approx(1, rel=0.02)
        # Each half of a distribution with two sides has the share of the values that its width is of both.
        left, right = 0.5, 1.5
        half = np.abs(values) * np.where(rng.random(400_000) < left / (left + right), -left, right)
        found, mean, *sides = brisque._asymmetric(half)
        assert found == pytest.approx(shape, rel=0.03)
        assert sides == pytest.approx([left**2, right**2], rel=0.03)
        assert mean == pytest.approx(half.mean(), rel=0.03)


def test_windows_and_scales():
    rng = np.random.default_rng(1)
    x = rng.random((37, 50))
    kernel = np.exp(-((np.mgrid[-3:4, -3:4] ** 2).sum(0)) / (2 * (7 / 6) ** 2))
    expected = ndimage.convolve(x, kernel / kernel.sum(), mode="constant")
    np.testing.assert_allclose(brisque._windowed(x), expected, rtol=1e-12)
    slope = np.arange(40.0)[:, None] * np.ones(3)
    np.testing.assert_allclose(brisque._half(slope)[2:-2], slope[4:-4:2] + 0.5, rtol=1e-12)
    assert brisque._half(np.ones((9, 4))).shape == (5, 4)


def test_counts_and_their_range():
    rng = np.random.default_rng(2)
    x = np.clip(ndimage.gaussian_filter(rng.random((64, 80)), 2) * 255 * 256, 0, 65535)
    assert brisque.features(x, 65535).shape == (36,)
    np.testing.assert_allclose(brisque.features(x, 65535), brisque.features(x / 257, 255), rtol=1e-6)
    with pytest.raises(InputError, match=r"at least 16x16, not shape \(15, 40\)"):
        brisque.features(np.zeros((15, 40)), 255)
    with pytest.raises(InputError, match="data_range is 0"):
        brisque.features(x, 0)
    with pytest.raises(InputError, match="not finite"):
        brisque.features(x * np.nan, 255)


@pytest.mark.skipif(not no_package, reason="the package is here")
def test_without_the_package_one_sentence_says_what_is_missing():
    with pytest.raises(InputError, match="pip install --no-deps brisque"):
        metrics.brisque(np.zeros((32, 32)), 255)


@pytest.mark.skipif(no_package, reason="the package brisque is not here")
def test_a_photograph_and_its_damaged_versions():
    from skimage import data

    photograph = data.camera().astype(float)
    rng = np.random.default_rng(0)
    good = metrics.brisque(photograph, 255)
    noisy = metrics.brisque(np.clip(photograph + 25 * rng.standard_normal(photograph.shape), 0, 255), 255)
    soft = metrics.brisque(ndimage.gaussian_filter(photograph, 2), 255)
    assert good < 35 < min(noisy, soft)
    assert metrics.brisque(photograph * 257, 65535) == pytest.approx(good, abs=1e-6)
