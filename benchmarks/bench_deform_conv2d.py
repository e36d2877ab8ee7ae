"""deform_conv2d, 3x3 with masks and offsets of about a pixel, channels-last."""

import importlib

import torch
import torch.nn.functional as F
from contest import Contest, channels_last, item_size, normal

from xrk import kernels

OP = "deform_conv2d"


def _case(channels, groups, size, dtype):
    return {"B": 1, "C": channels, "G": groups, "H": size, "W": size, "dtype": dtype}


CASES = {
    ("cpu", "tiny"): [_case(16, 2, 8, "float32")],
    ("cpu", "quick"): [_case(128, 8, 128, "float32")],
    ("cpu", "full"): [_case(128, 8, 256, "float32"), _case(64, 8, 256, "float32")],
    ("cuda", "tiny"): [_case(16, 2, 8, "float16")],
    ("cuda", "quick"): [_case(128, 8, 256, "float16")],
    ("cuda", "full"): [_case(128, 8, size, dtype) for size in (256, 512) for dtype in ("float16", "float32")],
}


def by_grid_sample(x, offset, weight, bias, mask):
    """All taps of all groups sampled at once, in columns that are then multiplied."""
    batch, channels, height, width = x.shape
    groups, taps = offset.shape[1] // 18, 9
    steps = torch.arange(3, device=x.device) - 1
    rows = torch.arange(height, device=x.device).view(-1, 1) + steps.repeat_interleave(3).view(-1, 1, 1)
    columns = torch.arange(width, device=x.device) + steps.repeat(3).view(-1, 1, 1)
    moved = offset.view(batch * groups, taps, 2, height, width)
    # grid_sample counts from -1 to 1, between the middles of the first and the last pixel, the columns first.
    grid = torch.stack(
        [(moved[:, :, 1] + columns) * (2 / (width - 1)) - 1, (moved[:, :, 0] + rows) * (2 / (height - 1)) - 1], -1
    ).to(x.dtype)
    samples = F.grid_sample(
        x.reshape(batch * groups, channels // groups, height, width),
        grid.view(batch * groups, taps * height, width, 2),
        padding_mode="zeros",
        align_corners=True,
    )
    samples = samples.view(batch, groups, channels // groups, taps, height * width)
    samples = samples * mask.reshape(batch, groups, 1, taps, height * width)
    y = weight.flatten(1) @ samples.view(batch, channels * taps, height * width)
    return (y + bias[:, None]).view(batch, -1, height, width)


def contest(case, device):
    shape = tuple(case[letter] for letter in "BCHW")
    batch, channels, height, width = shape
    groups = case["G"]
    x = channels_last(normal(shape, case, device))
    offset = channels_last(normal((batch, groups * 18, height, width), case, device, 1))
    mask = torch.sigmoid(channels_last(normal((batch, groups * 9, height, width), case, device, 2)))
    weight = normal((channels, channels, 3, 3), case, device, 3) / (3 * channels**0.5)
    bias = normal((channels,), case, device, 4)
    arguments = (x, offset, weight, bias)
    # The peers take rows of pixels; what that costs them is not theirs to pay here.
    rows = tuple(t.contiguous() for t in (*arguments, mask))
    peers = {"grid_sample": lambda: by_grid_sample(*rows)}
    try:
        operator = importlib.import_module("torchvision.ops").deform_conv2d
        peers["torchvision"] = lambda: operator(*rows[:4], padding=1, mask=rows[4])
    except (ImportError, RuntimeError) as error:
        peers["torchvision"] = f"torchvision's operators cannot be loaded ({type(error).__name__})"
    pixels = batch * height * width
    return Contest(
        ops=(OP,),
        ours=lambda: kernels.deform_conv2d(*arguments, mask=mask, padding=1),
        peers=peers,
        bytes=(2 * x.numel() + offset.numel() + mask.numel() + weight.numel()) * item_size(case),
        flops=pixels * 9 * channels * (2 * channels + 8),
    )


def test_deform_conv2d(compete):
    compete()
