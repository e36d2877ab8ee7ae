"""Simulated radiographs: exact chord lengths through solids, a polychromatic beam, a scintillator, counted quanta.

    scene (solids of six materials) ── ray tracing ──> thickness of each material (mm)
      ── Beer-Lambert over the spectrum ──> signal in units of the open beam ── scatter, blur, beam profile
      ── `Detector.expose` ──> Poisson quanta, light spread, gain map, read noise ──> counts (uint16)

A ray crosses a convex solid along one interval, so a product of solids (intersection) is an intersection of intervals
and a scene is a signed sum of such products: constructive solid geometry without a voxel in it.

Lengths are in mm, energies in keV, signal in units of the open beam's mean, dose in detected quanta per pixel of the
open beam.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["MATERIALS", "Detector", "Geometry", "Part", "Placing", "Scene", "Solid", "blur", "radiate", "rotation"]

FloatArray = NDArray[np.float32]

# Linear attenuation coefficients in 1/mm at ENERGIES, from the tables of Elam, Ravel and Sieber (Radiation Physics
# and Chemistry 63, 2002, 121) at the densities 0.94, 2.70, 4.51, 7.87, 8.96 and 7.30 g/cm3.
ENERGIES = np.array([20, 25, 30, 35, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140, 150], np.float64)
# fmt: off
MATERIALS: dict[str, NDArray[np.float64]] = {
    "polyethylene": np.array([
        0.04057, 0.03015, 0.02544, 0.02292, 0.02138, 0.01959, 0.01852, 0.01775,
        0.01713, 0.01662, 0.01616, 0.01575, 0.01538, 0.01504, 0.01472, 0.01442]),
    "aluminium": np.array([
        0.92931, 0.49563, 0.30466, 0.20780, 0.15346, 0.09940, 0.07501, 0.06213,
        0.05448, 0.04950, 0.04601, 0.04342, 0.04140, 0.03976, 0.03839, 0.03722]),
    "titanium": np.array([
        7.14946, 3.77540, 2.24234, 1.44844, 0.99786, 0.54728, 0.34548, 0.24179,
        0.18277, 0.14644, 0.12270, 0.10643, 0.09479, 0.08615, 0.07955, 0.07436]),
    "iron": np.array([
        20.21254, 10.78346, 6.43568, 4.15972, 2.85593, 1.54046, 0.94828, 0.64249,
        0.46845, 0.36181, 0.29255, 0.24536, 0.21192, 0.18741, 0.16892, 0.15460]),
    "copper": np.array([
        30.28452, 16.31089, 9.77927, 6.33791, 4.35566, 2.34125, 1.42695, 0.95351,
        0.68365, 0.51818, 0.41079, 0.33780, 0.28624, 0.24862, 0.22038, 0.19865]),
    "tin": np.array([
        15.66827, 8.57377, 30.09419, 20.55423, 14.18159, 7.81188, 4.79338, 3.16485,
        2.21145, 1.61574, 1.22413, 0.95593, 0.76587, 0.62730, 0.52376, 0.44474]),
}
CESIUM_IODIDE = np.array([
    12.11335, 6.63576, 4.08000, 8.32767, 10.35929, 5.80541, 3.57245, 2.36695,
    1.65836, 1.21244, 0.91794, 0.71576, 0.57219, 0.46732, 0.38882, 0.32883])
# fmt: on


@dataclass(frozen=True)
class Geometry:
    """A cone beam from a point source onto a flat panel.

    Args:
        shape: (H, W) of the panel in pixels.
        pitch: pixel pitch in mm.
        source_to_detector, source_to_object: distances in mm; scenes are centred on the object's origin.
    """

    shape: tuple[int, int]
    pitch: float
    source_to_detector: float = 1000.0
    source_to_object: float = 800.0

    def slopes(self) -> tuple[FloatArray, FloatArray]:
        """x and y of each pixel's ray per unit of z; (1, W) and (H, 1)."""
        height, width = self.shape
        x = (np.arange(width) - (width - 1) / 2) * (self.pitch / self.source_to_detector)
        y = (np.arange(height) - (height - 1) / 2) * (self.pitch / self.source_to_detector)
        return x[None, :].astype(np.float32), y[:, None].astype(np.float32)

    def window(self, centre: NDArray[np.float64], radius: float) -> tuple[slice, slice]:
        """The part of the panel on which a ball around ``centre`` can cast its shadow."""
        depth = centre[2] + self.source_to_object
        if depth <= radius:
            return slice(0, self.shape[0]), slice(0, self.shape[1])
        scale = self.source_to_detector / (depth - radius) / self.pitch
        reach = radius * scale * 1.1 + 2
        bounds = []
        for axis, size in ((1, self.shape[0]), (0, self.shape[1])):
            # Nearer and farther ends of the ball project to different places when it lies off the axis.
            near = centre[axis] * scale
            far = centre[axis] * self.source_to_detector / (depth + radius) / self.pitch
            low = int(np.floor(min(near, far) - reach + (size - 1) / 2))
            high = int(np.ceil(max(near, far) + reach + (size - 1) / 2)) + 1
            bounds.append(slice(min(max(low, 0), size), min(max(high, 0), size)))
        return bounds[0], bounds[1]


