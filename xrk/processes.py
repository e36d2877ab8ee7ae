"""Fast processes in the simulated beam; `xrk.cameras` records them.

    what stands still + what moves, at one time ── exp(-optical depth) ── fringes at edges ──> signal (H, W)

A keyhole in a moving melt pool that leaves pores, spatter, sprays and cracks: what high-speed radiography looks at
(Zhao et al. 2017, Sci. Rep. 7, 3602; Cunningham et al. 2019, Science 363, 849). No physics is solved: they are
drawn in two dimensions, as shadows. `xrk.simulate` traces rays through solids, which takes seconds a frame where this
takes about a millisecond.

Lengths are in pixels of the slow sharp camera (HR), times in frames of the fast blurred one (LR).
Optical depths are natural logarithms, signals in units of the open beam.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from xrk.simulate import FloatArray

__all__ = ["Crack", "MeltPool", "Mover", "Process", "Spatter", "Spray", "random_process"]


class Mover(Protocol):
    """Something that moves."""

    def draw(self, depth: FloatArray, time: float) -> None:
        """Adds its optical depth at ``time`` to ``depth`` (H, W), in place; hollows add less than nothing."""


@dataclass(frozen=True)
class Process:
    """What stands in the beam, as a function of time.

    Args:
        still: (H, W) optical depth of what stands still.
        movers: what moves.
        fringes: strength of the bright and dark lines that refraction draws along edges.
    """

    still: FloatArray
    movers: tuple[Mover, ...] = ()
    fringes: float = 0.0

    def signal(self, time: float) -> FloatArray:
        """(H, W) float32 in units of the open beam."""
        depth = self.still.copy()
        for mover in self.movers:
            mover.draw(depth, time)
        np.maximum(depth, 0, out=depth)
        signal = np.exp(-depth)
        if self.fringes > 0:
            # Of a thin object's phase, proportional to its depth, the intensity shows the Laplacian (Paganin et al.
            # 2002, J. Microsc. 206, 33).
            padded = np.pad(depth, 1, mode="edge")
            around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
            signal *= np.clip(1 + np.float32(self.fringes) * (around - 4 * depth), 0.5, 2.0)
        return signal


# --- what moves -------------------------------------------------------------------------------------------------------


def _window(depth: FloatArray, row: float, column: float, down: float, right: float) -> tuple[slice, slice]:
    """The part of the frame within ``down`` rows and ``right`` columns of a place; it may be empty."""
    height, width = depth.shape
    rows = slice(min(max(int(row - down), 0), height), min(max(int(row + down) + 2, 0), height))
    return rows, slice(min(max(int(column - right), 0), width), min(max(int(column + right) + 2, 0), width))


def _axes(part: tuple[slice, slice], row: float, column: float) -> tuple[FloatArray, FloatArray]:
    """Rows and columns of a window counted from a place: (h, 1) and (1, w)."""
    y = np.arange(part[0].start, part[0].stop, dtype=np.float32) - np.float32(row)
    x = np.arange(part[1].start, part[1].stop, dtype=np.float32) - np.float32(column)
    return y[:, None], x[None]


def _ball(depth: FloatArray, row: float, column: float, radius: float, amount: float, squeeze: float = 1.0) -> None:
    """A ball's chord, ``amount`` deep in the middle; ``squeeze``: half its width over half its height."""
    part = _window(depth, row, column, radius + 1, radius * squeeze + 1)
    if part[0].start < part[0].stop and part[1].start < part[1].stop:
        y, x = _axes(part, row, column)
        # The rim of half a pixel keeps the smallest from flickering as they pass over the grid.
        gap = (y * y + (x / np.float32(squeeze)) ** 2) / np.float32(radius * radius + 0.25)
        depth[part] += np.float32(amount) * np.sqrt(np.maximum(1 - gap, 0))


