"""Self-supervised adaptation: a blind-spot network learns a detector from its noisy frames, without a clean one.

    frames ── noise model ── stabilise (noise of variance 1) ── random patches, turned and mirrored
      ── BlindSpot: mean m and deviation s of each pixel's noise-free value from its surroundings ──
      loss = mean[(y - m)^2 / (s^2 + 1) + log(s^2 + 1) + 0.1 |s|]

The loss is that of the calibrated models (Khademi et al., WACV 2021, equations 7 and 8): no clean image in it. It rests
on noise that is independent from pixel to pixel. That is measured first, and where it does not hold the network is made
blind for more than the pixel itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from xrk import arrays, radiograph
from xrk.errors import InputError, InputTypeError
from xrk.io.atomic import check_target
from xrk.loading import Model, load
from xrk.models import BlindSpot, Card
from xrk.noise import NoiseModel, estimate_noise
from xrk.training import blindspot_net

__all__ = ["adapt", "lagged"]

# From this correlation between neighbours on, the pixels beside one tell of its noise.
CORRELATED = 0.05
_VALIDATE_EVERY = 25
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
    noise: NoiseModel | None = None,
    spot: int | None = None,
    features: int | None = None,
    steps: int = 600,
    patch: int = 128,
    batch: int = 4,
    rate: float = 1e-3,
    patience: int = 8,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Callable[[int, int], Any] | None = None,
    say: Callable[[str], Any] | None = None,
) -> Model:
    """Trains a blind-spot network on noisy frames of one detector.

    Args:
        frames: (N, H, W) counts or a sequence of (H, W), two or more of one size and dtype, each side at least 32.
        model: the shipped "blindspot", or a blind-spot `Model` or checkpoint, to go on from.
        out: also write the weights and their card to this .safetensors file, whole or not at all.
        run: folder for the run's state: a run that was killed goes on from its last checkpoint there.
        noise: the frames' noise; by default the median of estimates from up to eight frames.
        spot: half the side of what is blind, see `BlindSpot`, from 1 on; by default the distance from which on the
            noise of pixels is not correlated.
        features: begin from random weights instead, of a network with so many channels.
        steps, patch, batch, rate: training steps, side and number of the patches of each, first learning rate.
        patience: ends after so many checks, 25 steps apart, without a better one.
        seed: of everything random.
        device: "cpu", "cuda"; by default the CPU.
        progress: called with (steps done, steps). What it raises ends the run.
        say: called with sentences: what was found in the frames before the training begins, and why it ended early.

    Returns:
        The adapted `Model`; its card tells the frames' sha256, the noise, the correlation that was found, the steps.

    Raises:
        InputError: fewer than two frames, frames of different sizes, or without any noise, a spot or a number of steps
        below 1, a ``run`` of other frames or settings. InputTypeError: a dtype that
        cannot be used. ModelNotFoundError, CheckpointError, CheckpointFileError: see `xrk.load`. ImageFileError:
        ``out`` cannot be written.
    """
    started = time.monotonic()
    if spot is not None and spot < 1:
        raise InputError(f"spot is {spot}; expected 1 (the pixel alone is blind) or more.")
    if steps < 1:
        raise InputError(f"steps is {steps}; expected 1 or more.")
    if out is not None:
        check_target(out)
    stack = _stack(frames)
    start = None if features is not None else _start(model)
    if noise is None:
        noise = _estimated(stack)
    say = say or (lambda sentence: None)
    seen = np.stack([noise.stabilise(frame, np.float32) for frame in stack])
    correlation = [lagged(seen, steps_away) for steps_away in (1, 2, 3)]
    needed = next((n for n, pair in enumerate(correlation, 1) if max(map(abs, pair)) < CORRELATED), 4)
    say(_found(stack, noise, correlation[0], needed, spot))
    spot = needed if spot is None else spot
    patch = min(patch, *(side // 32 * 32 for side in seen.shape[1:]))
    torch.manual_seed(seed)
    network, config, begun = _network(start, features, spot)
    network = network.to(device or "cpu", memory_format=torch.channels_last)
    data = hashlib.sha256(np.ascontiguousarray(stack).tobytes()).hexdigest()
    facts = hashlib.sha256(json.dumps([seed, steps, patch, batch, rate, config, repr(noise), begun, data]).encode())
    training = _Run(network, seen, patch, batch, rate, seed, None if run is None else Path(run), facts.hexdigest())
    done, best = training.go(steps, patience, progress or (lambda done, total: None))
    if done < steps:
        say(f"Ended after {done} of {steps} steps: the last {patience} checks were no better.")
    card = Card(
        name="blindspot-adapted" if out is None else Path(out).stem,
        architecture="blindspot",
        config=config,
        domain="stabilised",
        noise="estimate",
        size_multiple=32,
        description=_DESCRIPTION,
        parameters=sum(p.numel() for p in network.parameters()),
        licence="Yours: trained on the frames given.",
        training={
            "recipe": "xrk.adapt",
            "begun_from": begun,
            "data_sha256": data,
            "frames": list(stack.shape),
            "noise": noise.to_dict(),
            "lag_one_correlation": {"rows": correlation[0][0], "columns": correlation[0][1]},
            "spot": spot,
            "steps": done,
            "loss": best,
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
    if isinstance(frames, Sequence) and not isinstance(frames, str | bytes):
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
    return stack


def _estimated(stack: np.ndarray) -> NoiseModel:
    chosen = stack[np.linspace(0, len(stack) - 1, min(8, len(stack))).astype(int)]
    models = sorted((estimate_noise(frame) for frame in chosen), key=lambda m: (m.gain, m.read_noise))
    middle = models[len(models) // 2]
    if middle.gain == 0 and float(np.ptp(chosen.astype(np.float64), axis=(1, 2)).max()) == 0:
        raise InputError("The frames are constant: there is no noise to learn from.")
    return middle


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


def _start(model: Any) -> Model:
    start = model if isinstance(model, Model) else load(model)
    blind = isinstance(start.module, BlindSpot) and start.module.noise is not None and start.module.std is not None
    if not blind or start.card.domain != "stabilised":
        raise InputError(
            f"{start.card.name} is a {start.card.architecture} for {start.card.domain} values; expected a blind-spot "
            "network for stabilised ones, as xrk.adapt makes them."
        )
    return start


def _network(start: Model | None, features: int | None, spot: int) -> tuple[BlindSpot, dict[str, Any], str]:
    """The network to begin with, its configuration, and whose weights it has."""
    if start is None:
        config = {"in_channels": 1, **blindspot_net.CONFIG, "features": features, "spot": spot}
        network = BlindSpot(**config)
        blindspot_net.initialise(network)
        return network, json.loads(json.dumps(config)), "random weights"
    config = start.card.config | {"spot": spot}
    network = BlindSpot(**config)
    network.load_state_dict(start.module.state_dict())
    return network, config, f"{start.card.name}, sha256 {start.card.sha256}"


def _save(out: Path, network: BlindSpot, card: Card) -> str:
    """Writes weights with their card in the header; returns the file's sha256."""
    partial = out.with_name(f"{out.name}.partial")
    entries = {k: v for k, v in card.to_dict().items() if k not in ("sha256", "source")}
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    try:
        save_file(state, partial, {"xrk_card": json.dumps(entries)})
        digest = hashlib.sha256(partial.read_bytes()).hexdigest()
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return digest


