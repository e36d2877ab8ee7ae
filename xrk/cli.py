"""The command `xrk`: one verb each for what the package does. Whatever it does, a caller can do through `import xrk`.

Exit codes: 0; 2 with one sentence on stderr, `xrk: ...`, for wrong usage and for whatever a file, a value or the
system refuses; 130 after Ctrl-C, which leaves no half-written file.
"""

import argparse
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["main"]

# Nothing of xrk is imported above: torch takes seconds, and wrong usage and -h should not wait for it.

DEFAULT_MODEL = "resnet18-unet"
IMAGE_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")

DESCRIPTION = """\
Enhance X-ray radiographs with pretrained restoration networks, in 16 bits from end to end.

  xrk demo                      simulate a radiograph, enhance it, measure the gain
  xrk enhance in.tif out.tif    enhance a TIFF file: same size, dtype, layout and metadata out
  xrk inspect in.tif            what an image or a checkpoint is, and whether it fits
"""

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



def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (by default the process's); returns the exit code."""
    try:
        arguments = _parse(sys.argv[1:] if argv is None else list(argv))
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as exit_:  # argparse: -h, --version, wrong usage
        return exit_.code if isinstance(exit_.code, int) else 2
    except KeyboardInterrupt:
        print("xrk: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has seen enough, as `head` has; nothing may be flushed there again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not _is_refusal(error):
            raise
        _complain(error)
        return 2


def _is_refusal(error: Exception) -> bool:
    """Whether an error is one that xrk or the system raises on purpose, to be told in a sentence."""
    from xrk.errors import XrkError

    return isinstance(error, XrkError | OSError | MemoryError)


def _complain(error: Exception | str, about: str | os.PathLike | None = None) -> None:
    text = " ".join(str(error).split()) or "not enough memory."  # only MemoryError comes without a text
    if about is not None and os.fspath(about) not in text:
        text = f"{about}: {text}"
    print(f"xrk: {text}", file=sys.stderr, flush=True)


# Arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"xrk: {message} (see `{self.prog} -h`).", file=sys.stderr)
        self.exit(2)


def _parse(argv: list[str]) -> argparse.Namespace:
    from xrk import cli_adapt, cli_video

    parser = _Parser(prog="xrk", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.set_defaults(run=lambda arguments: _version() if arguments.version else parser.print_help() or 0, verb=None)
    verbs = parser.add_subparsers(metavar="VERB", dest="verb", parser_class=_Parser)

    def verb(name: str, run: Callable[[argparse.Namespace], int], short: str, **texts: str) -> argparse.ArgumentParser:
        texts.setdefault("description", short[0].upper() + short[1:] + ".")
        sub = verbs.add_parser(name, help=short, formatter_class=argparse.RawDescriptionHelpFormatter, **texts)
        sub.set_defaults(run=run)
        return sub

    demo = verb("demo", _demo, "simulate a radiograph at a low dose, enhance it, and measure the gain")
    demo.add_argument("--size", type=int, default=2048, help="rows and columns of the frame (default: 2048)")
    demo.add_argument("--dual-energy", action="store_true", help="fuse a packed case's frames at two energies instead")
    demo.add_argument("--out", default="xrk-demo", metavar="DIR", help="folder for the files (default: xrk-demo)")

    enhance = verb(
        "enhance", _enhance, "enhance radiographs in TIFF files", description=ENHANCE, epilog=ENHANCE_EXAMPLES,
        usage="xrk enhance [options] IN [IN ...] OUT",
    )  # fmt: skip
    enhance.add_argument("paths", nargs="+", metavar="IN ... OUT", help="what to read; last, where to write")
    _add_enhance_options(enhance)

    plan = verb(
        "plan", _plan, "show how a network would run on frames of one size, and the memory that takes",
        epilog="example: xrk plan resnet18-unet 4096 4096 --memory 1GiB",
    )  # fmt: skip
    plan.add_argument("model", metavar="MODEL", help="a name that `xrk models` lists, or the path of a checkpoint")
    plan.add_argument("height", type=int, metavar="H", help="rows of the frames")
    plan.add_argument("width", type=int, metavar="W", help="columns of the frames")
    plan.add_argument("--memory", metavar="SIZE", help="memory to keep within, such as 2GiB (default: what is free)")
    plan.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: cpu)")

    fuse = verb(
        "fuse", _fuse, "fuse a low-energy and a high-energy radiograph into one",
        epilog="example: xrk fuse low.tif high.tif -o fused.tif --pseudocolor fused.png",
    )  # fmt: skip
    fuse.add_argument("low", metavar="LOW", help="the low-energy frame, TIFF")
    fuse.add_argument("high", metavar="HIGH", help="the high-energy frame, of the same size and dtype")
    fuse.add_argument("-o", "--out", required=True, metavar="OUT", help="the file to write")
    fuse.add_argument("--method", default="wavelet", choices=("wavelet", "spatial"), help="default: wavelet")
    fuse.add_argument(
        "--threshold", type=float, default=20.0, metavar="COUNTS", help="of the spatial rule (default: 20)"
    )
    fuse.add_argument("--compat", choices=("bytes",), help="fuse high and low bytes one by one, as published")
    fuse.add_argument("--allow-shift", action="store_true", help="fuse frames that are shifted against each other")
    fuse.add_argument("--pseudocolor", metavar="PNG", help="colour picture of the result")

    cli_adapt.add(verb)
    cli_video.add(verb)

    compare = verb(
        "compare", _compare, "measure how far an image is from another",
        epilog="example: xrk compare noisy.tif enhanced.tif --reference reference.tif --picture compared.png",
    )  # fmt: skip
    compare.add_argument("a", metavar="A", help="TIFF image")
    compare.add_argument("b", metavar="B", help="another of the same size; the truth, where no reference is named")
    compare.add_argument("--reference", metavar="TIFF", help="the truth; A and B are both measured against it")
    compare.add_argument("--range", type=float, metavar="COUNTS", help="peak of PSNR (default: the dtype's range)")
    compare.add_argument("--picture", metavar="PNG", help="both images, their residual, and the values along one row")
    compare.add_argument("--row", type=int, metavar="N", help="that row (default: the middle one)")
    compare.add_argument(
        "--brisque", action="store_true", help="also tell BRISQUE of each image, which knows 8-bit photographs only"
    )

    verb("models", _models, "list the networks that come with xrk")
    inspect = verb("inspect", _inspect, "say what an image or a checkpoint is, and what of it does not fit")
    inspect.add_argument("file", metavar="FILE", help="a TIFF image, or a checkpoint (.pth, .pt, .ckpt, .safetensors)")
    verb("info", _info, "show versions, devices, and which kernel path runs here and why")

    arguments, rest = parser.parse_known_args(argv)
    if rest and (arguments.verb != "enhance" or any(word.startswith("-") for word in rest)):
        parser.error(f"{' '.join(rest)} means nothing here")
    if arguments.verb == "enhance":
        arguments.paths += rest  # argparse takes positional arguments up to the first option only
        if len(arguments.paths) < 2:
            enhance.error(f"what should be written? {arguments.paths[0]} is the only path given")
    return arguments


def _add_enhance_options(enhance: argparse.ArgumentParser) -> None:
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


def noise(text: str) -> str | tuple[float, ...]:
    if text == "off":
        return text
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"expected off or three numbers GAIN,OFFSET,READ, not {text!r}")
    return numbers


# Verbs


def _version() -> int:
    import xrk

    print(f"xrk {xrk.__version__}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from xrk import demonstration

    if sys.stderr.isatty():
        print("Simulating and enhancing; on a CPU this takes a minute or two ...", file=sys.stderr)
    run = demonstration.run_dual_energy if arguments.dual_energy else demonstration.run
    print(run(size=arguments.size, out=arguments.out))
    return 0


def _models(_: argparse.Namespace) -> int:
    import xrk

    cards = xrk.list_models()
    for card in cards:
        facts = f"{card.architecture}, {card.parameters / 1e6:.2f} million parameters, sees {card.domain} values"
        rows = [("what", card.description), ("network", facts), ("limits", card.limits), ("licence", card.licence)]
        print(card.name)
        for name, text in rows:
            if text:
                print(textwrap.fill(text, 110, initial_indent=f"  {name:8} ", subsequent_indent=" " * 11))
    if not cards:
        print("No models come with this installation.")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    import xrk

    shape = (arguments.height, arguments.width)
    print(xrk.plan(arguments.model, shape, memory=arguments.memory, device=arguments.device))
    return 0


def _fuse(arguments: argparse.Namespace) -> int:
    import xrk

    report = xrk.fuse_file(
        arguments.low, arguments.high, arguments.out, arguments.method, threshold=arguments.threshold,
        compat=arguments.compat, allow_shift=arguments.allow_shift, picture=arguments.pseudocolor,
    )  # fmt: skip
    shift = "unknown" if report.shift is None else "{:+.0f} rows, {:+.0f} columns".format(*report.shift)
    print(f"{arguments.out}\n  {report.method} fusion; shift {shift}; {report.clipped} pixels clipped")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    import xrk

    a, b = (xrk.io.read(path).array for path in (arguments.a, arguments.b))
    names = (Path(arguments.a).name, Path(arguments.b).name)
    drawn = {"png": arguments.picture, "row": arguments.row, "names": names}
    if arguments.reference is None:
        print(f"{names[0]} against {names[1]}: {xrk.compare(a, b, data_range=arguments.range, **drawn)}")
        _tell_brisque(arguments, dict(zip(names, (a, b), strict=True)))
        return 0
    reference = xrk.io.read(arguments.reference).array
    told = [xrk.compare(image, reference, data_range=arguments.range) for image in (a, b)]
    if arguments.picture is not None:
        xrk.compare(a, b, data_range=arguments.range, **drawn)
    for name, figures in zip(names, told, strict=True):
        print(f"{name} against {Path(arguments.reference).name}: {figures}")
    _tell_brisque(arguments, {**dict(zip(names, (a, b), strict=True)), Path(arguments.reference).name: reference})
    return 0


def _tell_brisque(arguments: argparse.Namespace, images: dict[str, Any]) -> None:
    """Of every image, of stacks the middle frame."""
    if not arguments.brisque:
        return
    from xrk import comparison, metrics

    for name, image in images.items():
        frame = image if image.ndim == 2 else image[len(image) // 2]
        peak = comparison.range_of(frame) if arguments.range is None else arguments.range
        print(f"{name}: BRISQUE {metrics.brisque(frame, peak):.1f}")


def _info(_: argparse.Namespace) -> int:
    from xrk.environment import format_info

    print(format_info())
    return 0


def _enhance(arguments: argparse.Namespace) -> int:
    jobs, many = _jobs(arguments.paths)
    import xrk
    from xrk import errors, io

    if arguments.report is not None:
        check_report(arguments.report, [path for job in jobs for path in job])
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
    for source, target in jobs:
        preview = arguments.preview
        if many and preview is not None:
            preview = Path(preview) / f"{target.name}.png"
        uncertainty = arguments.uncertainty
        if many and uncertainty is not None:
            uncertainty = Path(uncertainty) / target.name
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
            if not many or not _is_refusal(error):
                raise
            entry["error"] = str(error)
            failed += 1
            _complain(error, about=source)
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
        _complain(f"{failed} of {len(jobs)} files could not be enhanced.")
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
        if any(os.path.exists(target) and os.path.exists(source) and target.samefile(source) for source in files):
            raise InputError(f"{target} would overwrite an input; choose another name or folder for the output.")
    return list(zip(files, targets, strict=True)), many


def sources(inputs: list[str]) -> list[Path]:
    """Files as they are, and of folders the TIFF files in them."""
    from xrk.errors import ImageFileError

    files: list[Path] = []
    for name in inputs:
        if os.path.isdir(name):
            entries = sorted(path for path in Path(name).iterdir() if not path.name.startswith("."))
            found = [path for path in entries if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
            if not found:
                raise ImageFileError(f"The folder {name} has no TIFF file in it ({', '.join(IMAGE_SUFFIXES)}).")
            files += found
        else:
            files.append(Path(name))
    return files


def check_report(path: str, others: list[Path]) -> None:
    from xrk import io
    from xrk.errors import InputError

    target = io.check_target(path)
    if any(target == other.resolve() for other in others):
        raise InputError(f"The report {path} would overwrite an image; choose another name.")


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


# inspect


def _inspect(arguments: argparse.Namespace) -> int:
    path = arguments.file
    if _kind(path) == "checkpoint":
        from xrk.loading import inspect_checkpoint

        print(inspect_checkpoint(path))
    else:
        print(_describe_image(path))
    return 0


def _kind(path: str) -> str:
    """ "image" or "checkpoint", by the file's first bytes, or else by its name."""
    from xrk.errors import ImageFileError

    head = b""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            head = file.read(9)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") or path.lower().endswith(IMAGE_SUFFIXES):
        return "image"
    torch_or_safetensors = head.startswith((b"PK\x03\x04", b"\x80")) or head[8:9] == b"{"
    if torch_or_safetensors or path.lower().endswith(CHECKPOINT_SUFFIXES):
        return "checkpoint"
    if os.path.isfile(path):
        raise ImageFileError(f"{path} is neither a TIFF image nor a checkpoint of torch or safetensors.")
    return "image"


def _describe_image(path: str) -> str:
    import numpy as np

    import xrk
    from xrk import io

    image = io.read(path)
    frames = image.array.reshape(-1, *image.array.shape[-2:])
    finite = np.isfinite(frames) if image.array.dtype.kind == "f" else None
    values = frames if finite is None else frames[finite]
    family = {"imagej": "ImageJ ", "ome": "OME ", "plain": ""}[image.kind]
    count = f", {len(frames)} frames" if image.array.ndim == 3 else ""
    rows = [("size", f"{frames.shape[2]} x {frames.shape[1]} pixels, {image.array.dtype.name}{count}")]
    if values.size:
        rows.append(("values", f"{values.min():g} to {values.max():g}, mean {values.mean(dtype=np.float64):g}"))
    rows.append(("levels", _levels(image)))
    invalid = frames.size - values.size
    rows.append(("invalid", f"{invalid} pixels are NaN or infinite" if invalid else "none"))
    try:
        noise = xrk.estimate_noise(frames[0], mask=None if finite is None else ~finite[0])
        sign = "-" if noise.intercept < 0 else "+"
        line = f"variance = {noise.gain:.4g} x mean {sign} {abs(noise.intercept):.4g}"
        rows.append(("noise", f"{line}{' in the first frame' if count else ''}; {noise.source}"))
    except xrk.errors.XrkError as error:
        rows.append(("noise", f"not estimated: {error}"))
    if image.resolution is not None and image.resolution != (1.0, 1.0, "none"):
        x, y, unit = image.resolution
        rows.append(("resolution", f"{x:g} x {y:g} pixels per {'unit' if unit == 'none' else unit}"))
    words = " ".join(line for line in image.description.splitlines() if not line.startswith('{"xrk": '))
    if words.strip():
        rows.append(("description", " ".join(words.split())[:100]))
    if image.report is not None:
        version = (image.report.get("versions") or {}).get("xrk", "?")
        rows.append(("enhanced", f"by xrk {version} with {image.report.get('model')} (xrk.io.read_report tells more)"))
    rows += [("note", note) for note in image.notes]
    head = f"{path}: an image ({family}{image.layout})"
    return "\n".join([head, *(f"  {name:11} {text}" for name, text in rows)])


def _levels(image: Any) -> str:
    import numpy as np

    if image.levels is not None:
        return "{:g} to {:g}, as the file states".format(*image.levels)
    if image.array.dtype.kind == "f":
        return "not stated; floats outside [0, 1] need --levels BLACK WHITE"
    limits = np.iinfo(image.array.dtype)
    return f"not stated; {limits.min} to {limits.max} (the dtype's range) unless --levels BLACK WHITE says otherwise"
