"""`xrk._native` against numpy, bit for bit, on every path that this processor runs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xrk import _native

PIXELS = ["uint8", "uint16", "int16", "int32", "float32", "float64"]
VALUES = ["float32", "float64"]
# Sizes around the widths of vectors, and two that are shared between threads (at least 65536 pixels for each).
SIZES = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 1001, 131072, 200003]


@pytest.fixture(params=_native.supported_simd())
def path(request):
    before = _native.simd()
    _native.set_simd(request.param)
    yield request.param
    _native.set_simd(before)


def normalised(x, black, inverse_range, dtype):
    with np.errstate(over="ignore", invalid="ignore"):
        return ((x.astype(np.float64) - black) * inverse_range).astype(dtype)


def applied(x, before, after, scale):
    """The documented formula, and how many pixels it limits."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = x.astype(np.float64) + (after.astype(np.float64) - before.astype(np.float64)) * scale
        if x.dtype.kind == "f":
            return total.astype(x.dtype), 0
    limits = np.iinfo(x.dtype)
    total = np.rint(np.where(np.isnan(total), x, total))
    limited = np.count_nonzero((total < limits.min) | (total > limits.max))
    return np.clip(total, limits.min, limits.max).astype(x.dtype), limited


def pixels(rng, dtype, shape):
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return rng.normal(0.4, 0.5, shape).astype(dtype)
    limits = np.iinfo(dtype)
    x = rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
    x.reshape(-1)[:2] = (limits.min, limits.max)[: x.size]
    return x


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    np.testing.assert_array_equal(actual.view(f"u{actual.itemsize}"), expected.view(f"u{expected.itemsize}"))


def test_the_widest_supported_path_is_taken_first():
    assert _native.supported_simd()[-1] == "baseline"
    assert _native.simd() == _native.supported_simd()[0]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("pixel", PIXELS)
def test_normalise_equals_numpy(path, pixel, value):
    rng = np.random.default_rng(1)
    for size in SIZES:
        x = pixels(rng, pixel, size)
        out = np.empty(size, value)
        assert _native.normalise(x, 100.3, 1 / 3871.7, out, threads=3) is None
        assert_same_bits(out, normalised(x, 100.3, 1 / 3871.7, value))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("pixel", PIXELS)
def test_apply_residual_equals_numpy(path, pixel, value):
    rng = np.random.default_rng(2)
    scale = 1.0 if np.dtype(pixel).kind == "f" else float(np.iinfo(pixel).max)
    for size in SIZES:
        x = pixels(rng, pixel, size)
        before = rng.random(size).astype(value)
        after = (before + rng.normal(0, 0.3, size)).astype(value)
        out = np.empty_like(x)
        limited = _native.apply_residual(x, before, after, scale, out, threads=2)
        expected, expected_limited = applied(x, before, after, scale)
        assert_same_bits(out, expected)
        assert limited == expected_limited
        if size > 1000 and x.dtype.kind != "f":
            assert limited > 0


@pytest.mark.parametrize("pixel", ["uint8", "uint16", "int16", "int32"])
def test_halves_go_to_the_even_neighbour(path, pixel):
    limits = np.iinfo(pixel)
    x = np.array([10, 11, 12, limits.max, limits.max, limits.min, limits.min], pixel)
    change = np.array([0.5, 0.5, -0.5, 0.49, 0.5, -0.5, -0.51])
    out = np.empty_like(x)
    limited = _native.apply_residual(x, np.zeros(7), change, 1.0, out)
    # The odd maximum plus a half is rounded up, out of the range; the even minimum minus a half is rounded back to it.
    assert out.tolist() == [10, 12, 12, limits.max, limits.max, limits.min, limits.min]
    assert limited == 2