@dataclass(frozen=True)
class MeltPool:
    """A keyhole that a laser drills and drags along, the melt around it, and the pores that it leaves.

    The keyhole swells and bends at two frequencies. Pores come off its tip, drift in the melt and freeze.

    Args:
        surface: row of the metal's surface.  start, speed: column of the laser at time 0, and columns a frame.
        deep, wide: of the keyhole.  density: optical depth of a row of metal as wide as the keyhole.
        beat: radians a frame of the slower oscillation.  phase: of both.  lean: columns a row.
        pores: (n, 5): time of birth, radius, drift down and right in all, frames until frozen.
    """

    surface: float
    start: float
    speed: float
    deep: float
    wide: float
    density: float
    beat: float
    phase: float
    lean: float
    pores: NDArray[np.float64]

    def tip(self, time: float) -> tuple[float, float]:
        """Row and column of the keyhole's lower end."""
        swell = 1 + 0.22 * np.sin(self.beat * time + self.phase) + 0.1 * np.sin(2.7 * self.beat * time + 2 * self.phase)
        deep = self.deep * swell
        bend = 0.5 * self.wide * np.sin(1.6 * self.beat * time + self.phase)
        return self.surface + deep, self.start + self.speed * time - self.lean * deep + bend

    def draw(self, depth: FloatArray, time: float) -> None:
        laser = self.start + self.speed * time
        behind = -np.sign(self.speed) if self.speed else 1.0
        _ball(depth, self.surface, laser + behind * 1.2 * self.deep, 1.3 * self.deep, -0.05 * self.density, 2.0)
        bottom, end = self.tip(time)
        deep = bottom - self.surface
        part = _window(
            depth, self.surface + deep / 2, (laser + end) / 2, deep / 2, abs(laser - end) / 2 + self.wide + 2
        )
        y, x = _axes(part, self.surface, 0.0)
        along = np.clip(y / np.float32(deep), 0, 1)
        inside = (y >= -1) & (y <= deep)
        half = np.float32(self.wide) * np.sqrt(1.02 - along) * (1 - np.float32(0.35) * along)
        ripple = np.sin(np.float32(9 / max(self.deep, 1.0)) * y - np.float32(3 * self.beat * time))
        centre = np.float32(laser) + along * along * np.float32(end - laser) + np.float32(0.12 * self.wide) * ripple
        chord = np.sqrt(np.maximum(1 - ((x - centre) / (half + np.float32(0.3))) ** 2, 0))
        depth[part] -= np.float32(self.density / self.wide) * half * chord * inside
        for born, radius, down, right, life in self.pores:
            age = time - born
            if age > 0:
                row, column = self.tip(born)
                gone = 1 - np.exp(-3 * min(age / life, 1.0))  # it slows down as the melt freezes around it
                size = radius * min(1.0, 0.4 + 0.6 * age / 3)
                _ball(depth, row + gone * down, column + gone * right, size, -self.density * size / self.wide)


@dataclass(frozen=True)
class Spatter:
    """Droplets that fly up from a moving place and fall again; each comes back after its own period.

    Args:
        surface, start, speed: row and column they come from, columns a frame.
        density: optical depth of a row of the droplets' metal.  fall: rows a frame squared.
        droplets: (n, 5): radius, rows and columns a frame at the start, period in frames, its part that is over at 0.
    """

    surface: float
    start: float
    speed: float
    density: float
    fall: float
    droplets: NDArray[np.float64]

    def draw(self, depth: FloatArray, time: float) -> None:
        for radius, down, right, period, phase in self.droplets:
            age = (time + phase * period) % period
            row = self.surface - 1 + down * age + 0.5 * self.fall * age * age
            if row < self.surface:
                column = self.start + self.speed * (time - age) + right * age
                _ball(depth, row, column, radius, 2 * radius * self.density)


