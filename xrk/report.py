"""What was done to an image: what is needed to do it again, and figures that tell whether to trust it."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

_BLOCK = 1 << 16  # pixels worked on at a time: their float64 copies stay in the cache


class _Noise(Protocol):
    def variance(self, mean: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class FrameReport:
    """One frame: its noise model, what was clipped or invalid, and the residual input - output.

    Attributes:
        noise: ``NoiseModel.to_dict()`` (gain, offset, read noise and in words where they come from), or None.
        clipped: pixels that would have left the dtype's range.
        invalid: pixels that were NaN, Inf or masked and came back as they were.
        residual: see `residual_statistics`; None where every pixel is invalid.
    """

    noise: dict[str, Any] | None
    clipped: int
    invalid: int
    residual: dict[str, float | None] | None


@dataclass(frozen=True)
class Report:
    """What `xrk.enhance` did.

    Attributes:
        model, architecture, domain: the card's.
        weights_sha256: of the weights file; None for a network that came from no file.
        shape, dtype: the image's; the dtype with its byte order, as numpy writes it (``<u2``).
        levels: (black, white) in the image's units.
        levels_source: "given", "file", "range of the dtype" or "unit range".
        frames: one entry per frame of a stack.
        clipped, invalid: sums over the frames.
        device: where the network ran.
        kernels: which code did the pixel arithmetic.
        plan: how the network was run.
        memory: the budget in bytes that the caller named, or None.
        versions: of xrk, torch, numpy and python.
        seconds: of the whole call, reading and writing of files included.
        warnings: sentences; what a careful user should know.
        file: what `xrk.enhance_file` adds: names of the files, the correction; None for arrays.
        uncertainty: the posterior's standard deviation of every pixel, of the image's shape, float32, in counts, NaN
            where a pixel is invalid; where `xrk.enhance` was asked for it. `to_dict` leaves it out.
    """

    model: str
    architecture: str
    domain: str
    weights_sha256: str | None
    shape: tuple[int, ...]
    dtype: str
    levels: tuple[float, float]
    levels_source: str
    frames: list[FrameReport]
    device: str
    kernels: str
    plan: str
    memory: int | None
    versions: dict[str, str]
    seconds: float
    warnings: list[str] = field(default_factory=list)
    file: dict[str, Any] | None = None
    uncertainty: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def clipped(self) -> int:
        return sum(frame.clipped for frame in self.frames)

    @property
    def invalid(self) -> int:
        return sum(frame.invalid for frame in self.frames)

    def to_dict(self, *, timing: bool = True) -> dict[str, Any]:
        """Plain JSON values only; None stands for a figure that is not finite.

        ``timing=False`` leaves the seconds out: what is written into a file must be the same in every run.
        """
        entries = dataclasses.asdict(dataclasses.replace(self, uncertainty=None))
        del entries["uncertainty"]
        if not timing:
            del entries["seconds"]
        return _plain({**entries, "clipped": self.clipped, "invalid": self.invalid})

    def to_json(self, *, timing: bool = True, indent: int | None = None) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(timing=timing), indent=indent, allow_nan=False)

    def __str__(self) -> str:
        size = " x ".join(str(side) for side in self.shape)
        lines = [
            f"{self.model} on {self.device}, {size} {np.dtype(self.dtype).name}, "
            f"levels {self.levels[0]:g} to {self.levels[1]:g} ({self.levels_source})",
            f"{self.plan}, {self.seconds:.2f} s; {self.clipped} pixels clipped, {self.invalid} invalid",
        ]
        for i, frame in enumerate(self.frames[:1]):
            which = f"frame {i} of {len(self.frames)}: " if len(self.frames) > 1 else ""
            if frame.noise is not None:
                numbers = (frame.noise.get(name, math.nan) for name in ("gain", "offset", "read_noise"))
                gain, offset, read_noise = numbers
                lines.append(f"{which}noise: gain {gain:.4g}, offset {offset:.4g}, read noise {read_noise:.4g}")
            if frame.residual is not None:
                lines.append(which + "residual: " + _describe(frame.residual))
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])


def _describe(residual: dict[str, float | None]) -> str:
    text = f"mean {residual['mean']:.4g}, sd {residual['sd']:.4g} counts"
    if residual.get("standardised_sd") is not None:
        text += f"; standardised mean {residual['standardised_mean']:.3g}, sd {residual['standardised_sd']:.3g}"
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def residual_statistics(
    before: np.ndarray, after: np.ndarray, noise: _Noise | None = None, invalid: np.ndarray | None = None
) -> dict[str, float | None]:
    """Figures of the residual x - y over the valid pixels of one frame.

    Args:
        before, after: x and y, (H, W), counts, of any real dtype.
        noise: where given, the standardised residual (x - y) / sqrt(var(y)) is described too, over the pixels whose
            modelled variance is positive. Of a perfect result it has mean 0, sd 1 and the noise's own autocorrelation
            (0 for white noise).
        invalid: bool (H, W), or None.

    Returns:
        ``mean`` and ``sd`` in counts; ``standardised_mean``, ``standardised_sd`` and the autocorrelation of
        neighbours ``standardised_lag1_horizontal`` and ``..._vertical``, each None where it is not defined.
    """
    statistics = ResidualStatistics(noise)
    statistics.add(before, after, invalid)
    return statistics.result()


class ResidualStatistics:
    """`residual_statistics` of a frame that comes in bands of rows, from the top down."""

    def __init__(self, noise: _Noise | None = None) -> None:
        self.noise = noise
        self.plain, self.standardised = _Moments(), _Moments()

    def add(self, before: np.ndarray, after: np.ndarray, invalid: np.ndarray | None = None) -> None:
        """The next rows, (rows, W) each."""
        rows = max(1, _BLOCK // before.shape[1])
        for start in range(0, before.shape[0], rows):
            part = slice(start, start + rows)
            self._add(before[part], after[part], None if invalid is None else ~invalid[part])

    def _add(self, before: np.ndarray, after: np.ndarray, valid: np.ndarray | None) -> None:
        y = after.astype(np.float64)
        r = before - y
        if valid is not None:
            r[~valid] = 0.0
        self.plain.add(r, valid)
        if self.noise is None:
            return
        variance = np.asarray(self.noise.variance(y))
        known = variance > 0.0 if valid is None else valid & (variance > 0.0)
        if known.all():
            known = None
            r /= np.sqrt(variance)
        else:
            r = np.divide(r, np.sqrt(variance, where=known, out=np.ones_like(r)), where=known, out=np.zeros_like(r))
        self.standardised.add(r, known)
        self.standardised.add_neighbours(r, known)

    def result(self) -> dict[str, float | None]:
        """The figures of all rows so far."""
        plain, standardised = self.plain, self.standardised
        return {
            "mean": plain.mean,
            "sd": plain.sd,
            "standardised_mean": standardised.mean,
            "standardised_sd": standardised.sd,
            "standardised_lag1_horizontal": standardised.correlation("horizontal"),
            "standardised_lag1_vertical": standardised.correlation("vertical"),
        }


class _Moments:
    """Mean, sd and lag-1 autocorrelation of an image that comes in bands of rows, 0 where it does not count."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, 0.0, 0.0
        self.pairs = {"horizontal": 0, "vertical": 0}
        self.products = {"horizontal": 0.0, "vertical": 0.0}
        self.above: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, r: np.ndarray, counts: np.ndarray | None) -> None:
        self.count += r.size if counts is None else int(np.count_nonzero(counts))
        self.sum += float(r.sum())
        self.squares += float(np.vdot(r, r))

    def add_neighbours(self, r: np.ndarray, counts: np.ndarray | None) -> None:
        counts = np.ones(r.shape, bool) if counts is None else counts
        self._pair("horizontal", r[:, :-1], r[:, 1:], counts[:, :-1], counts[:, 1:])
        self._pair("vertical", r[:-1], r[1:], counts[:-1], counts[1:])
        if self.above is not None:
            self._pair("vertical", self.above[0], r[:1], self.above[1], counts[:1])
        self.above = r[-1:].copy(), counts[-1:].copy()

    def _pair(self, axis: str, a: np.ndarray, b: np.ndarray, a_counts: np.ndarray, b_counts: np.ndarray) -> None:
        self.pairs[axis] += int(np.count_nonzero(a_counts & b_counts))
        self.products[axis] += float(np.einsum("ij,ij->", a, b))

    @property
    def mean(self) -> float | None:
        return self.sum / self.count if self.count else None

    @property
    def variance(self) -> float:
        square = self.squares / self.count
        variance = square - (self.sum / self.count) ** 2
        return variance if variance > 1e-12 * square else 0.0  # what is left of a constant by rounding

    @property
    def sd(self) -> float | None:
        return math.sqrt(self.variance) if self.count else None

    def correlation(self, axis: str) -> float | None:
        if not self.pairs[axis] or self.variance == 0.0:
            return None
        mean = self.sum / self.count
        return (self.products[axis] / self.pairs[axis] - mean * mean) / self.variance
