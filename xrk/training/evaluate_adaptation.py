"""What `xrk.adapt` wins: on real frames, and on simulated ones whose noise is correlated between pixels.

    python -m xrk.training.evaluate_adaptation FRAMES [--run FOLDER] [--steps 600]
    python -m xrk.training.evaluate_adaptation --correlated [--steps 600]

The first adapts to all TIFF files of a folder of consecutive frames, as `xrk adapt` does, and judges three of them
against the mean of their four neighbours in time: the scene drifts, so more would blur. The data range is that mean's.

The second makes 12 frames of one random scene each behind a scintillator (light spread 0.55 pixels, lag-1 correlation
0.36) and adapts twice, blind for the pixel alone and blind for its neighbours too, as it does by itself. It begins from
random weights and judges against what the frames would be without noise (data range: the open beam).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

import xrk
from xrk import io
from xrk.metrics import psnr
from xrk.noise import NoiseModel
from xrk.simulate import Detector
from xrk.training.data import clean_signal
from xrk.training.evaluate import GAIN, LIGHT_SPREAD, OFFSET, peers, pixel_noise


def real(folder: Path, run: Path | None, **options: Any) -> dict[str, float]:
    """PSNR in dB by method, means over three frames; "seconds" of the adaptation."""
    stack = np.stack([io.read(path).array for path in sorted(folder.glob("*.tif"))])[:40]
    started = time.monotonic()
    model = xrk.adapt(stack, run=run, say=print, progress=_told, **options)
    seconds = time.monotonic() - started
    found: dict[str, list[float]] = {}
    for index in np.linspace(5, len(stack) - 5, 3).astype(int):
        reference = stack[[index - 2, index - 1, index + 1, index + 2]].mean(0, dtype=np.float64)
        frame, span = stack[index], float(np.ptp(reference))
        nlm = peers(xrk.estimate_noise(frame), 0.0)["NLM (fast mode)"]
        for name, result in (
            ("noisy", frame),
            ("NLM (fast mode)", nlm(frame.astype(np.float32))),
            ("xrk resnet18-unet, supervised", xrk.enhance(frame)),
            ("xrk blindspot as shipped", xrk.enhance(frame, "blindspot")),
            ("xrk blindspot, adapted", xrk.enhance(frame, model)),
        ):
            found.setdefault(name, []).append(psnr(np.asarray(result, np.float64), reference, span))
    return {name: float(np.mean(values)) for name, values in found.items()} | {"seconds": seconds}


def correlated(size: int = 256, count: int = 12, dose: float = 400.0, **options: Any) -> dict[str, float]:
    """PSNR in dB by method, means over four frames."""
    noise, detector = pixel_noise(LIGHT_SPREAD), Detector(GAIN, OFFSET, 0.0, LIGHT_SPREAD)
    signals = [clean_signal(seed, size) for seed in range(count)]
    # Two exposures of each scene: what they differ by is noise.
    stack = np.stack([detector.expose(s, dose, seed=2 * i + j) for i, s in enumerate(signals) for j in range(2)])
    stack = np.clip(np.rint(stack), 0, 65535).astype(np.uint16)
    networks = {
        f"blind for {side} x {side}": xrk.adapt(stack, noise=noise, spot=spot, say=print, progress=_told, **options)
        for side, spot in ((1, 1), (3, 2))
    }
    found: dict[str, list[float]] = {}
    for index in range(4):
        clean, frame = detector.expected(signals[index], dose), stack[2 * index]
        results = {"noisy": frame} | {
            name: xrk.enhance(frame, model, noise=NoiseModel(noise.gain, noise.offset))
            for name, model in networks.items()
        }
        for name, result in results.items():
            found.setdefault(name, []).append(psnr(np.asarray(result, np.float64), clean, GAIN * dose))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _told(done: int, steps: int) -> None:
    if done % 50 == 0:
        print(f"step {done} of {steps}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frames", type=Path, nargs="?", help="folder of consecutive frames")
    parser.add_argument("--correlated", action="store_true", help="simulated frames with correlated noise")
    parser.add_argument("--run", type=Path, help="folder for the run's state, to go on from when killed")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--features", type=int, help="begin from random weights, with so many channels")
    arguments = parser.parse_args(argv)
    if arguments.correlated == (arguments.frames is not None):
        parser.error("name a folder of frames, or --correlated")
    options = {"steps": arguments.steps, "features": arguments.features}
    if arguments.correlated:
        table = correlated(**options | {"features": arguments.features or 12})
    else:
        table = real(arguments.frames, arguments.run, **options)
    for name, value in table.items():
        print(f"{name:32} {value:8.2f}{'' if name == 'seconds' else ' dB'}")


if __name__ == "__main__":
    main()
