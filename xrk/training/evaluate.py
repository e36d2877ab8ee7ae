"""The quality table: held-out scenes, flat field, synchrotron frames, beside what a user would otherwise pick.

    python -m xrk.training.evaluate [--models resnet18-unet] [--scenes 8] [--synchrotron FOLDER] [--out table.json]
    python -m xrk.training.evaluate --models lxie-net resnet18-unet --tables long_range --scenes 3

A model is a name or the path of weights that `xrk.training.export` wrote. With several of them the first one also has
the tables of residuals and of the flat field. ``long_range`` is where a network that sees the whole image should gain:
large uniform parts, wires and stripes across the frame, at the lowest doses.

Every peer gets the noise-free parameters of the noise (it works behind the Anscombe transform and its exact unbiased
inverse), while xrk estimates them from the noisy frame itself, as `xrk.enhance` does for a user. BM3D runs where the
package ``bm3d`` is installed; its licence is non-commercial, so it is no dependency of anything here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.restoration import denoise_nl_means, denoise_wavelet

import xrk
from xrk import io
from xrk.metrics import psnr, ssim
from xrk.noise import NoiseModel
from xrk.simulate import Detector, FloatArray, blur
from xrk.training.data import clean_signal

DOSES = (50.0, 400.0, 3000.0)
GAIN, OFFSET = 10.0, 100.0
LIGHT_SPREAD = 0.55
TABLES = ("scenes", "residual", "flat", "long_range")

Denoiser = Callable[[FloatArray], FloatArray]


def kernel_of(spread: float, size: int = 33) -> FloatArray:
    impulse = np.zeros((size, size), np.float32)
    impulse[size // 2, size // 2] = 1
    return blur(impulse, spread)


def pixel_noise(spread: float) -> NoiseModel:
    """What a pixel of the evaluated detector shows: light spread averages quanta and so lowers the gain."""
    return NoiseModel(GAIN * float((kernel_of(spread) ** 2).sum()), OFFSET)


def peers(noise: NoiseModel, spread: float) -> dict[str, Denoiser]:
    """name -> function from counts to counts."""
    names: dict[str, Denoiser] = {
        "median 3x3": lambda z: _median(z),
        "wavelet BayesShrink": _stabilised(
            noise, lambda v: denoise_wavelet(v, method="BayesShrink", mode="soft", sigma=1.0, rescale_sigma=True)
        ),
        "NLM (fast mode)": _stabilised(
            noise, lambda v: denoise_nl_means(v, patch_size=5, patch_distance=6, h=0.8, sigma=1.0, fast_mode=True)
        ),
    }
    if importlib.util.find_spec("bm3d"):
        names["BM3D"] = _stabilised(noise, lambda v: _bm3d(v, None))
        if spread > 0:
            names["BM3D given the noise spectrum"] = _stabilised(noise, lambda v: _bm3d(v, kernel_of(spread)))
    return names


def _median(counts: FloatArray) -> FloatArray:
    padded = np.pad(counts, 1, mode="reflect")
    height, width = counts.shape
    return np.median([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=0)


def _stabilised(noise: NoiseModel, denoise: Denoiser) -> Denoiser:
    return lambda counts: noise.unstabilise(denoise(noise.stabilise(counts)))


def _bm3d(values: FloatArray, kernel: FloatArray | None) -> FloatArray:
    import bm3d

    if not hasattr(np, "trapz"):
        np.trapz = np.trapezoid  # the package still asks for the name that numpy 2.4 took away
    low, high = float(values.min()), float(values.max())
    scale = 1 / max(high - low, 1e-6)
    spread: Any = scale
    if kernel is not None:
        spectrum = np.abs(np.fft.fft2(kernel, s=values.shape)) ** 2 / (kernel**2).sum()
        spread = spectrum * (scale**2 * values.size)
    return bm3d.bm3d((values - low) * scale, spread) / scale + low


def _label(model: str) -> str:
    return f"xrk {xrk.load(model).card.name}"


def scenes_table(models: list[str], count: int, size: int, first: int) -> list[dict[str, Any]]:
    """Mean PSNR, SSIM and seconds per megapixel over scenes ``first ...`` at each dose, white and correlated."""
    rows = []
    for label, spread in (("white", 0.0), ("scintillator", LIGHT_SPREAD)):
        noise = pixel_noise(spread)
        detector = Detector(GAIN, OFFSET, 0.0, spread)
        for dose in DOSES:
            figures: dict[str, list[tuple[float, float, float]]] = {}
            for seed in range(first, first + count):
                signal = clean_signal(seed, size)
                clean = detector.expected(signal, dose).astype(np.float64)
                noisy = detector.expose(signal, dose, seed=seed)
                counts = np.clip(np.rint(noisy), 0, 65535).astype(np.uint16)
                methods: dict[str, Denoiser] = {"noisy": lambda z: z, **peers(noise, spread)}
                methods |= {_label(name): lambda z, name=name: xrk.enhance(z, name) for name in models}
                for name, method in methods.items():
                    start = time.perf_counter()
                    result = np.asarray(method(counts if name.startswith("xrk") else noisy), np.float64)
                    seconds = (time.perf_counter() - start) / (size * size / 1e6)
                    peak = GAIN * dose
                    figures.setdefault(name, []).append((psnr(result, clean, peak), ssim(result, clean, peak), seconds))
            for name, values in figures.items():
                mean = np.mean(values, axis=0)
                seconds = float(np.median([v[2] for v in values]))
                rows.append(
                    {
                        "noise": label,
                        "quanta": dose,
                        "method": name,
                        "psnr": mean[0],
                        "ssim": mean[1],
                        "seconds": seconds,
                    }
                )
                print(
                    f"{label:13} {dose:6.0f}  {name:32} {mean[0]:6.2f} dB  {mean[1]:.4f}  {seconds:7.2f} s/Mpx",
                    flush=True,
                )
    return rows


def residual_table(model: str, count: int, size: int, first: int) -> list[dict[str, Any]]:
    """What was taken away, standardised with the true noise, beside the noise that had been put in."""
    rows = []
    for label, spread in (("white", 0.0), ("scintillator", LIGHT_SPREAD)):
        noise = pixel_noise(spread)
        detector = Detector(GAIN, OFFSET, 0.0, spread)
        for dose in DOSES:
            found = []
            for seed in range(first, first + count):
                signal = clean_signal(seed, size)
                clean = detector.expected(signal, dose)
                counts = np.clip(np.rint(detector.expose(signal, dose, seed=seed)), 0, 65535).astype(np.uint16)
                result = xrk.enhance(counts, model).astype(np.float64)
                removed = (counts - result) / np.sqrt(noise.variance(result) + 1 / 12)
                added = (counts - clean) / np.sqrt(noise.variance(clean) + 1 / 12)
                found.append([removed.std(), added.std(), _lag(removed), _lag(added), removed.mean()])
            mean = np.mean(found, axis=0)
            row = dict(zip(("sd", "sd_put_in", "lag1", "lag1_put_in", "mean"), map(float, mean), strict=True))
            rows.append({"noise": label, "quanta": dose, **row})
            print(
                f"{label:13} {dose:6.0f}  residual sd {row['sd']:.3f} (put in {row['sd_put_in']:.3f})"
                f"  lag-1 {row['lag1']:+.3f} (put in {row['lag1_put_in']:+.3f})  mean {row['mean']:+.4f}",
                flush=True,
            )
    return rows


def _lag(image: np.ndarray) -> float:
    image = image - image.mean()
    across = (image[:, 1:] * image[:, :-1]).mean() + (image[1:] * image[:-1]).mean()
    return float(across / 2 / (image**2).mean())


def flat_table(model: str, size: int) -> list[dict[str, Any]]:
    """A uniform field in: what is left of its noise, and how far any 8 x 8 mean strays, in units of the noise."""
    rows = []
    for label, spread in (("white", 0.0), ("scintillator", LIGHT_SPREAD)):
        noise, detector = pixel_noise(spread), Detector(GAIN, OFFSET, 0.0, spread)
        for dose in DOSES:
            signal = np.ones((size, size), np.float32)
            clean = float(GAIN * dose + OFFSET)
            counts = np.clip(np.rint(detector.expose(signal, dose, seed=99)), 0, 65535).astype(np.uint16)
            sigma = float(np.sqrt(noise.variance(np.array(clean))))
            deviation = (xrk.enhance(counts, model).astype(np.float64) - clean) / sigma
            blocks = deviation.reshape(size // 8, 8, size // 8, 8).mean((1, 3))
            row = {"sd": deviation.std(), "block_max": np.abs(blocks).max(), "max": np.abs(deviation).max()}
            rows.append({"noise": label, "quanta": dose, **{k: float(v) for k, v in row.items()}})
            print(
                f"{label:13} {dose:6.0f}  flat field: sd {row['sd']:.3f}, largest 8x8 mean {row['block_max']:.3f},"
                f" largest pixel {row['max']:.3f} of the noise",
                flush=True,
            )
    return rows


def long_range_scenes(size: int, seed: int) -> dict[str, FloatArray]:
    """Signals where what lies far away tells more than the neighbourhood: in units of the open beam."""
    rng = np.random.default_rng([seed, 2])
    rows, cols = np.mgrid[:size, :size] / size
    steps = np.exp(-0.4 * np.floor(6 * cols) - 0.1 * (rows > 0.5)).astype(np.float32)
    wires = np.full((size, size), 0.5, np.float32)
    angle = rng.uniform(-0.1, 0.1)
    for number in range(12):
        across = (rows - (number + 1) / 13 - angle * (cols - 0.5)) * size
        radius = 4.0 * 0.75**number
        wires *= np.exp(-0.12 * np.sqrt(np.maximum(radius**2 - across**2, 0))).astype(np.float32)
    gains = 1 + 0.03 * np.repeat(rng.standard_normal(size // 8 + 1), 8)[:size]
    stripes = (0.6 * np.exp(-0.8 * (np.hypot(rows - 0.5, cols - 0.5) < 0.3)) * gains).astype(np.float32)
    return {"uniform steps": blur(steps, 0.7), "wires": blur(wires, 0.7), "stripes": stripes}


def long_range_table(models: list[str], count: int, size: int, first: int) -> list[dict[str, Any]]:
    """PSNR on `long_range_scenes` at doses lower than the quality table's lowest, white noise."""
    rows = []
    detector = Detector(GAIN, OFFSET, 0.0, 0.0)
    for dose in (15.0, 50.0):
        figures: dict[tuple[str, str], list[float]] = {}
        for seed in range(first, first + count):
            for kind, signal in long_range_scenes(size, seed).items():
                clean = detector.expected(signal, dose)
                counts = np.clip(np.rint(detector.expose(signal, dose, seed=seed)), 0, 65535).astype(np.uint16)
                methods: dict[str, Denoiser] = {"noisy": lambda z: z, **peers(pixel_noise(0.0), 0.0)}
                methods |= {_label(name): lambda z, name=name: xrk.enhance(z, name) for name in models}
                for name, method in methods.items():
                    given = counts if name.startswith("xrk") else counts.astype(np.float32)
                    value = psnr(np.asarray(method(given), np.float64), clean, GAIN * dose)
                    figures.setdefault((kind, name), []).append(value)
        for (kind, name), values in figures.items():
            rows.append({"scene": kind, "quanta": dose, "method": name, "psnr": float(np.mean(values))})
            print(f"{kind:13} {dose:6.0f}  {name:32} {np.mean(values):6.2f} dB", flush=True)
    return rows