@dataclass(frozen=True)
class Solid:
    """A convex solid: the unit ball, cube [-1, 1]^3 or cylinder (axis z), scaled and placed.

    Args:
        kind: "ellipsoid", "box" or "cylinder".
        centre: (3,) in mm.
        axes: (3, 3); the columns are the images of the unit vectors: half-axes in mm, orthogonal to each other.
    """

    kind: str
    centre: NDArray[np.float64]
    axes: NDArray[np.float64]

    @property
    def radius(self) -> float:
        return float(np.sqrt((self.axes**2).sum()))

    def interval(self, distance: float, x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Where the rays (x, y, 1) from a source ``distance`` before the origin enter and leave; enter > leave: a miss.

        The parameter is z itself, zero at the origin: counted from the source, fp32 would leave the small solids
        ragged.
        """
        to_local = np.linalg.inv(self.axes)
        start = to_local @ -self.centre
        aslant = [np.float32(row[0]) * x + np.float32(row[1]) * y for row in to_local]
        origin = [np.float32(s) + np.float32(distance) * a for s, a in zip(start, aslant, strict=True)]
        direction = [a + np.float32(row[2]) for a, row in zip(aslant, to_local, strict=True)]
        if self.kind == "ellipsoid":
            return _roots(origin, direction)
        if self.kind == "box":
            return _slabs(origin, direction)
        near, far = _roots(origin[:2], direction[:2])
        low, high = _slabs(origin[2:], direction[2:])
        return np.maximum(near, low), np.minimum(far, high)


def _roots(origin: Sequence[FloatArray], direction: Sequence[FloatArray]) -> tuple[FloatArray, FloatArray]:
    """|origin + t direction| = 1. Rays that miss get an empty interval."""
    a = sum(d * d for d in direction) + np.float32(1e-12)
    closest = -sum(o * d for o, d in zip(origin, direction, strict=True)) / a
    # The squared distance at the closest approach, from differences that are small themselves.
    gap = sum((o + closest * d) ** 2 for o, d in zip(origin, direction, strict=True))
    half = np.sqrt(np.maximum(1 - gap, 0) / a)
    miss = gap >= 1
    return np.where(miss, np.float32(1e9), closest - half), np.where(miss, np.float32(-1e9), closest + half)


def _slabs(origin: Sequence[FloatArray], direction: Sequence[FloatArray]) -> tuple[FloatArray, FloatArray]:
    """|origin_i + t direction_i| <= 1 for each i."""
    near, far = np.float32(-1e9), np.float32(1e9)
    for o, d in zip(origin, direction, strict=True):
        inverse = 1 / np.where(np.abs(d) < 1e-9, np.float32(1e-9), d)
        a, b = (-1 - o) * inverse, (1 - o) * inverse
        near, far = np.maximum(near, np.minimum(a, b)), np.minimum(far, np.maximum(a, b))
    return near, far


@dataclass(frozen=True)
class Part:
    """The intersection of ``solids``, of one material; ``sign`` -1 takes that material away again."""

    material: str
    solids: tuple[Solid, ...]
    sign: float = 1.0


@dataclass
class Scene:
    """A signed sum of parts."""

    parts: list[Part] = field(default_factory=list)

    def add(self, material: str, *solids: Solid) -> None:
        self.parts.append(Part(material, solids))

    def cut(self, material: str, *solids: Solid) -> None:
        """Remove ``material`` from the intersection of ``solids``; name the solid that is cut among them."""
        self.parts.append(Part(material, solids, -1.0))

    def thickness(self, geometry: Geometry) -> dict[str, FloatArray]:
        """Path length in mm of every pixel's ray through each material, (H, W) float32 each."""
        x, y = geometry.slopes()
        total: dict[str, FloatArray] = {}
        for part in self.parts:
            windows = [geometry.window(solid.centre, solid.radius) for solid in part.solids]
            rows = slice(max(w[0].start for w in windows), min(w[0].stop for w in windows))
            cols = slice(max(w[1].start for w in windows), min(w[1].stop for w in windows))
            if rows.start >= rows.stop or cols.start >= cols.stop:
                continue
            xs, ys = x[:, cols], y[rows]
            near, far = np.float32(-1e9), np.float32(1e9)
            for solid in part.solids:
                enter, leave = solid.interval(geometry.source_to_object, xs, ys)
                near, far = np.maximum(near, enter), np.minimum(far, leave)
            length = np.maximum(far - near, 0) * np.sqrt(xs * xs + ys * ys + 1)
            if part.material not in total:
                total[part.material] = np.zeros(geometry.shape, np.float32)
            total[part.material][rows, cols] += np.float32(part.sign) * length
        for length in total.values():
            np.maximum(length, 0, out=length)
        return total


def spectrum(kilovolts: float = 130.0, filters: Mapping[str, float] | None = None) -> NDArray[np.float64]:
    """Weights of the ENERGIES in the open beam's signal; they sum to 1.

    Kramers' bremsstrahlung behind ``filters`` (mm of each material), absorbed in 0.5 mm of caesium iodide and
    integrated as energy. No characteristic lines.
    """
    filters = {"aluminium": 2.5, "copper": 0.3} if filters is None else filters
    path = sum(MATERIALS[name] * length for name, length in filters.items())
    photons = np.maximum(kilovolts - ENERGIES, 0) / ENERGIES * np.exp(-path) * (1 - np.exp(-0.5 * CESIUM_IODIDE))
    signal = photons * ENERGIES * np.gradient(ENERGIES)
    return signal / signal.sum()


def transmit(thickness: Mapping[str, FloatArray], shape: tuple[int, int], weights: NDArray[np.float64]) -> FloatArray:
    """Signal behind the object in units of the open beam, (H, W) float32 (Beer-Lambert, summed over the spectrum)."""
    signal = np.zeros(shape, np.float32)
    for index, weight in enumerate(weights):
        if weight > 1e-4:
            path = np.zeros(shape, np.float32)
            for material, length in thickness.items():
                path += np.float32(MATERIALS[material][index]) * length
            signal += np.float32(weight) * np.exp(-path)
    return signal


def blur(image: FloatArray, sigma: float) -> FloatArray:
    """Gaussian blur with standard deviation ``sigma`` in pixels, mirrored at the border; 0 returns ``image`` itself."""
    if sigma <= 0:
        return image
    radius = max(1, int(np.ceil(4 * sigma)))
    taps = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    taps = (taps / (2 * taps.sum() - taps[0])).astype(np.float32)
    for axis in (0, 1):
        padded = np.pad(image, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)], mode="reflect")
        size = image.shape[axis]
        shifted = [padded[s : s + size] if axis == 0 else padded[:, s : s + size] for s in range(2 * radius + 1)]
        image = taps[0] * shifted[radius]
        for distance in range(1, radius + 1):
            image += taps[distance] * (shifted[radius - distance] + shifted[radius + distance])
    return image