@dataclass(frozen=True)
class Spray:
    """A liquid jet: a core with travelling waves that breaks up, and droplets in a cone.

    Args:
        row, column: of the nozzle.  angle: of the jet, radians from "to the right", clockwise.
        speed: pixels a frame.  core, length: half width and length of the core.  wave: its waves' length.
        density: optical depth of a pixel of liquid.
        droplets: (n, 4): radius, angle to the jet, speed relative to the jet's, phase.
        reach: how far droplets fly.
    """

    row: float
    column: float
    angle: float
    speed: float
    core: float
    length: float
    wave: float
    density: float
    droplets: NDArray[np.float64]
    reach: float

    def draw(self, depth: FloatArray, time: float) -> None:
        down, right = np.float32(np.sin(self.angle)), np.float32(np.cos(self.angle))
        centre = self.row + down * self.length / 2, self.column + right * self.length / 2
        extent = (abs(down) * self.length / 2 + 3 * self.core + 2, abs(right) * self.length / 2 + 3 * self.core + 2)
        part = _window(depth, *centre, *extent)
        y, x = _axes(part, self.row, self.column)
        along, across = right * x + down * y, right * y - down * x
        grown = np.clip(along / np.float32(self.length), 0, 1)
        waves = np.sin(np.float32(2 * np.pi / self.wave) * (along - np.float32(self.speed * time)))
        across = across - np.float32(0.7 * self.core) * grown * waves
        half = np.float32(self.core) * np.sqrt(np.maximum(1 - grown, 0)) * (1 + np.float32(0.25) * waves * grown)
        chord = np.sqrt(np.maximum(half * half - across * across, 0))
        depth[part] += np.float32(2 * self.density) * chord * (along >= 0)
        for radius, aside, relative, phase in self.droplets:
            flown = (self.speed * relative * time + phase * self.reach) % self.reach
            direction = self.angle + aside
            row, column = self.row + np.sin(direction) * flown, self.column + np.cos(direction) * flown
            _ball(depth, row, column, radius, 2 * radius * self.density)


@dataclass(frozen=True)
class Crack:
    """A crack that grows along a path, by leaps, and gapes behind its tip.

    Args:
        path: (n, 2) rows and columns.  start: time at which it begins.  speed: pixels a frame.
        width: of the open end.  amount: optical depth that is missing where it gapes.  leap: radians a frame.
    """

    path: NDArray[np.float64]
    start: float
    speed: float
    width: float
    amount: float
    leap: float

    def draw(self, depth: FloatArray, time: float) -> None:
        age = time - self.start
        left = self.speed * (age - 0.9 * np.sin(self.leap * age) / self.leap)
        if age <= 0 or left <= 0:
            return
        # It opens the wider the further the tip has gone on.
        width = self.width * (0.35 + 0.65 * min(1.0, left / 40))
        grown = [self.path[0]]
        for a, b in pairwise(self.path):
            length = float(np.hypot(*(b - a)))
            grown.append(a + (b - a) * min(1.0, left / length))
            left -= length
            if left <= 0:
                break
        low, high = np.min(grown, 0), np.max(grown, 0)
        part = _window(depth, *(low + high) / 2, *(high - low) / 2 + width + 2)
        if part[0].start == part[0].stop or part[1].start == part[1].stop:
            return
        y, x = _axes(part, *grown[0])
        distance = np.float32(np.inf)
        for a, b in pairwise(grown):
            distance = np.minimum(distance, _distance(y, x, a - grown[0], b - grown[0]))
        depth[part] -= np.float32(self.amount) * np.clip(np.float32(width / 2 + 0.5) - distance, 0, min(1.0, width))


def _distance(y: FloatArray, x: FloatArray, a: NDArray[np.float64], b: NDArray[np.float64]) -> FloatArray:
    """From each pixel to the segment between two places."""
    length = max(float(np.hypot(*(b - a))), 1e-6)
    down, right = ((b - a) / length).astype(np.float32)
    y, x = y - np.float32(a[0]), x - np.float32(a[1])
    half = np.float32(length / 2)
    beyond = np.abs(down * y + right * x - half) - half
    return np.hypot(right * y - down * x, np.maximum(beyond, 0))


