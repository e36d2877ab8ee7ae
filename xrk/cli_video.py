"""The verb `xrk fuse-video`."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from xrk.cli import noise

__all__ = ["add"]

FUSE_VIDEO = """\
Fuse the videos of two cameras, a fast one of low and a slow one of high resolution, into one that is both.
OUT is written whole or not at all. Frames that are done are kept beside it in OUT.frames while there are more to do:
after Ctrl-C, or whatever else, the same command goes on where it ended.
"""

FUSE_VIDEO_EXAMPLES = """\
examples:
  xrk fuse-video lr.tif hr.tif -o fused.tif
  xrk fuse-video scan.h5::/fast/data scan.h5::/slow/data -o fused.tif --ratio 10 --memory 4GiB
  xrk fuse-video lr.tif hr.tif -o linear.tif --model linear
"""


def add(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verb and its arguments; ``verb`` as in `xrk.cli`."""
    video = verb(
        "fuse-video", _run, "fuse a fast low-resolution and a slow high-resolution video into one",
        description=FUSE_VIDEO, epilog=FUSE_VIDEO_EXAMPLES,
    )  # fmt: skip
    video.add_argument("lr", metavar="LR", help="the fast camera's frames: a TIFF stack, or HDF5 as FILE::/DATA/SET")
    video.add_argument("hr", metavar="HR", help="the slow camera's key frames, of the same dtype")
    video.add_argument("-o", "--out", required=True, metavar="OUT", help="the TIFF stack to write")
    video.add_argument(
        "--model", default="stf", metavar="NAME",
        help="a network for two cameras, or its checkpoint, or bicubic or linear without a network (default: stf)",
    )  # fmt: skip
    video.add_argument("--scale", type=int, default=4, help="HR pixels per LR pixel, along a side (default: 4)")
    video.add_argument("--ratio", type=int, default=20, help="LR frames per key frame (default: 20)")
    video.add_argument(
        "--separation", type=int, default=1, metavar="N", help="from a frame to its neighbours in a window (default: 1)"
    )
    for name, whose in (("--levels", "black and white level in counts"), ("--hr-levels", "of HR frames, if others")):
        video.add_argument(name, nargs=2, type=float, metavar=("BLACK", "WHITE"), help=whose)
    video.add_argument("--noise", type=noise, metavar="off|GAIN,OFFSET,READ", help="noise model, as for enhance")
    video.add_argument("--compat", choices=("xfusion",), help="in 8 bits, as the original does")
    video.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: cpu)")
    video.add_argument("--memory", metavar="SIZE", help="memory to keep within, such as 2GiB")
    video.add_argument("--restart", action="store_true", help="throw away the frames that an earlier run left")
    video.add_argument("--report", metavar="JSON", help="file for the report")
    video.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _run(arguments: argparse.Namespace) -> int:
    import xrk

    if arguments.report is not None:
        xrk.io.check_target(arguments.report)
        videos = [path.partition("::")[0] for path in (arguments.lr, arguments.hr)]
        outputs = {"report": arguments.report, "video": arguments.out}
        xrk.io.check_apart(outputs, {"input": videos, "model": arguments.model})
    given = xrk.NoiseModel(*arguments.noise) if isinstance(arguments.noise, tuple) else arguments.noise
    names = ("model", "scale", "ratio", "separation", "levels", "hr_levels", "compat", "device", "memory")
    with _frame_bar(arguments.quiet) as advance:
        report = xrk.fuse_video_file(
            arguments.lr, arguments.hr, arguments.out, noise=given, resume=not arguments.restart, progress=advance,
            **{name: getattr(arguments, name) for name in names},
        )  # fmt: skip
    if arguments.report is not None:
        with xrk.io.atomic_file(arguments.report) as file:
            file.write(json.dumps(report.to_dict(), indent=2).encode() + b"\n")
    if not arguments.quiet:
        print(f"{arguments.out}\n  " + str(report).replace("\n", "\n  "))
    return 0


@contextmanager
def _frame_bar(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A function of (frames done, frames) that shows frames per second and time left, on stderr if it is a terminal."""
    from tqdm import tqdm

    shown = "{percentage:3.0f}% |{bar}| {n_fmt} of {total_fmt} frames, {rate_noinv_fmt}, {remaining} left"
    hidden = quiet or not sys.stderr.isatty()
    with tqdm(total=0, unit="frame", bar_format=shown, leave=False, disable=hidden, miniters=1, smoothing=0.1) as bar:

        def advance(done: int, total: int) -> None:
            if not bar.total:
                bar.reset(total)
                bar.initial = bar.n = done - 1 if done > 1 else 0  # frames of an earlier run took no time
            bar.update(done - bar.n)

        yield advance
