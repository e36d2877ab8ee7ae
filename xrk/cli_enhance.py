"""The verb `xrk enhance`."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xrk.cli import complain, is_refusal, noise, sources

__all__ = ["add"]

DEFAULT_MODEL = "resnet18-unet"

ENHANCE = """\
Enhance radiographs: TIFF in, TIFF out, with the same size, dtype, layout and metadata.
What was done is written into the output's metadata as JSON.

One file gives one file. Several files, or a folder (its TIFF files), go into the folder OUT under their own names;
a file that cannot be enhanced is reported, and the others go on. No input is ever overwritten.
"""

ENHANCE_EXAMPLES = """\
examples:
  xrk enhance part.tif part_clean.tif --preview part.png
  xrk enhance frame12bit.tif out.tif --levels 0 4095
  xrk enhance raw/ clean/ --dark dark.tif --flat flat.tif
  xrk enhance a.tif b.tif out/ --noise 5.6,2500,0 --report what_was_done.json
  xrk enhance frame.tif out.tif --model blindspot --uncertainty sd.tif
"""


def add(verb: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds the verb and its arguments, and returns its parser; ``verb`` as in `xrk.cli`."""
    enhance = verb(
        "enhance", _run, "enhance radiographs in TIFF files", description=ENHANCE, epilog=ENHANCE_EXAMPLES,
        usage="xrk enhance [options] IN [IN ...] OUT",
    )  # fmt: skip
    enhance.add_argument("paths", nargs="+", metavar="IN ... OUT", help="what to read; last, where to write")
    enhance.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="NAME",
        help=f"a name that `xrk models` lists, or the path of a checkpoint (default: {DEFAULT_MODEL})",
    )  # fmt: skip
    enhance.add_argument(
        "--levels", nargs=2, type=float, metavar=("BLACK", "WHITE"),
        help="black and white level in counts; by default what the file states, or else the range of its dtype",
    )  # fmt: skip
    enhance.add_argument(
        "--noise", type=noise, metavar="off|GAIN,OFFSET,READ",
        help="noise model: gain (counts per quantum), offset and read noise (counts), or off; by default what the "
        "model asks for, mostly an estimate from each frame",
    )  # fmt: skip
    enhance.add_argument("--dark", metavar="TIFF", help="dark frame, or a stack to be averaged; subtracted first")
    enhance.add_argument("--flat", metavar="TIFF", help="flat field, or a stack to be averaged; divided out first")
    enhance.add_argument("--badpixels", metavar="TIFF", help="map, not 0 where the detector's pixel is bad; repaired")
    enhance.add_argument("--mask", metavar="TIFF", help="image that is not 0 where a pixel is invalid")
    enhance.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: cpu)")
    enhance.add_argument("--memory", metavar="SIZE", help="memory to keep within, such as 2GiB")
    enhance.add_argument("--preview", metavar="PNG", help="picture, before and after; a folder for several inputs")
    enhance.add_argument(
        "--uncertainty", metavar="TIFF",
        help="file for the standard deviation of every pixel, in counts, of a blind-spot network; a folder for several "
        "inputs",
    )  # fmt: skip
    enhance.add_argument(
        "--compat", choices=("tiles",),
        help="run a blind-spot network as its published code does: tiles of 512 with a noise fit each, truncated",
    )  # fmt: skip
    enhance.add_argument("--report", metavar="JSON", help="file for the report: noise model, residual, versions, ...")
    enhance.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return enhance