def test_what_is_not_finite(path):
    x = np.array([7, 8, 9, 10] * 9, np.uint16)
    after = np.array([np.nan, np.inf, -np.inf, 1.0] * 9, np.float32)
    out = np.empty_like(x)
    assert _native.apply_residual(x, np.zeros(36, np.float32), after, 2.0, out) == 18
    assert out.tolist() == [7, 65535, 0, 12] * 9
    out = np.empty(36, np.float32)
    assert _native.apply_residual(x.astype(np.float32), np.zeros(36, np.float32), after, 2.0, out) == 0
    np.testing.assert_array_equal(out, [np.nan, np.inf, -np.inf, 12] * 9)


@pytest.mark.parametrize("pixel", PIXELS)
def test_an_unchanged_value_leaves_every_bit(path, pixel):
    rng = np.random.default_rng(3)
    x = pixels(rng, pixel, (37, 41))
    n = np.empty(x.shape, np.float32)
    _native.normalise(x, float(x.min()), 1 / 54321.0, n)
    out = np.empty_like(x)
    assert _native.apply_residual(x, n, n, 54321.0, out) == 0
    assert_same_bits(out, x)


def test_the_number_of_threads_changes_nothing(path):
    rng = np.random.default_rng(4)
    x = pixels(rng, "uint16", (517, 1033))
    before = rng.random(x.shape, np.float32)
    after = before + rng.normal(0, 0.2, x.shape).astype(np.float32)
    results = []
    for threads in (1, 2, 3, 5, 8, 1000):
        out, n = np.empty_like(x), np.empty(x.shape, np.float32)
        limited = _native.apply_residual(x, before, after, 65535.0, out, threads=threads)
        _native.normalise(x, 11.0, 1 / 65000, n, threads=threads)
        results.append((limited, out.tobytes(), n.tobytes()))
    assert all(result == results[0] for result in results)


def test_in_place_is_allowed(path):
    rng = np.random.default_rng(5)
    x = pixels(rng, "float32", 100_001)
    before, after = rng.random((2, x.size), np.float32)
    expected, _ = applied(x, before, after, 0.7)
    for position in range(3):
        arrays = [x.copy(), before.copy(), after.copy()]
        _native.apply_residual(*arrays, 0.7, arrays[position])
        assert_same_bits(arrays[position], expected)
    expected = normalised(x, 0.25, 1.5, np.float32)
    _native.normalise(x, 0.25, 1.5, x)
    assert_same_bits(x, expected)