def synchrotron_table(folder: Path, models: list[str]) -> list[dict[str, Any]]:
    """Single frames against the mean of their four neighbours in time.

    The scene drifts, so more neighbours would blur; that mean is itself noisy, with a quarter of a frame's variance,
    which is subtracted from the mean squared errors (``corrected``).
    """
    frames = [io.read(path).array.astype(np.float64) for path in sorted(folder.glob("*.tif"))]
    rows: dict[str, list[tuple[float, float]]] = {}
    for index in range(4, len(frames) - 2, 6):
        frame = frames[index]
        reference = np.mean([frames[index + step] for step in (-2, -1, 1, 2)], axis=0)
        noise = np.mean((frames[index + 1] - frames[index]) ** 2) / 2
        counts = frame.astype(np.uint16)
        methods: dict[str, Denoiser] = {"noisy": lambda z: z, **peers(xrk.estimate_noise(counts), 0.0)}
        methods |= {_label(name): lambda z, name=name: xrk.enhance(z.astype(np.uint16), name) for name in models}
        for name, method in methods.items():
            error = float(np.mean((np.asarray(method(frame.astype(np.float32)), np.float64) - reference) ** 2))
            rows.setdefault(name, []).append((error, max(error - noise / 4, 1.0)))
    table = []
    for name, values in rows.items():
        raw, corrected = (10 * float(np.log10(65535**2 / np.mean(v))) for v in zip(*values, strict=True))
        table.append({"method": name, "psnr": raw, "corrected": corrected})
        print(
            f"synchrotron  {name:32} {raw:6.2f} dB, {corrected:6.2f} dB without the reference's own noise", flush=True
        )
    return table


