"""PSNR and SSIM against scikit-image."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from xrk import metrics
from xrk.errors import InputError, InputTypeError


@pytest.mark.parametrize(
    ("shape", "dtype", "peak"), [((37, 50), "u2", 65535), ((7, 7), "f8", 1.0), ((64, 9), ">i2", 4095)]
)
def test_equal_to_scikit_image(shape, dtype, peak):
    rng = np.random.default_rng(0)
    reference = (rng.random(shape) * 0.4 * peak + 0.3 * peak).astype(dtype)
    image = (reference + rng.normal(0, 0.05 * peak, shape)).astype(dtype)
    x, y = image.astype("f8"), reference.astype("f8")
    assert metrics.psnr(image, reference, peak) == pytest.approx(peak_signal_noise_ratio(y, x, data_range=peak))
    assert metrics.ssim(image, reference, peak) == pytest.approx(structural_similarity(y, x, data_range=peak), rel=1e-9)


def test_the_rules_of_xfusion():
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 200, (20, 30), np.uint8)
    image = np.clip(reference + rng.integers(-9, 9, (20, 30)), 0, 255).astype(np.uint8)
    found, actual = metrics.xfusion_scores(image, reference), metrics.xfusion_scores(image, reference, actual=True)
    assert found["psnr"] == pytest.approx(peak_signal_noise_ratio(reference, image))
    assert actual["psnr"] == pytest.approx(found["psnr"] + 20 * np.log10(image.max() / 255))
    assert found["ssim"] == actual["ssim"] == pytest.approx(structural_similarity(reference, image), rel=1e-9)
    assert found["aad"] == pytest.approx(np.abs(image.astype(int) - reference).mean())
    with pytest.raises(InputTypeError, match="uint16"):
        metrics.xfusion_scores(image.astype("u2"), reference)


def test_equal_images():
    x = np.arange(100.0).reshape(10, 10)
    assert metrics.psnr(x, x, 1) == np.inf
    assert metrics.ssim(x, x, 100) == pytest.approx(1)


@pytest.mark.parametrize("measure", [metrics.psnr, metrics.ssim])
def test_bad_input(measure):
    with pytest.raises(InputError, match=r"\(8, 8\).*\(8, 9\)"):
        measure(np.zeros((8, 8)), np.zeros((8, 9)), 1)
    with pytest.raises(InputError, match="data_range is 0"):
        measure(np.zeros((8, 8)), np.zeros((8, 8)), 0)


@pytest.mark.parametrize(
    ("window", "error"), [(0, InputError), (1, InputError), (-3, InputError), (7.0, InputTypeError)]
)
def test_windows_that_are_none(window, error):
    with pytest.raises(error, match="window="):
        metrics.ssim(np.zeros((9, 9)), np.ones((9, 9)), 1, window)


def test_ssim_needs_its_window():
    with pytest.raises(InputError, match="7x7"):
        metrics.ssim(np.zeros((6, 60)), np.zeros((6, 60)), 1)
