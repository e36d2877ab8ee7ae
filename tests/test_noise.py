import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from xrk.errors import InputError, InputTypeError
from xrk.noise import NoiseModel


def draws(quanta, gain, offset, read_noise, shape=(500, 800)):
    """Counts (float64) of one mean, `quanta`."""
    rng = np.random.default_rng(1)
    return gain * rng.poisson(quanta, shape) + offset + read_noise * rng.standard_normal(shape)


# --- the model


def test_variance_is_a_line_from_the_offset_on():
    model = NoiseModel(2.0, 100.0, 5.0)
    assert model.intercept == 25 - 200
    np.testing.assert_allclose(model.variance([50.0, 100.0, 300.0]), [25.0, 25.0, 425.0])
    assert json.loads(json.dumps(model.to_dict())) == {
        "gain": 2.0,
        "offset": 100.0,
        "read_noise": 5.0,
        "source": "given",
    }


def test_numpy_scalars_become_floats():
    model = NoiseModel(np.float32(2), np.int64(100), np.float64(5))
    assert [type(v) for v in (model.gain, model.offset, model.read_noise)] == [float] * 3


@pytest.mark.parametrize(
    "values",
    [
        (-1.0,),
        (math.nan,),
        (math.inf,),
        (0.0,),
        (0.0, 5.0, 0.0),
        (1.0, math.nan),
        (1.0, math.inf),
        (1.0, 0.0, -2.0),
        (1.0, 0.0, math.nan),
    ],
)
def test_impossible_models_are_refused(values):
    with pytest.raises(InputError):
        NoiseModel(*values)


@pytest.mark.parametrize("values", [("2",), (None,), (1j,), ([1.0, 2.0],), (1.0, "0")])
def test_what_is_no_number_is_refused(values):
    with pytest.raises(InputTypeError):
        NoiseModel(*values)


# --- the forward transform


def test_stabilise_is_the_generalised_anscombe_transform():
    gain, offset, read_noise = 1.7, 95.0, 4.0
    z = np.linspace(80, 5000, 40_001)
    expected = 2 / gain * np.sqrt(np.maximum(0, gain * z + 0.375 * gain**2 + read_noise**2 - gain * offset))
    np.testing.assert_allclose(NoiseModel(gain, offset, read_noise).stabilise(z), expected, rtol=1e-12, atol=1e-9)


def test_stabilise_depends_on_gain_and_intercept_only():
    z = np.linspace(-100, 5000, 1001)
    known = NoiseModel(2.0, 100.0, 12.0)
    crossing = NoiseModel(2.0, -known.intercept / 2.0, 0.0)
    np.testing.assert_allclose(known.stabilise(z), crossing.stabilise(z), rtol=1e-12)


def test_stabilise_is_clipped_where_the_root_has_no_argument():
    assert NoiseModel(2.0, 100.0, 5.0).stabilise(0.0) == 0


def test_gaussian_noise_is_divided_out():
    model = NoiseModel(0.0, 100.0, 4.0)
    z = np.array([80.0, 100.0, 140.0])
    np.testing.assert_array_equal(model.stabilise(z), [-5, 0, 10])
    np.testing.assert_array_equal(model.expected_stabilised(z), [-5, 0, 10])
    np.testing.assert_array_equal(model.unstabilise([-5.0, 0.0, 10.0]), z)


@pytest.mark.parametrize("read_noise", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("quanta", [5, 8, 20, 300, 20_000])
def test_stabilised_noise_has_unit_deviation(quanta, read_noise):
    model = NoiseModel(1.7, 95.0, 1.7 * read_noise)
    z = draws(quanta, 1.7, 95.0, 1.7 * read_noise)
    assert model.stabilise(z).std() == pytest.approx(1.0, abs=0.02)


# --- the exact unbiased inverse


def expectation(model, mean):
    """E[stabilise(z)] by adaptive quadrature over the read noise and a sum over the quanta: nothing of xrk in it."""
    y, sigma = (mean - model.offset) / model.gain, model.read_noise / model.gain
    total = 0.0
    for p in range(max(0, int(y - 12 * math.sqrt(y) - 5)), int(y + 12 * math.sqrt(y) + 45)):
        weight = math.exp(p * math.log(y) - y - math.lgamma(p + 1)) if y > 0 else float(p == 0)
        if weight < 1e-16:
            continue
        inside = p + 0.375 + sigma**2
        if sigma == 0:
            total += weight * 2 * math.sqrt(inside)
        else:
            # g = u^2 - inside / sigma takes the root's kink out of the integrand.
            h = inside / sigma
            total += (
                weight
                * 4
                * math.sqrt(sigma)
                * quad(
                    lambda u, h=h: u * u * math.exp(-0.5 * (u * u - h) ** 2) / math.sqrt(2 * math.pi),
                    math.sqrt(max(0.0, h - 9)),
                    math.sqrt(h + 9),
                    epsabs=1e-13,
                    epsrel=1e-12,
                )[0]
            )
    return total


@pytest.mark.parametrize("sigma", [0.0, 0.05, 0.6, 2.0, 15.0])
@pytest.mark.parametrize("quanta", [0.0, 0.3, 2.0, 17.0, 140.0])
def test_inverse_agrees_with_the_numerically_exact_expectation(quanta, sigma):
    model = NoiseModel(1.7, 95.0, 1.7 * sigma)
    mean = 95.0 + 1.7 * quanta
    value = expectation(model, mean)
    spread = math.sqrt(quanta + sigma**2 + 0.1)
    assert model.expected_stabilised(mean) == pytest.approx(value, abs=1e-7)
    assert (model.unstabilise(value) - mean) / 1.7 == pytest.approx(0.0, abs=1e-7 * spread)


def test_inverse_is_exact_far_above():
    # E = 2 sqrt(t + 1/8 + O(1/t^2)) with t = y + sigma^2.
    model = NoiseModel(2.0, 50.0, 6.0)
    t = np.array([1e4, 1e6, 1e9])
    np.testing.assert_allclose(model.unstabilise(2 * np.sqrt(t + 0.125)), 50 + 2 * (t - 9), rtol=1e-12, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 2.0, 20.0])
