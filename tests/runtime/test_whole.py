import threading

import numpy as np
import pytest
import torch
from torch import nn

from xrk.errors import InputError
from xrk.runtime.whole import resize_cubic, run_whole


class Recorder(nn.Module):
    """Gives its input back and keeps it."""

    def forward(self, x):
        self.seen = x.clone()
        return x


class Half(nn.Module):
    """Mean over 2 x 2 pixels: an output of half the resolution."""

    def forward(self, x):
        return nn.functional.avg_pool2d(x, 2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 7), (3, 1), (5, 9), (31, 33), (32, 64), (40, 3)])
def test_padding_is_numpys_reflection_at_the_bottom_and_right(shape):
    x = torch.rand(1, 1, *shape)
    module = Recorder()
    y = run_whole(module, x, 32)
    bottom, right = (-side % 32 for side in shape)
    expected = x[0, 0].numpy()
    for axis, width in enumerate((bottom, right)):
        pads = [(0, 0), (0, 0)]
        pads[axis] = (0, width)
        expected = np.pad(expected, pads, mode="edge" if shape[axis] == 1 else "reflect")
    np.testing.assert_array_equal(module.seen[0, 0].numpy(), expected)
    np.testing.assert_array_equal(y, x)


def test_a_module_that_works_in_place_leaves_the_input_alone():
    x = torch.randn(1, 1, 8, 8)
    kept = x.clone()
    y = run_whole(nn.ReLU(inplace=True), x, 8)
    assert torch.equal(x, kept)
    assert torch.equal(y, kept.clamp(min=0))


def test_half_resolution_output_comes_back_at_full_size():
    x = torch.rand(1, 1, 37, 50)
    y = run_whole(Half(), x, 32, 0.5)
    assert y.shape == x.shape
    padded = np.pad(x[0, 0].numpy(), ((0, 27), (0, 14)), mode="reflect")
    small = padded.reshape(32, 2, 32, 2).mean(axis=(1, 3))
    expected = resize_cubic(torch.from_numpy(small)[None, None], (64, 64))[..., :37, :50]
    np.testing.assert_allclose(y, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (16, 20), (13, 21)])
@pytest.mark.parametrize("factor", [2, 3])
def test_resize_is_pillows_bicubic_in_float(shape, factor):
    image = pytest.importorskip("PIL.Image")
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    size = (shape[0] * factor, shape[1] * factor)
    expected = np.asarray(image.fromarray(x).resize(size[::-1], image.Resampling.BICUBIC))
    np.testing.assert_allclose(resize_cubic(torch.from_numpy(x), size), expected, atol=2e-6)


def test_resize_keeps_a_plane_inside():
    # Keys' kernel with a = -0.5 reproduces polynomials up to degree 2; new pixel i lies at i / 2 - 1 / 4.
    row, column = np.mgrid[0:12, 0:10].astype(np.float64)
    y = resize_cubic(torch.from_numpy(3 * row - 2 * column + 0.1 * row * row), (24, 20)).numpy()
    row, column = np.mgrid[0:24, 0:20] / 2 - 0.25
    inside = np.s_[4:-4, 4:-4]
    np.testing.assert_allclose(y[inside], (3 * row - 2 * column + 0.1 * row * row)[inside], atol=1e-12)


@pytest.mark.parametrize(
    ("module", "given"),
    [(Half(), r"\(1, 1, 16, 16\)"), (nn.Conv2d(1, 2, 1), r"\(1, 2, 32, 32\)"), (nn.LSTM(32, 4), "tuple")],
)
def test_another_output_shape_is_named(module, given):
    x = torch.rand(1, 1, 30, 30)
    if isinstance(module, nn.LSTM):
        module.forward = lambda x: (x, x)
    with pytest.raises(InputError, match=f"{given}.*expected"):
        run_whole(module, x, 32)


def test_products_are_full_float32_and_the_callers_settings_come_back():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append((torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision))
            seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), torch.backends.cudnn.deterministic))
            return x

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            run_whole(Spy(), torch.rand(1, 1, 4, 4))
            assert torch.is_autocast_enabled("cpu")
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen[0][1] == "ieee"
    assert seen[1] == (False, False, True)


def test_the_settings_hold_while_any_thread_is_inside():
    first_in, second_in, first_left = threading.Event(), threading.Event(), threading.Event()
    seen = []

    class First(nn.Module):
        def forward(self, x):
            first_in.set()
            assert second_in.wait(10)
            return x

    class Second(nn.Module):
        def forward(self, x):
            second_in.set()
            assert first_left.wait(10)
            seen.append(torch.backends.mkldnn.matmul.fp32_precision)
            return x

    before = torch.get_float32_matmul_precision()
    x = torch.rand(1, 1, 4, 4)
    try:
        torch.set_float32_matmul_precision("medium")
        first = threading.Thread(target=run_whole, args=(First(), x))
        second = threading.Thread(target=run_whole, args=(Second(), x))
        first.start()
        assert first_in.wait(10)
        second.start()
        first.join(10)
        first_left.set()
        second.join(10)
        assert seen == ["ieee"]
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)
