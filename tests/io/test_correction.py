"""Dark and flat-field correction in the pass that decodes: what `Correction.apply` makes of the whole frame."""

import os

import numpy as np
import pytest
import tifffile
from torch import nn

from xrk import io
from xrk.enhancement import enhance_file
from xrk.errors import InputError
from xrk.io import tiff_native
from xrk.loading import Model
from xrk.models import Card
from xrk.radiograph import prepare_correction

SHAPE = (150, 221)
DTYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"]
LAYOUTS = {
    "rows": {},
    "strips": {"compression": "packbits", "rowsperstrip": 32},
    "tiles": {"compression": "deflate", "tile": (64, 48), "predictor": False},
    "swapped": {"byteorder": ">"},
}


def frame_of(dtype, rng):
    if dtype[0] == "f":
        frame = rng.normal(0, 300, SHAPE).astype(dtype)
        frame[4, 5], frame[6, 7], frame[0, 0] = np.nan, np.inf, -0.0
        return frame
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, SHAPE, dtype=dtype, endpoint=True)


def corrections(dtype, rng):
    scale = {"u1": 100.0, "i1": 60.0}.get(dtype, 4000.0)
    dark, flat = rng.uniform(0, 0.3 * scale, SHAPE), rng.uniform(0.2, 2, SHAPE) * scale
    dark[30, 40] = np.nan  # and wherever flat <= dark
    both = prepare_correction(dark, flat, SHAPE)
    assert 2 < both.invalid.sum() < dark.size / 2
    yield both
    yield prepare_correction(None, np.abs(flat) + 1, SHAPE, 0.1)
    yield prepare_correction(np.asfortranarray(np.nan_to_num(dark)), None, SHAPE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(tmp_path, monkeypatch, dtype, layout):
    rng = np.random.default_rng(9)
    frame = frame_of(dtype, rng)
    with io.create(tmp_path / "a.tif", shape=SHAPE, dtype=dtype, **LAYOUTS[layout]) as sink:
        sink.write(slice(None), frame)
    for native in (True, False):
        if not native:
            monkeypatch.setattr(tiff_native, "_native", None)
        with io.open(tmp_path / "a.tif") as source:
            assert source.reader == ("xrk" if native else "tifffile")
            for correction in corrections(dtype, rng):
                for rows in ((0, 150), (17, 103)):
                    read, clipped = source.read_corrected(slice(*rows), correction)
                    expected, most = correction.rows(*rows).apply(frame[slice(*rows)])
                    assert read.tobytes() == expected.tobytes() or np.array_equal(read, expected, equal_nan=True)
                    assert clipped == most


def test_values_of_a_window_are_those_of_the_corrected_frame(tmp_path):
    native = pytest.importorskip("xrk._native")
    rng = np.random.default_rng(3)
    frame, correction = frame_of("u2", rng), next(corrections("u2", rng))
    tifffile.imwrite(tmp_path / "a.tif", frame, compression="zlib", tile=(32, 48))
    reader = native.TiffReader(os.open(tmp_path / "a.tif", os.O_RDONLY), 0, 1 << 20)
    out = np.empty((60, 70), np.float32)
    parts = (correction.dark, correction.gain, correction.pedestal, correction.invalid)
    reader.read(0, -10, -20, out, "reflect", (100.0, 1 / 60000), 2, parts)
    exact = (correction.apply(frame)[0] - 100.0) * (1 / 60000)
    np.testing.assert_array_equal(out, np.pad(exact, ((10, 0), (20, 0)), mode="reflect")[:60, :70].astype(np.float32))
    with pytest.raises(ValueError, match="dark has not the frame's height and width"):
        reader.read(0, 0, 0, out, "reflect", (100.0, 1 / 60000), 2, (correction.dark[1:], 1.0, 0.0, None))
    with pytest.raises(TypeError, match="gain must be a C-contiguous array of float64"):
        reader.read(0, 0, 0, out, "reflect", (100.0, 1 / 60000), 2, (0.0, correction.gain.T, 0.0, None))


def test_a_closed_file(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros(SHAPE, "u2"))
    with io.open(tmp_path / "a.tif") as source:
        pass
    with pytest.raises(InputError, match="is closed"):
        source.read_corrected(slice(0, 3), prepare_correction(np.zeros(SHAPE), None, SHAPE))


@pytest.mark.parametrize("dtype", ["u2", "f4"])
def test_a_file_is_corrected_as_its_array(tmp_path, dtype):
    rng = np.random.default_rng(8)
    frame = rng.integers(300, 60000, (700, 90)).astype(dtype)
    dark, flat = rng.integers(80, 120, frame.shape).astype("u2"), rng.integers(20000, 60000, frame.shape).astype("u2")
    flat[100:103, 20] = 0
    with io.create(tmp_path / "in.tif", shape=frame.shape, dtype=dtype, compression="zstd", rowsperstrip=50) as sink:
        sink.write(slice(None), frame)
    model = Model(Card(name="same", architecture="dncnn", domain="unit", noise="none"), nn.Identity().eval())
    report = enhance_file(tmp_path / "in.tif", tmp_path / "out.tif", model, levels=(0, 65535), dark=dark, flat=flat)
    correction = prepare_correction(dark, flat, frame.shape)
    corrected, clipped = correction.apply(frame)
    np.testing.assert_array_equal(io.read(tmp_path / "out.tif").array, np.where(correction.invalid, frame, corrected))
    assert report.file["correction"] == {"dark": "array", "flat": "array", "invalid": 3, "clipped": clipped}
    assert (clipped > 0) == (dtype == "u2")