@settings(deadline=None, max_examples=60)
@given(
    pixel=st.sampled_from(PIXELS),
    value=st.sampled_from(VALUES),
    shape=st.tuples(st.integers(0, 9), st.integers(0, 70)),
    scale=st.floats(-1e9, 1e9),
    magnitude=st.sampled_from([1e-3, 1.0, 1e6, 1e30]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_frame_equals_numpy(pixel, value, shape, scale, magnitude, seed):
    rng = np.random.default_rng(seed)
    x = pixels(rng, pixel, shape)
    before = (rng.normal(0, 1, shape) * magnitude).astype(value)
    after = (rng.normal(0, 1, shape) * magnitude).astype(value)
    expected, expected_limited = applied(x, before, after, scale)
    chosen = _native.simd()
    try:
        for path in _native.supported_simd():
            _native.set_simd(path)
            out, n = np.empty_like(x), np.empty(shape, value)
            assert _native.apply_residual(x, before, after, scale, out, threads=2) == expected_limited
            assert_same_bits(out, expected)
            _native.normalise(x, scale, 1 / 1237.0, n)
            assert_same_bits(n, normalised(x, scale, 1 / 1237.0, value))
    finally:
        _native.set_simd(chosen)


def arguments(**changes):
    """Arguments of apply_residual, with some replaced."""
    x = np.zeros((4, 6), np.uint16)
    f = np.zeros((4, 6), np.float32)
    return {"x": x, "before": f, "after": f, "scale": 1.0, "out": np.empty_like(x), "threads": 1, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": [[1, 2]]}, TypeError, "x is a list; expected a numpy array"),
        ({"x": None}, TypeError, "x is a NoneType"),
        ({"x": np.zeros((4, 6), np.uint32)}, TypeError, "x has dtype uint32; expected uint8, uint16"),
        ({"x": np.zeros((4, 6), np.int64)}, TypeError, "x has dtype int64"),
        ({"x": np.zeros((4, 6), bool)}, TypeError, "x has dtype bool"),
        ({"x": np.zeros((4, 6), complex)}, TypeError, "x has dtype complex128"),
        ({"x": np.zeros((4, 6), object)}, TypeError, "x has dtype object"),
        ({"x": np.zeros((4, 6), np.dtype("u2").newbyteorder())}, TypeError, "x has dtype >u2 in the other byte order"),
        ({"x": np.zeros((4, 12), np.uint16)[:, ::2]}, ValueError, "x is not C-contiguous"),
        ({"x": np.zeros((6, 4), np.uint16).T}, ValueError, "x is not C-contiguous"),
        ({"x": np.zeros(49, np.uint8)[1:].view(np.uint16).reshape(4, 6)}, ValueError, "not C-contiguous and aligned"),
        ({"before": np.zeros((4, 6), np.float16)}, TypeError, "before has dtype float16; expected float32 or float64"),
        ({"before": np.zeros((6, 4), np.float32)}, ValueError, r"before has shape \(6, 4\); expected x's, \(4, 6\)"),
        ({"before": np.zeros(24, np.float32)}, ValueError, r"before has shape \(24,\)"),
        ({"after": np.zeros((4, 6))}, TypeError, "after has dtype float64; expected before's, float32"),
        ({"after": np.zeros((4, 5), np.float32)}, ValueError, "after has shape"),
        ({"out": np.zeros((4, 6), np.int16)}, TypeError, "out has dtype int16; expected x's, uint16"),
        ({"out": np.zeros((4, 7), np.uint16)}, ValueError, "out has shape"),
        ({"scale": np.nan}, ValueError, "scale is nan; expected a finite number"),
        ({"scale": np.inf}, ValueError, "scale is inf"),
        ({"threads": 0}, ValueError, "threads is 0; expected 1 or more"),
        ({"threads": -3}, ValueError, "threads is -3"),
        ({"threads": 2**40}, TypeError, "incompatible"),
        ({"threads": 1.5}, TypeError, "incompatible"),
        ({"scale": "1"}, TypeError, "incompatible"),
    ],
)
def test_bad_arguments_of_apply_residual(changes, error, words):
    with pytest.raises(error, match=words):
        _native.apply_residual(**arguments(**changes))


def test_a_read_only_out_is_refused():
    out = np.zeros((4, 6), np.uint16)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        _native.apply_residual(**arguments(out=out))
    n = np.zeros((4, 6), np.float32)
    n.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        _native.normalise(out, 0.0, 1.0, n)


def test_a_shifted_overlap_is_refused():
    buffer = np.zeros(64, np.float32)
    with pytest.raises(ValueError, match="out shares memory with x"):
        _native.normalise(buffer[:32], 0.0, 1.0, buffer[1:33])
    with pytest.raises(ValueError, match="out shares memory with x"):
        _native.normalise(buffer.view(np.uint16)[:32], 0.0, 1.0, buffer[:32])
    x = np.zeros(32, np.float32)
    with pytest.raises(ValueError, match="out shares memory with after"):
        _native.apply_residual(x, x, buffer[8:40], 1.0, buffer[:32])
    with pytest.raises(ValueError, match="out shares memory with before"):
        _native.apply_residual(x, buffer[8:40], x, 1.0, buffer[:32])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": 3}, TypeError, "x is a int"),
        ({"x": np.zeros((2, 2), np.uint64)}, TypeError, "x has dtype uint64"),
        ({"out": np.zeros((2, 2), np.float16)}, TypeError, "out has dtype float16"),
        ({"out": np.zeros((2, 3), np.float32)}, ValueError, "out has shape"),
        ({"out": np.zeros((2, 4), np.float32)[:, ::2]}, ValueError, "out is not C-contiguous"),
        ({"black": -np.inf}, ValueError, "black is -inf"),
        ({"inverse_range": np.nan}, ValueError, "inverse_range is nan"),
        ({"threads": 0}, ValueError, "threads is 0"),
    ],
)
def test_bad_arguments_of_normalise(changes, error, words):
    good = {"x": np.zeros((2, 2), np.uint16), "black": 0.0, "inverse_range": 1.0, "out": np.zeros((2, 2), np.float32)}
    with pytest.raises(error, match=words):
        _native.normalise(**{**good, **changes})


