"""group_norm with SiLU, of one image and of several."""

import torch
import torch.nn.functional as F
from contest import Contest, channels_last, imported, item_size, normal

from xrk import kernels

OP = "group_norm"


def _case(batch, channels, size, groups, dtype):
    return {"B": batch, "C": channels, "H": size, "W": size, "G": groups, "dtype": dtype}


CASES = {
    ("cpu", "tiny"): [_case(1, 16, 8, 4, "float32")],
    ("cpu", "quick"): [_case(1, 64, 256, 32, "float32")],
    ("cpu", "full"): [_case(1, 64, 512, 32, "float32"), _case(1, 128, 512, 32, "float32")],
    ("cuda", "tiny"): [_case(1, 16, 8, 4, "float16")],
    ("cuda", "quick"): [_case(1, 128, 2048, 32, "float16"), _case(8, 128, 512, 32, "float16")],
    ("cuda", "full"): [
        *(_case(1, 128, size, 32, "float16") for size in (1024, 2048, 4096)),
        _case(1, 64, 2048, 64, "float16"),
        _case(1, 128, 2048, 32, "float32"),
        _case(8, 128, 512, 32, "float16"),
    ],
}


def contest(case, device):
    shape = tuple(case[letter] for letter in "BCHW")
    groups = case["G"]
    x = channels_last(normal(shape, case, device))
    weight, bias = (normal((shape[1],), case, device, seed) for seed in (1, 2))

    def eager() -> torch.Tensor:
        return F.silu(F.group_norm(x, groups, weight, bias), inplace=True)

    peers = {"torch eager": eager, "torch.compile": torch.compile(eager, fullgraph=True)}
    # Torch's own kernel for the layout that it was written for: what a network in NCHW would run.
    planes = x.contiguous()
    peers["torch eager, NCHW"] = lambda: F.silu(F.group_norm(planes, groups, weight, bias), inplace=True)
    if device == "cuda":
        liger = imported("liger_kernel.ops.group_norm")
        peers["Liger, NCHW"] = liger if isinstance(liger, str) else _liger(liger, planes, groups, weight, bias)
    values = x.numel()
    return Contest(
        ops=("group_norm_summarise", "group_norm_apply"),
        ours=lambda: kernels.group_norm(x, groups, weight, bias, activation="silu"),
        peers=peers,
        # The map is read twice: its sums must be known before the first value is written.
        bytes=3 * values * item_size(case),
        flops=12 * values,
    )


def _liger(module, x, groups, weight, bias):
    def run() -> torch.Tensor:
        y = module.LigerGroupNormFunction.apply(x, weight, bias, x.shape[1], groups, 1e-5)
        return F.silu(y, inplace=True)

    return run


def test_group_norm(compete):
    compete()
