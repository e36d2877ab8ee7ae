"""The layers' Triton kernels under Triton's interpreter, against float64: run by test_interpreted_layers.py with
TRITON_INTERPRET=1, in a process of its own, since that is decided when Triton is imported."""

import torch
import torch.nn.functional as F
from xrk.kernels import launch
from xrk.kernels.convolution import triton_conv2d, triton_depthwise_conv2d
from xrk.kernels.deformable import triton_deform_conv2d
from xrk.kernels.deformable.deform_conv2d import deform_conv2d_reference
from xrk.kernels.normalization import triton_group_norm, triton_layer_norm
from xrk.kernels.normalization.group_norm import group_norm_summarise_reference
from xrk.kernels.wavelet import triton_wavelet2d
from xrk.kernels.wavelet.wavelet2d import wavelet2d_inverse_reference, wavelet2d_reference

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


def wavelet2d():
    for wavelet in ("db4", "haar"):
        for shape in [(1, 1, 1), (2, 5, 14), (1, 23, 2), (3, 8, 9)]:
            x = normal(shape, torch.float32)
            expected = wavelet2d_reference(x.double(), wavelet)
            bands = torch.full(expected.shape, torch.nan)
            triton_wavelet2d.wavelet2d(x, wavelet, shape[0], bands)
            check(bands, expected, f"wavelet2d {wavelet} {shape}")
            expected = wavelet2d_inverse_reference(bands.double(), wavelet)
            image = torch.full(expected.shape, torch.nan)
            triton_wavelet2d.wavelet2d_inverse(bands, wavelet, shape[0], image)
            check(image, expected, f"wavelet2d_inverse {wavelet} {shape}")


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


def map_of(shape, dtype):
    return normal(shape, dtype).contiguous(memory_format=torch.channels_last)


def weights(shape, dtype):
    return (normal(shape, torch.float64) / (shape[1] * shape[2] * shape[3]) ** 0.5).to(dtype)


def exact_epilogue(y, residual, activation, add_first):
    y = y if residual is None or not add_first else y + residual.double()
    if activation == "leaky_relu":
        y = F.leaky_relu(y, 0.1)
    elif activation is not None:
        y = torch.sigmoid(y) if activation == "sigmoid" else getattr(F, activation)(y)
    return y if residual is None or add_first else y + residual.double()


