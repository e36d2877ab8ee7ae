"""The layers' Triton kernels under Triton's interpreter, against float64: run by test_interpreted_layers.py with
TRITON_INTERPRET=1, in a process of its own, since that is decided when Triton is imported."""

import torch
import torch.nn.functional as F
from xrk.kernels import launch
from xrk.kernels.convolution import triton_depthwise_conv2d
from xrk.kernels.normalization import triton_group_norm, triton_layer_norm
from xrk.kernels.normalization.group_norm import group_norm_summarise_reference

# The interpreter truncates where it should round to bfloat16.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.6e-2}


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


def exact_group_norm(x, groups, weight, bias, silu):
    values = x.double().reshape(x.shape[0], groups, -1)
    values = values - values.mean(-1, keepdim=True)
    y = (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-5)).reshape(x.shape)
    y = y if weight is None else y * weight.double()[:, None, None]
    y = y if bias is None else y + bias.double()[:, None, None]
    return F.silu(y) if silu else y


def group_norm():
    launch.GROUP_NORM["values"], launch.GROUP_NORM["programs"] = 256, 5  # several chunks and blocks of small maps
    shapes = [((1, 1, 1, 1), 1), ((2, 6, 7, 1), 3), ((1, 33, 1, 19), 33), ((1, 48, 17, 31), 8), ((2, 130, 3, 5), 1)]
    for dtype in TOLERANCE:
        for shape, groups in shapes:
            mean = 1e4 if dtype == torch.float32 else 3.0
            x = normal(shape, dtype, mean).contiguous(memory_format=torch.channels_last)
            x[0, 0, 0, 0] = 0.0  # a dead pixel, and just where a chunk begins
            what = f"group_norm {shape} in {groups}, {dtype}"
            state, expected = triton_group_norm.summarise(x, groups), group_norm_summarise_reference(x, groups)
            torch.testing.assert_close(state, expected, rtol=2e-6, atol=0, msg=what)
            torch.testing.assert_close(state[..., 1], expected[..., 1], rtol=1e-7, atol=1e-7, msg=what)
            weight, bias = normal(shape[1], dtype), normal(shape[1], torch.float32)
            for w, b, silu in [(weight, bias, True), (None, None, False), (None, bias, True)]:
                out = torch.full(shape, torch.nan, dtype=dtype).contiguous(memory_format=torch.channels_last)
                triton_group_norm.apply(x, state, w, b, 1e-5, silu, out)
                check(out, exact_group_norm(x, groups, w, b, silu), what)
    even = torch.full((1, 8, 33, 21), 4711.3).contiguous(memory_format=torch.channels_last)
    assert (triton_group_norm.summarise(even, 2)[..., 2] == 0).all()


if __name__ == "__main__":
    torch.manual_seed(0)
    layer_norm()
    depthwise_conv2d()
    group_norm()
    print("all equal")
