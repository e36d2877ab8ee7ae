"""What a fusing network sees of two cameras, and what becomes of its answer: in 16 bits, or as XFusion has it."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional as F

from xrk import radiograph
from xrk.errors import InputError, InputTypeError
from xrk.network import Domain

__all__ = ["Conversion", "Counts", "Native", "XFusion"]

ROWS = 256  # worked on at a time in float64


class Conversion(Protocol):
    """Both ways between counts and a network's values; LR and HR name the two cameras.

    Attributes:
        dtype: of the resulting frames.
    """

    dtype: np.dtype

    def lr(self, counts: np.ndarray, name: str) -> np.ndarray:
        """What the network sees of an LR frame: (h, w) counts -> (h, w) float32, or float64 of `Counts`.

        ``name``: of the frame, for errors.
        """

    def hr(self, counts: np.ndarray, name: str) -> np.ndarray:
        """The same of an HR frame."""

    def result(self, values: np.ndarray) -> tuple[np.ndarray, int]:
        """Counts of an answer (H, W), float32 or float64, and how many of them were clipped to the dtype's range."""


@dataclass(frozen=True)
class Native:
    """Counts between black and white level, every frame of a camera by the same map, rounded once at the end.

    Args:
        dtype: of all frames. lr_domain, hr_domain: maps of the two cameras; a result has the HR camera's counts.
    """

    dtype: np.dtype
    lr_domain: Domain
    hr_domain: Domain

    def lr(self, counts: np.ndarray, name: str) -> np.ndarray:
        return self.lr_domain.before(_filled(counts, name))

    def hr(self, counts: np.ndarray, name: str) -> np.ndarray:
        return self.hr_domain.before(_filled(counts, name))

    def result(self, values: np.ndarray) -> tuple[np.ndarray, int]:
        out, clipped, domain = np.empty(values.shape, self.dtype), 0, self.hr_domain
        for start in range(0, len(values), ROWS):
            counts = values[start : start + ROWS].astype(np.float64)
            counts *= domain.unit
            counts += domain.shift
            if domain.noise is not None:
                counts = domain.noise.unstabilise(counts, np.float64)
            clipped += radiograph.round_counts(counts, out[start : start + ROWS])
        return out, clipped


@dataclass(frozen=True)
class Counts:
    """Counts of the HR camera in float64, for what needs no range of its own.

    Args:
        dtype: of all frames. lr_levels, hr_levels: (black, white) of the two cameras: LR counts become HR counts.
    """

    dtype: np.dtype
    lr_levels: tuple[float, float]
    hr_levels: tuple[float, float]

    def lr(self, counts: np.ndarray, name: str) -> np.ndarray:
        values = _filled(counts, name).astype(np.float64)
        if self.lr_levels != self.hr_levels:
            (low, high), (black, white) = self.lr_levels, self.hr_levels
            values = (values - low) * ((white - black) / (high - low)) + black
        return values

    def hr(self, counts: np.ndarray, name: str) -> np.ndarray:
        return _filled(counts, name).astype(np.float64)

    def result(self, values: np.ndarray) -> tuple[np.ndarray, int]:
        out = np.empty(values.shape, self.dtype)
        return out, radiograph.round_counts(values.copy(), out)


def _filled(counts: np.ndarray, name: str) -> np.ndarray:
    """The frame with what is not finite filled from its surroundings."""
    invalid = radiograph.invalid_pixels(counts)
    if invalid is None:
        return counts
    if invalid.all():
        raise InputError(f"The {name} has no finite value.")
    return radiograph.fill(counts, invalid)


class XFusion:
    """The original's 8 bits on the way in and out, so that its published figures can be compared.

    Bytes are "virtual" data: v / 255. 16-bit counts are "actual" data of two cameras: bytes are v / 257 cut off, HR
    frames are mirrored left to right, and both are cropped at the bottom and at the right to multiples of 32 LR pixels
    (a side that has no 32 stays). LR frames of the HR frames' size, as they are after registration, are made four
    times smaller by taking the mean of the middle two by two of every four by four pixels: bilinear, without a filter.
    An answer is limited to [0, 1] and becomes bytes, times 255 and rounded half to even.

    Args:
        dtype: of the frames. lr_shape, hr_shape: (H, W) of theirs. scale: HR pixels per LR pixel.

    Raises:
        InputTypeError: another dtype than uint8 and uint16.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, dtype: np.dtype, lr_shape: tuple[int, int], hr_shape: tuple[int, int], scale: int) -> None:
        if dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
            raise InputTypeError(f'compat="xfusion" takes frames of uint8 or uint16, not {dtype.name}.')
        self.actual = dtype.itemsize == 2
        self.shrinks = scale if self.actual and lr_shape == hr_shape and scale > 1 else 1
        height, width = (side // self.shrinks for side in lr_shape)
        if self.actual:
            height, width = (side - side % 32 if side >= 32 else side for side in (height, width))
        self.lr_shape, self.hr_shape = (height, width), (height * scale, width * scale)

    def lr(self, counts: np.ndarray, name: str) -> np.ndarray:
        values = self._unit(counts)
        if self.shrinks > 1:
            whole = torch.from_numpy(values)[None, None]
            values = F.interpolate(whole, scale_factor=1 / self.shrinks, mode="bilinear", align_corners=False)
            values = values[0, 0].numpy()
        return np.ascontiguousarray(values[: self.lr_shape[0], : self.lr_shape[1]])

    def hr(self, counts: np.ndarray, name: str) -> np.ndarray:
        values = self._unit(counts)
        values = values[:, ::-1] if self.actual else values
        return np.ascontiguousarray(values[: self.hr_shape[0], : self.hr_shape[1]])

    def _unit(self, counts: np.ndarray) -> np.ndarray:
        return (counts // 257 if self.actual else counts).astype(np.float32) / np.float32(255)

    def result(self, values: np.ndarray) -> tuple[np.ndarray, int]:
        clipped = int(np.count_nonzero((values < 0) | (values > 1)))
        return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8), clipped
