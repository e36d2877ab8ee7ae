"""Figures of merit against a reference; the data range is always the caller's, never guessed from the image."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from xrk.arguments import whole_number
from xrk.brisque import brisque
from xrk.errors import InputError, InputTypeError

__all__ = ["aad", "brisque", "cnr", "mse", "psnr", "snr", "ssim", "xfusion_scores"]

# Rows and columns of a rectangle, as for indexing: (slice(0, 64), slice(10, 74)).
Region = tuple[slice, slice]


def psnr(image: ArrayLike, reference: ArrayLike, data_range: float) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(data_range^2 / mean squared error); inf for equal images.

    Args:
        image, reference: arrays of one shape, any real dtype.
        data_range: the peak, in the arrays' units.

    Raises:
        InputError: the shapes differ, or ``data_range`` is not positive.
    """
    image, reference = _pair(image, reference, data_range)
    error = float(np.mean((image - reference) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(data_range**2 / error))


def ssim(image: ArrayLike, reference: ArrayLike, data_range: float, window: int = 7) -> float:
    """Mean structural similarity over square windows (Wang et al., IEEE Trans. Image Process. 13, 2004, 600).

    Uniform windows of ``window`` x ``window`` pixels that lie wholly inside, sample (co)variances, K1 = 0.01 and
    K2 = 0.03: the definition of scikit-image's ``structural_similarity`` with its defaults.

    Args:
        image, reference: (H, W) of one shape, any real dtype, H and W at least ``window``.
        data_range: the peak, in the arrays' units.

    Raises:
        InputError: the shapes differ or are smaller than the window, the window is below 2, or ``data_range`` is not
        positive. InputTypeError: the window is no whole number.
    """
    x, y = _pair(image, reference, data_range)
    window = whole_number(window, "window", 2, unit=" of pixels")
    if x.ndim != 2 or min(x.shape) < window:
        raise InputError(f"SSIM needs (H, W) images of at least {window}x{window} pixels, not shape {x.shape}.")
    # Shifted by a common value, which leaves (co)variances alone, so that the sums of squares do not cancel.
    shift = y.mean()
    x, y = x - shift, y - shift
    mean_x, mean_y = _window_mean(x, window), _window_mean(y, window)
    sample = window**2 / (window**2 - 1)
    var_x = sample * (_window_mean(x * x, window) - mean_x**2)
    var_y = sample * (_window_mean(y * y, window) - mean_y**2)
    covariance = sample * (_window_mean(x * y, window) - mean_x * mean_y)
    mean_x, mean_y = mean_x + shift, mean_y + shift
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float(np.mean(luminance * structure))


def mse(image: ArrayLike, reference: ArrayLike) -> float:
    """Mean squared error, in squared units of the arrays.

    Raises:
        InputError: the shapes differ.
    """
    x, y = _pair(image, reference)
    return float(np.mean((x - y) ** 2))


def aad(image: ArrayLike, reference: ArrayLike) -> float:
    """Average absolute difference, in units of the arrays.

    Raises:
        InputError: the shapes differ.
    """
    x, y = _pair(image, reference)
    return float(np.mean(np.abs(x - y)))


def xfusion_scores(image: ArrayLike, reference: ArrayLike, actual: bool = False) -> dict[str, float]:
    """PSNR in dB, SSIM and AAD of an 8-bit frame by the rules that XFusion's published figures follow.

    The peak of PSNR is 255, or, for its own recordings (``actual``), the largest value of ``image``; SSIM has windows
    of 7 and a range of 255, AAD is in grey levels.

    Args:
        image, reference: (H, W) uint8, as `xrk.fuse_video` gives with ``compat="xfusion"``.

    Raises:
        InputTypeError: not uint8. InputError: the shapes differ, or ``actual`` and an image of zeros.
    """
    for what, array in (("image", image), ("reference", reference)):
        if (dtype := np.asarray(array).dtype) != np.uint8:
            raise InputTypeError(f"The {what} is {dtype}; XFusion's rules are for uint8.")
    peak = float(np.max(image)) if actual else 255.0
    return {"psnr": psnr(image, reference, peak), "ssim": ssim(image, reference, 255.0), "aad": aad(image, reference)}


def snr(image: ArrayLike, region: Region, resolution: float | None = None) -> float:
    """Signal-to-noise ratio of an even region: mean over sample standard deviation.

    Args:
        image: (H, W), counts above the offset.
        region: where the object is even.
        resolution: basic spatial resolution SR_b in micrometres; the ratio is then normalised to 88.6 micrometres,
            SNR_n = SNR * 88.6 / SR_b (ISO 17636-2).

    Raises:
        InputError: the region is empty or of one pixel, or the resolution is not positive.
    """
    values = _region(image, region)
    deviation = float(values.std(ddof=1))
    ratio = float("inf") if deviation == 0 else float(values.mean()) / deviation
    return ratio * _normalisation(resolution)


def cnr(image: ArrayLike, region: Region, background: Region, resolution: float | None = None) -> float:
    """Contrast-to-noise ratio: difference of two regions' means over the background's standard deviation.

    Args, Raises: as for `snr`; ``background`` is the even region beside the detail (CNR_n of ISO 17636-2).
    """
    inside, beside = _region(image, region), _region(image, background)
    deviation, contrast = float(beside.std(ddof=1)), abs(float(inside.mean() - beside.mean()))
    if deviation == 0:
        return float("inf") if contrast else 0.0
    return contrast / deviation * _normalisation(resolution)


def _region(image: ArrayLike, region: Region) -> np.ndarray:
    array = np.asarray(image)
    values = array[region].astype(np.float64)
    if values.size < 2:
        raise InputError(f"The region {region} of an image {array.shape} has {values.size} pixels; it needs two.")
    return values


def _normalisation(resolution: float | None) -> float:
    if resolution is None:
        return 1.0
    if not resolution > 0:
        raise InputError(f"resolution is {resolution}; expected micrometres above 0.")
    return 88.6 / resolution


def _window_mean(image: np.ndarray, window: int) -> np.ndarray:
    for axis in (0, 1):
        total = np.cumsum(image, axis=axis)
        total = np.concatenate([np.zeros_like(total.take([0], axis)), total], axis=axis)
        size = total.shape[axis]
        image = total.take(np.arange(window, size), axis) - total.take(np.arange(size - window), axis)
    return image / window**2


def _pair(image: ArrayLike, reference: ArrayLike, data_range: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(image, np.float64), np.asarray(reference, np.float64)
    if x.shape != y.shape:
        raise InputError(f"The image has shape {x.shape} and the reference {y.shape}; they must be equal.")
    if not data_range > 0:
        raise InputError(f"data_range is {data_range}; it must be a positive number.")
    return x, y
