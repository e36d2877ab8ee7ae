"""SS2D: the mixer of the Mamba restoration networks, which sees the whole image through four scans of it.

    x ── in_proj ─┬─ depthwise 3x3 ─ SiLU ─ four scans, summed ─ LayerNorm ─(x)─ out_proj ── y
                  └─ z ──────────────────────────────────────────── SiLU ───┘

One definition serves VMamba (Liu et al. 2024, arXiv 2401.10166, section 4), MambaIR (Guo et al. 2024, arXiv 2402.15648,
section 3.3) and what came after them; their tensors have the same names.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xrk.errors import InputError, InputTypeError
from xrk.kernels import depthwise_conv2d, layer_norm, selective_scan, selective_scan_2d

__all__ = ["SS2D"]

RASTER = "raster"

# The steps that a network starts with are spread evenly in their logarithm (Gu, Dao 2023, arXiv 2312.00752, 3.6).
_FIRST_STEPS = (1e-3, 1e-1)
_HALVES = (torch.float16, torch.bfloat16)


class SS2D(nn.Module):
    """The selective scan of an image in four directions, between two projections; (B, H, W, C) -> (B, H, W, C).

        x, z = in_proj(input)                            D channels each, D = int(expand * C)
        x = SiLU(conv2d(x))                              depthwise 3x3, zeros around the image
        y = the sum of the scans of x                    `xrk.kernels.selective_scan_2d`
        out = out_proj(LayerNorm(y) * SiLU(z))           epsilon 1e-5

    The whole image takes part in every pixel, so cutting the image into tiles changes the result.

    Args:
        channels: C.
        d_state: N, states per channel.
        expand: D over C.
        order: ``"raster"``, the four directions: by rows, by columns, and both reversed. Or where the scans go, for
            images of one size: an integer tensor (K, H*W), a permutation of the row-major positions for each of K
            scans with weights of their own, or (H*W) for one. Sorted scans, which differ from image to image, are
            given to `forward`. Only the raster is run in bands of rows, within a memory budget: `xrk.plan` refuses
            another order by name, or runs its scans on whole maps where ``unknown="whole"`` says so.
        scans: K; by default 4, or as many as ``order`` has rows.
        gate: the branch z; without it, as in VMamba's "noz" networks, ``in_proj`` makes x alone.
        conv_bias: the depthwise convolution has a bias; VMamba's "noz" networks have none.
        rank: R of the projection that gives the steps dt; by default ceil(C / 16).

    Maps may be float16 or bfloat16: the scans, their sum and its norm are float32 then, and so are the scans' weights,
    which `half` leaves alone. float64 stays float64.

    Raises:
        InputError: ``order`` holds something else than permutations, or not as many as ``scans``.
        InputTypeError: ``order`` is neither ``"raster"`` nor integers.
    """

    def __init__(
        self,
        channels: int,
        d_state: int = 16,
        expand: float = 2.0,
        order: Any = RASTER,
        *,
        scans: int | None = None,
        gate: bool = True,
        conv_bias: bool = True,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        inner = int(expand * channels)
        rank = math.ceil(channels / 16) if rank is None else rank
        self.order = None if isinstance(order, str) and order == RASTER else _permutations(order)
        if scans is None:
            scans = 4 if self.order is None else self.order.shape[-2]
        self.inner, self.gate = inner, gate
        self.in_proj = nn.Linear(channels, (2 if gate else 1) * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        self.x_proj_weight = nn.Parameter(torch.empty(scans, rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(scans, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(scans, inner))
        self.A_logs = nn.Parameter(torch.empty(scans * inner, d_state))
        self.Ds = nn.Parameter(torch.empty(scans * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        if self.order is not None:
            self._check_scans(self.order)
        # Arithmetic on the meta device, where checkpoints are compared with networks, would load torch's compiler.
        if not self.A_logs.is_meta:
            self.reset_scans()

    @torch.no_grad()
    def reset_scans(self) -> None:
        """The scans' weights as training starts from: A = -1, -2, ..., -N and steps from 0.001 to 0.1."""
        nn.init.uniform_(self.x_proj_weight, -(self.inner**-0.5), self.inner**-0.5)
        rank = self.dt_projs_weight.shape[-1]
        nn.init.uniform_(self.dt_projs_weight, -(rank**-0.5), rank**-0.5)
        least, most = map(math.log, _FIRST_STEPS)
        steps = torch.exp(torch.rand_like(self.dt_projs_bias) * (most - least) + least)
        # The bias stands before the softplus, log(1 + exp(b)): this is its inverse.
        self.dt_projs_bias.copy_(steps + torch.log(-torch.expm1(-steps)))
        self.A_logs.copy_(torch.arange(1, self.A_logs.shape[1] + 1).log().expand_as(self.A_logs))
        nn.init.ones_(self.Ds)

    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C).

        ``order`` takes the place of the module's own: integers (H*W), (K, H*W), or (B, K, H*W) for each image its own.

        Raises:
            InputError: as the class does, or the order is of an image of another size.
        """
        # Two products instead of halves of one: each map is dense, and a band needs z only after its scan.
        z = F.linear(x, self.in_proj.weight[self.inner :]) if self.gate else None
        u = F.linear(x, self.in_proj.weight[: self.inner])
        u = depthwise_conv2d(u.permute(0, 3, 1, 2), self.conv2d.weight, self.conv2d.bias, activation="silu")
        # What a scan adds up may pass float16's largest number, so it stays in float32 until it is normalised.
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = self._scan(u.permute(0, 2, 3, 1).to(exact), order)
        weight, bias = self.out_norm.weight.to(exact), self.out_norm.bias.to(exact)
        y = layer_norm(y, weight, bias, None if z is None else z.to(exact), self.out_norm.eps)
        return self.out_proj(y.to(x.dtype))

    def _scan(self, x: Tensor, order: Tensor | None) -> Tensor:
        if order is not None:
            order = _permutations(order)
            self._check_scans(order)
        elif self.order is not None:
            order = self.order
        else:
            self._check_scans(None)
            weights = self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds
            return selective_scan_2d(x, *(weight.to(x.dtype) for weight in weights))
        return self._scan_along(x, order.to(x.device))

    def _scan_along(self, x: Tensor, order: Tensor) -> Tensor:
        """The sum of one scan of the pixels for each permutation, order (K, L) or (B, K, L)."""
        batch, height, width, channels = x.shape
        if order.shape[-1] != height * width:
            raise InputError(
                f"The order of this SS2D visits {order.shape[-1]} positions; "
                f"an image of {height} x {width} pixels has {height * width}."
            )
        dtype = x.dtype
        u = x.reshape(batch, height * width, channels)
        rank, states = self.dt_projs_weight.shape[-1], self.A_logs.shape[1]
        y = torch.zeros_like(u)
        # Autocast would hand the scan 16-bit steps.
        with torch.autocast(x.device.type, enabled=False):
            for k in range(order.shape[-2]):
                of_k = slice(k * channels, (k + 1) * channels)
                low, b, c = F.linear(u, self.x_proj_weight[k].to(dtype)).split([rank, states, states], -1)
                dt = F.linear(low, self.dt_projs_weight[k].to(dtype))
                along = selective_scan(
                    u.transpose(1, 2),
                    dt.transpose(1, 2),
                    -torch.exp(self.A_logs[of_k].to(dtype)),
                    b.transpose(1, 2),
                    c.transpose(1, 2),
                    self.Ds[of_k].to(dtype),
                    delta_bias=self.dt_projs_bias[k].to(dtype),
                    delta_softplus=True,
                    order=order[..., k, :],
                )
                y = y + along.transpose(1, 2)
        return y.reshape(x.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SS2D":
        """As in torch, but `half` and `bfloat16` leave the scans' own weights in float32."""

        def exact(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return tensor.to(made.device, torch.float32) if made.dtype in _HALVES else made

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(exact, recurse=False)

    def _check_scans(self, order: Tensor | None) -> None:
        scans = self.x_proj_weight.shape[0]
        if order is None and scans != 4:
            raise InputError(f"This SS2D has weights for {scans} scans; pass their order, for the raster has 4.")
        if order is not None and order.shape[-2] != scans:
            raise InputError(
                f"The order holds {order.shape[-2]} permutations; this SS2D has weights for {scans} scans."
            )


def _permutations(order: Any) -> Tensor:
    """The order as int64 (..., K, L), every row of it holding each position once."""
    try:
        # A list becomes a tensor with data also where the network is built without any, on the meta device.
        order = order if isinstance(order, Tensor) else torch.as_tensor(order, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise InputTypeError(f'The order of an SS2D is "raster" or a tensor of integers, got {order!r:.80}.') from None
    shape = tuple(order.shape)
    if order.ndim not in (1, 2, 3) or 0 in shape:
        raise InputError(
            f"The order of an SS2D has shape (positions), (scans, positions) or with a batch before, got {shape}."
        )
    if order.dtype == torch.bool or order.is_floating_point() or order.is_complex():
        dtype = str(order.dtype).removeprefix("torch.")
        raise InputTypeError(f'The order of an SS2D is "raster" or a tensor of integers, got one of {dtype}.')
    order = order.to(torch.int64)
    order = order[None] if order.ndim == 1 else order
    positions = torch.arange(shape[-1], device=order.device)
    if not torch.equal(order.sort(-1).values, positions.expand(order.shape)):
        raise InputError(
            f"The order of an SS2D must hold each position from 0 to {shape[-1] - 1} once; this one is no permutation."
        )
    return order.contiguous()
