"""What becomes of small, faint details: the contrast of planted discs and wires that is left after denoising.

    python -m xrk.training.contrast [--models resnet18-unet ...] [--scenes 16] [--quanta 400] [--out table.json]

A model is a name or the path of weights. Each frame is divided into cells of 32 x 32 pixels, and each cell has one
detail at a random place: a disc, or a wire of 24 pixels' length in a random direction, darker than what lies there by
1, 2, 3 or 5 standard deviations of the noise at that place. The frame is exposed with them and without them, both are
denoised, and the contrast recovered is what of the detail t is in the difference d: <d, t> / <t, t>, over all cells of
a kind. 1 says that all of it is left; a linear filter that blurs gives less, and the same at every contrast. What a
network takes for noise falls off towards small and faint. White noise; "flat" is an even field at 0.6 of the open beam,
"scenes" are the held-out random scenes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import xrk
from xrk.simulate import Detector, FloatArray, to_uint16
from xrk.training.data import clean_signal
from xrk.training.evaluate import GAIN, OFFSET, Denoiser, peers, pixel_noise

CELL, WIRE_LENGTH = 32, 24.0
DETAILS = tuple(("disc", size) for size in (2.0, 4.0, 8.0, 16.0)) + tuple(("wire", size) for size in (1.0, 2.0, 4.0))
CONTRASTS = (1.0, 2.0, 3.0, 5.0)
FLAT = 0.6  # of the open beam
_FINE = 8  # samples a pixel along each axis, for the share of a pixel that a detail covers


@dataclass(frozen=True)
class Recovery:
    """The contrast recovered of one kind of detail by one method.

    Attributes:
        method, background: whose, and in front of what ("flat" or "scenes").
        detail, size: "disc" and its diameter or "wire" and its width, in pixels.
        contrast: in standard deviations of the noise.
        share: of that contrast which is left, 1 being all.
        error: standard error of the share, from its spread over the cells.
        cells: how many there were.
    """

    method: str
    background: str
    detail: str
    size: float
    contrast: float
    share: float
    error: float
    cells: int


def coverage(detail: str, size: float, rng: np.random.Generator) -> FloatArray:
    """The share of each pixel of a cell that a detail at a random place near the middle covers, (32, 32)."""
    place = (np.arange(CELL * _FINE) + 0.5) / _FINE - CELL / 2
    y, x = np.meshgrid(place, place, indexing="ij")
    y, x = y - rng.uniform(-2, 2), x - rng.uniform(-2, 2)
    if detail == "disc":
        inside = np.hypot(y, x) < size / 2
    else:
        angle = rng.uniform(0, np.pi)
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        inside = (np.abs(along) < WIRE_LENGTH / 2) & (np.abs(across) < size / 2)
    return inside.reshape(CELL, _FINE, CELL, _FINE).mean((1, 3), dtype=np.float32)


def plant(signal: FloatArray, quanta: float, seed: int) -> tuple[FloatArray, list[tuple[str, float, float]]]:
    """The signal with a detail in every cell, and for each cell, row after row, what it has: (detail, size, contrast).

    Args:
        signal: (H, W), multiples of 32, in units of the open beam.
        quanta: per pixel of the open beam; they say what a standard deviation is.
    """
    rng = np.random.default_rng([seed, 3])
    kinds = [(*detail, contrast) for detail in DETAILS for contrast in CONTRASTS]
    planted, given = signal.copy(), []
    deviation = np.sqrt(signal / np.float32(quanta))
    for cell in _cells(signal.shape):
        kind = kinds[rng.integers(len(kinds))]
        given.append(kind)
        planted[cell] -= np.float32(kind[2]) * deviation[cell] * coverage(*kind[:2], rng)
    return np.maximum(planted, 0), given


def _cells(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    for top in range(0, shape[0], CELL):
        for left in range(0, shape[1], CELL):
            yield np.s_[top : top + CELL, left : left + CELL]


def recoveries(methods: dict[str, Denoiser], background: str, quanta: float, count: int, size: int) -> list[Recovery]:
    """Of all methods over ``count`` frames of ``size`` x ``size`` pixels; each takes and gives counts."""
    detector = Detector(GAIN, OFFSET, 0.0, 0.0)
    sums: dict[tuple, list[tuple[float, float]]] = {}
    for seed in range(count):
        signal = clean_signal(seed, size) if background == "scenes" else np.full((size, size), FLAT, np.float32)
        planted, given = plant(signal, quanta, seed)
        truth = detector.expected(planted, quanta).astype(np.float64) - detector.expected(signal, quanta)
        frames = [to_uint16(detector.expose(s, quanta, 2 * seed + i)) for i, s in enumerate((signal, planted))]
        for name, method in methods.items():
            without, with_them = (np.asarray(method(frame), np.float64) for frame in frames)
            difference = with_them - without
            for kind, cell in zip(given, _cells(signal.shape), strict=True):
                t = truth[cell]
                sums.setdefault((name, *kind), []).append((float((difference[cell] * t).sum()), float((t * t).sum())))
    found = []
    for (name, *kind), values in sorted(sums.items()):
        products, squares = np.array(values).T
        share = float(products.sum() / squares.sum())
        error = float(np.sqrt(((products - share * squares) ** 2).sum()) / squares.sum())
        found.append(Recovery(name, background, *kind, share, error, len(values)))
    return found


def markdown(found: list[Recovery]) -> str:
    """A table for each method: details down, contrasts across, "flat / scenes" in per cent."""
    lines: list[str] = []
    for method in dict.fromkeys(r.method for r in found):
        lines += [f"| {method}: detail | " + " | ".join(f"{c:g} sigma" for c in CONTRASTS) + " |"]
        lines += ["|---|" + "---|" * len(CONTRASTS)]
        for detail, size in DETAILS:
            cells = []
            for contrast in CONTRASTS:
                key = (method, detail, size, contrast)
                shares = [r.share for r in found if (r.method, r.detail, r.size, r.contrast) == key]
                cells.append(" / ".join(f"{100 * share:.0f}" for share in shares))
            lines.append(f"| {detail}, {size:g} px | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18-unet"])
    parser.add_argument("--scenes", type=int, default=16, help="frames in front of each background")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--quanta", type=float, default=400.0, help="per pixel of the open beam")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    arguments = parser.parse_args(argv)
    if arguments.size % CELL:
        parser.error(f"--size {arguments.size}: expected a multiple of {CELL}")
    name = "NLM (fast mode)"
    methods: dict[str, Denoiser] = {name: peers(pixel_noise(0.0), 0.0)[name]}
    for model in arguments.models:
        loaded = xrk.load(model)
        methods[f"xrk {loaded.card.name}"] = lambda z, loaded=loaded: xrk.enhance(z, loaded)
    found = []
    for background in ("flat", "scenes"):
        found += recoveries(methods, background, arguments.quanta, arguments.scenes, arguments.size)
    print(f"{arguments.quanta:g} quanta a pixel, contrast recovered in per cent, flat / scenes")
    error, cells = max(r.error for r in found), min(r.cells for r in found)
    print(f"of {cells} cells and more each, standard errors up to {100 * error:.0f} per cent")
    print(markdown(found))
    if arguments.out:
        document: dict[str, Any] = {
            "quanta": arguments.quanta,
            "size": arguments.size,
            "threads": torch.get_num_threads(),
            "versions": xrk.info()["packages"],
            "models": {name: xrk.load(name).card.sha256 for name in arguments.models},
            "recovery": [asdict(r) for r in found],
        }
        arguments.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