@pytest.mark.parametrize("quanta", [0.5, 1.0, 3.0, 10.0, 100.0, 10_000.0])
def test_inverse_of_the_mean_over_many_draws_is_unbiased(quanta, sigma):
    model = NoiseModel(1.7, 95.0, 1.7 * sigma)
    values = model.stabilise(draws(quanta, 1.7, 95.0, 1.7 * sigma))
    centre, error = values.mean(), values.std() / math.sqrt(values.size)
    slope = (model.unstabilise(centre + 1e-3) - model.unstabilise(centre - 1e-3)) / 2e-3
    assert abs(model.unstabilise(centre) - (95.0 + 1.7 * quanta)) < 4 * error * slope


def models():
    return st.builds(
        NoiseModel,
        st.floats(0.01, 100),
        st.floats(-1000, 1000),
        st.one_of(st.just(0.0), st.floats(0.01, 100)),
    )


@settings(max_examples=60, deadline=None)
@given(models(), st.lists(st.floats(-50, 1e4), min_size=2, max_size=20))
def test_inverse_increases_and_is_inverted_by_the_expectation(model, values):
    values = np.sort(values)
    means = model.unstabilise(values)
    assert np.isfinite(means).all()
    apart = np.diff(values) > 1e-6
    assert (np.diff(means)[apart] > 0).all()
    np.testing.assert_allclose(model.expected_stabilised(means), values, rtol=1e-6, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(models(), st.floats(-5, 1e6))
def test_the_round_trip_starts_anywhere(model, quanta):
    mean = model.offset + model.gain * quanta
    spread = math.sqrt(model.variance(mean) + model.gain**2)
    assert float(model.unstabilise(model.expected_stabilised(mean))) == pytest.approx(mean, abs=1e-5 * spread)


@pytest.mark.parametrize("sigma", [0.0, 0.7, 5.0, 50.0])
def test_inverse_goes_on_smoothly_below_no_quanta(sigma):
    model = NoiseModel(1.0, 0.0, sigma)
    start = float(model.expected_stabilised(0.0))
    step = 0.01
    slopes = np.diff(model.unstabilise(start + step * np.arange(-3, 4))) / step
    np.testing.assert_allclose(slopes, slopes[2], rtol=0.04)


# --- pointwise on any array


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "i4", ">f4", "f8", "f2"])
@pytest.mark.parametrize("method", ["stabilise", "unstabilise", "expected_stabilised", "variance"])
def test_arrays_of_any_dtype_and_layout(method, dtype):
    model = NoiseModel(2.0, 10.0, 3.0)
    array = np.random.default_rng(0).integers(0, 200, (60, 90)).astype(dtype)[::-2, 1::3]
    result = getattr(model, method)(array)
    reference = getattr(model, method)(np.ascontiguousarray(array, dtype=np.float64))
    assert result.shape == array.shape
    assert result.dtype == (np.float32 if dtype in (">f4", "f2") else np.float64)
    np.testing.assert_allclose(result, reference, rtol=2e-7, atol=1e-5)
    assert getattr(model, method)(array, dtype="f4").dtype == np.float32
    assert getattr(model, method)(array[:0]).shape == (0, array.shape[1])
    assert getattr(model, method)(array[0, 0]).shape == ()


@pytest.mark.parametrize("method", ["stabilise", "unstabilise", "expected_stabilised"])
def test_a_band_gives_the_bits_of_the_frame(method):
    model = NoiseModel(2.0, 10.0, 3.0)
    frame = np.random.default_rng(0).uniform(0, 500, (300, 211)).astype(np.float32)
    whole = getattr(model, method)(frame)
    bands = [getattr(model, method)(frame[i : i + 37]) for i in range(0, 300, 37)]
    np.testing.assert_array_equal(np.concatenate(bands), whole)


