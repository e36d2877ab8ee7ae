"""The verb `xrk compare`."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["add"]


def add(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verb and its arguments; ``verb`` as in `xrk.cli`."""
    compare = verb(
        "compare", _run, "measure how far an image is from another",
        epilog="example: xrk compare noisy.tif enhanced.tif --reference reference.tif --picture compared.png",
    )  # fmt: skip
    compare.add_argument("a", metavar="A", help="TIFF image")
    compare.add_argument("b", metavar="B", help="another of the same size; the truth, where no reference is named")
    compare.add_argument("--reference", metavar="TIFF", help="the truth; A and B are both measured against it")
    compare.add_argument("--range", type=float, metavar="COUNTS", help="peak of PSNR (default: the dtype's range)")
    compare.add_argument("--picture", metavar="PNG", help="both images, their residual, and the values along one row")
    compare.add_argument("--row", type=int, metavar="N", help="that row (default: the middle one)")
    compare.add_argument(
        "--region", type=_region, metavar="R0:R1,C0:C1",
        help="also tell the SNR of each image in rows R0 to R1 - 1 and columns C0 to C1 - 1, where the object is even",
    )  # fmt: skip
    compare.add_argument(
        "--background", type=_region, metavar="R0:R1,C0:C1", help="and the CNR of that region against this one"
    )
    compare.add_argument("--offset", type=float, metavar="COUNTS", help="without exposure, for the SNR (default: 0)")
    compare.add_argument(
        "--resolution", type=float, metavar="UM", help="basic spatial resolution: tells SNR_n and CNR_n (ISO 17636-2)"
    )
    compare.add_argument(
        "--brisque", action="store_true", help="also tell BRISQUE of each image, which knows 8-bit photographs only"
    )


def _region(text: str) -> tuple[slice, slice]:
    found = re.fullmatch(r"(\d+):(\d+),(\d+):(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected rows and columns R0:R1,C0:C1 such as 0:64,100:164, not {text!r}")
    top, bottom, left, right = map(int, found.groups())
    return slice(top, bottom), slice(left, right)


def _run(arguments: argparse.Namespace) -> int:
    import xrk
    from xrk import picture
    from xrk.errors import InputError

    for option in ("background", "offset", "resolution"):
        if getattr(arguments, option) is not None and arguments.region is None:
            raise InputError(f"--{option} is for the figures of a region; name it with --region R0:R1,C0:C1.")
    if arguments.picture is not None:
        picture.check_png(arguments.picture)
        xrk.io.check_apart(
            {"picture": arguments.picture}, {"image": [arguments.a, arguments.b], "reference": arguments.reference}
        )
    a, b = (xrk.io.read(path).array for path in (arguments.a, arguments.b))
    names = (Path(arguments.a).name, Path(arguments.b).name)
    drawn = {"png": arguments.picture, "row": arguments.row, "names": names}
    images = [(names[0], a), (names[1], b)]  # files of two folders may have one name
    if arguments.reference is None:
        lines = [f"{names[0]} against {names[1]}: {xrk.compare(a, b, data_range=arguments.range, **drawn)}"]
    else:
        reference, name = xrk.io.read(arguments.reference).array, Path(arguments.reference).name
        lines = [
            f"{own} against {name}: {xrk.compare(image, reference, data_range=arguments.range)}"
            for own, image in images
        ]
        if arguments.picture is not None:
            xrk.compare(a, b, data_range=arguments.range, **drawn)
        if not any(Path(arguments.reference).samefile(path) for path in (arguments.a, arguments.b)):
            images.append((name, reference))
    # Of stacks the middle frame is looked at.
    frames = [(name, image if image.ndim == 2 else image[len(image) // 2]) for name, image in images]
    if arguments.region is not None:
        lines += [f"{name}: {_of_regions(arguments, frame)}" for name, frame in frames]
    if arguments.brisque:
        lines += [f"{name}: BRISQUE {_brisque(frame, arguments.range):.1f}" for name, frame in frames]
    print("\n".join(lines))
    return 0


def _of_regions(arguments: argparse.Namespace, frame: Any) -> str:
    import numpy as np

    from xrk import metrics
    from xrk.errors import InputError

    for name, region in (("region", arguments.region), ("background", arguments.background)):
        if region is not None and any(part.stop > side for part, side in zip(region, frame.shape, strict=True)):
            rows, columns = region
            raise InputError(
                f"The {name} {rows.start}:{rows.stop},{columns.start}:{columns.stop} leaves an image of "
                f"{frame.shape[0]} rows and {frame.shape[1]} columns."
            )
    above = frame.astype(np.float64) - (arguments.offset or 0.0)
    suffix = "" if arguments.resolution is None else "_n"
    text = f"SNR{suffix} {metrics.snr(above, arguments.region, arguments.resolution):.2f}"
    if arguments.background is not None:
        text += f", CNR{suffix} {metrics.cnr(above, arguments.region, arguments.background, arguments.resolution):.2f}"
    return text


def _brisque(frame: Any, peak: float | None) -> float:
    from xrk import comparison, metrics

    return metrics.brisque(frame, comparison.range_of(frame) if peak is None else peak)
