"""The quality table of two cameras: simulated processes and a real one, over noise, key frames' distance, separation.

    python -m xrk.training.evaluate_video [--model stf] [--scenes 4] [--melt-pool WHEEL] [--out table.json]
    python -m xrk.training.evaluate_video --picture strip.png [--melt-pool WHEEL]

Beside the network stand bicubic interpolation of the LR frames, linear interpolation in time between the key frames,
and a network that sees one image: every LR frame enhanced, then enlarged. Frames at key frames' times are left out.

The real data is the high-speed synchrotron stack of the package napari-melt-pool-tracker (BSD-3), read out of its wheel
(``pip download --no-deps napari-melt-pool-tracker``). As in XFusion's papers, key frames are every so many of its
frames, and LR frames the means of 4 x 4 pixels; its own frames, noise included, are what results are compared with.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

import xrk
from xrk import picture
from xrk.cameras import Cameras
from xrk.metrics import aad, psnr, ssim
from xrk.processes import random_process

SCALE = 4
SINGLE = "resnet18-unet"
STACK = "wall1_H5.tif"  # 262 frames, 120 x 400
# LR frames per key frame, separation of a window's LR frames, quanta per LR pixel and per HR pixel; one of them changes
# at a time.
CASES = (
    (20, 1, 100.0, 1500.0), (20, 1, 1000.0, 1500.0), (20, 1, 10000.0, 1500.0), (20, 1, 1000.0, 300.0),
    (10, 1, 1000.0, 1500.0), (40, 1, 1000.0, 1500.0),
    (20, 2, 1000.0, 1500.0), (20, 4, 1000.0, 1500.0),
)  # fmt: skip
MELT_POOL_CASES = ((10, 1), (20, 1), (20, 2))  # the first two of these
MELT_POOL_FRAMES = 81

Frames = NDArray[Any]


@dataclass(frozen=True)
class Recording:
    """What two cameras saw, and what a result is held against: (N, h, w), (K, 4h, 4w), (N, 4h, 4w)."""

    lr: Frames
    hr: Frames
    truth: Frames
    ratio: int
    peak: float  # of PSNR and SSIM, in counts
    levels: tuple[float, float] | None = None  # as for `xrk.fuse_video`

    def judged(self) -> list[int]:
        """Frames that lie between two key frames."""
        return [i for i in range((len(self.hr) - 1) * self.ratio) if i % self.ratio]


def simulated(seed: int, size: int, ratio: int, lr_quanta: float, hr_quanta: float) -> Recording:
    """One key frame's distance of random process ``seed``; quanta of the open beam per pixel of each camera."""
    cameras = Cameras(SCALE, ratio, lr_quanta=lr_quanta, hr_quanta=hr_quanta)
    lr, hr, truth = cameras.record(random_process(seed, (size, size), ratio), ratio + 1, seed)
    return Recording(lr, hr, truth, ratio, cameras.white - cameras.black)


