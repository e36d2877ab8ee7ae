"""Self-supervised adaptation: a blind-spot network learns a detector from its noisy frames, without a clean one.

    frames ── noise model ── stabilise (noise of variance 1) ── random patches, turned and mirrored
      ── BlindSpot: mean m and deviation s of each pixel's noise-free value from its surroundings ──
      loss = mean[(y - m)^2 / (s^2 + 1) + log(s^2 + 1) + 0.1 |s|]

    frames ── normalised by black and white ── random patches, turned and mirrored
      ── BlindSpot: mean m and deviation s of each pixel from its surroundings, its noise included ──
      loss = mean[(y - m)^2 / (s^2 + f) + log(s^2 + f)]

The first loss is that of the calibrated models (Khademi et al., WACV 2021, equations 7 and 8), the second that of their
uncalibrated one: no clean image in either. The uncalibrated network learns the noise with the rest, and what of it is
noise is fitted to each frame when it is enhanced. Its floor f is published as 0.001, which at 16 bits is a deviation of
2072 counts; here it is that or a tenth of the noise's variance, the lesser, so that the deviation is learnt from quiet
frames too. Far less would be no floor: a deviation that is too small at the start then costs more than all pixels.

Both rest on noise that is independent from pixel to pixel. That is measured first, and where it does not hold the
network is made blind for more than the pixel itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from xrk import arrays, radiograph
from xrk.arguments import whole_number
from xrk.errors import InputError, InputTypeError
from xrk.io.atomic import atomic_file, check_apart, check_target
from xrk.loading import Model, load, sha256_of
from xrk.models import BlindSpot, Card
from xrk.noise import NoiseModel, estimate_noise
from xrk.progress import Progress, check_progress, told
from xrk.runtime.device import resolve_device
from xrk.training import blindspot_net
from xrk.training.adaptation_run import Run, check_folder

__all__ = ["adapt", "lagged"]

# From this correlation between neighbours on, the pixels beside one tell of its noise.
CORRELATED = 0.05
LOSSES = ("calibrated", "uncalibrated")
# A network blind for more would not fit on the smallest frames.
_WIDEST = 16
_FLOOR, _FLOOR_OF_NOISE = 1e-3, 0.1
_DESCRIPTION = "Blind-spot network adapted to a detector from its own noisy frames, without a clean image."
_LIMITS = (
    "Fits the detector and the settings that its frames were taken with. Structure as weak as the noise can be smoothed"
    " away; regular patterns of the detector are taken for object. Research use; not a medical device."
)


def adapt(
    frames: Any,
    model: str | os.PathLike[str] | Model = "blindspot",
    *,
    out: str | os.PathLike[str] | None = None,
    run: str | os.PathLike[str] | None = None,
    loss: str | None = None,
    noise: NoiseModel | None = None,
    levels: tuple[float, float] | None = None,
    spot: int | None = None,
    features: int | None = None,
    steps: int = 600,
    patch: int = 128,
    batch: int = 4,
    rate: float = 1e-3,
    patience: int = 8,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Progress = None,
    say: Callable[[str], Any] | None = None,
) -> Model:
    """Trains a blind-spot network on noisy frames of one detector.

    Args:
        frames: (N, H, W) counts or a sequence of (H, W), two or more of one size and dtype, each side at least 32.
        model: the shipped "blindspot", or a blind-spot `Model` or checkpoint, to go on from; a published Keras file is
            one.
        out: also write the weights and their card to this .safetensors file, whole or not at all.
        run: folder for the run's state: a run that was killed goes on from its last checkpoint there, and one that was
            done goes on if more ``steps`` are asked for.
        loss: "calibrated" or "uncalibrated", see above: what a network to go on from was made for, and by default of
            one that begins anew "calibrated".
        noise: the frames' noise; by default the median of estimates from up to eight frames. The uncalibrated loss
            takes its scale from it and no more.
        levels: (black, white) of networks that see normalised counts, which the uncalibrated ones do; by default the
            dtype's range. `xrk.enhance` must be given the same.
        spot: half the side of what is blind, see `BlindSpot`, 1 to 16; by default the distance from which on the
            noise of pixels is not correlated.
        features: begin from random weights instead, of a network with so many channels.
        steps, batch: training steps, and patches of each.
        patch: their side, a multiple of 32; of smaller frames the largest that fits.
        rate: first learning rate.
        patience: ends after so many checks, 25 steps apart, without a better one.
        seed: of everything random.
        device: "cpu", "cuda"; by default the CPU.
        progress: True for a bar, or a function that is called with (steps done, steps). What it raises ends the run.
        say: called with sentences: what was found in the frames before the training begins, why it ended early, and
            that nothing better was found.

    Returns:
        The adapted `Model`, of the best check or, where none was better, with the weights it began from; its card tells
        the frames' sha256, the noise, the correlation that was found, the steps, and the loss before and after.

    Raises:
        InputError: fewer than two frames, frames of different sizes, with masked or missing values, or without any
        noise; an option out of its range; a ``run`` of other frames or settings; a training that diverged.
        InputTypeError: a dtype or a kind of option that cannot be used. DeviceError: the device is not there.
        CheckpointFileError: what lies in ``run`` is damaged. ModelNotFoundError, CheckpointError, CheckpointFileError:
        see `xrk.load`. ImageFileError: ``out`` cannot be written.
    """
    started = time.monotonic()
    steps, patience, batch = (
        whole_number(value, name, 1) for name, value in (("steps", steps), ("patience", patience), ("batch", batch))
    )
    patch, seed = whole_number(patch, "patch", 32), whole_number(seed, "seed", 0, 2**63 - 2)
    spot = None if spot is None else whole_number(spot, "spot", 1, _WIDEST)
    features = None if features is None else whole_number(features, "features", 1)
    if patch % 32:
        raise InputError(f"patch={patch}; expected a multiple of 32.")
    if isinstance(rate, bool) or not isinstance(rate, Real):
        raise InputTypeError(f"rate is {rate!r}; expected a number.")
    if not (math.isfinite(rate) and rate > 0):
        raise InputError(f"rate is {rate}; expected a finite number above 0.")
    if loss is not None and loss not in LOSSES:
        raise InputError(f"loss={loss!r}; expected one of {', '.join(map(repr, LOSSES))}.")
    if noise is not None and not isinstance(noise, NoiseModel):
        raise InputTypeError(f"noise is {noise!r}; expected an xrk.NoiseModel, or None for an estimate.")
    device = resolve_device(device)
    check_progress(progress)
    if out is not None:
        if not isinstance(out, str | os.PathLike):
            raise InputTypeError(f"out is a {type(out).__name__}; expected the path of a file, or None.")
        check_target(out)
        check_apart({"output": out}, {"model": model})
    folder = check_folder(run)
    stack = _stack(frames)
    start = None if features is not None else _start(model, loss)
    loss = loss or ("calibrated" if start is None or start.module.noise is not None else "uncalibrated")
    domain = start.card.domain if start is not None else ("stabilised" if loss == "calibrated" else "unit")
    if domain == "unit":
        finite = ((frame, None) for frame in stack)
        levels = radiograph.resolve_levels(levels, stack.dtype, finite)
    if noise is None:
        noise = _estimated(stack)
    say = say or (lambda sentence: None)
    seen = np.stack([noise.stabilise(frame, np.float32) for frame in stack])
    correlation = [lagged(seen, steps_away) for steps_away in (1, 2, 3)]
    needed = next((n for n, pair in enumerate(correlation, 1) if max(map(abs, pair)) < CORRELATED), 4)
    say(_found(stack, noise, correlation[0], needed, spot))
    spot = needed if spot is None else spot
    patch = min(patch, *(side // 32 * 32 for side in seen.shape[1:]))
    deviation = 1.0
    if domain == "unit":
        black, white = levels
        seen = np.stack([((frame - black) / (white - black)).astype(np.float32) for frame in stack])
        deviation = _deviation(stack, noise, white - black)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network, config, begun = _network(start, features, spot, loss, deviation)
    own = begun
    if start is not None:  # one that was never a file has no sha256, so its run is told by the weights themselves
        own += sha256_of(network)
    network = network.to(device, memory_format=torch.channels_last)
    surprise = blindspot_net.surprise
    if loss == "uncalibrated":
        surprise = partial(blindspot_net.uncalibrated, floor=min(_FLOOR, _FLOOR_OF_NOISE * deviation**2))
    data = hashlib.sha256(np.ascontiguousarray(stack).tobytes()).hexdigest()
    facts = {
        "frames": data, "model": own, "settings of the network": json.dumps(config), "noise": repr(noise),
        "levels": repr(levels if domain == "unit" else None), "seed": repr(seed), "patch": repr(patch),
        "batch": repr(batch), "rate": repr(float(rate)),
    }  # fmt: skip
    training = Run(network, surprise, seen, patch, batch, float(rate), seed, folder, facts)
    with told(progress, steps, "step") as tell:
        ended = training.go(steps, patience, tell)
    if ended.steps < steps:
        say(f"Ended after {ended.steps} of {steps} steps: the last {patience} checks were no better.")
    if not ended.kept:
        say(
            f"No check was better than what it began from (loss {ended.before:.4f}, at best {ended.checked:.4f} after "
            "it): the weights are unchanged."
        )
    card = Card(
        name="blindspot-adapted" if out is None else Path(out).stem,
        architecture="blindspot",
        config=config,
        domain=domain,
        noise="estimate" if domain == "stabilised" else "fit",
        description=_DESCRIPTION,
        parameters=sum(p.numel() for p in network.parameters()),
        licence="Yours: trained on the frames given.",
        training={
            "recipe": "xrk.adapt",
            "loss_function": loss,
            "begun_from": begun,
            "data_sha256": data,
            "frames": list(stack.shape),
            "noise": noise.to_dict(),
            "levels": list(levels) if domain == "unit" else None,
            "lag_one_correlation": {"rows": correlation[0][0], "columns": correlation[0][1]},
            "spot": spot,
            "steps": ended.steps,
            "kept_step": ended.kept,
            "loss_before": ended.before if math.isfinite(ended.before) else None,
            "loss": ended.loss,
            "seed": seed,
            "seconds": round(time.monotonic() - started, 1),
        },
        limits=_LIMITS,
    )
    network = network.cpu().eval().requires_grad_(False)
    if out is not None:
        card = replace(card, sha256=_save(Path(out), network, card))
    return Model(card, network)


def lagged(seen: np.ndarray, steps: int = 1) -> tuple[float, float]:
    """How far a pixel's noise is correlated with that so many pixels down and to the right, from frames' differences.

    The object cancels where it stands still; where it moved, the difference is large. So each 32 x 32 block is judged
    by itself, and the median over the quarter with the least variance counts.

    Args:
        seen: (N, H, W) stabilised frames, N >= 2.
    """
    found: list[tuple[float, float, float]] = []
    for first, second in pairwise(seen[:9]):
        difference = (second - first).astype(np.float64)
        height, width = (n // 32 * 32 for n in difference.shape)
        blocks = difference[:height, :width].reshape(height // 32, 32, width // 32, 32).swapaxes(1, 2)
        blocks = blocks - blocks.mean((2, 3), keepdims=True)
        variance = (blocks**2).mean((2, 3))
        down = (blocks[:, :, steps:] * blocks[:, :, :-steps]).mean((2, 3))
        right = (blocks[..., steps:] * blocks[..., :-steps]).mean((2, 3))
        found += zip(variance.ravel(), down.ravel(), right.ravel(), strict=True)
    quiet = np.array(sorted(found))[: max(1, len(found) // 4)]
    # A block's own mean was taken off, which leaves neighbours of white noise with a correlation of -1 / 1024.
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.nan_to_num(quiet[:, 1:] / quiet[:, :1])
    return float(np.median(ratios[:, 0])), float(np.median(ratios[:, 1]))


# --- what comes in --------------------------------------------------------------------------------------------------


def _stack(frames: Any) -> np.ndarray:
    several = isinstance(frames, Sequence) and not isinstance(frames, str | bytes)
    if any(np.ma.is_masked(frame) for frame in (frames if several else (frames,))):
        raise InputError("The frames have masked pixels; fill them first.")
    if several:
        one = [arrays.host_array(frame, f"frame {i}") for i, frame in enumerate(frames)]
        shapes = {frame.shape for frame in one}
        if len(shapes) > 1:
            raise InputError(f"The frames have sizes {sorted(shapes)}; expected one size.")
        if len({frame.dtype.newbyteorder("=") for frame in one}) > 1:
            raise InputTypeError("The frames have different dtypes; expected one.")
        stack = np.stack(one) if one else np.empty((0, 0, 0))
    else:
        stack = arrays.host_array(frames, "frames")
    if stack.ndim != 3 or len(stack) < 2 or min(stack.shape[1:]) < 32:
        raise InputError(f"The frames have shape {stack.shape}; expected (N, H, W), two or more of 32 x 32 or larger.")
    radiograph.check_dtype(stack.dtype)
    if stack.dtype.kind == "f" and not np.isfinite(stack).all():
        raise InputError("The frames have values that are not finite; fill them first.")
    if all(frame.min() == frame.max() for frame in stack):
        raise InputError("The frames are constant: there is no noise to learn from.")
    return stack


def _estimated(stack: np.ndarray) -> NoiseModel:
    chosen = stack[np.linspace(0, len(stack) - 1, min(8, len(stack))).astype(int)]
    models = sorted((estimate_noise(frame) for frame in chosen), key=lambda m: (m.gain, m.read_noise))
    return models[len(models) // 2]


def _found(
    stack: np.ndarray, noise: NoiseModel, correlation: tuple[float, float], needed: int, spot: int | None
) -> str:
    """What the frames are like, in a sentence or two."""
    told = (
        f"{len(stack)} frames of {stack.shape[1]} x {stack.shape[2]}, gain {noise.gain:.4g}, "
        f"offset {noise.offset:.4g}, read noise {noise.read_noise:.4g}; the noise of neighbours is "
        f"correlated by {correlation[0]:+.3f} down and {correlation[1]:+.3f} across"
    )
    if needed == 1:
        return f"{told}: white."
    side = 2 * needed - 1
    told += f". From {CORRELATED} on a network that sees neighbours finds the pixel's own noise in them"
    if spot is None:
        return f"{told}: it is made blind for the {side} x {side} pixels around each (spot={needed})."
    return f"{told}; spot={spot} was asked for, {'less than' if spot < needed else 'and'} the {needed} needed."


def _deviation(stack: np.ndarray, noise: NoiseModel, span: float) -> float:
    """The noise's standard deviation at the frames' median, at least that of rounding, over the levels' span."""
    step = 1.0 if stack.dtype.kind in "iu" else 2.0**-20 * span
    return math.sqrt(max(float(noise.variance(np.median(stack))), step**2 / 12)) / span


