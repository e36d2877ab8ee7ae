import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from xrk import radiograph
from xrk.errors import InputError, InputTypeError

NAMES = ["uint8", "uint16", "int16", "int32", "float32", "float64"]


@pytest.fixture(params=["native", "numpy"])
def path(request, monkeypatch):
    """Both implementations of the pixel arithmetic."""
    if request.param == "numpy":
        monkeypatch.setattr(radiograph, "_native", None)
        assert radiograph.kernel_path() == "numpy"
    elif radiograph._native is None:
        pytest.skip("xrk._native is not built here")
    else:
        assert radiograph.kernel_path().startswith("native (")
    return request.param


# --- what is accepted


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", "<>")
def test_accepted_dtypes_keep_their_byte_order(name, order):
    dtype = np.dtype(name).newbyteorder(order)
    assert radiograph.check_dtype(dtype) == dtype


@pytest.mark.parametrize(
    "name", ["bool", "int8", "uint32", "int64", "float16", "complex64", "O", "U5", "M8[s]", "bfloat16"]
)
def test_other_dtypes(name):
    with pytest.raises(InputTypeError, match="expected one of uint8, uint16, int16, int32, float32, float64"):
        radiograph.check_dtype(name)


def test_structured_dtypes():
    with pytest.raises(InputTypeError, match="expected one of"):
        radiograph.check_dtype(np.dtype([("a", "u2")]))


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 9), (7, 1), (3, 480, 640), (1, 1, 1), (5, 8, 3), (2, 100, 3), (480, 640)]
)
def test_accepted_shapes(shape):
    radiograph.check_shape(shape)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4, 5)])
def test_other_ranks(shape):
    with pytest.raises(InputError, match=r"has shape .*; expected \(H, W\) or a stack \(N, H, W\)") as caught:
        radiograph.check_shape(shape)
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 4, 4), (4, 0, 4)])
def test_empty_shapes(shape):
    with pytest.raises(InputError, match=r"empty.*expected at least one pixel"):
        radiograph.check_shape(shape)


@pytest.mark.parametrize(("channels", "hint"), [(1, r"image\[\.\.\., 0\]"), (3, "one channel"), (4, "one channel")])
def test_colour_channels_are_recognised(channels, hint):
    with pytest.raises(InputError, match=f"RGB.*expected.*{hint}"):
        radiograph.check_shape((480, 640, channels))


def test_masks():
    mask = np.zeros((4, 5), bool)
    assert radiograph.check_mask(mask, (4, 5)) is mask
    assert radiograph.check_mask(mask, (9, 4, 5)) is mask
    radiograph.check_mask(np.zeros((9, 4, 5), np.uint8), (9, 4, 5))
    with pytest.raises(InputError, match=r"shape \(5, 4\) for an image of shape \(4, 5\); expected \(4, 5\)\."):
        radiograph.check_mask(np.zeros((5, 4), bool), (4, 5))
    with pytest.raises(InputError, match=r"expected \(4, 5\) or \(9, 4, 5\)"):
        radiograph.check_mask(np.zeros((8, 4, 5), bool), (9, 4, 5))
    with pytest.raises(InputTypeError, match="float64; expected bool or uint8"):
        radiograph.check_mask(np.zeros((4, 5)), (4, 5))


# --- levels


@pytest.mark.parametrize(
    ("name", "levels"),
    [("uint8", (0, 255)), ("uint16", (0, 65535)), ("int16", (-32768, 32767)), ("int32", (-(2**31), 2**31 - 1))],
)
def test_integers_have_their_dtypes_range(name, levels):
    assert radiograph.resolve_levels(None, np.dtype(name)) == levels
    assert radiograph.resolve_levels(None, np.dtype(name).newbyteorder(">")) == levels


