"""Two 3x3 convolutions in a row with ReLU between them and a residual, as a residual block has them."""

import torch
import torch.nn.functional as F
from contest import Contest, channels_last, item_size, normal
from xrk.kernels import launch

from xrk import kernels

OP = "conv2d_pair"


def _case(channels, size, dtype):
    return {"B": 1, "C": channels, "H": size, "W": size, "dtype": dtype}


CASES = {
    ("cpu", "tiny"): [_case(8, 8, "float32")],
    ("cpu", "quick"): [_case(32, 256, "float32")],
    ("cpu", "full"): [_case(32, 512, "float32"), _case(48, 512, "float32")],
    ("cuda", "tiny"): [_case(8, 8, "float16")],
    ("cuda", "quick"): [_case(32, 2048, "float16")],
    ("cuda", "full"): [_case(channels, 2048, "float16") for channels in (16, 32, 48, 64)],
}


def contest(case, device):
    b, c, h, w = (case[letter] for letter in "BCHW")
    x = channels_last(normal((b, c, h, w), case, device))
    weights = [normal((c, c, 3, 3), case, device, seed) / (3 * c**0.5) for seed in (1, 2)]
    biases = [normal((c,), case, device, seed) for seed in (3, 4)]

    def eager() -> torch.Tensor:
        y = F.relu(F.conv2d(x, weights[0], biases[0], padding=1), inplace=True)
        return F.conv2d(y, weights[1], biases[1], padding=1).add_(x)

    fused = launch.conv2d_pair_in_triton((c, c, c), case["dtype"])
    return Contest(
        # As the operator itself chooses: two of conv2d where a map between them is no loss.
        ops=(OP if fused else "conv2d",),
        ours=lambda: kernels.conv2d_pair(x, weights[0], biases[0], weights[1], biases[1], x),
        peers={"torch eager": eager, "torch.compile": torch.compile(eager, fullgraph=True)},
        # The residual is the input: read once.
        bytes=2 * x.numel() * item_size(case),
        flops=2 * 2 * 9 * c * x.numel(),
        flops_dtype=case["dtype"] if device == "cuda" else "float32",
    )


def test_conv2d_pair(compete):
    compete()
