"""The layers' Triton kernels under Triton's interpreter, against float64: run by test_interpreted_layers.py with
TRITON_INTERPRET=1, in a process of its own, since that is decided when Triton is imported."""

import torch
import torch.nn.functional as F
from xrk.kernels.convolution import triton_depthwise_conv2d
from xrk.kernels.normalization import triton_layer_norm

# The interpreter truncates where it should round to bfloat16.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.6e-2}


def normal(shape, dtype, mean=0.0):
    return (torch.randn(shape, dtype=torch.float64) + mean).to(dtype)


def check(actual, expected, what):
    scale = max(1.0, expected.abs().max().item())
    error = (actual.double() - expected).abs().max().item() / scale
    assert error <= TOLERANCE[actual.dtype], f"{what}: {error}"


def layer_norm():
    for dtype in TOLERANCE:
        for pixels, channels, mean in [(1, 1, 0), (7, 33, 0), (61, 96, 1e4 if dtype == torch.float32 else 0)]:
            both = normal((pixels, 2 * channels), dtype, mean)
            x, gate = both[:, :channels], normal((pixels, 2 * channels), dtype)[:, channels:]
            weight, bias = normal(channels, dtype), normal(channels, torch.float32).to(dtype)
            for w, b, g in [(weight, bias, gate), (None, None, None), (weight, None, gate)]:
                out = torch.full((pixels, channels), torch.nan, dtype=dtype)
                stride = 2 * channels
                triton_layer_norm.layer_norm(x, stride, w, b, g, 0 if g is None else stride, 1e-5, out)
                w64, b64 = (None if t is None else t.double() for t in (w, b))
                expected = F.layer_norm(x.double(), (channels,), w64, b64)
                expected = expected if g is None else expected * F.silu(g.double())
                check(out, expected, f"layer_norm {pixels} x {channels}, {dtype}")


def depthwise_conv2d():
    shapes = [(1, 1, 1, 1), (2, 33, 3, 5), (1, 7, 1, 37), (1, 4, 5, 1)]
    for number, dtype in enumerate(TOLERANCE):
        for shape in shapes:
            kernel, dilation = (3, 1) if number % 2 == 0 else (5, 2)
            x = normal(shape, dtype).contiguous(memory_format=torch.channels_last)
            weight, bias = normal((shape[1], 1, kernel, kernel), dtype), normal(shape[1], dtype)
            for b, silu in [(bias, True), (None, False)]:
                out = torch.full(shape, torch.nan, dtype=dtype).contiguous(memory_format=torch.channels_last)
                triton_depthwise_conv2d.depthwise_conv2d(x, weight, b, dilation, silu, out)
                b64 = None if b is None else b.double()
                padding = kernel // 2 * dilation
                expected = F.conv2d(
                    x.double(), weight.double(), b64, padding=padding, dilation=dilation, groups=shape[1]
                )
                check(out, F.silu(expected) if silu else expected, f"depthwise_conv2d {shape}, {dtype}")


if __name__ == "__main__":
    torch.manual_seed(0)
    layer_norm()
    depthwise_conv2d()
    print("all equal")
