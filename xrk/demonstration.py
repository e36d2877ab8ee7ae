"""What `xrk demo` does: simulate a low and a high dose, enhance the low one, say how much nearer it came."""

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
from xrk.metrics import psnr, ssim
from xrk.report import Report
from xrk.scenes import housing
from xrk.simulate import Detector, Geometry, blur, radiate, to_uint16

__all__ = ["Demonstration", "run", "simulate"]

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
    if not 64 <= size <= 8192:
        raise InputError(f"size is {size}; expected 64 to 8192 pixels.")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageFileError(f"The folder {folder} cannot be made: {error.strerror}. Choose another one.") from error
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
