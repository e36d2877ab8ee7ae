"""Training data: a pool of noise-free signals on disk, and noisy patches drawn from it without end.

random scenes ── radiate ──> pool.npy (signals of the open beam, uint16)
  ── crop, turn, scale thickness, texture, shading ──> clean ── quanta, light spread, read noise, spots ──> noisy
  ── generalised Anscombe ──> (network input, what its output should be, weight)
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xrk.scenes import random_scene
from xrk.simulate import Geometry, blur, radiate

__all__ = ["Patches", "build_pool", "clean_signal", "expected_anscombe"]

# A pool stores signals in units of the open beam times this; scatter and gain lift some values above 1.
POOL_SCALE = 50000.0


def clean_signal(seed: int, size: int) -> NDArray[np.float32]:
    """The noise-free signal of random scene ``seed``, (size, size) float32 in units of the open beam."""
    rng = np.random.default_rng([seed, 1])
    field = float(np.exp(rng.uniform(np.log(15.0), np.log(150.0)))) * size / 384
    geometry = Geometry((size, size), field / size)
    return radiate(
        random_scene(seed, field),
        geometry,
        kilovolts=float(rng.uniform(60, 150)),
        unsharpness=float(rng.uniform(0.0, 1.0)),
        scatter=float(rng.uniform(0.0, 0.15)),
        vignetting=float(rng.uniform(0.0, 0.15)),
    )


def _pool_rows(job: tuple[int, int, int]) -> NDArray[np.uint16]:
    first, count, size = job
    signals = np.stack([clean_signal(seed, size) for seed in range(first, first + count)])
    return np.clip(np.rint(signals * POOL_SCALE), 0, 65535).astype(np.uint16)


def build_pool(path: Path, count: int, size: int = 384, first_seed: int = 1_000_000, workers: int = 2) -> None:
    """Write ``count`` signals of scenes ``first_seed ...`` to ``path``, a (count, size, size) uint16 .npy file.

    Seeds below 1_000_000 are kept for evaluation. A file that is already complete is left alone.
    """
    if path.exists():
        return
    partial = path.with_suffix(".partial")
    chunk = 16
    pool = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint16, shape=(count, size, size))
    jobs = [(first_seed + i, min(chunk, count - i), size) for i in range(0, count, chunk)]
    with ProcessPoolExecutor(workers) as processes:
        for job, rows in zip(jobs, processes.map(_pool_rows, jobs), strict=True):
            start = job[0] - first_seed
            pool[start : start + len(rows)] = rows
    pool.flush()
    partial.rename(path)


# Mean of the Anscombe transform 2 sqrt(q + 3/8 + s^2) over Poisson counts plus Gaussian read noise as a function of
# mean + s^2, from the closed form of its inverse (Makitalo and Foi 2013, eq. 10).
_TABLE_D = np.concatenate([np.linspace(1.2247449, 20, 4000), np.geomspace(20.01, 4000, 4000)])
_TABLE_Y = (
    _TABLE_D**2 / 4
    + np.sqrt(1.5) / (4 * _TABLE_D)
    - 11 / (8 * _TABLE_D**2)
    + 5 * np.sqrt(1.5) / (8 * _TABLE_D**3)
    - 1 / 8
)


def expected_anscombe(quanta: NDArray[np.float32]) -> NDArray[np.float32]:
    """E[2 sqrt(max(z + 3/8, 0))] for z with mean (and variance) ``quanta``, read noise included in both."""
    return np.interp(quanta, _TABLE_Y, _TABLE_D).astype(np.float32)


class Patches:
    """Endless noisy patches from a pool, in the variance-stabilised domain of the network.

    Args:
        pool: the .npy file that `build_pool` wrote.
        size: side of the patches in pixels.
        seed: of everything random; `state` and `restore` carry the generator over a restart.
        scenes: which of the pool's scenes to draw from.
        quanta: range of the dose, quanta per open-beam pixel, drawn log-uniformly.
        white: the noise is independent from pixel to pixel, of exactly the assumed strength, and without spots.
        frames: real noisy frames in the network's domain, (N, H, W): a quarter of the patches comes from them, with
            NaN for what the output should be.
    """

    def __init__(
        self,
        pool: Path,
        size: int,
        seed: int,
        scenes: slice = slice(None),
        quanta: tuple[float, float] = (15.0, 12000.0),
        white: bool = False,
        frames: NDArray[np.float32] | None = None,
    ) -> None:
        self.signals = np.load(pool, mmap_mode="r")[scenes]
        self.size = size
        self.quanta, self.white, self.frames = quanta, white, frames
        self.rng = np.random.default_rng(seed)

    def state(self) -> dict:
        return self.rng.bit_generator.state

    def restore(self, state: dict) -> None:
        self.rng.bit_generator.state = state

    def batch(self, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """(noisy, target, weight), each (count, 1, size, size) float32.

        noisy and target are in units of the noise; weight turns a squared error there into one of the linear signal,
        up to a constant per patch.
        """
        noisy, target, weight = zip(*(self.patch() for _ in range(count)), strict=True)
        return np.stack(noisy)[:, None], np.stack(target)[:, None], np.stack(weight)[:, None]

    def clean(self) -> NDArray[np.float32]:
        rng, size = self.rng, self.size
        image = self.signals[rng.integers(len(self.signals))]
        step = 2 if 2 * size <= min(image.shape) and rng.random() < 0.15 else 1
        extent = step * size
        top, left = rng.integers(image.shape[0] - extent + 1), rng.integers(image.shape[1] - extent + 1)
        patch = image[top : top + extent, left : left + extent].astype(np.float32) / np.float32(POOL_SCALE)
        if step == 2:
            patch = patch.reshape(size, 2, size, 2).mean((1, 3))
        patch = np.rot90(patch, rng.integers(4))
        if rng.random() < 0.5:
            patch = patch.T
        patch = np.ascontiguousarray(patch)
        if rng.random() < 0.4:  # the same scene of thicker or thinner material
            patch = patch ** np.float32(np.exp(rng.uniform(np.log(0.3), np.log(1.8))))
        if rng.random() < 0.2:
            patch = patch * np.exp(-self._bars())
        if rng.random() < 0.25:  # texture
            patch = patch * np.exp(np.float32(10 ** rng.uniform(-2.5, -0.7)) * self._fractal(rng.uniform(0.8, 2.2)))
        if rng.random() < 0.2:  # shading left by an imperfect flat field
            patch = patch * (1 + np.float32(rng.uniform(0, 0.05)) * self._fractal(3.0))
        if rng.random() < 0.1:  # gain steps between readout columns
            columns = np.repeat(rng.normal(0, 10 ** rng.uniform(-3, -1.7), size // 8 + 1), 8)[:size]
            patch = patch * (1 + columns.astype(np.float32))
        return np.clip(patch, 0, 1.6)

    def _bars(self) -> NDArray[np.float32]:
        """Attenuation of line pairs, fins or laminations: parallel bars, the next one narrower or as wide.

        Whoever averages along the bars wins 2 to 3 dB there on one who does not; random scenes alone show too few.
        """
        rng, size = self.rng, self.size
        rows, cols = np.mgrid[:size, :size].astype(np.float32)
        centre = rng.uniform(0, size, 2).astype(np.float32)
        angle = rng.uniform(0, np.pi)
        along, across = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        y, x = rows - centre[0], cols - centre[1]
        width, ratio = float(np.exp(rng.uniform(np.log(1.2), np.log(16.0)))), rng.uniform(0.85, 1.0)
        extent, length = rng.uniform(0.3, 1.2) * size, rng.uniform(0.2, 1.2) * size
        edges, at = [], -extent / 2
        while width > 0.5 and at < extent / 2:
            edges += [at, at + width]
            at, width = at + 2 * width, width * ratio
        fine = 4  # samples a pixel
        u = np.arange(-1.5 * size * fine, 1.5 * size * fine) / fine
        inside = (np.searchsorted(edges, u) % 2).astype(np.float32)
        spread = np.float32(rng.uniform(0.3, 1.2))
        smooth = blur(np.convolve(inside, np.ones(fine) / fine, "same").astype(np.float32)[None], spread * fine)[0]
        profile = np.interp(along * x + across * y, u, smooth).astype(np.float32)
        window = np.clip(np.float32(length / 2) - np.abs(along * y - across * x) + np.float32(0.5), 0, 1)
        return np.float32(np.exp(rng.uniform(np.log(0.02), np.log(2.0)))) * profile * window

    def _mark(self, patch: NDArray[np.float32], quanta: float) -> None:
        """Faint cracks, wires, pores and inclusions, some tenths to some multiples of the noise, in place.

        They are what inspection looks for and what a denoiser that never saw any smooths away.
        """
        rng, size = self.rng, self.size
        rows, cols = np.mgrid[:size, :size].astype(np.float32)
        for _ in range(rng.integers(1, 5)):
            centre = rng.uniform(0, size, 2).astype(np.float32)
            y, x = rows - centre[0], cols - centre[1]
            width = np.float32(np.exp(rng.uniform(np.log(0.8), np.log(6.0))))
            if rng.random() < 0.65:
                angle, half = rng.uniform(0, np.pi), np.float32(rng.uniform(4, 90))
                along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
                across = np.float32(np.cos(angle)) * y - np.float32(np.sin(angle)) * x
                across += np.float32(rng.normal(0, 0.002)) * along * along  # cracks are seldom straight
                distance = np.hypot(across, np.maximum(np.abs(along) - half, 0))
            else:
                distance = np.hypot(y, x * np.float32(rng.uniform(0.5, 1.0)))
            profile = np.clip(width / 2 + np.float32(0.5) - distance, 0, min(1.0, float(width)))
            local = patch[int(centre[0]), int(centre[1])]
            noise = 1 / np.sqrt(max(quanta * float(local), 1.0))
            contrast = np.exp(rng.uniform(np.log(0.4), np.log(6.0))) * noise * rng.choice([-1, 1])
            patch *= 1 + np.float32(np.clip(contrast, -0.8, 1.0)) * profile

    def _fractal(self, slope: float) -> NDArray[np.float32]:
        """A random field with power spectrum 1/f^(2 slope), mean 0, standard deviation 1."""
        size = self.size
        frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
        frequency[0, 0] = np.inf
        spectrum = np.fft.rfft2(self.rng.standard_normal((size, size))) / frequency**slope
        image = np.fft.irfft2(spectrum, s=(size, size))
        return (image / image.std()).astype(np.float32)

    def patch(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        rng, size = self.rng, self.size
        if self.frames is not None and rng.random() < 0.25:
            return self._real()
        quanta = np.float32(np.exp(rng.uniform(*np.log(self.quanta))))
        signal = self.clean()
        if rng.random() < 0.5:
            self._mark(signal, float(quanta))
        mean = quanta * signal
        counts = rng.poisson(mean).astype(np.float32)
        spread = 0.0
        if not self.white and rng.random() < 0.4:
            spread = float(rng.uniform(0.3, 0.9))
            tail = np.float32(rng.uniform(0, 0.15) if rng.random() < 0.4 else 0.0)
            wide = 2.5 * spread
            mean, counts = ((1 - tail) * blur(x, spread) + tail * blur(x, wide) for x in (mean, counts))
            impulse = np.zeros((33, 33), np.float32)
            impulse[16, 16] = 1
            kernel = (1 - tail) * blur(impulse, spread) + tail * blur(impulse, wide)
            # Per quantum that the *pixel* variance shows, the blurred signal counts this many times less.
            effective = np.float32((kernel**2).sum())
            mean, counts = mean / effective, counts / effective
        read = np.float32(0.0)
        if rng.random() < 0.5:
            read = np.float32(np.sqrt(max(float(mean.mean()), 0.5)) * 10 ** rng.uniform(-1.5, 0.2))
            counts = counts + read * rng.standard_normal((size, size), dtype=np.float32)
        if not self.white and rng.random() < 0.15:  # white spots
            hit = rng.random((size, size)) < 10 ** rng.uniform(-4.5, -2.5)
            counts = counts + hit * rng.exponential(30 * np.sqrt(mean.mean() + 1), (size, size)).astype(np.float32)
        variance = read * read + np.float32(0.375)
        noisy = 2 * np.sqrt(np.maximum(counts + variance, 0))
        target = expected_anscombe(mean + read * read)
        if not self.white and rng.random() < 0.5:  # the noise model is itself an estimate
            error = np.float32(np.exp(rng.normal(0, 0.05)))
            noisy, target = noisy * error, target * error
        weight = mean + read * read + np.float32(0.5)
        return noisy, target, weight / weight.mean()

    def _real(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """A patch of a real frame; nobody knows what it should be."""
        rng, size = self.rng, self.size
        frame = self.frames[rng.integers(len(self.frames))]
        top, left = (rng.integers(side - size + 1) for side in frame.shape)
        patch = np.rot90(frame[top : top + size, left : left + size], rng.integers(4))
        patch = np.ascontiguousarray(patch.T if rng.random() < 0.5 else patch)
        return patch, np.full_like(patch, np.nan), np.ones_like(patch)