# --- the run --------------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    network: BlindSpot
    seen: np.ndarray
    patch: int
    batch: int
    rate: float
    seed: int
    folder: Path | None
    facts: str  # what a checkpoint must agree with to be gone on from

    def go(self, steps: int, patience: int, tell: Callable[[int, int], Any]) -> tuple[int, float]:
        """Trains, leaves the best weights in the network, and returns the steps done and the best loss."""
        optimizer = torch.optim.Adam(self.network.parameters(), lr=self.rate)
        rng = np.random.default_rng(self.seed)
        held_out = self._patches(np.random.default_rng(self.seed + 1), 8)
        best, best_state, stale, step = float("inf"), self._state(), 0, 0
        saved = self._load()
        if saved is not None:
            self.network.load_state_dict(saved["network"])
            optimizer.load_state_dict(saved["optimizer"])
            rng.bit_generator.state = saved["generator"]
            best, best_state, stale, step = saved["best"], saved["best_state"], saved["stale"], saved["step"]
        while step < steps and stale < patience:
            for group in optimizer.param_groups:  # constant, then down to a tenth over the last third
                group["lr"] = self.rate * min(1.0, 0.1 + 0.9 * 3 * (1 - step / steps))
            loss = blindspot_net.surprise(self.network, self._patches(rng, self.batch))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % _VALIDATE_EVERY == 0 or step == steps:
                with torch.inference_mode():
                    value = float(blindspot_net.surprise(self.network, held_out))
                stale = stale + 1 if value >= best else 0
                if value < best:
                    best, best_state = value, self._state()
                self._store(optimizer, rng, best, best_state, stale, step)
            tell(step, steps)
        self.network.load_state_dict(best_state)
        return step, best

    def _patches(self, rng: np.random.Generator, count: int) -> Tensor:
        out = np.empty((count, 1, self.patch, self.patch), np.float32)
        for i in range(count):
            frame = self.seen[rng.integers(len(self.seen))]
            top, left = (rng.integers(side - self.patch + 1) for side in frame.shape)
            piece = frame[top : top + self.patch, left : left + self.patch]
            piece = np.rot90(piece, rng.integers(4))
            out[i, 0] = piece.T if rng.random() < 0.5 else piece
        return torch.from_numpy(out).to(next(self.network.parameters()).device)

    def _state(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}

    def _load(self) -> dict[str, Any] | None:
        if self.folder is None or not (self.folder / "checkpoint.pt").exists():
            return None
        device = next(self.network.parameters()).device
        saved = torch.load(self.folder / "checkpoint.pt", map_location=device, weights_only=True)
        if saved["facts"] != self.facts:
            raise InputError(f"{self.folder} holds a run with other frames or settings; name another folder.")
        return saved

    def _store(self, optimizer, rng, best: float, best_state: dict, stale: int, step: int) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        saved = {
            "facts": self.facts,
            "network": self.network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": rng.bit_generator.state,
            "best": best,
            "best_state": best_state,
            "stale": stale,
            "step": step,
        }
        partial = self.folder / "checkpoint.partial"
        torch.save(saved, partial)
        os.replace(partial, self.folder / "checkpoint.pt")
