"""What `xrk demo` does: simulate a low and a high dose, enhance the low one, say how much nearer it came.

With ``--dual-energy``: simulate a case at two energies, enhance both frames, fuse them.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xrk import io, picture
from xrk.enhancement import enhance
from xrk.errors import ImageFileError, InputError
from xrk.fusion import FusionReport, fuse, pseudocolor
from xrk.io.atomic import atomic_file
from xrk.metrics import psnr, ssim
from xrk.report import Report
from xrk.scenes import baggage, housing
from xrk.simulate import Detector, Geometry, blur, radiate, to_uint16

__all__ = ["Demonstration", "DualEnergy", "run", "run_dual_energy", "simulate", "simulate_dual_energy"]

# Detected quanta per pixel of the open beam: a short exposure, and one sixteen times as long.
LOW_DOSE, HIGH_DOSE = 375.0, 6000.0
FIELD_OF_VIEW = 204.8  # mm


@dataclass(frozen=True)
class Demonstration:
    """What one run found, and where it wrote its files."""

    folder: Path
    size: int
    simulation_seconds: float
    enhancement_seconds: float
    psnr: tuple[float, float]  # dB before, after
    ssim: tuple[float, float]
    report: Report

    def __str__(self) -> str:
        megapixels = self.size**2 / 1e6
        rate = f"{self.enhancement_seconds / megapixels:.2f} s per megapixel on {self.report.device}"
        names = "noisy.tif, enhanced.tif, reference.tif, panel.png"
        return "\n".join(
            [
                f"simulated   {self.size} x {self.size} uint16, {LOW_DOSE:.0f} and {HIGH_DOSE:.0f} quanta per pixel"
                f" of the open beam, in {self.simulation_seconds:.1f} s",
                f"enhanced    the low dose with {self.report.model} in {self.enhancement_seconds:.1f} s ({rate})",
                f"PSNR        {self.psnr[0]:.2f} dB before, {self.psnr[1]:.2f} dB after (against the noise-free frame)",
                f"SSIM        {self.ssim[0]:.4f} before, {self.ssim[1]:.4f} after",
                f"written     {self.folder}{os.sep} {names}",
            ]
        )


def simulate(size: int, seed: int = 1) -> tuple[NDArray[np.uint16], NDArray[np.float32], NDArray[np.uint16]]:
    """The housing of `xrk.scenes` at the low dose.

    Returns:
        (noisy, clean, reference), each (size, size) in counts of the low dose: the frame, what it would be without
        noise (float32), and the high dose scaled to it. The panel is 204.8 mm wide whatever ``size``.
    """
    detector_rng = np.random.default_rng([seed, 0])
    signal = radiate(housing(), Geometry((size, size), FIELD_OF_VIEW / size))
    gain_map = 1 + 0.01 * blur(detector_rng.standard_normal((size, size), dtype=np.float32), 1.5)
    detector = Detector(gain_map=gain_map.astype(np.float32))
    noisy = detector.expose(signal, LOW_DOSE, seed)
    high = detector.expose(signal, HIGH_DOSE, seed + 1)
    reference = (high - detector.offset) * (LOW_DOSE / HIGH_DOSE) + detector.offset
    return to_uint16(noisy), detector.expected(signal, LOW_DOSE), to_uint16(reference)


def run(size: int = 2048, out: str | os.PathLike = "xrk-demo", model: str = "resnet18-unet") -> Demonstration:
    """Simulate, enhance, measure, and write noisy.tif, enhanced.tif, reference.tif (uint16) and panel.png to ``out``.

    The figures compare with the noise-free frame, the data range being the open beam's. reference.tif is the high dose
    scaled to the counts of the low one.

    Raises:
        InputError: ``size`` is not between 64 and 8192.
        ImageFileError: the folder cannot be made or written to.
    """
    folder = _folder(size, out)
    start = time.perf_counter()
    noisy, clean, reference = simulate(size)
    simulated = time.perf_counter()
    enhanced, report = enhance(noisy, model, report=True)
    done = time.perf_counter()
    peak = float(Detector().gain * LOW_DOSE)
    for name, frame in (("noisy", noisy), ("enhanced", enhanced), ("reference", reference)):
        document = report.to_dict(timing=False) if name == "enhanced" else None
        io.write(folder / f"{name}.tif", frame, report=document)
    residual = enhanced.astype(np.float32) - clean
    frames = [("noisy", noisy), ("enhanced", enhanced), (f"reference, {HIGH_DOSE / LOW_DOSE:.0f}x the dose", reference)]
    picture.panel_png(folder / "panel.png", frames, ("enhanced - noise-free", residual), zoom=_gauge(size))
    return Demonstration(
        folder=folder,
        size=size,
        simulation_seconds=simulated - start,
        enhancement_seconds=done - simulated,
        psnr=(psnr(noisy, clean, peak), psnr(enhanced, clean, peak)),
        ssim=(ssim(noisy, clean, peak), ssim(enhanced, clean, peak)),
        report=report,
    )


def _gauge(size: int) -> tuple[int, int, int, int]:
    """(row, column, rows, columns) of the part that the picture enlarges: cracks and pores."""
    return tuple(round(size * part) for part in (0.20, 0.50, 0.14, 0.14))


def _folder(size: int, out: str | os.PathLike) -> Path:
    if not 64 <= size <= 8192:
        raise InputError(f"size is {size}; expected 64 to 8192 pixels.")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageFileError(f"The folder {folder} cannot be made: {error.strerror}. Choose another one.") from error
    return folder


# --- two energies -----------------------------------------------------------------------------------------------------

# Kilovolts and filters (mm) of the two beams, and the width of the panel in mm: a baggage scanner's.
BEAMS = {"low": (80.0, None), "high": (150.0, {"copper": 1.0})}
SCANNER_GAIN, SCANNER_DOSE, SCANNER_WIDTH = 8.0, 3000.0, 450.0


@dataclass(frozen=True)
class DualEnergy:
    """What one run with two energies made, and where it wrote its files."""

    folder: Path
    shape: tuple[int, int]
    report: FusionReport

    def __str__(self) -> str:
        shift = "unknown" if self.report.shift is None else "{:+.0f} rows, {:+.0f} columns".format(*self.report.shift)
        height, width = self.shape
        return "\n".join(
            [
                f"simulated   {width} x {height} uint16, {BEAMS['low'][0]:.0f} and {BEAMS['high'][0]:.0f} kV",
                f"fused       both, enhanced: {self.report.method} rule, shift {shift}, {self.report.clipped} clipped",
                f"written     {self.folder}{os.sep} low.tif, high.tif, fused.tif, fused.png (low, high, fused)",
            ]
        )


def simulate_dual_energy(width: int) -> list[NDArray[np.uint16]]:
    """The packed case of `xrk.scenes` as a scanner's soft and hard beam see it: (H, width) each, H = 0.73 width."""
    geometry = Geometry((width * 210 // 288, width), SCANNER_WIDTH / width)
    detector = Detector(gain=SCANNER_GAIN, offset=100, read_noise=3)
    return [
        to_uint16(detector.expose(radiate(baggage(), geometry, kilovolts=kv, filters=mm), SCANNER_DOSE, seed))
        for seed, (kv, mm) in enumerate(BEAMS.values())
    ]


def run_dual_energy(size: int = 1024, out: str | os.PathLike = "xrk-demo", model: str = "resnet18-unet") -> DualEnergy:
    """Simulate a case at two energies, enhance, fuse, and write low.tif, high.tif, fused.tif and fused.png to ``out``.

    The picture shows both enhanced frames and the fused one in the published pseudo-colours, white being the open beam.

    Args:
        size: columns of the frames.

    Raises: as `run`.
    """
    folder = _folder(size, out)
    frames = simulate_dual_energy(size)
    low, high = (enhance(frame, model) for frame in frames)
    fused, report = fuse(low, high, report=True)
    for name, frame in (("low", frames[0]), ("high", frames[1])):
        io.write(folder / f"{name}.tif", frame)
    io.write(folder / "fused.tif", fused, report={"fusion": report.to_dict()})
    white = SCANNER_GAIN * SCANNER_DOSE
    grey = [np.clip(255 * (f / white) ** 0.6, 0, 255).astype(np.uint8)[..., None].repeat(3, 2) for f in (low, high)]
    with atomic_file(folder / "fused.png") as file:
        file.write(picture.encode_png(np.concatenate([*grey, pseudocolor(fused, white)], 1)))
    return DualEnergy(folder, fused.shape, report)
