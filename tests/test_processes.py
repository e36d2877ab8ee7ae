"""Fast processes: chords and paths that can be written down, and that every random one is sound and repeatable."""

from itertools import pairwise

import numpy as np
import pytest

from xrk.processes import Crack, MeltPool, Process, Spatter, Spray, random_process

SHAPE = (64, 96)


def shadow(mover, at):
    depth = np.zeros(SHAPE, np.float32)
    mover.draw(depth, at)
    return depth


def centroid(depth):
    rows, columns = np.indices(depth.shape)
    weight = np.abs(depth)
    return (weight * rows).sum() / weight.sum(), (weight * columns).sum() / weight.sum()


def pool(**changes):
    no_pores = np.zeros((0, 5))
    values = {
        "surface": 10.0, "start": 30.0, "speed": 0.5, "deep": 20.0, "wide": 4.0, "density": 1.0, "beat": 0.3,
        "phase": 0.0, "lean": 0.0, "pores": no_pores,
    }  # fmt: skip
    return MeltPool(**values | changes)


def test_beer_lambert_and_fringes():
    still = np.zeros(SHAPE, np.float32)
    still[:, 48:] = 1.0
    signal = Process(still).signal(0.0)
    np.testing.assert_allclose(signal[:, [0, 95]], np.exp(-still[:, [0, 95]]), rtol=1e-6)
    fringed = Process(still, fringes=0.1).signal(0.0)
    # Brighter on the thin side of the edge and darker on the thick one, as refraction has it; nothing elsewhere.
    np.testing.assert_allclose(fringed[5, 46:50] / signal[5, 46:50], [1, 1.1, 0.9, 1], rtol=1e-5)


def test_a_keyhole_goes_with_its_laser_and_hollows_the_metal():
    early, late = (shadow(pool(), at) for at in (0.0, 20.0))
    mouths = [np.flatnonzero(depth[12] < -0.5).mean() for depth in (early, late)]
    np.testing.assert_allclose(mouths, [30, 40], atol=1.1)
    hollow = early < -0.3
    assert hollow[11:20, 29:32].all() and not hollow[:9].any()
    lengths = [pool().tip(at)[0] - 10 for at in range(40)]
    assert 12 < min(lengths) < 18 and 22 < max(lengths) < 28


def test_a_pore_is_born_at_the_tip_and_freezes():
    born = np.array([[4.0, 2.0, -3.0, 5.0, 10.0]])
    with_pore = pool(pores=born)
    assert np.array_equal(shadow(with_pore, 3.9), shadow(pool(), 3.9))
    places = []
    for at in (5.0, 9.0, 14.0, 40.0):
        alone = np.zeros(SHAPE, np.float32)
        alone += shadow(with_pore, at) - shadow(pool(), at)
        assert alone.min() < -0.1 and alone.max() < 1e-6
        places.append(centroid(alone))
    tip = np.array(with_pore.tip(4.0))
    np.testing.assert_allclose(places[-1], tip + 0.95 * np.array([-3, 5]), atol=0.3)
    np.testing.assert_allclose(places[-1], places[-2], atol=0.05)
    assert np.hypot(*(places[0] - tip)) < 2.5


def test_droplets_fly_and_fall():
    droplet = np.array([[2.0, -3.0, 1.0, 30.0, 0.0]])
    spatter = Spatter(surface=50.0, start=40.0, speed=0.0, density=0.1, fall=0.2, droplets=droplet)
    for age in (4.0, 10.0, 20.0):
        row, column = centroid(shadow(spatter, age))
        assert (row, column) == pytest.approx((49 - 3 * age + 0.1 * age**2, 40 + age), abs=0.05)
    slow = Spatter(50.0, 40.0, 0.0, 0.1, 0.4, droplet)
    assert not shadow(slow, 20.0).any()  # below the surface
    assert np.array_equal(shadow(spatter, 34.0), shadow(spatter, 4.0))  # it comes back
    assert shadow(spatter, 10.0).max() == pytest.approx(0.4, rel=0.05)


def test_a_jet_leaves_its_nozzle_and_its_droplets_move_on():
    core = Spray(32.0, 0.0, 0.0, 3.0, 4.0, 40.0, 15.0, 0.05, np.zeros((0, 4)), 120.0)
    depth = shadow(core, 0.0)
    assert depth[32, 1] == pytest.approx(0.4, rel=0.05)  # as deep as it is wide
    assert depth[:, 41:].max() == 0 and depth[:20].max() == 0
    drop = np.array([[2.0, 0.1, 1.0, 0.2]])
    thin = Spray(32.0, 0.0, 0.0, 3.0, 0.01, 1.0, 15.0, 0.05, drop, 120.0)
    for at in (0.0, 5.0):
        far = 24 + 3 * at
        found = np.unravel_index(shadow(thin, at).argmax(), SHAPE)
        assert found == pytest.approx((32 + far * np.sin(0.1), far * np.cos(0.1)), abs=0.8)


def test_a_crack_grows_along_its_path_by_leaps():
    path = np.array([[10.0, 10.0], [10.0, 40.0], [50.0, 40.0]])
    crack = Crack(path, start=2.0, speed=2.0, width=3.0, amount=0.5, leap=0.5)
    assert not shadow(crack, 2.0).any()
    sizes = [-shadow(crack, at).sum() for at in np.arange(2, 45, 1.0)]
    assert all(b >= a - 1e-4 for a, b in pairwise(sizes)) and sizes[-1] == sizes[-2]
    whole = shadow(crack, 60.0)
    assert whole[10, 10:40].max() == pytest.approx(-0.5) and whole[12:50, 40].max() == pytest.approx(-0.5)
    assert whole.min() == pytest.approx(-0.5)  # where its parts meet it is no deeper
    early = shadow(crack, 2 + 2 * np.pi / 0.5)  # a whole number of leaps: 8 pi pixels
    assert early[10, 33] < 0 and early[10, 40] == 0


@pytest.mark.parametrize("seed", range(8))
def test_random_processes_are_sound_and_move(seed):
    process = random_process(seed, SHAPE)
    first, later = process.signal(0.0), process.signal(15.0)
    for signal in (first, later):
        assert signal.dtype == np.float32 and np.isfinite(signal).all()
        assert signal.min() >= 0 and signal.max() <= 2
    assert np.array_equal(random_process(seed, SHAPE).signal(15.0), later)
    assert np.array_equal(process.signal(0.0), first)  # the past does not depend on what was asked before
    assert not np.array_equal(random_process(seed + 1, SHAPE).signal(0.0), first)


def test_most_random_processes_move():
    moved = []
    for seed in range(40):
        process = random_process(seed, SHAPE)
        moved.append(np.abs(process.signal(20.0) - process.signal(0.0)).max() > 0.01)
    assert np.mean(moved) > 0.9
