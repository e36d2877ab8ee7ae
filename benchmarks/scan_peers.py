"""The peers of both scans: what a torch user has without xrk. Each scans sequences; all do the same projections."""

from collections.abc import Callable

import torch
from contest import imported

# u (batch, L, D), dt (batch, L, D) after softplus, A (D, N), B and C (batch, L, N) -> sum over n of C h, (batch, L, D).
Scan = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _step(
    h: torch.Tensor, u: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    h = torch.exp(dt[..., None] * A) * h + (dt * u)[..., None] * b[..., None, :]
    return h, (h * c[..., None, :]).sum(-1)


def _loop_of(step: Callable) -> Scan:
    def scan(u, dt, A, b, c):
        u, dt, A, b, c = (t.float() for t in (u, dt, A, b, c))
        h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
        y = torch.empty_like(u)
        for t in range(u.shape[1]):
            h, y[:, t] = step(h, u[:, t], dt[:, t], A, b[:, t], c[:, t])
        return y

    return scan


def loop() -> Scan:
    """One step after the other."""
    return _loop_of(_step)


def compiled_loop() -> Scan:
    """The same loop, each step compiled by torch.compile: the whole loop would be unrolled."""
    return _loop_of(torch.compile(_step, fullgraph=True))


def mambapy() -> Scan | str:
    """mambapy's parallel scan, used as its own Mamba block uses it."""
    module = imported("mambapy.pscan")
    if isinstance(module, str):
        return module

    def scan(u, dt, A, b, c):
        u, dt, A, b, c = (t.float() for t in (u, dt, A, b, c))
        decay = torch.exp(dt[..., None] * A)
        h = module.pscan(decay, (dt * u)[..., None] * b[:, :, None, :])
        return (h @ c[..., None]).squeeze(-1)

    return scan


def mamba_ssm() -> Callable | str:
    """mamba-ssm's CUDA scan, `selective_scan_fn`."""
    module = imported("mamba_ssm.ops.selective_scan_interface")
    return module if isinstance(module, str) else module.selective_scan_fn