def _run(arguments: argparse.Namespace) -> int:
    jobs, many = _jobs(arguments.paths)
    import xrk
    from xrk import errors, io

    if arguments.report is not None:
        io.check_target(arguments.report)
    previews = [_beside(arguments.preview, f"{target.name}.png", many) for _, target in jobs]
    uncertainties = [_beside(arguments.uncertainty, target.name, many) for _, target in jobs]
    outputs = {"output": [target for _, target in jobs], "preview": previews, "uncertainty": uncertainties}
    inputs = {"input": [source for source, _ in jobs], "dark frame": arguments.dark, "flat field": arguments.flat}
    inputs |= {"map of bad pixels": arguments.badpixels, "mask": arguments.mask, "model": arguments.model}
    io.check_apart({**outputs, "report": arguments.report}, inputs)
    model = xrk.load(arguments.model)
    noise = xrk.NoiseModel(*arguments.noise) if isinstance(arguments.noise, tuple) else arguments.noise
    for reference in (arguments.dark, arguments.flat, arguments.badpixels, arguments.mask):
        if many and reference is not None:
            io.read(reference)  # what is wrong with it is told once, not for every file
    if many:
        _make_folder(arguments.paths[-1])
        for folder in (arguments.preview, arguments.uncertainty):
            if folder is not None:
                _make_folder(folder)
    told: list[dict[str, Any]] = []
    failed = 0
    progress = _Progress([source for source, _ in jobs], arguments.quiet)
    for (source, target), preview, uncertainty in zip(jobs, previews, uncertainties, strict=True):
        entry: dict[str, Any] = {"input": str(source), "output": str(target)}
        told.append(entry)
        try:
            with progress.of(source) as advance:
                report = xrk.enhance_file(
                    source, target, model, levels=arguments.levels, noise=noise, mask=arguments.mask,
                    memory=arguments.memory, device=arguments.device, progress=advance, dark=arguments.dark,
                    flat=arguments.flat, badpixels=arguments.badpixels, preview=preview, uncertainty=uncertainty,
                    compat=arguments.compat,
                )  # fmt: skip
        except errors.DeviceError:
            raise
        except Exception as error:
            if not many or not is_refusal(error):
                raise
            entry["error"] = str(error)
            failed += 1
            complain(error, about=source)
        else:
            entry["report"] = report.to_dict()
            if not arguments.quiet:
                progress.clear()
                print(f"{target}\n  " + str(report).replace("\n", "\n  "), flush=True)
    progress.close()
    if arguments.report is not None:
        with io.atomic_file(arguments.report) as file:
            file.write(json.dumps(told if many else told[0]["report"], indent=2).encode() + b"\n")
    if failed:
        complain(f"{failed} of {len(jobs)} files could not be enhanced.")
    return 2 if failed else 0


def _jobs(paths: list[str]) -> tuple[list[tuple[Path, Path]], bool]:
    """(source, target) for each file, and whether OUT is a folder for them."""
    from xrk.errors import ImageFileError, InputError

    *inputs, out = paths
    many = len(inputs) > 1 or os.path.isdir(inputs[0])
    files = sources(inputs)
    if many and os.path.exists(out) and not os.path.isdir(out):
        raise ImageFileError(f"{out} is a file; several inputs need a folder to go to.")
    into_folder = many or os.path.isdir(out) or out.endswith(("/", os.sep))
    targets = [Path(out) / source.name if into_folder else Path(out) for source in files]
    for index, target in enumerate(targets):
        if target in targets[:index]:
            raise InputError(f"Two inputs are named {target.name}, and both would be written to {target}.")
    return list(zip(files, targets, strict=True)), many


def _beside(given: str | None, name: str, many: bool) -> str | Path | None:
    """Where one file's preview or map goes: of several inputs, under this name into the folder that was given."""
    return given if given is None or not many else Path(given) / name


def _make_folder(path: str) -> None:
    from xrk.errors import ImageFileError

    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ImageFileError(f"The folder {path} cannot be made: {error.strerror}.") from error


class _Progress:
    """One bar over the pixels of all files, with rate and time left; on stderr if that is a terminal."""

    def __init__(self, sources: list[Path], quiet: bool) -> None:
        from tqdm import tqdm

        shown = not quiet and sys.stderr.isatty()
        self._pixels = {source: _count_pixels(source) for source in sources} if shown else {}
        self._before = 0
        self._bar = tqdm(
            total=sum(self._pixels.values()), unit="pixel", unit_scale=True, leave=False, disable=not shown, miniters=1
        )

    @contextmanager
    def of(self, source: Path) -> Iterator[Callable[[int, int], None]]:
        """A function of (rows done, rows) for one file."""
        pixels = self._pixels.get(source, 0)
        self._bar.set_description(source.name)

        def advance(done: int, total: int) -> None:
            self._bar.update(self._before + pixels * done // total - self._bar.n)

        try:
            yield advance
        except BaseException:
            self._bar.clear()  # the sentence that tells of it gets a line of its own
            raise
        finally:
            self._before += pixels  # those of a file that failed are done with, too

    def clear(self) -> None:
        """Room for a line of text."""
        self._bar.clear()

    def close(self) -> None:
        self._bar.close()


def _count_pixels(source: Path) -> int:
    """Of an image file; 0 where it cannot be opened, which is told when its turn comes."""
    from xrk import io
    from xrk.errors import XrkError

    try:
        with io.open(source) as opened:
            return math.prod(opened.shape)
    except (XrkError, OSError):
        return 0
