"""The command `xrk`: one verb each for what the package does. Whatever it does, a caller can do through `import xrk`.

Exit codes: 0; 2 with one sentence on stderr, `xrk: ...`, for wrong usage and for whatever a file, a value or the
system refuses; 130 after Ctrl-C, which leaves no half-written file.
"""

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

__all__ = ["main"]

# Nothing of xrk is imported above: torch takes seconds, and wrong usage and -h should not wait for it.

IMAGE_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")

DESCRIPTION = """\
Enhance X-ray radiographs with pretrained restoration networks, in 16 bits from end to end.

  xrk demo                      simulate a radiograph, enhance it, measure the gain
  xrk enhance in.tif out.tif    enhance a TIFF file: same size, dtype, layout and metadata out
  xrk inspect in.tif            what an image or a checkpoint is, and whether it fits
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
        if not is_refusal(error):
            raise
        complain(error)
        return 2


def is_refusal(error: Exception) -> bool:
    """Whether an error is one that xrk or the system raises on purpose, to be told in a sentence."""
    from xrk.errors import XrkError

    return isinstance(error, XrkError | OSError | MemoryError)


def complain(error: Exception | str, about: str | os.PathLike | None = None) -> None:
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
    from xrk import cli_adapt, cli_compare, cli_enhance, cli_inspect, cli_video

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

    enhance = cli_enhance.add(verb)

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
    cli_compare.add(verb)
    verb("models", _models, "list the networks that come with xrk")
    cli_inspect.add(verb)
    verb("info", _info, "show versions, devices, and which kernel path runs here and why")

    arguments, rest = parser.parse_known_args(_joined(argv))
    if rest and (arguments.verb != "enhance" or any(word.startswith("-") for word in rest)):
        parser.error(f"{' '.join(rest)} means nothing here")
    if arguments.verb == "enhance":
        arguments.paths += rest  # argparse takes positional arguments up to the first option only
        if len(arguments.paths) < 2:
            enhance.error(f"what should be written? {arguments.paths[0]} is the only path given")
    return arguments


def _joined(argv: list[str]) -> list[str]:
    """The words, numbers as -1,0,0 joined to the option before them: argparse would take them for an option."""
    words: list[str] = []
    for word in argv:
        if re.match(r"-[\d.][^,]*,", word) and words and words[-1].startswith("--") and "=" not in words[-1]:
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


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


def _info(_: argparse.Namespace) -> int:
    from xrk.environment import format_info

    print(format_info())
    return 0


# What verbs share


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