def conv2d():
    # (B, H, W), C, O, K: one pixel, from one channel, to one channel, and through the products of matrices
    cases = [((1, 1, 1), 1, 1, 3), ((2, 9, 17), 1, 5, 3), ((1, 3, 37), 20, 1, 3), ((1, 9, 18), 20, 33, 3)]
    cases += [((1, 1, 19), 48, 3, 1)]
    activations = ["silu", "relu", None, "gelu", "leaky_relu", "sigmoid"]
    for dtype in TOLERANCE:
        for number, ((batch, height, width), channels, outputs, kernel) in enumerate(cases):
            activation, add_first = activations[number], number % 2 == 1
            x = map_of((batch, channels, height, width), dtype)
            weight = weights((outputs, channels, kernel, kernel), dtype)
            bias = None if number == 2 else normal(outputs, torch.float32)
            residual = None if number == 0 else map_of((batch, outputs, height, width), dtype)
            out = torch.full_like(map_of((batch, outputs, height, width), dtype), torch.nan)
            parts = triton_conv2d.conv2d(x, weight, bias, residual, activation, 0.1, add_first, out, number != 2)
            b64 = None if bias is None else bias.double()
            expected = F.conv2d(x.double(), weight.double(), b64, padding=kernel // 2)
            what = f"conv2d {cases[number]}, {dtype}"
            check(out, exact_epilogue(expected, residual, activation, add_first), what)
            if parts is None:
                continue
            # Of the output as it is stored; the deviations of one pixel are zero.
            state, stored = triton_conv2d.merge(parts, outputs), group_norm_summarise_reference(out, outputs)
            torch.testing.assert_close(state, stored, rtol=4e-6, atol=1e-6, msg=what)
    out = map_of((1, 16, 9, 5), torch.float32)
    weight, bias = torch.zeros(16, 16, 1, 1), torch.full((16,), 1e4)
    parts = triton_conv2d.conv2d(out, weight, bias, out.clone(), None, 0.0, False, out, True)
    state = triton_conv2d.merge(parts, 4)
    torch.testing.assert_close(state, group_norm_summarise_reference(out, 4), rtol=1e-6, atol=0)


def conv2d_pair():
    launch.CONV2D_PAIR["programs"] = 2  # fewer than tiles: a program's place between the two is taken again
    for dtype in TOLERANCE:
        for (height, width), with_residual in (((17, 35), True), ((1, 2), False)):
            x = map_of((2, 5, height, width), dtype)
            weight1, weight2 = weights((18, 5, 3, 3), dtype), weights((7, 18, 3, 3), dtype)
            bias1, bias2 = normal(18, dtype), normal(7, torch.float32)
            residual = map_of((2, 7, height, width), dtype) if with_residual else None
            out = torch.full_like(map_of((2, 7, height, width), dtype), torch.nan)
            acts, biases = ("gelu", "leaky_relu"), (bias1, bias2 if with_residual else None)
            triton_conv2d.conv2d_pair(x, (weight1, weight2), biases, residual, acts, 0.1, with_residual, out)
            between = F.gelu(F.conv2d(x.double(), weight1.double(), bias1.double(), padding=1)).to(dtype).double()
            b64 = bias2.double() if with_residual else None
            expected = F.conv2d(between, weight2.double(), b64, padding=1)
            check(out, exact_epilogue(expected, residual, "leaky_relu", with_residual), f"conv2d_pair {dtype}")


def deform_conv2d():
    # x, outputs, groups, deformable groups, kernel, stride, padding, dilation
    cases = [((2, 6, 7, 5), 17, 1, 2, (2, 3), 1, 1, 1), ((1, 40, 9, 11), 6, 2, 1, (2, 2), 2, 1, 2)]
    cases += [((1, 32, 3, 4), 5, 1, 1, (1, 2), 1, 0, 1)]
    for dtype in TOLERANCE:
        for shape, outputs, groups, moved, kernel, stride, padding, dilation in cases:
            taps = kernel[0] * kernel[1]
            height, width = (
                (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(shape[2:], kernel, strict=True)
            )
            x, weight = map_of(shape, dtype), weights((outputs, shape[1] // groups, *kernel), dtype)
            both = map_of((shape[0], 3 * moved * taps, height, width), torch.float32)
            both[0, 0, 0, 0], both[0, 1, 1, 0] = 1e30, -torch.inf
            offset, mask = both[:, : 2 * moved * taps], both[:, 2 * moved * taps :]
            numbers = (stride, padding, dilation)
            for b, m in ((normal(outputs, dtype), mask), (None, None)):
                out = torch.full_like(map_of((shape[0], outputs, height, width), dtype), torch.nan)
                triton_deform_conv2d.deform_conv2d(x, offset, m, weight, b, *numbers, 0, out)
                doubles = (None if t is None else t.double() for t in (x, offset, weight, b, m))
                expected = deform_conv2d_reference(*doubles, *numbers)
                check(out, expected, f"deform_conv2d {shape}, {dtype}")
                # The rows from the second on by themselves.
                rows, lower = torch.full_like(out[:, :, 1:], torch.nan), None if m is None else m[:, :, 1:]
                rows = rows.contiguous(memory_format=torch.channels_last)
                triton_deform_conv2d.deform_conv2d(x, offset[:, :, 1:], lower, weight, b, *numbers, stride, rows)
                check(rows, expected[:, :, 1:], f"deform_conv2d from row 1, {shape}, {dtype}")
    offset[0, 0, 2, 0] = torch.nan
    triton_deform_conv2d.deform_conv2d(x, offset, None, weight, None, *numbers, 0, out)
    assert out[0, :, 2, 0].isnan().all() and out.isnan().sum() == outputs


if __name__ == "__main__":
    torch.manual_seed(0)
    layer_norm()
    depthwise_conv2d()
    group_norm()
    conv2d()
    conv2d_pair()
    wavelet2d()
    deform_conv2d()
    print("all equal")