def test_an_empty_frame_is_no_error():
    x, n = np.zeros((0, 5), np.uint16), np.zeros((0, 5), np.float32)
    _native.normalise(x, 0.0, 1.0, n)
    assert _native.apply_residual(x, n, n, 1.0, np.empty_like(x), threads=4) == 0


def test_an_unknown_path_is_refused():
    before = _native.simd()
    with pytest.raises(ValueError, match=r"there is no path 'sse9' on this processor; it runs: .*baseline"):
        _native.set_simd("sse9")
    assert _native.simd() == before


def test_cuda_is_reported():
    assert isinstance(_native.HAVE_CUDA, bool)
    assert hasattr(_native, "cuda") == _native.HAVE_CUDA
    if _native.HAVE_CUDA:
        assert _native.cuda.RUNTIME_VERSION >= 11000
        assert _native.cuda.device_count() >= 0


@pytest.mark.skipif(not _native.HAVE_CUDA, reason="built without CUDA")
def test_bad_arguments_of_the_cuda_kernels():
    with pytest.raises(ValueError, match="dtype is 'float64'; expected 'float16' or 'float32'"):
        _native.cuda.normalise(8, 0.0, 1.0, 8, 1, "float64", 0)
    with pytest.raises(ValueError, match="x is a null pointer"):
        _native.cuda.normalise(0, 0.0, 1.0, 8, 1, "float32", 0)
    with pytest.raises(ValueError, match="scale is nan"):
        _native.cuda.apply_residual(8, 8, 8, float("nan"), 8, 1, "float16", 8, 0)
    with pytest.raises(ValueError, match="limited is a null pointer"):
        _native.cuda.apply_residual(8, 8, 8, 1.0, 8, 1, "float16", 0, 0)


@pytest.mark.skipif(
    not _native.HAVE_CUDA or _native.cuda.device_count() == 0, reason="needs a build with CUDA and an NVIDIA device"
)
@pytest.mark.parametrize("value", ["float16", "float32"])
def test_the_cuda_kernels_equal_numpy(value):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    rng = np.random.default_rng(6)
    x = pixels(rng, "uint16", (1031, 997))
    before = rng.random(x.shape).astype(value)
    after = (before + rng.normal(0, 0.3, x.shape)).astype(value)
    stream = torch.cuda.current_stream().cuda_stream
    device_x, device_before, device_after = (torch.from_numpy(a).cuda() for a in (x, before, after))
    device_n = torch.empty(x.shape, dtype=getattr(torch, value), device="cuda")
    device_out = torch.empty_like(device_x)
    limited = torch.zeros(1, dtype=torch.int64, device="cuda")
    _native.cuda.normalise(device_x.data_ptr(), 11.0, 1 / 60000, device_n.data_ptr(), x.size, value, stream)
    _native.cuda.apply_residual(
        *(t.data_ptr() for t in (device_x, device_before, device_after)),
        65535.0,
        device_out.data_ptr(),
        x.size,
        value,
        limited.data_ptr(),
        stream,
    )
    assert_same_bits(device_n.cpu().numpy(), normalised(x, 11.0, 1 / 60000, value))
    expected, expected_limited = applied(x, before, after, 65535.0)
    assert_same_bits(device_out.cpu().numpy(), expected)
    assert int(limited) == expected_limited > 0