def long_range_markdown(rows: list[dict[str, Any]]) -> str:
    """The rows of `long_range_table` as README shows them: PSNR by scene and dose, a line for each method."""
    columns = list(dict.fromkeys((row["scene"], row["quanta"]) for row in rows))
    lines = [
        "| method | " + " | ".join(f"{scene}, {quanta:.0f}" for scene, quanta in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {(row["scene"], row["quanta"]): row for row in rows if row["method"] == method}
        lines.append(f"| {method} | " + " | ".join(f"{found[c]['psnr']:.2f}" for c in columns) + " |")
    return "\n".join(lines)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows of `scenes_table` as README shows them: PSNR / SSIM by noise and dose, a line for each method."""
    columns = list(dict.fromkeys((row["noise"], row["quanta"]) for row in rows))
    lines = [
        "| method | " + " | ".join(f"{noise}, {quanta:.0f}" for noise, quanta in columns) + " | s/Mpx |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {(row["noise"], row["quanta"]): row for row in rows if row["method"] == method}
        cells = [f"{found[c]['psnr']:.2f} / {found[c]['ssim']:.3f}" if c in found else "" for c in columns]
        seconds = float(np.median([row["seconds"] for row in found.values()]))
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {seconds:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18-unet"])
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument(
        "--first", type=int, default=0, help="seed of the first scene; training never uses any below 1000000"
    )
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="by default all of them")
    parser.add_argument("--synchrotron", type=Path, help="folder of consecutive frames")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    arguments = parser.parse_args(argv)
    for name in arguments.models:
        xrk.load(name)
    xrk.enhance(np.zeros((64, 64), np.uint16), arguments.models[0])  # first-call costs are nobody's time per pixel
    models, frames = arguments.models, (arguments.scenes, arguments.size, arguments.first)
    tables: dict[str, Callable[[], Any]] = {
        "scenes": lambda: scenes_table(models, *frames),
        "residual": lambda: residual_table(models[0], *frames),
        "flat": lambda: flat_table(models[0], arguments.size),
        "long_range": lambda: long_range_table(models, *frames),
    }
    document: dict[str, Any] = {
        "command": f"python -m xrk.training.evaluate --models {' '.join(models)} --scenes {arguments.scenes}",
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "versions": xrk.info()["packages"],
        "models": {name: xrk.load(name).card.sha256 for name in models},
        **{name: tables[name]() for name in arguments.tables},
    }
    if arguments.synchrotron:
        document["synchrotron"] = synchrotron_table(arguments.synchrotron, models)
    if "scenes" in document:
        print(markdown(document["scenes"]))
    if "long_range" in document:
        print(long_range_markdown(document["long_range"]))
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=1, default=float))


if __name__ == "__main__":
    main()
