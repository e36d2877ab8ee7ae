"""The simulator against geometry and statistics that can be written down."""

import numpy as np
import pytest

from xrk.scenes import housing, random_scene
from xrk.simulate import (
    ENERGIES,
    MATERIALS,
    Detector,
    Geometry,
    Placing,
    Scene,
    blur,
    radiate,
    rotation,
    spectrum,
    to_uint16,
    transmit,
)

# Odd, so that a pixel lies on the axis; the source is far, so that the middle rays are nearly parallel.
GEOMETRY = Geometry((101, 131), 0.2, source_to_detector=10000.0, source_to_object=9900.0)
AT = Placing()


def thickness(*solids, cut=()):
    scene = Scene()
    scene.add("iron", *solids)
    for other in cut:
        scene.cut("iron", *solids, other)
    return scene.thickness(GEOMETRY).get("iron", np.zeros(GEOMETRY.shape))


def test_chord_through_a_ball():
    length = thickness(AT.ball([0, 0, 0], 5))
    x = (np.arange(131) - 65) * 0.2 * 9900 / 10000
    y = (np.arange(101) - 50) * 0.2 * 9900 / 10000
    expected = 2 * np.sqrt(np.maximum(25 - x[None] ** 2 - y[:, None] ** 2, 0))
    assert length[50, 65] == pytest.approx(10, rel=1e-4)
    np.testing.assert_allclose(length, expected, atol=0.02)


def test_chord_through_a_small_ball_far_from_the_source():
    assert thickness(AT.ball([0, 0, 0], 0.15))[50, 65] == pytest.approx(0.3, rel=2e-3)


def test_box_and_cylinder_along_and_across():
    assert thickness(AT.box([0, 0, 0], [4, 6, 7]))[50, 65] == pytest.approx(7, rel=1e-4)
    assert thickness(AT.cylinder([0, 0, 0], 3, 8))[50, 65] == pytest.approx(8, rel=1e-4)
    across = AT.cylinder([0, 0, 0], 3, 8, rotation(x=np.pi / 2))
    assert thickness(across)[50, 65] == pytest.approx(6, rel=1e-4)
    tilted = AT.box([0, 0, 0], [40, 40, 5], rotation(x=0.5))
    assert thickness(tilted)[50, 65] == pytest.approx(5 / np.cos(0.5), rel=1e-4)


def test_cut_takes_away_exactly_what_it_covers():
    plate, bore = AT.box([0, 0, 0], [20, 16, 5]), AT.cylinder([0, 0, 1], 2, 2)
    length = thickness(plate, cut=[bore])
    assert length[50, 65] == pytest.approx(3, rel=1e-4)
    assert length[50, 65 + 25] == pytest.approx(5, rel=1e-3)


def test_windows_lose_nothing():
    geometry = Geometry((96, 80), 1.0, source_to_detector=300.0, source_to_object=150.0)
    whole = Geometry((96, 80), 1.0, source_to_detector=300.0, source_to_object=150.0)
    object.__setattr__(whole, "window", lambda centre, radius: (slice(0, 96), slice(0, 80)))
    scene = random_scene(3, 40.0)
    for material, length in scene.thickness(geometry).items():
        np.testing.assert_array_equal(length, scene.thickness(whole)[material])


def test_beer_lambert_one_energy():
    weights = np.zeros(len(ENERGIES))
    weights[5] = 1
    length = np.full((4, 5), 3.0, np.float32)
    signal = transmit({"aluminium": length}, (4, 5), weights)
    np.testing.assert_allclose(signal, np.exp(-3 * MATERIALS["aluminium"][5]), rtol=1e-6)


def test_spectrum_hardens_with_the_filter():
    mean = [spectrum(120.0, {"copper": mm}) @ ENERGIES for mm in (0.1, 0.5, 2.0)]
    assert mean == sorted(mean)
    assert spectrum().sum() == pytest.approx(1)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0])
def test_blur_keeps_the_mean_and_has_its_width(sigma):
    impulse = np.zeros((65, 65), np.float32)
    impulse[32, 32] = 1
    spread = blur(impulse, sigma)
    assert spread.sum() == pytest.approx(1, rel=1e-5)
    if sigma >= 1:
        x = np.arange(65) - 32
        assert np.sqrt((spread.sum(0) * x**2).sum()) == pytest.approx(sigma, rel=0.02)
    constant = np.full((9, 70), 7.0, np.float32)
    np.testing.assert_allclose(blur(constant, sigma), 7, rtol=1e-5)


def test_detector_statistics():
    signal = np.full((400, 400), 0.5, np.float32)
    detector = Detector(gain=4.0, offset=100.0, read_noise=6.0, light_spread=0.0)
    counts = detector.expose(signal, 200, seed=0)
    assert counts.mean() == pytest.approx(100 + 4 * 100, rel=1e-3)
    assert counts.mean() == pytest.approx(float(detector.expected(signal, 200).mean()), rel=1e-3)
    assert counts.var() == pytest.approx(16 * 100 + 36, rel=0.02)
    correlated = Detector(gain=4.0, offset=0.0, read_noise=0.0, light_spread=0.55).expose(signal, 200, seed=0)
    centred = correlated - correlated.mean()
    tap = np.exp(-0.5 / 0.55**2)  # of a neighbour, relative to the pixel's own
    assert (centred[:, 1:] * centred[:, :-1]).mean() / centred.var() == pytest.approx(
        2 * tap / (1 + 2 * tap**2), abs=0.02
    )
    np.testing.assert_array_equal(counts, detector.expose(signal, 200, seed=0))


def test_housing_looks_the_same_at_every_size():
    small = radiate(housing(), Geometry((64, 64), 204.8 / 64), unsharpness=0)
    large = radiate(housing(), Geometry((256, 256), 204.8 / 256), unsharpness=0)
    assert np.corrcoef(small.ravel(), large.reshape(64, 4, 64, 4).mean((1, 3)).ravel())[0, 1] > 0.98
    assert 0.005 < small.min() < 0.1 < 0.9 < small.max() < 1.1


@pytest.mark.parametrize("seed", range(12))
def test_random_scenes_are_sound(seed):
    geometry = Geometry((48, 64), 1.0)
    signal = radiate(random_scene(seed, 60.0), geometry)
    assert np.isfinite(signal).all()
    assert signal.min() >= 0
    assert signal.max() < 1.3
    np.testing.assert_array_equal(signal, radiate(random_scene(seed, 60.0), geometry))


def test_to_uint16_rounds_and_clips():
    np.testing.assert_array_equal(to_uint16(np.array([-3.0, 0.5, 1.5, 70000.0])), np.array([0, 0, 2, 65535], "u2"))
