"""A training that runs for hours: steps, a running average, a log, and a checkpoint to go on from after a kill."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["TrainingRun", "learning_rate", "write_checkpoint"]


class Data(Protocol):
    """Where the examples come from."""

    def restore(self, state: dict) -> None:
        """Goes on behind the batch after which `state` was asked for."""


def learning_rate(step: int, steps: int, cooldown: int, warmup: int = 200) -> float:
    """Relative rate: linear warm-up, constant, then 1 - sqrt down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    left = steps - step
    return 1.0 if left >= cooldown else 1 - math.sqrt(1 - max(left, 0) / cooldown)


def write_checkpoint(path: Path, saved: dict[str, Any]) -> None:
    """Whole or not at all: a kill while it is written leaves the one before."""
    partial = path.with_suffix(".partial")
    torch.save(saved, partial)
    os.replace(partial, path)


class TrainingRun:
    """A network that learns, with all that its folder keeps: ``checkpoint.pt`` and ``log.csv``.

    Args:
        folder: of the run; it exists.
        network: trained in place.
        optimizers: of its parameters; their rates are those at a relative rate of 1.
        described: goes into the checkpoint as it is: "model" and "config", for what exports it.
        forgets: (most, ramp): of the average a share of min(most, 1 - 1 / (1 + step / ramp)) stays at each step, so
            that it follows quickly at first.
        constrain: brings the network back to where it must stay, after each step and before it counts in the average.

    Attributes:
        average: the network that is validated and shipped. step: steps done.
    """

    def __init__(
        self,
        folder: Path,
        network: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        described: dict[str, Any],
        forgets: tuple[float, float],
        constrain: Callable[[Any], None] = lambda network: None,
    ) -> None:
        self.folder, self.network, self.optimizers, self.described = folder, network, optimizers, described
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        self.step = 0
        self._forgets, self._constrain = forgets, constrain
        self._rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        self._losses: list[float] = []
        self._began = time.monotonic()

    def resume(self, data: Data) -> None:
        """Goes on from the folder's checkpoint, if there is one."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        saved = torch.load(path, map_location=next(self.network.parameters()).device, weights_only=True)
        self.network.load_state_dict(saved["network"])
        self.average.load_state_dict(saved["average"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        data.restore(saved["generator"])
        self.step, self._began = saved["step"], time.monotonic() - saved["seconds"]
        print(f"resumed at step {self.step} after {saved['seconds']:.0f} s", flush=True)

    def learn(self, loss: Tensor, rate: float, most: float | None = None) -> None:
        """A step down the loss's gradient at a relative rate; ``most`` is the largest norm that a gradient may have."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, base in zip(groups, self._rates, strict=True):
            group["lr"] = base * rate
        self.network.zero_grad(set_to_none=True)
        loss.backward()
        if most is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), most)
        for optimizer in self.optimizers:
            optimizer.step()
        self._constrain(self.network)
        self.step += 1
        most_kept, ramp = self._forgets
        decay = min(most_kept, 1 - 1 / (1 + self.step / ramp))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
        self._losses.append(loss.item())

    def log(self, figure: float, rate: float) -> None:
        """A line of step, seconds, mean loss since the last line, the validation's figure in dB, relative rate."""
        loss = sum(self._losses) / len(self._losses)
        line = f"{self.step},{self._seconds():.0f},{loss:.4f},{figure:.3f},{rate:.3f}"
        with (self.folder / "log.csv").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
        self._losses = []

    def save(self, generator: dict) -> None:
        """``generator`` is the data's state behind the last batch that the network has learnt from."""
        saved = {
            **self.described,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": generator,
            "step": self.step,
            "seconds": self._seconds(),
        }
        write_checkpoint(self.folder / "checkpoint.pt", saved)

    def _seconds(self) -> float:
        return time.monotonic() - self._began
