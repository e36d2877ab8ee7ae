"""conv2d with SiLU and a residual, and followed by a group norm, whose summaries its epilogue makes (norm: groups)."""

import torch
import torch.nn.functional as F
from contest import Contest, channels_last, item_size, normal
from xrk.kernels import launch

from xrk import kernels

OP = "conv2d"


def _case(inputs, outputs, size, dtype, norm=0):
    return {"B": 1, "C": inputs, "O": outputs, "H": size, "W": size, "K": 3, "norm": norm, "dtype": dtype}


CASES = {
    ("cpu", "tiny"): [_case(4, 8, 8, "float32"), _case(4, 8, 8, "float32", 4)],
    ("cpu", "quick"): [_case(48, 48, 256, "float32"), _case(48, 48, 256, "float32", 8)],
    ("cpu", "full"): [
        *(_case(*channels, 512, "float32") for channels in ((1, 48), (48, 1), (48, 48), (96, 96))),
        _case(48, 48, 512, "float32", 8),
    ],
    ("cuda", "tiny"): [_case(4, 8, 8, "float16"), _case(4, 8, 8, "float16", 4)],
    ("cuda", "quick"): [
        _case(1, 48, 2048, "float16"),
        _case(48, 1, 2048, "float16"),
        _case(32, 32, 2048, "float16"),
        _case(48, 48, 2048, "float16", 8),
    ],
    ("cuda", "full"): [
        # The rows of launch.CONV2D_IN_TRITON, their limits, and what lies beyond them.
        *(_case(1, channels, 2048, "float16") for channels in (16, 48, 64, 96)),
        *(_case(channels, 1, 2048, "float16") for channels in (16, 48, 64, 96)),
        *(_case(channels, channels, 2048, "float16") for channels in (16, 32, 48, 64, 96)),
        *(_case(channels, channels, 2048, "float32") for channels in (4, 16)),
        *(_case(channels, channels, 2048, "float16", 8) for channels in (32, 48, 96)),
    ],
}


def contest(case, device):
    b, c, o, h, w, k, norm = (case[name] for name in ("B", "C", "O", "H", "W", "K", "norm"))
    x = channels_last(normal((b, c, h, w), case, device))
    weight = normal((o, c, k, k), case, device, 1) / (k * c**0.5)
    bias, gamma, beta = (normal((o,), case, device, seed) for seed in (2, 3, 4))
    residual = channels_last(normal((b, o, h, w), case, device, 5))
    outputs = b * o * h * w

    def ours() -> torch.Tensor:
        if not norm:
            return kernels.conv2d(x, weight, bias, residual, padding=k // 2, activation="silu")
        y, state = kernels.conv2d(x, weight, bias, padding=k // 2, summaries=norm)
        return kernels.group_norm_apply(y, state, gamma, beta, activation="silu")

    def eager() -> torch.Tensor:
        y = F.conv2d(x, weight, bias, padding=k // 2)
        if norm:
            return F.silu(F.group_norm(y, norm, gamma, beta), inplace=True)
        return F.silu(y, inplace=True).add_(residual)

    few = launch.conv2d_in_triton(c, o, (k, k), (1, k // 2, 1, 1), case["dtype"])
    # Read: the input, and the residual, or the map that the norm waited for. Written: the output, and that map.
    maps = x.numel() + (3 if norm else 2) * outputs
    return Contest(
        ops=("conv2d_few_channels" if few else OP, *(("group_norm_apply",) if norm else ())),
        ours=ours,
        peers={"torch eager": eager, "torch.compile": torch.compile(eager, fullgraph=True)},
        bytes=maps * item_size(case),
        flops=2 * c * k * k * outputs,
        flops_dtype=case["dtype"] if device == "cuda" else "float32",
    )


def test_conv2d(compete):
    compete()
