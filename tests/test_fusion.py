"""Dual-energy fusion against PyWavelets and the published rules written out; bands against the whole frame."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xrk
from xrk import fusion
from xrk.errors import ImageFileError, InputError, InputTypeError
from xrk.registration import find_shift

pywt = pytest.importorskip("pywt")

KERNEL = np.array(
    [[0.077847, 0.123317, 0.077847], [0.123317, 0.195346, 0.123317], [0.077847, 0.123317, 0.077847]], np.float64
)


def pair(shape, seed=0, dtype=np.uint16):
    """Smooth structure in both frames, and noise."""
    rng = np.random.default_rng(seed)
    rows, columns = (np.arange(n) for n in shape)
    scene = np.hypot(*np.meshgrid(rows - shape[0] / 3, columns - shape[1] / 2, indexing="ij")) < min(shape) / 3
    frames = [20000 + a * scene + b * rng.standard_normal(shape) for a, b in ((9000, 300), (15000, 250))]
    return [np.clip(np.rint(f), 0, 65535).astype(dtype) for f in frames]


def smoothed(x):
    padded = np.pad(x, 1, mode="reflect" if min(x.shape) > 1 else "edge")
    return sum(KERNEL[i, j] * padded[i : i + x.shape[0], j : j + x.shape[1]] for i in range(3) for j in range(3))


def published(low, high):
    """The wavelet rule as it is published: frame by frame, level by level, before rounding."""
    with pytest.warns(UserWarning) if min(low.shape) < 112 else _silence():
        first, second = (pywt.wavedec2(f.astype(np.float64), "db4", level=4) for f in (low, high))
    parts = [0.5 * smoothed(first[0]) + 0.5 * smoothed(second[0])]
    for a, b in zip(first[1:], second[1:], strict=True):
        parts.append(tuple(x + y for x, y in zip(a, b, strict=True)))
    return pywt.waverec2(parts, "db4")[: low.shape[0], : low.shape[1]]


class _silence:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


@settings(max_examples=25)
@given(st.integers(2, 150), st.integers(2, 150), st.integers(0, 1000))
def test_the_wavelet_rule_is_the_published_one(height, width, seed):
    low, high = pair((height, width), seed)
    expected = published(low, high)
    fused = xrk.fuse(low.astype(np.float64), high.astype(np.float64), allow_shift=True)
    np.testing.assert_allclose(fused, expected, rtol=0, atol=1e-6)
    rounded, report = xrk.fuse(low, high, allow_shift=True, report=True)
    assert rounded.dtype == np.uint16
    inside = np.abs(expected - np.floor(expected) - 0.5) > 1e-6  # ties go either way
    assert np.array_equal(rounded[inside], np.clip(np.rint(expected), 0, 65535)[inside])
    assert report.clipped == np.count_nonzero((np.rint(expected) < 0) | (np.rint(expected) > 65535))


@pytest.mark.parametrize("options", [{}, {"method": "spatial"}, {"compat": "bytes"}])
@pytest.mark.parametrize("band", [16, 64, 256])
@pytest.mark.parametrize("height", [700, 513])
def test_bands_do_not_show(monkeypatch, options, band, height):
    frames = pair((height, 90), 5, np.uint16 if "compat" in options else np.float64)
    monkeypatch.setattr(fusion, "_BAND", 1 << 20)
    whole, told = xrk.fuse(*frames, **options, report=True)
    monkeypatch.setattr(fusion, "_BAND", band)
    banded, report = xrk.fuse(*frames, **options, report=True)
    assert np.array_equal(banded, whole)
    assert report == told


def test_a_shorter_reach_shows(monkeypatch):
    frames = pair((700, 90), 5, np.float64)
    monkeypatch.setattr(fusion, "_BAND", 1 << 20)
    whole = xrk.fuse(*frames)
    monkeypatch.setattr(fusion, "_BAND", 64)
    monkeypatch.setattr(fusion, "_REACH", 96)
    assert not np.array_equal(xrk.fuse(*frames), whole)


def test_the_spatial_rule(monkeypatch):
    low, high = pair((40, 50), 2)
    expected = np.empty(low.shape)
    mean = low / 2 + high / 2
    padded = np.pad(mean, 1, mode="reflect")
    for r in range(40):
        for c in range(50):
            a, b = float(low[r, c]), float(high[r, c])
            around = padded[r : r + 3, c : c + 3].mean()
            if abs(a - b) < 400:
                expected[r, c] = mean[r, c]
            else:
                expected[r, c] = a if abs(around - b) < abs(around - a) else b
    fused = xrk.fuse(low, high, "spatial", threshold=400, allow_shift=True)
    assert np.array_equal(fused, np.rint(expected))
    assert 0.02 < np.mean(np.abs(low.astype(float) - high) < 400) < 0.98


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2)])
def test_the_spatial_rule_mirrors_narrow_frames_too(shape):
    """Beyond the border lies the pixel next to the outermost, where there is one."""
    rng = np.random.default_rng(1)
    low, high = rng.integers(0, 30000, (2, *shape)).astype(np.uint16)
    mean = low / 2 + high / 2
    around = np.zeros(shape)
    for row, column in np.ndindex(shape):
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                r, c = (
                    min(abs(n), 2 * (side - 1) - abs(n)) if side > 1 else 0
                    for n, side in zip((row + i, column + j), shape, strict=True)
                )
                around[row, column] += mean[r, c] / 9
    detail = np.where(np.abs(around - high) < np.abs(around - low), low, high)
    expected = np.rint(np.where(np.abs(low.astype(float) - high) < 20, mean, detail))
    assert np.array_equal(xrk.fuse(low, high, "spatial"), expected)


def test_bytes_as_published():
    low, high = pair((64, 80), 3)
    planes = []
    for shift in (8, 0):
        plane = published((low >> shift) & 255, (high >> shift) & 255)
        planes.append(np.clip(np.rint(plane), 0, 255).astype(np.uint16))
    fused, report = xrk.fuse(low, high, compat="bytes", allow_shift=True, report=True)
    assert np.mean(fused != (planes[0] << 8 | planes[1])) < 1e-3  # ties
    assert report.clipped > 0
    assert report.compat == "bytes"


def test_float32_is_within_a_count_and_tensors_come_back_as_tensors():
    low, high = pair((300, 200))
    exact = xrk.fuse(low, high).astype(int)
    tensors = [torch.from_numpy(f.astype(np.int32)) for f in (low, high)]
    fast = xrk.fuse(*tensors, precision="float32")
    assert isinstance(fast, torch.Tensor)
    assert np.abs(np.clip(fast.numpy(), 0, 65535) - exact).max() <= 1


def test_details_are_added():
    low, _ = pair((128, 128))
    assert not np.array_equal(xrk.fuse(low, low), low)


def test_shifted_frames_are_refused():
    low, high = pair((200, 220))
    moved = np.roll(high, (4, -7), (0, 1))
    shift = find_shift(low, moved)
    assert (shift.rows, shift.columns) == (4, -7)
    with pytest.raises(InputError, match=r"shifted by \+4 rows and -7 columns.*allow_shift=True"):
        xrk.fuse(low, moved)
    _, report = xrk.fuse(low, moved, allow_shift=True, report=True)
    assert report.shift == (4.0, -7.0)


def test_frames_without_anything_in_common_are_not():
    rng = np.random.default_rng(0)
    low, high = rng.integers(1000, 3000, (2, 128, 128)).astype(np.uint16)
    for a, b in ((low, high), (np.full_like(low, 5), high), (np.full_like(low, 5), np.full_like(low, 9))):
        _, report = xrk.fuse(a, b, report=True)
        assert report.shift is None
    hot = [np.full_like(low, 500) for _ in range(2)]
    hot[0][40, 50] = hot[1][90, 20] = 60000
    assert find_shift(*hot) is None


@pytest.mark.parametrize("side", [16, 17, 20, 31, 32, 40])
def test_small_frames_of_noise_have_no_clear_peak(side):
    rng = np.random.default_rng(side)
    for _ in range(20):
        assert find_shift(*rng.integers(1000, 3000, (2, side, side))) is None
    disc = np.hypot(*(np.mgrid[:side, :side] - side / 2)) < 6
    found = find_shift(1000 * disc, np.roll(700 * disc, (3, -2), (0, 1)))
    assert found is None if side < 40 else (found.rows, found.columns) == (3, -2)


@pytest.mark.parametrize(
    ("change", "options", "error", "problem"),
    [
        (lambda a, b: (a, b[:-1]), {}, InputError, r"frame \(31, 40\)"),
        (lambda a, b: (a[None], b[None]), {}, InputError, r"expected two \(H, W\)"),
        (lambda a, b: (a, b.astype(np.int32)), {}, InputTypeError, "frame int32"),
        (lambda a, b: (a, b), {"method": "average"}, InputError, "method='average'"),
        (lambda a, b: (a, b), {"threshold": -1}, InputError, "threshold=-1"),
        (lambda a, b: (a, b), {"threshold": "20"}, InputTypeError, "threshold='20'"),
        (lambda a, b: (a, b), {"precision": "float16"}, InputError, "precision='float16'"),
        (lambda a, b: (a, b), {"compat": "bytes", "method": "spatial"}, InputError, "compat="),
        (lambda a, b: (a * 1.0, b * np.inf), {}, InputError, "high-energy frame has values that are not finite"),
    ],
)
def test_bad_input(change, options, error, problem):
    low, high = pair((32, 40))
    with pytest.raises(error, match=problem):
        xrk.fuse(*change(low, high), **options)


def test_files(tmp_path):
    low, high = pair((120, 96))
    for name, frame in (("low", low), ("high", high)):
        xrk.io.write(tmp_path / f"{name}.tif", frame)
    report = xrk.fuse_file(
        tmp_path / "low.tif", tmp_path / "high.tif", tmp_path / "out.tif", picture=tmp_path / "out.png"
    )
    assert np.array_equal(xrk.io.read(tmp_path / "out.tif").array, xrk.fuse(low, high))
    assert report.method == "wavelet"
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError):
        xrk.fuse_file(tmp_path / "low.tif", tmp_path / "high.tif", tmp_path / "no.tif", "other")
    with pytest.raises(ImageFileError):
        xrk.fuse_file(tmp_path / "low.tif", tmp_path / "none.tif", tmp_path / "no.tif")
    assert not (tmp_path / "no.tif").exists()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for output, picture in (("high.tif", None), ("low.tif", None), ("o.tif", "high.tif"), ("o.png", "o.png")):
        with pytest.raises(InputError, match=r"would (overwrite the (low|high)-energy frame|both be written to)"):
            picture = None if picture is None else tmp_path / picture
            xrk.fuse_file(tmp_path / "low.tif", tmp_path / "high.tif", tmp_path / output, picture=picture)
    with pytest.raises(ImageFileError, match=r"ends in \.png"):
        xrk.fuse_file(tmp_path / "low.tif", tmp_path / "high.tif", tmp_path / "o.tif", picture=tmp_path / "p.tif")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("compression", ["none", "deflate"])
def test_files_are_fused_band_by_band(tmp_path, monkeypatch, compression):
    """The bytes are those of the whole frames, and no more rows are asked for at once than a band takes."""
    low, high = pair((700, 64))
    for name, frame in (("low", low), ("high", high)):
        path = tmp_path / f"{name}.tif"
        with xrk.io.create(path, shape=frame.shape, dtype=frame.dtype, compression=compression) as sink:
            sink.write(slice(None), frame)
    asked = []
    read = xrk.io.Source.read

    def counting(self, rows=slice(None), *rest, **options):
        array = read(self, rows, *rest, **options)
        asked.append(len(array))
        return array

    monkeypatch.setattr(xrk.io.Source, "read", counting)
    monkeypatch.setattr(fusion, "_BAND", 32)
    monkeypatch.setattr("xrk.registration._SIDE", 64)
    report = xrk.fuse_file(tmp_path / "low.tif", tmp_path / "high.tif", tmp_path / "out.tif")
    assert max(asked) == 32 + 2 * fusion._REACH
    monkeypatch.undo()
    monkeypatch.setattr("xrk.registration._SIDE", 64)
    expected, told = xrk.fuse(low, high, report=True)
    assert np.array_equal(xrk.io.read(tmp_path / "out.tif").array, expected)
    assert report == told
    assert xrk.io.read_report(tmp_path / "out.tif")["fusion"]["clipped"] == told.clipped


def test_what_is_only_found_on_the_way_leaves_no_file(tmp_path, monkeypatch):
    low, high = pair((700, 64), dtype=np.float32)
    high[690, 3] = np.nan
    for name, frame in (("low", low), ("high", high)):
        xrk.io.write(tmp_path / f"{name}.tif", frame)
    monkeypatch.setattr("xrk.registration._SIDE", 64)
    with pytest.raises(InputError, match="high-energy frame has values that are not finite"):
        xrk.fuse_file(tmp_path / "low.tif", tmp_path / "high.tif", tmp_path / "no.tif")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["high.tif", "low.tif"]
    xrk.io.write(tmp_path / "stack.tif", np.stack([low, low]))
    with pytest.raises(InputError, match="has 2 pages"):
        xrk.fuse_file(tmp_path / "low.tif", tmp_path / "stack.tif", tmp_path / "no.tif")


def test_pseudocolour_is_the_published_formula():
    import colorsys

    counts = np.array([[0, 257 * 30, 257 * 90, 257 * 179, 257 * 180, 257 * 255, 70000]])
    colours = fusion.pseudocolor(counts, 65535)
    for count, colour in zip(np.clip(counts[0], 0, 65535), colours[0], strict=True):
        v = count * 255 / 65535
        expected = colorsys.hsv_to_rgb((round(v) * 2 % 360) / 360, 0.8, (v / 255) ** 2.2)
        np.testing.assert_allclose(colour, 255 * np.array(expected), atol=0.51)


def test_a_simulated_case_at_two_energies():
    """What is organic lets both beams through, what is metal more of the hard one: and the pair is found unshifted."""
    from xrk.scenes import baggage
    from xrk.simulate import Detector, Geometry, radiate, to_uint16

    geometry, detector = Geometry((210, 288), 450 / 288), Detector(gain=8, offset=100, read_noise=3)
    beams = [radiate(baggage(), geometry, kilovolts=kv, filters=f) for kv, f in ((80, None), (150, {"copper": 1.0}))]
    low, high = (to_uint16(detector.expose(beam, 3000, seed)) for seed, beam in enumerate(beams))
    ratio = np.log(beams[1]) / np.log(beams[0])
    blade, bottle = ratio[64:67, 88:91].mean(), ratio[40:43, 187:190].mean()
    assert blade < 0.6 < 0.8 < bottle
    _, report = xrk.fuse(low, high, report=True)
    assert report.shift == (0.0, 0.0)
