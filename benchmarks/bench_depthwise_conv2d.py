"""depthwise_conv2d with bias and SiLU, channels-last."""

import torch
import torch.nn.functional as F
from contest import Contest, channels_last, item_size, normal

from xrk import kernels

OP = "depthwise_conv2d"


def _case(channels, size, kernel, dilation, dtype):
    return {"B": 1, "C": channels, "H": size, "W": size, "K": kernel, "dilation": dilation, "dtype": dtype}


CASES = {
    ("cpu", "tiny"): [_case(16, 8, 3, 1, "float32")],
    ("cpu", "quick"): [_case(96, 256, 3, 1, "float32")],
    ("cpu", "full"): [
        _case(96, 512, 3, 1, "float32"),
        _case(192, 512, 3, 1, "float32"),
        _case(96, 512, 5, 1, "float32"),
        _case(96, 512, 3, 2, "float32"),
    ],
    ("cuda", "tiny"): [_case(16, 8, 3, 1, "float16")],
    ("cuda", "quick"): [_case(96, 2048, 3, 1, "float16"), _case(192, 2048, 3, 1, "float16")],
    ("cuda", "full"): [
        *(_case(96, size, 3, 1, "float16") for size in (1024, 2048, 4096)),
        *(_case(192, 2048, 3, 1, dtype) for dtype in ("float16", "float32")),
        _case(96, 2048, 5, 1, "float16"),
        _case(96, 2048, 3, 2, "float16"),
    ],
}


def contest(case, device):
    shape = tuple(case[letter] for letter in "BCHW")
    channels, kernel, dilation = shape[1], case["K"], case["dilation"]
    x = channels_last(normal(shape, case, device))
    weight = normal((channels, 1, kernel, kernel), case, device, 1) / kernel
    bias = normal((channels,), case, device, 2)
    padding = kernel // 2 * dilation

    def eager() -> torch.Tensor:
        y = F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=channels)
        return F.silu(y, inplace=True)

    values = x.numel()
    return Contest(
        ops=(OP,),
        ours=lambda: kernels.depthwise_conv2d(x, weight, bias, dilation, "silu"),
        peers={"torch eager": eager, "torch.compile": torch.compile(eager, fullgraph=True)},
        bytes=2 * values * item_size(case),
        flops=(2 * kernel**2 + 4) * values,
    )


def test_depthwise_conv2d(compete):
    compete()