def _wide_blur(image: FloatArray, sigma: float) -> FloatArray:
    """Gaussian blur so wide that a sample every ``sigma / 4`` and straight lines between them carry it."""
    for axis in (0, 1):
        size = image.shape[axis]
        knots = np.linspace(0, size - 1, max(2, min(size, int(4 * size / sigma) + 2)))
        weights = np.exp(-0.5 * ((knots[:, None] - np.arange(size)[None, :]) / sigma) ** 2)
        weights /= weights.sum(1, keepdims=True)
        lines = np.maximum(1 - np.abs(np.arange(size)[:, None] - knots[None, :]) / max(knots[1], 1e-9), 0)
        matrix = (lines @ weights).astype(np.float32)
        image = matrix @ image if axis == 0 else image @ matrix.T
    return image


def radiate(
    scene: Scene,
    geometry: Geometry,
    *,
    kilovolts: float = 130.0,
    filters: Mapping[str, float] | None = None,
    unsharpness: float = 0.7,
    scatter: float = 0.08,
    vignetting: float = 0.12,
) -> FloatArray:
    """The noise-free signal at the panel, (H, W) float32 in units of the open beam's centre.

    Args:
        kilovolts, filters: of the beam, see `spectrum`.
        unsharpness: standard deviation of the focal spot's blur in pixels.
        scatter: scattered fraction, as a wide blur of the primary signal.
        vignetting: how much darker the open beam is at the ends of the axes.
    """
    signal = transmit(scene.thickness(geometry), geometry.shape, spectrum(kilovolts, filters))
    if scatter > 0:
        signal += np.float32(scatter) * _wide_blur(signal, max(geometry.shape) / 9)
    signal = blur(signal, unsharpness)
    x, y = geometry.slopes()
    reach = max(x[0, -1], y[-1, 0], 1e-9)
    return signal * (1 - np.float32(vignetting) * ((x / reach) ** 2 + (y / reach) ** 2) / 2)


