"""The two cameras: what they count on average, its noise, their grids, blurs and shutters."""

from dataclasses import replace

import numpy as np
import pytest

from xrk.cameras import Cameras
from xrk.processes import Process, random_process
from xrk.simulate import blur

SHARP = Cameras(lr_blur=0.0, hr_blur=0.0, lr_shutter=0.0, hr_shutter=0.0, read_noise=0.0)
BRIGHT = replace(SHARP, lr_quanta=1e9, hr_quanta=1e9)


class Slider:
    """A plate whose edge moves two columns a frame."""

    def draw(self, depth, time):
        depth[:, : round(20 + 2 * time)] += 1.0


def plain(value, shape=(64, 64)):
    return Process(np.full(shape, value, np.float32))


def test_counts_and_noise_are_those_of_the_dose():
    cameras = replace(SHARP, lr_quanta=900.0, hr_quanta=400.0, read_noise=50.0)
    process = plain(0.5, (400, 400))
    level = np.exp(-0.5)
    expected = cameras.black + level * (cameras.white - cameras.black)
    for frame, quanta in ((cameras.lr_frame(process, 0, 7), 900.0), (cameras.hr_frame(process, 0, 7), 400.0)):
        assert frame.dtype == np.uint16
        assert frame.mean() == pytest.approx(expected, rel=3e-3)
        variance = level * (cameras.white - cameras.black) ** 2 / quanta + 50.0**2
        assert frame.var() == pytest.approx(variance, rel=0.05)
    assert cameras.truth(process, 3).max() == pytest.approx(expected, rel=1e-5)


def test_without_noise_lr_pixels_are_means_of_the_truth():
    process = random_process(5, (48, 64))
    truth = BRIGHT.truth(process, 4)
    low = BRIGHT.lr_frame(process, 4, 0)
    assert low.shape == (12, 16)
    np.testing.assert_allclose(low, np.clip(truth, 0, 65535).reshape(12, 4, 16, 4).mean((1, 3)), atol=6)
    np.testing.assert_allclose(BRIGHT.hr_frame(process, 0, 0), np.clip(BRIGHT.truth(process, 0), 0, 65535), atol=6)


def test_a_shutter_blurs_what_moves_and_key_frames_are_apart():
    process = Process(np.zeros((16, 96), np.float32), (Slider(),))
    high = replace(BRIGHT, ratio=10).hr_frame(process, 3, 0)
    assert (high[4] < 30000).sum() == 80  # at LR frame 30
    still = BRIGHT.lr_frame(process, 10, 0)[2]
    opened = replace(BRIGHT, lr_shutter=4.0).lr_frame(process, 10, 0)[2]
    edge = [int(((frame > 16000) & (frame < 39500)).sum()) for frame in (still, opened)]
    assert edge[0] == 0 and edge[1] >= 2
    assert opened.mean() == pytest.approx(still.mean(), rel=0.02)


def test_a_blur_is_in_the_cameras_own_pixels():
    process = random_process(2, (64, 64))
    truth = BRIGHT.truth(process, 0)
    low = replace(BRIGHT, lr_blur=0.6).lr_frame(process, 0, 0)
    np.testing.assert_allclose(low, blur(truth, 2.4).reshape(16, 4, 16, 4).mean((1, 3)), atol=6)
    high = replace(BRIGHT, hr_blur=0.8)
    np.testing.assert_allclose(high.hr_frame(process, 0, 0), blur(truth, 0.8), atol=6)
    np.testing.assert_allclose(high.truth(process, 0), blur(truth, 0.8), rtol=1e-6)


def test_a_grid_may_be_shifted():
    rows, columns = np.mgrid[:64, :64].astype(np.float32)
    ramp = Process(-np.log(0.2 + 0.004 * rows + 0.006 * columns))
    low = BRIGHT.lr_frame(ramp, 0, 0).astype(float)
    moved = replace(BRIGHT, shift=(1.5, -0.5)).lr_frame(ramp, 0, 0).astype(float)
    difference = (moved - low)[1:-1, 1:-1] / (BRIGHT.white - BRIGHT.black)
    np.testing.assert_allclose(difference, 1.5 * 0.004 - 0.5 * 0.006, atol=1e-4)


def test_records_repeat_and_their_frames_do_not_depend_on_each_other():
    process, cameras = random_process(9, (32, 48)), Cameras(ratio=4)
    low, high, truth = cameras.record(process, 9, seed=3)
    assert (low.shape, high.shape, truth.shape) == ((9, 8, 12), (3, 32, 48), (9, 32, 48))
    again = cameras.record(process, 9, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip((low, high, truth), again, strict=True))
    assert np.array_equal(low[6], cameras.lr_frame(process, 6, 3))
    assert np.array_equal(high[2], cameras.hr_frame(process, 2, 3))
    assert not np.array_equal(low, cameras.record(process, 9, seed=4)[0])
    assert cameras.record(process, 8, seed=3)[1].shape[0] == 2
