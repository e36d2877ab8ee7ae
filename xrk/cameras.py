"""Two cameras that record a process: a fast blurred one and a slow sharp one.

    `Process.signal` ── mean over the shutter's time ── own blur ── own grid ── quanta, read noise ──> LR, HR (uint16)
                     ── at the middle of that time, blurred and sampled as the slow camera does ──> truth

Lengths and times as in `xrk.processes`: LR frame i is exposed around time i, HR key frame k around time k * ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from xrk.processes import Process
from xrk.simulate import FloatArray, blur, to_uint16

__all__ = ["Cameras"]


@dataclass(frozen=True)
class Cameras:
    """A fast blurred camera and a slow sharp one behind one object.

    Args:
        scale: HR pixels in a row of a LR pixel.  ratio: LR frames from one HR key frame to the next.
        lr_quanta, hr_quanta: of the open beam, for each pixel of that camera and frame.
        lr_shutter, hr_shutter: how long they are open, in LR frames.
        lr_blur, hr_blur: standard deviation of their point spread, each in its own pixels.
        shift: HR pixels by which the LR grid lies too low and too far right.
        white, black: counts of the open beam and of no beam, of both.
        read_noise: of both, in counts.
    """

    scale: int = 4
    ratio: int = 20
    lr_quanta: float = 4000.0
    hr_quanta: float = 1500.0
    lr_shutter: float = 0.8
    hr_shutter: float = 0.2
    lr_blur: float = 0.5
    hr_blur: float = 0.6
    shift: tuple[float, float] = (0.0, 0.0)
    white: float = 40000.0
    black: float = 1000.0
    read_noise: float = 20.0

    def lr_frame(self, process: Process, index: int, seed: int) -> NDArray[np.uint16]:
        """Frame ``index`` of the fast camera, (H / scale, W / scale); the same for the same seed and index."""
        signal = self._open(process, index, self.lr_shutter)
        signal = _moved(blur(signal, self.lr_blur * self.scale), *self.shift)
        height, width = (n // self.scale for n in signal.shape)
        signal = signal[: height * self.scale, : width * self.scale]
        signal = signal.reshape(height, self.scale, width, self.scale).mean((1, 3))
        return self._counted(signal, self.lr_quanta, np.random.default_rng([seed, 0, index]))

    def hr_frame(self, process: Process, index: int, seed: int) -> NDArray[np.uint16]:
        """Key frame ``index`` of the slow camera, (H, W), taken at LR frame index * ratio."""
        signal = blur(self._open(process, index * self.ratio, self.hr_shutter), self.hr_blur)
        return self._counted(signal, self.hr_quanta, np.random.default_rng([seed, 1, index]))

    def truth(self, process: Process, index: int) -> FloatArray:
        """What the slow camera would count at LR frame ``index`` at once and without noise, (H, W) float32."""
        return self._counts(blur(process.signal(index), self.hr_blur))

    def record(
        self, process: Process, frames: int, seed: int
    ) -> tuple[NDArray[np.uint16], NDArray[np.uint16], FloatArray]:
        """LR frames (N, h, w), HR key frames (K, H, W) and truth (N, H, W) from time 0 on; K = (N - 1) // ratio + 1.

        Counts of both cameras are on one scale, that of ``white`` and ``black``.
        """
        keys = range((frames - 1) // self.ratio + 1)
        return (
            np.stack([self.lr_frame(process, i, seed) for i in range(frames)]),
            np.stack([self.hr_frame(process, k, seed) for k in keys]),
            np.stack([self.truth(process, i) for i in range(frames)]),
        )

    def _open(self, process: Process, time: float, shutter: float) -> FloatArray:
        count = max(1, int(np.ceil(4 * shutter)))
        times = time + shutter * ((np.arange(count) + 0.5) / count - 0.5)
        signal = process.signal(float(times[0]))
        for t in times[1:]:
            signal += process.signal(float(t))
        return signal / np.float32(count)

    def _counts(self, signal: FloatArray) -> FloatArray:
        return signal * np.float32(self.white - self.black) + np.float32(self.black)

    def _counted(self, signal: FloatArray, quanta: float, rng: Generator) -> NDArray[np.uint16]:
        counts = self._counts(rng.poisson(quanta * np.maximum(signal, 0)).astype(np.float32) / np.float32(quanta))
        return to_uint16(counts + np.float32(self.read_noise) * rng.standard_normal(signal.shape, dtype=np.float32))


def _moved(image: FloatArray, down: float, right: float) -> FloatArray:
    """The image as seen by a grid that lies ``down`` and ``right`` pixels further on, linear between pixels."""
    for axis, by in ((0, down), (1, right)):
        if by:
            size = image.shape[axis]
            place = np.clip(np.arange(size) + by, 0, size - 1)
            low = np.minimum(place.astype(int), size - 2)
            part = np.expand_dims((place - low).astype(np.float32), 1 - axis)
            image = image.take(low, axis) * (1 - part) + image.take(low + 1, axis) * part
    return image