@pytest.mark.parametrize("model", [NoiseModel(2.0, 10.0, 3.0), NoiseModel(0.0, 10.0, 3.0)])
def test_values_that_are_not_finite_pass_through(model):
    strange = np.array([np.nan, np.inf, -np.inf, 1e300])
    for method in (model.stabilise, model.unstabilise, model.expected_stabilised):
        result = method(strange)
        assert np.isnan(result[0]) and result[1] == np.inf and not np.isnan(result[2:]).any()


@pytest.mark.parametrize("array", [np.zeros(3, bool), np.zeros(3, complex), np.array(["a"]), np.array([None])])
def test_arrays_that_are_no_counts_are_refused(array):
    with pytest.raises(InputTypeError, match="dtype"):
        NoiseModel(1.0).stabilise(array)


def test_only_float_results():
    with pytest.raises(InputTypeError, match="float32 or float64"):
        NoiseModel(1.0).stabilise([1.0], dtype=np.uint16)


@pytest.mark.parametrize("method", ["stabilise", "unstabilise", "expected_stabilised"])
def test_no_copy_of_the_frame_in_double_precision(method):
    model = NoiseModel(2.0, 10.0, 3.0)
    frame = np.full((1500, 2000), 400.0, np.float32)
    getattr(model, method)(frame[:10])
    tracemalloc.start()
    getattr(model, method)(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < frame.nbytes + 2**21


# --- photon transfer


def flats_and_darks(levels, frames=20, gain=3.0, offset=100.0, read_noise=8.0, size=60, flicker=0.0):
    rng = np.random.default_rng(0)
    pattern = 1 + 0.05 * rng.standard_normal((size, size))
    stacks = []
    for level in levels:
        lamp = 1 + flicker * rng.standard_normal((frames, 1, 1))
        quanta = rng.poisson(np.broadcast_to(level * pattern * lamp, (frames, size, size)))
        stacks.append(gain * quanta + offset + read_noise * rng.standard_normal(quanta.shape))
    darks = offset + read_noise * rng.standard_normal((frames, size, size))
    return stacks, darks


@pytest.mark.parametrize("flicker", [0.0, 0.02])
@pytest.mark.parametrize("levels", [(400,), (100, 400, 2000)])
@pytest.mark.parametrize("frames", [2, 20])
def test_photon_transfer(levels, frames, flicker):
    stacks, darks = flats_and_darks(levels, frames, flicker=flicker)
    model = NoiseModel.from_flats(stacks if len(levels) > 1 else stacks[0], darks)
    assert model.gain == pytest.approx(3.0, rel=0.03 if frames > 2 else 0.1)
    assert model.offset == pytest.approx(100.0, abs=0.5)
    assert model.read_noise == pytest.approx(8.0, rel=0.05)
    assert "photon transfer" in model.source


def test_photon_transfer_ignores_wild_pixels():
    (stack,), darks = flats_and_darks((400,))
    stack[::2, 5, 7] += 5000
    stack[3, 20, 20] = np.nan
    stack[:, 30, 30] = 65535
    darks[4, 9, 9] = np.inf
    darks[::3, 11, 11] = 4000
    model = NoiseModel.from_flats(stack, darks)
    assert model.gain == pytest.approx(3.0, rel=0.03)
    assert model.read_noise == pytest.approx(8.0, rel=0.05)


def test_photon_transfer_of_integers():
    stacks, darks = flats_and_darks((100, 400))
    model = NoiseModel.from_flats([np.rint(s).astype(np.uint16) for s in stacks], np.rint(darks).astype(np.uint16))
    assert model.gain == pytest.approx(3.0, rel=0.03)


@pytest.mark.parametrize(
    "flats, darks, words",
    [
        (np.ones((1, 4, 4)), np.ones((3, 4, 4)), "at least 2 frames"),
        (np.ones((3, 4, 4)), np.ones((1, 4, 4)), "at least 2 frames"),
        (np.ones((4, 4)), np.ones((3, 4, 4)), "at least 2 frames"),
        (np.ones((3, 4, 5)), np.ones((3, 4, 4)), "same height and width"),
        (np.ones((3, 4, 4)), np.ones((3, 4, 4)), "brighter"),
        (np.ones((3, 4, 4)), np.full((3, 4, 4), np.nan), "finite"),
    ],
)
def test_bad_flats(flats, darks, words):
    with pytest.raises(InputError, match=words):
        NoiseModel.from_flats(flats, darks)


def test_photon_transfer_on_a_real_detector(shared_data):
    h5py = pytest.importorskip("h5py")
    with h5py.File(shared_data / "calibration" / "k11-18014-imaging.h5") as file:
        frames = file["entry/detector/detector"][:]
    for darks in (frames[50:100], frames[3151:]):
        model = NoiseModel.from_flats(frames[:50], darks)
        assert model.gain == pytest.approx(1.55, rel=0.05)
        assert model.read_noise == pytest.approx(2.2, rel=0.1)
        assert model.offset == pytest.approx(99, abs=1)