@dataclass(frozen=True)
class Detector:
    """A flat panel with a scintillator: counts = gain (light spread * quanta) gain_map + offset + read noise.

    Args:
        gain: counts (DN) per detected quantum.
        offset: counts without any beam.
        read_noise: standard deviation in counts.
        light_spread: standard deviation in pixels of the scintillator's point spread; it blurs the quanta after they
            were counted and so correlates the noise of neighbouring pixels. 0: white noise.
        gain_map: (H, W) relative gain of the pixels, or None.
    """

    gain: float = 9.0
    offset: float = 200.0
    read_noise: float = 6.0
    light_spread: float = 0.55
    gain_map: FloatArray | None = None

    def expected(self, signal: FloatArray, quanta: float) -> FloatArray:
        """Mean counts, (H, W) float32, of ``signal`` (units of the open beam) at ``quanta`` per open-beam pixel."""
        mean = np.float32(quanta) * signal
        mean = blur(mean, self.light_spread)
        if self.gain_map is not None:
            mean = mean * self.gain_map
        return mean * np.float32(self.gain) + np.float32(self.offset)

    def expose(self, signal: FloatArray, quanta: float, seed: int) -> FloatArray:
        """One noisy frame, counts as (H, W) float32, before rounding and clipping."""
        rng = np.random.default_rng(seed)
        counted = blur(rng.poisson(quanta * np.maximum(signal, 0)).astype(np.float32), self.light_spread)
        if self.gain_map is not None:
            counted *= self.gain_map
        counts = counted * np.float32(self.gain) + np.float32(self.offset)
        if self.read_noise > 0:
            counts += np.float32(self.read_noise) * rng.standard_normal(signal.shape, dtype=np.float32)
        return counts


def to_uint16(counts: FloatArray) -> NDArray[np.uint16]:
    return np.clip(np.rint(counts), 0, 65535).astype(np.uint16)


def rotation(x: float = 0.0, y: float = 0.0, z: float = 0.0) -> NDArray[np.float64]:
    """Rotation matrix about x, then y, then z, angles in radians."""
    matrix = np.eye(3)
    for axis, angle in enumerate((x, y, z)):
        c, s = np.cos(angle), np.sin(angle)
        turn = np.eye(3)
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        turn[i, i] = turn[j, j] = c
        turn[i, j], turn[j, i] = -s, s
        matrix = turn @ matrix
    return matrix


class Placing:
    """Makes solids in the frame of a part that is itself turned and moved."""

    def __init__(self, turn: NDArray[np.float64] | None = None, origin: Sequence[float] = (0.0, 0.0, 0.0)) -> None:
        self.turn = np.eye(3) if turn is None else turn
        self.origin = np.asarray(origin, np.float64)

    def _solid(self, kind: str, centre: Sequence[float], half: Sequence[float], turn: NDArray | None) -> Solid:
        own = np.eye(3) if turn is None else turn
        return Solid(kind, self.origin + self.turn @ np.asarray(centre, np.float64), self.turn @ own @ np.diag(half))

    def box(self, centre: Sequence[float], size: Sequence[float], turn: NDArray | None = None) -> Solid:
        return self._solid("box", centre, np.asarray(size, np.float64) / 2, turn)

    def cylinder(self, centre: Sequence[float], radius: float, length: float, turn: NDArray | None = None) -> Solid:
        return self._solid("cylinder", centre, (radius, radius, length / 2), turn)

    def ellipsoid(self, centre: Sequence[float], half: Sequence[float], turn: NDArray | None = None) -> Solid:
        return self._solid("ellipsoid", centre, half, turn)

    def ball(self, centre: Sequence[float], radius: float) -> Solid:
        return self._solid("ellipsoid", centre, (radius, radius, radius), None)
