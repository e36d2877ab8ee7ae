"""The run of `xrk.adapt`: steps on random patches, the best weights kept, a checkpoint to go on from after a kill.

Every so many steps the loss of some patches is looked at, always the same; that of the weights it begins from as well.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xrk.errors import CheckpointFileError, InputError, InputTypeError
from xrk.models import BlindSpot
from xrk.training.training_run import write_checkpoint

__all__ = ["VALIDATE_EVERY", "Outcome", "Run", "check_folder"]

VALIDATE_EVERY = 25
_SAVED = {"facts", "network", "optimizer", "generator", "best", "best_state", "best_step", "stale", "step"}


def check_folder(run: str | os.PathLike[str] | None) -> Path | None:
    """Where the run's state goes, before anything is trained; the folder itself is made with the first checkpoint.

    Raises:
        InputTypeError: not a path. InputError: a file has this name, or nothing can be written there.
    """
    if run is None:
        return None
    if not isinstance(run, str | os.PathLike):
        raise InputTypeError(f"run is a {type(run).__name__}; expected the path of a folder, or None.")
    folder = Path(run)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"The run's folder {folder} cannot be made: {there} is a file; name another.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"The run's folder {folder} cannot be written: no permission to write in {there}.")
    return folder


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        steps: that were done.
        kept: the step whose weights were kept; 0 means those it began from, where no check was better.
        before, checked: loss of the weights it began from, and the least of all checks.
    """

    steps: int
    kept: int
    before: float
    checked: float

    @property
    def loss(self) -> float:
        """Of the weights that were kept."""
        return self.checked if self.kept else self.before


@dataclass
class Run:
    """One training.

    Attributes:
        network: what is trained, in place.
        loss: of the network and (B, 1, patch, patch) patches.
        seen: (N, H, W) float32, the frames as the network sees them.
        patch, batch, rate, seed: see `xrk.adapt`.
        folder: of the checkpoint; None keeps none.
        facts: what a checkpoint must agree with to be gone on from, by the names that an error calls them.
    """

    network: BlindSpot
    loss: Callable[[BlindSpot, Tensor], Tensor]
    seen: np.ndarray
    patch: int
    batch: int
    rate: float
    seed: int
    folder: Path | None
    facts: dict[str, str]

    def go(self, steps: int, patience: int, tell: Callable[[int, int], Any]) -> Outcome:
        """Trains, and leaves the best weights in the network, be they those it began from.

        Patience is with the checks alone: the first steps may well cost more than later ones win back.

        Raises:
            InputError: the loss was never finite, or the folder holds another run. CheckpointFileError: what it holds
            cannot be read.
        """
        optimizer = torch.optim.Adam(self.network.parameters(), lr=self.rate)
        rng = np.random.default_rng(self.seed)
        held_out = self._patches(np.random.default_rng(self.seed + 1), 8)
        begun, before = self._state(), self._check(held_out)
        best, best_state, best_step, stale, step = math.inf, begun, 0, 0, 0
        saved = self._load()
        if saved is not None:
            self.network.load_state_dict(saved["network"])
            optimizer.load_state_dict(saved["optimizer"])
            rng.bit_generator.state = saved["generator"]
            best, best_state, best_step = saved["best"], saved["best_state"], saved["best_step"]
            stale, step = saved["stale"], saved["step"]
        while step < steps and stale < patience:
            for group in optimizer.param_groups:  # constant, then down to a tenth over the last third
                group["lr"] = self.rate * min(1.0, 0.1 + 0.9 * 3 * (1 - step / steps))
            loss = self.loss(self.network, self._patches(rng, self.batch))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % VALIDATE_EVERY == 0 or step == steps:
                value = self._check(held_out)
                better = value < best  # which NaN is not
                stale = 0 if better else stale + 1
                if better:
                    best, best_state, best_step = value, self._state(), step
                if not math.isfinite(best):
                    raise InputError(
                        f"The training diverged: after {step} steps the loss is {value}; expected a rate below "
                        f"{self.rate:g}."
                    )
                self._store(optimizer, rng, best, best_state, best_step, stale, step)
            tell(step, steps)
        kept = 0 if before <= best else best_step
        self.network.load_state_dict(best_state if kept else begun)
        return Outcome(step, kept, before, best)

    def _check(self, held_out: Tensor) -> float:
        with torch.inference_mode():
            return float(self.loss(self.network, held_out))

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
        path = self.folder / "checkpoint.pt"
        device = next(self.network.parameters()).device
        try:
            saved = torch.load(path, map_location=device, weights_only=True)
        except OSError:
            raise
        except Exception:  # torch raises almost anything on damaged files
            saved = None
        if not isinstance(saved, dict) or set(saved) != _SAVED or not isinstance(saved["facts"], dict):
            raise CheckpointFileError(
                f"{path} is damaged, or no checkpoint of this version of xrk.adapt; delete {self.folder} to begin anew."
            )
        other = [name for name in self.facts if saved["facts"].get(name) != self.facts[name]]
        if other:
            raise InputError(
                f"{self.folder} holds a run that was begun with other {', '.join(other)}; delete that folder to begin "
                "anew, or ask for what it was begun with."
            )
        return saved

    def _store(self, optimizer, rng, best: float, best_state: dict, best_step: int, stale: int, step: int) -> None:
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
            "best_step": best_step,
            "stale": stale,
            "step": step,
        }
        write_checkpoint(self.folder / "checkpoint.pt", saved)
