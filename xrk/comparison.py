"""Two images of one thing held against each other: figures, and a picture to look at."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from xrk import arrays, metrics, picture
from xrk.errors import InputError

__all__ = ["Comparison", "compare", "range_of"]


@dataclass(frozen=True)
class Comparison:
    """How far one image is from another; of stacks, over all frames.

    Attributes:
        data_range: the peak of PSNR and SSIM, in counts.
        psnr: dB; infinite for equal images.
        ssim: mean structural similarity, of stacks the mean over the frames; None below 7 x 7 pixels.
        mse, aad: mean squared error and average absolute difference, in counts.
        largest: largest absolute difference, in counts.
        differing: pixels that differ at all.
    """

    data_range: float
    psnr: float
    ssim: float | None
    mse: float
    aad: float
    largest: float
    differing: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values only; None stands for a figure that is not finite."""
        return {k: v if v is not None and np.isfinite(v) else None for k, v in asdict(self).items()}

    def __str__(self) -> str:
        ssim = "-" if self.ssim is None else f"{self.ssim:.5f}"
        return (
            f"PSNR {self.psnr:.2f} dB (peak {self.data_range:g}), SSIM {ssim}, MSE {self.mse:.6g}, AAD {self.aad:.6g}, "
            f"largest difference {self.largest:g}, {self.differing} pixels differ"
        )


def compare(
    image: Any,
    other: Any,
    *,
    data_range: float | None = None,
    png: str | os.PathLike[str] | None = None,
    row: int | None = None,
    names: tuple[str, str] = ("first", "second"),
) -> Comparison:
    """Figures of merit of ``image`` against ``other``, which is taken for the truth.

    Args:
        image, other: (H, W) or (N, H, W), counts, of one shape; kinds of arrays as for `xrk.enhance`.
        data_range: the peak of PSNR and SSIM in counts; by default the range of integer dtypes (65535 for uint16).
        png: also write a picture: both, their residual on a symmetric scale, enlarged parts, and the values along one
            row. Of stacks the middle frame is shown.
        row: that row; by default the middle one.
        names: what to call the images in the picture.

    Raises:
        InputError: the shapes differ, values are not finite, or floats come without a data range. InputTypeError: a
        kind or dtype that cannot be used. ImageFileError: the picture cannot be written.
    """
    x, y = (np.asarray(arrays.accept(a).array) for a in (image, other))
    if x.shape != y.shape:
        raise InputError(f"The images have shapes {x.shape} and {y.shape}; expected one shape.")
    for name, image in (("first", x), ("second", y)):
        missing = np.count_nonzero(~np.isfinite(image)) if image.dtype.kind == "f" else 0
        if missing:
            raise InputError(f"The {name} image has {missing} values that are not finite (NaN, Inf); fill them first.")
    if data_range is None:
        data_range = max(range_of(x), range_of(y))
    frames = list(zip(*(a if a.ndim == 3 else a[None] for a in (x, y)), strict=True))
    ssim = None
    if min(x.shape[-2:]) >= 7:
        ssim = float(np.mean([metrics.ssim(a, b, data_range) for a, b in frames]))
    difference = x.astype(np.float64) - y.astype(np.float64)
    if png is not None:
        first, second = frames[len(frames) // 2]
        residual = (f"{names[0]} - {names[1]}", difference.reshape(-1, *x.shape[-2:])[len(frames) // 2])
        middle = x.shape[-2] // 2 if row is None else row
        picture.panel_png(png, [(names[0], first), (names[1], second)], residual, profile=middle)
    return Comparison(
        data_range=data_range,
        psnr=metrics.psnr(x, y, data_range),
        ssim=ssim,
        mse=metrics.mse(x, y),
        aad=metrics.aad(x, y),
        largest=float(np.abs(difference).max()),
        differing=int(np.count_nonzero(difference)),
    )


def range_of(image: np.ndarray) -> float:
    """The counts that an integer dtype spans.

    Raises:
        InputError: floats have no range of their own.
    """
    if image.dtype.kind == "f":
        raise InputError("Images of floats have no range of their own; pass data_range= (--range).")
    limits = np.iinfo(image.dtype)
    return float(limits.max - min(0, limits.min))