def melt_pool(wheel: Path, ratio: int) -> Recording:
    """The start of the real stack, shrunk and thinned out; sides cut to multiples of 16. Peak: its largest count."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(STACK))
        stack = tifffile.imread(io.BytesIO(archive.read(name)))
    count = (min(len(stack), MELT_POOL_FRAMES) - 1) // ratio * ratio + 1
    height, width = (side // 16 * 16 for side in stack.shape[1:])
    stack = stack[:count, :height, :width]
    lr = stack.reshape(count, height // SCALE, SCALE, width // SCALE, SCALE).mean((2, 4))
    peak = float(stack.max())  # of 16 bits it fills the lowest 11: the beam is no brighter
    return Recording(np.rint(lr).astype(stack.dtype), stack[::ratio], stack, ratio, peak, (0.0, peak))


def methods(model: xrk.Model, ratio: int, separation: int) -> dict[str, Callable[[Recording], Iterator[Frames]]]:
    """name -> function from a recording to its frames in order."""

    def fused(which: str | xrk.Model) -> Callable[[Recording], Iterator[Frames]]:
        return lambda seen: xrk.fuse_video(
            seen.lr, seen.hr, scale=SCALE, ratio=ratio, separation=separation, model=which, levels=seen.levels
        )

    def single(seen: Recording) -> Iterator[Frames]:
        noise = xrk.estimate_noise(np.hstack(seen.lr))  # of all frames: one alone has few pixels to tell by
        lr = np.stack([xrk.enhance(frame, SINGLE, levels=seen.levels, noise=noise) for frame in seen.lr])
        return fused("bicubic")(replace(seen, lr=lr))

    return {
        "bicubic": fused("bicubic"),
        f"{SINGLE}, then bicubic": single,
        "linear in time": fused("linear"),
        f"xrk {model.card.name}": fused(model),
    }


def figures(seen: Recording, frames: Iterator[Frames]) -> tuple[float, float, float]:
    """PSNR in dB, SSIM, and AAD in thousandths of the peak: means over the frames that are judged."""
    judged, found = set(seen.judged()), []
    for i, frame in enumerate(frames):
        if i in judged:
            truth = seen.truth[i]
            found.append((psnr(frame, truth, seen.peak), ssim(frame, truth, seen.peak), aad(frame, truth)))
    mean = np.mean(found, 0)
    return float(mean[0]), float(mean[1]), float(mean[2] / seen.peak * 1000)


def simulated_table(model: xrk.Model, count: int, size: int, first: int) -> list[dict[str, Any]]:
    """Means over processes ``first ...`` for each of `CASES`."""
    rows = []
    for ratio, separation, *quanta in CASES:
        values: dict[str, list[tuple[float, float, float]]] = {}
        for seed in range(first, first + count):
            seen = simulated(seed, size, ratio, *quanta)
            for name, method in methods(model, ratio, separation).items():
                values.setdefault(name, []).append(figures(seen, method(seen)))
        case = {"ratio": ratio, "separation": separation, "quanta": quanta}  # per LR pixel and per HR pixel
        rows += [_row(case, name, np.mean(found, 0)) for name, found in values.items()]
    return rows


def melt_pool_table(model: xrk.Model, wheel: Path) -> list[dict[str, Any]]:
    rows = []
    for ratio, separation in MELT_POOL_CASES:
        seen = melt_pool(wheel, ratio)
        case = {"ratio": ratio, "separation": separation, "quanta": None}
        rows += [_row(case, name, figures(seen, f(seen))) for name, f in methods(model, ratio, separation).items()]
    return rows


def _row(case: dict[str, Any], name: str, found: Any) -> dict[str, Any]:
    row = case | {"method": name} | dict(zip(("psnr", "ssim", "aad"), map(float, found), strict=True))
    print(f"{_title(case):43} {name:28} {row['psnr']:6.2f} dB  {row['ssim']:.4f}  {row['aad']:6.2f}", flush=True)
    return row


def _title(case: dict[str, Any]) -> str:
    quanta = "" if case["quanta"] is None else ", {:.0f} and {:.0f} quanta".format(*case["quanta"])
    return f"1 : {case['ratio']}, separation {case['separation']}{quanta}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """PSNR / SSIM / AAD, a line for each case and a column for each method."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    lines = ["| case | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for title in dict.fromkeys(map(_title, rows)):
        found = {row["method"]: row for row in rows if _title(row) == title}
        cells = (f"{found[name]['psnr']:.2f} / {found[name]['ssim']:.3f} / {found[name]['aad']:.1f}" for name in names)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def strip(path: Path, model: xrk.Model, seen: Recording) -> None:
    """A picture: every method's frames at a few times between the first two key frames, the truth below."""
    times = [round(seen.ratio * part) for part in (0.25, 0.5, 0.75)]
    rows = []
    for name, method in methods(model, seen.ratio, 1).items():
        frames = [frame for _, frame in zip(range(seen.ratio), method(seen), strict=False)]
        rows.append((name, [frames[i] for i in times]))
    rows.append(("truth", [seen.truth[i] for i in times]))
    picture.strip_png(path, rows, [f"frame {i} of {seen.ratio}" for i in times])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stf", help="a name, or the path of weights")
    parser.add_argument("--scenes", type=int, default=4, help="random processes in each case's mean")
    parser.add_argument("--first", type=int, default=0, help="first process' seed; training uses none below 1000000")
    parser.add_argument("--size", type=int, default=192, help="side of the simulated HR frames")
    parser.add_argument("--melt-pool", type=Path, metavar="WHEEL", help="of napari-melt-pool-tracker")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw this picture, and no table")
    arguments = parser.parse_args(argv)
    wheel, model = arguments.melt_pool, xrk.load(arguments.model)
    if arguments.picture:
        seen = melt_pool(wheel, 10) if wheel else simulated(arguments.first, arguments.size, 20, 4000.0, 1500.0)
        strip(arguments.picture, model, seen)
        return
    document: dict[str, Any] = {
        "command": f"python -m xrk.training.evaluate_video --scenes {arguments.scenes} --size {arguments.size}"
        + (" --melt-pool WHEEL" if wheel else ""),
        "versions": xrk.info()["packages"],
        "model": model.card.sha256,
        "simulated": simulated_table(model, arguments.scenes, arguments.size, arguments.first),
    }
    print(markdown(document["simulated"]))
    if wheel:
        document["melt_pool"] = melt_pool_table(model, wheel)
        print(markdown(document["melt_pool"]))
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=1, default=float))


if __name__ == "__main__":
    main()