def test_levels_as_given():
    for levels in ((0, 4095), [0.5, 2], np.array([100, 4000], "u2"), (Fraction(1, 2), np.float32(3.5)), (-5, -1)):
        black, white = radiograph.resolve_levels(levels, np.dtype("u2"))
        assert (black, white) == (float(levels[0]), float(levels[1]))
        assert type(black) is float


def test_floats_lie_in_the_unit_range_or_need_levels():
    frame = np.array([[0.0, 0.25], [np.nan, 1.0]], np.float32)
    frames = [(frame, np.isnan(frame))]
    assert radiograph.resolve_levels(None, frame.dtype, frames) == (0.0, 1.0)
    spoilt = frame.copy()
    spoilt[0, 0] = 300
    with pytest.raises(InputError, match=r"float32.*between 0 and 300 needs levels=\(black, white\).*\[0, 1\]"):
        radiograph.resolve_levels(None, frame.dtype, [*frames, (spoilt, np.isnan(spoilt))])
    masked = np.zeros(frame.shape, bool)
    masked[0, 0] = masked[1, 0] = True
    assert radiograph.resolve_levels(None, frame.dtype, [(spoilt, masked)]) == (0.0, 1.0)
    assert radiograph.resolve_levels(None, frame.dtype, [(frame, np.ones_like(masked))]) == (0.0, 1.0)
    with pytest.raises(InputError, match="between -1e-07 and"):
        radiograph.resolve_levels(None, np.dtype("f8"), [(np.array([[-1e-7, 0.5]]), None)])


@pytest.mark.parametrize(
    ("levels", "why"),
    [
        ((5, 1), "reversed"),
        ((3, 3), "equal"),
        ((0, math.nan), "not finite"),
        ((-math.inf, 0), "not finite"),
        ((-1.7e308, 1.7e308), "cannot hold"),
        ((0, 1e-310), "cannot hold"),
        ((0, 10**400), "cannot hold"),
    ],
)
def test_unusable_levels(levels, why):
    with pytest.raises(InputError, match=rf"{why}.*; expected levels=\(black, white\).*black < white"):
        radiograph.resolve_levels(levels, np.dtype("u2"))


@pytest.mark.parametrize("levels", [5, (1, 2, 3), (1,), "01", ("0", "1"), (None, 1), (1j, 2), {}])
def test_what_are_no_levels(levels):
    with pytest.raises(InputTypeError, match=r"levels=.*; expected levels=\(black, white\)"):
        radiograph.resolve_levels(levels, np.dtype("u2"))


# --- invalid pixels


def test_invalid_pixels():
    frame = np.array([[1, np.nan], [np.inf, -np.inf]], np.float32)
    np.testing.assert_array_equal(radiograph.invalid_pixels(frame), [[False, True], [True, True]])
    mask = np.array([[2, 0], [0, 0]], np.uint8)
    np.testing.assert_array_equal(radiograph.invalid_pixels(frame, mask), [[True, True], [True, True]])
    assert radiograph.invalid_pixels(np.ones((2, 2), np.float32)) is None
    assert radiograph.invalid_pixels(np.ones((2, 2), np.uint16), np.zeros((2, 2), bool)) is None
    np.testing.assert_array_equal(radiograph.invalid_pixels(np.ones((2, 2), np.uint16), mask), mask > 0)


@given(
    hnp.arrays(
        st.sampled_from(NAMES), hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 100)
    ),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_fill_stays_within_the_valid_values_and_touches_nothing_else(frame, random):
    invalid = np.array([[random.random() < 0.6 for _ in row] for row in frame])
    invalid.flat[random.randrange(frame.size)] = False
    if frame.dtype.kind == "f":
        frame[invalid] = np.nan
    kept = frame.copy()
    filled = radiograph.fill(frame, invalid)
    np.testing.assert_array_equal(frame, kept)
    assert filled.dtype == frame.dtype
    valid = frame[~invalid]
    np.testing.assert_array_equal(filled[~invalid], valid)
    slack = 1e-5 * valid.max() if frame.dtype.kind == "f" else 0
    assert filled.min() >= valid.min() - slack
    assert filled.max() <= valid.max() + slack
    np.testing.assert_array_equal(filled, radiograph.fill(frame, invalid))


