"""layer_norm over channels, with and without a gate."""

import torch
import torch.nn.functional as F
from contest import Contest, imported, item_size, normal

from xrk import kernels

OP = "layer_norm"


def _case(size, channels, gate, dtype):
    return {"B": 1, "H": size, "W": size, "C": channels, "gate": gate, "dtype": dtype}


CASES = {
    ("cpu", "tiny"): [_case(8, 16, 1, "float32")],
    ("cpu", "quick"): [_case(256, 96, 1, "float32"), _case(256, 96, 0, "float32")],
    ("cpu", "full"): [_case(512, 96, 1, "float32"), _case(512, 192, 1, "float32"), _case(512, 96, 0, "float32")],
    ("cuda", "tiny"): [_case(8, 16, 1, "float16")],
    ("cuda", "quick"): [_case(2048, 96, 1, "float16"), _case(2048, 192, 1, "float16"), _case(2048, 192, 0, "float16")],
    ("cuda", "full"): [
        *(_case(size, 96, 1, "float16") for size in (1024, 2048, 4096)),
        *(_case(2048, 192, gate, dtype) for gate in (0, 1) for dtype in ("float16", "float32")),
        _case(2048, 512, 1, "float16"),
    ],
}


def contest(case, device):
    shape = tuple(case[letter] for letter in "BHWC")
    x = normal(shape, case, device)
    gate = normal(shape, case, device, 1) if case["gate"] else None
    weight, bias = (normal(shape[-1:], case, device, seed) for seed in (2, 3))

    def eager() -> torch.Tensor:
        y = F.layer_norm(x, shape[-1:], weight, bias)
        return y if gate is None else y * F.silu(gate)

    peers = {"torch eager": eager, "torch.compile": torch.compile(eager, fullgraph=True)}
    if device == "cuda":
        liger = imported("liger_kernel.ops.layer_norm")
        peers["Liger"] = liger if isinstance(liger, str) else _liger(liger, x, weight, bias, gate)
    values = x.numel()
    return Contest(
        ops=(OP,),
        ours=lambda: kernels.layer_norm(x, weight, bias, gate),
        peers=peers,
        bytes=(3 if case["gate"] else 2) * values * item_size(case),
        # Sums of the values and of their squares, three operations to apply; a gate is an exponential and three more.
        flops=(12 if case["gate"] else 8) * values,
    )


def _liger(module, x, weight, bias, gate):
    def run() -> torch.Tensor:
        y = module.LigerLayerNormFunction.apply(x, weight, bias, 1e-5)
        return y if gate is None else y * F.silu(gate)

    return run


def test_layer_norm(compete):
    compete()
