"""The verb `xrk adapt`."""

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xrk.cli import noise, sources

__all__ = ["add"]

ADAPT = """\
Train a blind-spot denoiser on noisy frames of one detector, without a clean image, and write it with its card.

FILES are TIFF files, or folders of them; pages count as frames. The state of the run lies in OUT.run until it is done:
the same command goes on from there after it was killed, with another --steps too.
Then: xrk enhance in.tif out.tif --model OUT
"""


def add(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verb and its arguments; ``verb`` as in `xrk.cli`."""
    adapt = verb(
        "adapt", _run, "train a denoiser on one's own noisy frames, without a clean one", description=ADAPT,
        epilog="example: xrk adapt frames/ -o mine.safetensors",
    )  # fmt: skip
    adapt.add_argument("files", nargs="+", metavar="FILES", help="two noisy frames or more, of one size and dtype")
    adapt.add_argument("-o", "--out", required=True, metavar="OUT", help="the .safetensors file to write")
    adapt.add_argument("--model", default="blindspot", metavar="NAME", help="what to go on from (default: blindspot)")
    adapt.add_argument(
        "--noise", type=_calibrated, metavar="GAIN,OFFSET,READ", help="calibrated noise (default: an estimate)"
    )
    adapt.add_argument(
        "--loss", choices=("calibrated", "uncalibrated"),
        help="of a network that begins anew: noise known, or learnt with the rest (default: calibrated)",
    )  # fmt: skip
    adapt.add_argument(
        "--levels", nargs=2, type=float, metavar=("BLACK", "WHITE"),
        help="of networks with the uncalibrated loss, which see normalised counts (default: the dtype's range)",
    )  # fmt: skip
    adapt.add_argument(
        "--spot", type=int, metavar="N", help="blind for 2N - 1 pixels each way (default: by the noise's correlation)"
    )
    adapt.add_argument("--features", type=int, metavar="N", help="begin from random weights, with so many channels")
    adapt.add_argument("--steps", type=int, default=600, help="training steps at most (default: 600)")
    adapt.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    adapt.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: cpu)")
    adapt.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _calibrated(text: str) -> tuple[float, ...]:
    if text == "off":
        raise argparse.ArgumentTypeError("expected three numbers GAIN,OFFSET,READ, not 'off'")
    return noise(text)


def _run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    import xrk
    from xrk import io
    from xrk.errors import InputError

    paths = sources(arguments.files)
    if not arguments.out.endswith(".safetensors"):
        raise InputError(f"{arguments.out} is to hold the weights; expected a name that ends in .safetensors.")
    io.check_apart({"output": arguments.out}, {"frame": paths})
    given = None if arguments.noise is None else xrk.NoiseModel(*arguments.noise)
    frames = [frame for path in paths for frame in _pages(io.read(path).array)]
    run = Path(f"{arguments.out}.run")
    shown = not arguments.quiet and sys.stderr.isatty()
    with tqdm(total=arguments.steps, unit="step", disable=not shown, leave=False) as bar:
        model = xrk.adapt(
            frames, arguments.model, out=arguments.out, run=run, noise=given, spot=arguments.spot, loss=arguments.loss,
            levels=None if arguments.levels is None else tuple(arguments.levels), features=arguments.features,
            steps=arguments.steps, seed=arguments.seed, device=arguments.device,
            progress=lambda done, total: bar.update(done - bar.n),
            say=(lambda sentence: None) if arguments.quiet else lambda sentence: bar.write(sentence),
        )  # fmt: skip
    shutil.rmtree(run, ignore_errors=True)
    if not arguments.quiet:
        told = model.card.training
        before = "" if told["loss_before"] is None else f"{told['loss_before']:.4f} before and "
        loss = f"loss {before}{told['loss']:.4f} after"
        print(f"{arguments.out}\n  {told['steps']} steps, {loss}, sha256 {model.card.sha256}")
    return 0


def _pages(array: Any) -> Any:
    return array if array.ndim == 3 else array[None]