def _start(model: Any, loss: str | None) -> Model:
    start = model if isinstance(model, Model) else load(model)
    network = start.module
    domain = "unit"  # of the published networks: those without a noise of their own, and with one that is learnt
    blind = isinstance(network, BlindSpot) and network.std is not None
    if blind and network.noise is not None and next(network.noise.parameters(), None) is None:
        domain = "stabilised"
    if not blind or start.card.domain != domain:
        raise InputError(
            f"{start.card.name} is a {start.card.architecture} for {start.card.domain} values; expected a blind-spot "
            "network with a standard deviation, as xrk.adapt makes them and Keras files hold them."
        )
    if loss is not None and (loss == "calibrated") != (network.noise is not None):
        own = "uncalibrated" if loss == "calibrated" else "calibrated"
        raise InputError(
            f"{start.card.name} was made for the {own} loss; leave out loss={loss!r}, or begin anew: features=."
        )
    return start


def _network(
    start: Model | None, features: int | None, spot: int, loss: str, deviation: float
) -> tuple[BlindSpot, dict[str, Any], str]:
    """The network to begin with, its configuration, and whose weights it has."""
    if start is None:
        config = {"in_channels": 1, **blindspot_net.CONFIG, "features": features, "spot": spot}
        if loss == "uncalibrated":
            config |= {"noise": None, "unit": deviation}
        network = BlindSpot(**config)
        blindspot_net.initialise(network)
        return network, json.loads(json.dumps(config)), "random weights"
    config = start.card.config | {"spot": spot}
    network = BlindSpot(**config)
    network.load_state_dict(start.module.state_dict())
    return network, config, f"{start.card.name}, sha256 {start.card.sha256}"


def _save(out: Path, network: BlindSpot, card: Card) -> str:
    """Writes weights with their card in the header; returns the file's sha256."""
    entries = {k: v for k, v in card.to_dict().items() if k not in ("sha256", "source")}
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    content = save(state, {"xrk_card": json.dumps(entries)})
    with atomic_file(out) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()