# --- random processes -------------------------------------------------------------------------------------------------


def random_process(seed: int, shape: tuple[int, int], frames: int = 40) -> Process:
    """A random process; the same seed, shape and number of frames give the same one.

    Args:
        shape: (H, W) in HR pixels, at least 16 each.
        frames: LR frames in which it happens.
    """
    rng = np.random.default_rng(seed)
    height = shape[0]
    surface = float(rng.uniform(0.15, 0.6) * height) if rng.random() < 0.75 else -float(height)
    thick = float(np.exp(rng.uniform(np.log(0.25), np.log(1.8))))
    still = _still(rng, shape, surface, thick)
    kinds = (_melt_pool, _spray, _cracks)
    movers: list[Mover] = []
    for kind in rng.permutation(len(kinds))[: rng.choice([1, 2, 3], p=[0.55, 0.35, 0.1])]:
        movers += kinds[kind](rng, shape, surface, thick, frames)
    return Process(still, tuple(movers), float(rng.choice([0.0, np.exp(rng.uniform(np.log(0.02), np.log(0.3)))])))


def _log_uniform(rng: Generator, low: float, high: float) -> float:
    """A number whose logarithm is evenly spread."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _still(rng: Generator, shape: tuple[int, int], surface: float, thick: float) -> FloatArray:
    """A plate below a rough surface: texture, grains of powder, old pores, scratches, a beam that is not even."""
    height, width = shape
    x = np.arange(width, dtype=np.float32)
    edge = np.float32(surface) + np.float32(_log_uniform(rng, 0.2, 4.0)) * _texture(rng, (1, width), 1.2)[0]
    below = np.clip(np.arange(height, dtype=np.float32)[:, None] - edge[None] + np.float32(0.5), 0, 1)
    depth = np.float32(thick) * below
    depth *= 1 + np.float32(_log_uniform(rng, 0.003, 0.12)) * _texture(rng, shape, float(rng.uniform(0.4, 1.6)))
    depth += np.float32(rng.uniform(0, 0.3))
    depth += np.float32(_log_uniform(rng, 0.005, 0.15)) * _texture(rng, shape, 2.0)
    if rng.random() < 0.6:  # a layer of powder, or old pores anywhere
        powder = rng.random() < 0.5 and surface > 0
        for _ in range(int(rng.choice([10, 30, 60]))):
            radius = _log_uniform(rng, 0.8, 5.0)
            row = edge[rng.integers(width)] - rng.uniform(0, 3 * radius) if powder else rng.uniform(0, height)
            _ball(depth, row, rng.uniform(0, width), radius, (0.12 if powder else -0.1) * thick * radius)
    for _ in range(rng.integers(0, 4)):  # lines: scratches, wires, edges of a window
        a = rng.uniform(0, 1, 2) * shape
        path = np.stack([a, a + rng.normal(0, 0.6, 2) * shape])
        Crack(path, -1e6, 1.0, _log_uniform(rng, 0.8, 6.0), thick * rng.uniform(-0.5, 0.5), 1.0).draw(depth, 0.0)
    return depth + np.float32(rng.normal(0, 0.05)) * x[None] / width


def _texture(rng: Generator, shape: tuple[int, int], slope: float) -> FloatArray:
    """A random field of power spectrum 1 / f^(2 slope), mean 0, standard deviation 1; it is periodic."""
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal(shape)) / frequency**slope
    image = np.fft.irfft2(spectrum, s=shape)
    return (image / max(float(image.std()), 1e-12)).astype(np.float32)


def _melt_pool(rng: Generator, shape: tuple[int, int], surface: float, thick: float, frames: int) -> list[Mover]:
    height, width = shape
    surface = surface if surface > 0 else float(rng.uniform(0.1, 0.5) * height)
    speed = _log_uniform(rng, 0.05, 1.5) * float(rng.choice([-1, 1]))
    start = float(rng.uniform(0.2, 0.8) * width) - speed * frames / 2
    wide = min(_log_uniform(rng, 2.0, 10.0), width / 8)
    deep = min(wide * float(rng.uniform(2, 6)), 0.5 * height)
    count = int(rng.integers(0, 9))
    pores = np.stack(
        [
            rng.uniform(-frames, frames, count),
            np.exp(rng.uniform(np.log(1.0), np.log(max(0.8 * wide, 1.5)), count)),
            rng.uniform(-0.6, 0.3, count) * deep,
            -np.sign(speed) * rng.uniform(-0.3, 1.0, count) * deep,
            rng.uniform(4, 30, count),
        ],
        1,
    )
    density = thick * float(rng.uniform(0.3, 0.95))
    beat, phase, lean = _log_uniform(rng, 0.05, 1.2), float(rng.uniform(0, 6.28)), float(rng.normal(0, 0.25))
    movers: list[Mover] = [
        MeltPool(surface, start, speed, deep, wide, density, beat, phase, lean * float(np.sign(speed)), pores)
    ]
    if rng.random() < 0.7:
        count = int(rng.integers(3, 16))
        droplets = np.stack(
            [
                np.exp(rng.uniform(np.log(0.8), np.log(4.0), count)),
                -np.exp(rng.uniform(np.log(0.5), np.log(6.0), count)),
                rng.normal(0, 1.2, count),
                rng.uniform(10, 60, count),
                rng.uniform(0, 1, count),
            ],
            1,
        )
        movers.append(Spatter(surface, start, speed, 0.15 * thick, _log_uniform(rng, 0.005, 0.2), droplets))
    return movers


def _spray(rng: Generator, shape: tuple[int, int], surface: float, thick: float, frames: int) -> list[Mover]:
    height, width = shape
    side = float(rng.choice([0.0, np.pi]))
    row, column = float(rng.uniform(0.1, 0.9) * height), (0.0 if side == 0 else float(width))
    angle = side + float(rng.normal(0, 0.3))
    if rng.random() < 0.4:  # from above
        row, column, angle = 0.0, float(rng.uniform(0.2, 0.8) * width), np.pi / 2 + float(rng.normal(0, 0.3))
    reach, cone = 1.2 * float(np.hypot(*shape)), _log_uniform(rng, 0.03, 0.5)
    count = int(rng.choice([10, 25, 50]))
    droplets = np.stack(
        [
            np.exp(rng.uniform(np.log(0.8), np.log(4.0), count)),
            cone * rng.standard_normal(count),
            rng.uniform(0.5, 1.2, count),
            rng.uniform(0, 1, count),
        ],
        1,
    )
    core, length = _log_uniform(rng, 1.5, 8.0), float(rng.uniform(0.2, 0.9)) * reach / 1.2
    speed, wave = _log_uniform(rng, 0.3, 8.0), _log_uniform(rng, 8.0, 50.0)
    return [Spray(row, column, angle, speed, core, length, wave, _log_uniform(rng, 0.01, 0.12), droplets, reach)]


def _cracks(rng: Generator, shape: tuple[int, int], surface: float, thick: float, frames: int) -> list[Mover]:
    movers: list[Mover] = []
    for _ in range(rng.integers(1, 4)):
        steps = int(rng.integers(4, 14))
        direction = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.45, steps))
        length = rng.uniform(0.04, 0.16, steps) * max(shape)
        walk = np.stack([np.sin(direction) * length, np.cos(direction) * length], 1)
        path = rng.uniform(0.1, 0.9, 2) * shape + np.concatenate([np.zeros((1, 2)), np.cumsum(walk, 0)])
        start, speed = float(rng.uniform(-0.5, 0.7) * frames), _log_uniform(rng, 0.2, 4.0)
        amount = thick * _log_uniform(rng, 0.1, 0.8)
        movers.append(Crack(path, start, speed, _log_uniform(rng, 0.8, 4.0), amount, _log_uniform(rng, 0.1, 1.0)))
    return movers