def test_fill_follows_the_surroundings():
    # On a ramp, a dead pixel, a dead column and a hole get about the ramp's values.
    ramp = np.add.outer(10.0 * np.arange(64), 3.0 * np.arange(48))
    invalid = np.zeros(ramp.shape, bool)
    invalid[20, 20] = invalid[:, 30] = invalid[40:50, 5:15] = True
    error = np.abs(radiograph.fill(np.where(invalid, np.nan, ramp), invalid) - ramp)
    assert error[20, 20] < 10
    assert error[4:-4, 30].max() < 10
    assert error.max() < 60  # the hole is 100 counts high


def test_fill_of_an_odd_frame_uses_the_last_row_and_column():
    frame = np.full((5, 7), 3, np.uint16)
    frame[4, 6] = 9
    invalid = np.ones(frame.shape, bool)
    invalid[4, 6] = False
    np.testing.assert_array_equal(radiograph.fill(frame, invalid), 9)


# --- arithmetic


def _random_frame(name, rng, shape=(37, 53)):
    dtype = np.dtype(name)
    if dtype.kind == "f":
        return rng.normal(1000, 3000, shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)


@pytest.mark.parametrize("name", NAMES)
def test_normalise_is_float64_rounded_once(name, path):
    frame = _random_frame(name, np.random.default_rng(2))
    black, inverse = 12.7, 1 / 4083.3
    n = radiograph.normalise(frame, black, inverse, threads=2)
    assert n.dtype == np.float32
    np.testing.assert_array_equal(n, ((frame.astype(np.float64) - black) * inverse).astype(np.float32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("values", ["float32", "float64"])
def test_apply_residual_against_the_formula(name, values, path):
    rng = np.random.default_rng(3)
    frame = _random_frame(name, rng)
    before, after = rng.random((2, *frame.shape)).astype(values)
    out = np.empty_like(frame)
    clipped = radiograph.apply_residual(frame, before, after, 30000.0, out, threads=2)
    exact = frame.astype(np.float64) + (after.astype(np.float64) - before) * 30000.0
    if frame.dtype.kind == "f":
        assert clipped == 0
        np.testing.assert_array_equal(out, exact.astype(frame.dtype))
    else:
        limits = np.iinfo(frame.dtype)
        rounded = np.rint(exact)
        np.testing.assert_array_equal(out, np.clip(rounded, limits.min, limits.max).astype(frame.dtype))
        assert clipped == ((rounded < limits.min) | (rounded > limits.max)).sum()
        assert clipped > 0 or name == "int32"


def test_rounding_is_half_to_even(path):
    frame = np.array([[10, 11, 0, 65535]], np.uint16)
    before = np.zeros((1, 4))
    out = np.empty_like(frame)
    assert radiograph.apply_residual(frame, before, np.array([[0.5, 0.5, -0.5, 0.5]]), 1.0, out) == 1
    np.testing.assert_array_equal(out, [[10, 12, 0, 65535]])  # 65535.5 rounds to 65536, which is clipped


def test_no_change_keeps_every_bit(path):
    frame = np.array([[0.0, -0.0, 5e-324, 1e300, -1e-300]])
    before = np.array([[0.1, 0.2, 0.3, 0.4, 0.5]], np.float32)
    out = np.empty_like(frame)
    radiograph.apply_residual(frame, before, before.copy(), 1e6, out)
    assert out.tobytes() == frame.tobytes()


# --- dark frame and flat field


def _detector(rng, shape=(40, 50)):
    dark = rng.normal(300, 5, shape)
    gain = rng.normal(1, 0.1, shape).clip(0.6, 1.4)
    return dark, gain


def test_correction_removes_the_detector():
    rng = np.random.default_rng(4)
    dark, gain = _detector(rng)
    scene = rng.uniform(1000, 20000, dark.shape)
    raw = np.rint(dark + gain * scene).astype(np.uint16)
    flat = dark + gain * 30000.0
    corrected, invalid = radiograph.correct(raw, dark, flat)
    assert invalid is None
    assert corrected.dtype == np.uint16
    # A pixel of median gain keeps its counts, and the dark's median is the pedestal.
    expected = np.median(dark) + np.median(gain) * scene
    assert np.abs(corrected - expected).max() <= 0.5 + 0.5 / 0.6 * np.median(gain)


def test_references_may_be_stacks_and_either_may_be_missing():
    rng = np.random.default_rng(5)
    dark, gain = _detector(rng)
    frame = rng.uniform(1000, 20000, dark.shape).astype(np.float32)
    darks = dark + rng.normal(0, 1, (4, *dark.shape))
    np.testing.assert_array_equal(
        radiograph.correct(frame, darks, dark + gain)[0], radiograph.correct(frame, darks.mean(axis=0), dark + gain)[0]
    )
    only_dark, _ = radiograph.correct(frame, dark)
    np.testing.assert_allclose(only_dark, frame - dark + np.median(dark), rtol=1e-6)
    only_flat, _ = radiograph.correct(frame, None, gain * 1000 + 100, offset=100.0)
    np.testing.assert_allclose(only_flat, (frame - 100) * np.median(gain) / gain + 100, rtol=1e-6)


def test_pixels_that_cannot_be_corrected_are_invalid_and_left():
    dark = np.full((4, 4), 100.0)
    flat = np.full((4, 4), 1100.0)
    flat[0, 0], flat[0, 1], flat[0, 2], dark[1, 1] = 100, 50, np.nan, np.inf
    frame = np.arange(16, dtype=np.int16).reshape(4, 4) * 100
    corrected, invalid = radiograph.correct(frame, dark, flat)
    expected = np.zeros((4, 4), bool)
    expected[0, :3] = expected[1, 1] = True
    np.testing.assert_array_equal(invalid, expected)
    np.testing.assert_array_equal(corrected, frame)


def test_a_floats_own_invalid_pixels_survive_the_correction():
    frame = np.array([[1.0, np.nan], [np.inf, -np.inf]], np.float32)
    corrected, invalid = radiograph.correct(frame, np.full((2, 2), 0.5), np.full((2, 2), 4.5))
    assert invalid is None
    np.testing.assert_array_equal(corrected, frame)


def test_correction_clips_and_counts_what_leaves_the_dtype():
    correction = radiograph.prepare_correction(np.full((1, 4), 10), np.array([[20, 110, 110, 110]]), (1, 4))
    corrected, clipped = correction.apply(np.array([[200, 200, 200, 0]], np.uint8))
    np.testing.assert_array_equal(corrected, [[255, 200, 200, 0]])  # (200 - 10) * 10 + 10 leaves uint8
    assert clipped == 1


def test_bad_references():
    frame = np.ones((4, 5), np.uint16)
    with pytest.raises(InputError, match=r"dark frame has shape \(5, 4\); expected \(4, 5\), or a stack"):
        radiograph.correct(frame, np.ones((5, 4)))
    with pytest.raises(InputError, match=r"flat field has shape \(0, 4, 5\)"):
        radiograph.correct(frame, None, np.ones((0, 4, 5)))
    with pytest.raises(InputTypeError, match="flat field is of dtype complex128; expected integers or floats"):
        radiograph.correct(frame, None, np.ones((4, 5), complex))
    with pytest.raises(InputError, match="nowhere; expected F > D"):
        radiograph.correct(frame, np.full((4, 5), 9), np.full((4, 5), 3))
    with pytest.raises(InputError, match="dark frame has no finite pixel"):
        radiograph.correct(frame, np.full((4, 5), np.nan))
