"""Muon: momentum whose step is orthogonalised; a kernel counts as a matrix (outputs, inputs x taps)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalise"]


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix to ``matrix`` (m, n), roughly: all singular values come out in 0.7 .. 1.2.

    Newton-Schulz iteration x <- a x + b (x x^T) x + c (x x^T)^2 x with the coefficients of Jordan et al., "Muon: An
    optimizer for hidden layers in neural networks" (2024), which trade exactness for speed.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum; each step is orthogonalised and scaled by sqrt(max(1, m / n)).

    Args:
        params: kernels (outputs, inputs, kh, kw).
        lr: length of a step: the spectral norm of the change of each kernel matrix.
        momentum: of the running mean of the gradients.
        weight_decay: decoupled, relative to ``lr``.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for kernel in group["params"]:
                if kernel.grad is None:
                    continue
                state = self.state[kernel]
                if not state:
                    state["mean"] = torch.zeros_like(kernel)
                mean = state["mean"].lerp_(kernel.grad, 1 - group["momentum"])
                step = kernel.grad.lerp(mean, group["momentum"]).flatten(1)
                scale = max(1.0, step.shape[0] / step.shape[1]) ** 0.5
                kernel.mul_(1 - group["lr"] * group["weight_decay"])
                kernel.add_(orthogonalise(step).view_as(kernel), alpha=-group["lr"] * scale)
