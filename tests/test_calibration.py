"""Dark, flat and bad pixels from series of frames of a detector whose faults are known; and their use."""

import numpy as np
import pytest
import tifffile
from torch import nn

import xrk
from xrk import io
from xrk.calibration import BadPixel
from xrk.enhancement import enhance_file
from xrk.errors import InputError, InputTypeError
from xrk.loading import Model
from xrk.models import Card

SHAPE = (61, 70)
FAULTS = {"dead": (10, 12), "over": (20, 40), "under": (33, 5), "noisy": (50, 60), "non_uniform": (40, 40)}


@pytest.fixture(scope="module")
def series():
    rng = np.random.default_rng(8)
    gain = 1 + 0.1 * np.sin(np.arange(70) / 9) + 0.01 * rng.standard_normal(SHAPE)
    gain[FAULTS["over"]], gain[FAULTS["under"]], gain[FAULTS["dead"]] = 1.5, 0.4, 0.0
    noise = np.full(SHAPE, 4.0)
    noise[FAULTS["noisy"]] = 60.0
    darks = 100 + noise * rng.standard_normal((40, *SHAPE))
    flats = 100 + 20000 * gain + 40 * np.sqrt(gain) * rng.standard_normal((40, *SHAPE))
    flats[::2, FAULTS["non_uniform"][0], FAULTS["non_uniform"][1]] *= 1.04  # its response is not what it was
    flats[:, 10, 12] = darks[:, 10, 12]
    return flats.round().astype(np.uint16), darks.round().astype(np.uint16)


def test_each_fault_is_found_and_nothing_else(series):
    found = xrk.calibrate(*series)
    for name, place in FAULTS.items():
        assert found.badpixels[place] & BadPixel[name.upper()], name
    assert np.count_nonzero(found.badpixels) == len(FAULTS)
    assert found.counts == dict.fromkeys(FAULTS, 1) | {"cluster": 0, "kernel": 0}
    np.testing.assert_allclose(found.dark, series[1].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.flat, series[0].mean(axis=0), rtol=1e-6)


def test_clusters(series):
    flats, darks = (stack.copy() for stack in series)
    flats[:, 5:8, 30:33] = darks[:, 5:8, 30:33]
    flats[:, 0, 0] = darks[:, 0, 0]
    found = xrk.calibrate(flats, darks)
    square = found.badpixels[5:8, 30:33]
    assert (square & BadPixel.CLUSTER).all() and (square & BadPixel.DEAD).all()
    assert (square & BadPixel.KERNEL > 0).tolist() == [[False, True, False], [True, True, True], [False, True, False]]
    corner = found.badpixels[0, 0]
    assert corner & BadPixel.KERNEL and not corner & BadPixel.CLUSTER  # three neighbours are all there are


def test_the_series_are_not_written_over(series, tmp_path):
    flats, darks = (stack[:3, :20, :20] for stack in series)
    for name, stack in (("flat.tif", flats), ("darks.tif", darks)):
        io.write(tmp_path / name, stack)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found = xrk.calibrate(tmp_path / "flat.tif", tmp_path / "darks.tif")
    with pytest.raises(InputError, match=r"The flat .*flat\.tif would overwrite the series of flats"):
        found.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "found").mkdir()
    assert [path.name for path in found.save(tmp_path / "found")] == ["dark.tif", "flat.tif", "badpixels.tif"]


def test_a_real_detector(shared_data):
    h5py = pytest.importorskip("h5py")
    with h5py.File(shared_data / "calibration" / "k11-18014-imaging.h5") as file:
        frames = next(v for v in walk(file) if v.ndim == 3)[:100].astype(np.float64)
    found = xrk.calibrate(frames[:50], frames[50:])
    assert np.median(found.dark) == pytest.approx(99, abs=2)
    assert np.count_nonzero(found.badpixels) < 0.1 * found.badpixels.size


def walk(group):
    for item in group.values():
        if hasattr(item, "shape"):
            yield item
        else:
            yield from walk(item)


@pytest.mark.parametrize(
    ("flats", "darks", "error", "words"),
    [
        (np.zeros((3, 4, 5)), np.zeros((3, 4, 6)), InputError, "expected equal H and W"),
        (np.zeros((4, 5)), np.zeros((3, 4, 5)), InputError, "at least 2 frames"),
        (np.zeros((3, 4, 5), complex), np.zeros((3, 4, 5)), InputTypeError, "complex"),
        (np.zeros((3, 4, 5)), np.ones((3, 4, 5)), InputError, "exchanged"),
    ],
)
def test_what_cannot_be_calibrated(flats, darks, error, words):
    with pytest.raises(error, match=words):
        xrk.calibrate(flats, darks)


# --- used


class Same(nn.Module):
    def forward(self, x):
        return x


SAME = Model(Card(name="same", architecture="dncnn"), Same().eval())


@pytest.mark.parametrize("as_files", [False, True])
def test_bad_pixels_are_repaired(tmp_path, series, as_files):
    found = xrk.calibrate(*series)
    image = series[0][3]
    tifffile.imwrite(tmp_path / "in.tif", image)
    paths = dict(zip(("dark", "flat", "badpixels"), found.save(tmp_path), strict=True))
    given = paths if as_files else {name: getattr(found, name) for name in paths}
    report = enhance_file(tmp_path / "in.tif", tmp_path / "out.tif", SAME, **given)
    corrected = io.read(tmp_path / "out.tif").array.astype(float)
    level = np.median(corrected)
    assert np.abs(corrected / level - 1).max() < 0.05  # noise, and no hole or peak
    assert report.file["badpixels"] == {"map": "badpixels.tif" if as_files else "array", "repaired": len(FAULTS)}
    assert report.invalid == 0
    assert io.read_report(paths["dark"])["calibration"]["pixels"] == found.counts


def test_bad_pixels_and_masked_ones(tmp_path):
    image = np.full((40, 40), 0.5, np.float32)
    image[3, 3], image[5, 5], image[7, 7] = np.nan, np.nan, 0.9
    tifffile.imwrite(tmp_path / "in.tif", image)
    bad = np.zeros(image.shape, np.uint8)
    bad[5, 5] = bad[7, 7] = 2
    report = enhance_file(tmp_path / "in.tif", tmp_path / "out.tif", SAME, badpixels=bad)
    out = io.read(tmp_path / "out.tif").array
    assert np.isnan(out[3, 3]) and report.invalid == 1
    assert np.nanmin(out) == np.nanmax(out) == 0.5


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (np.ones((40, 40), np.uint8), InputError, "every pixel"),
        (np.zeros((3, 4), bool), InputError, r"expected \(40, 40\)"),
        (np.zeros((40, 40)), InputTypeError, "float64"),
    ],
)
def test_maps_that_do_not_fit(tmp_path, bad, error, words):
    tifffile.imwrite(tmp_path / "in.tif", np.ones((40, 40), np.uint8))
    with pytest.raises(error, match=words):
        enhance_file(tmp_path / "in.tif", tmp_path / "out.tif", SAME, badpixels=bad)
    assert not (tmp_path / "out.tif").exists()
