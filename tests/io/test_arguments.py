"""Arguments that make no sense are told of in one sentence, before a file is written."""

import numpy as np
import pytest
import tifffile

import xrk
from xrk import io
from xrk.errors import ImageFileError, InputError, InputTypeError, XrkError

PIXELS = np.arange(35, dtype="u2").reshape(5, 7)


@pytest.fixture
def path(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", PIXELS)
    return tmp_path / "a.tif"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"path": None}, InputTypeError, "path is a NoneType; expected a text"),
        ({"path": b"a.tif"}, InputTypeError, "path is a bytes"),
        ({"path": 3}, InputTypeError, "path is a int"),
        ({"path": "a\0.tif"}, ImageFileError, "null byte"),
        ({"cache": "64MiB"}, InputTypeError, "cache='64MiB'; expected a whole number of bytes, 0 or more|to"),
        ({"cache": -1}, InputError, "cache=-1"),
        ({"cache": 1 << 70}, InputError, "cache=1180591620717411303424"),
        ({"threads": 0}, InputError, "threads=0; expected a whole number, 1 "),
        ({"threads": 1.5}, InputTypeError, r"threads=1\.5"),
    ],
)
def test_open(path, options, error, words):
    with pytest.raises(error, match=words):
        io.open(**{"path": path, **options})
    if "path" in options:
        for function in (io.read, io.read_report, lambda path: io.write(path, PIXELS), io.check_writable):
            with pytest.raises(error, match=words):
                function(options["path"])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"like": "a.tif"}, InputTypeError, "like is a str; expected what xrk.io.open or xrk.io.read gave"),
        ({"like": PIXELS}, InputTypeError, "like is a ndarray"),
        ({"shape": 5}, InputTypeError, "shape=5; expected"),
        ({"shape": (5.5, 7)}, InputTypeError, r"shape=\(5\.5, 7\)"),
        ({"shape": (5, 0)}, InputError, "not empty"),
        ({"tile": 256}, InputTypeError, "tile=256; expected"),
        ({"tile": (16, 17)}, InputError, "multiples of 16"),
        ({"tile": (16.0, 16)}, InputTypeError, "tile="),
        ({"rowsperstrip": 2.5}, InputTypeError, r"rowsperstrip=2\.5; expected a whole number"),
        ({"rowsperstrip": 1 << 32}, InputError, "rowsperstrip=4294967296"),
        ({"resolution": (np.nan, 1)}, InputError, "resolution=.*expected pixels per unit"),
        ({"resolution": (np.inf, 1)}, InputError, "resolution="),
        ({"resolution": 5}, InputError, "resolution=5"),
        ({"description": 5}, InputTypeError, "description is a int; expected a text"),
        ({"description": "\ud800"}, InputError, "description is no text"),
        ({"threads": -1}, InputError, "threads=-1"),
        ({"level": "x"}, InputTypeError, "level='x'; expected a whole number, 1 to 22"),
        ({"level": 0}, InputError, "level=0"),
        ({"level": 13, "compression": "deflate"}, InputError, "level=13; expected a whole number, 1 to 12"),
        ({"level": 99, "compression": "zstd"}, InputError, "level=99; expected a whole number, 1 to 22"),
        ({"predictor": 3}, InputTypeError, "predictor=3; expected True, False or None"),
    ],
)
def test_create(tmp_path, options, error, words):
    with pytest.raises(error, match=words) as caught:
        io.create(tmp_path / "new.tif", **{"shape": (5, 7), "dtype": "u2", **options})
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((slice(None), PIXELS + 0.5), {"levels": "x"}),
        ((slice(None), PIXELS + 0.5), {"levels": 3}),
        ((slice(None), PIXELS + 0.5), {"levels": (1, 1)}),
        ((slice("a", None), PIXELS), {}),
        ((slice(0.0, 5.0), PIXELS), {}),
        ((slice(None), [[1], [1, 2]]), {}),
        ((slice(None), None), {}),
    ],
)
def test_rows_of_a_sink(tmp_path, arguments, options):
    with io.create(tmp_path / "new.tif", shape=(5, 7), dtype="u2") as sink:
        with pytest.raises((InputError, InputTypeError)):
            sink.write(*arguments, **options)
        sink.write(slice(None), PIXELS)
    assert (io.read(tmp_path / "new.tif").array == PIXELS).all()


@pytest.mark.parametrize("flats", [[], [np.ones((3, 3))], [np.ones((3, 3)), np.ones((4, 3))], ["x", 3], [None]])
def test_frames_for_a_calibration(flats):
    with pytest.raises(XrkError, match="flats"):
        xrk.calibrate(flats, np.zeros((2, 3, 3)))
