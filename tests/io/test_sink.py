"""Files written row by row: every layout in every order, against tifffile and rasterio; whole or not at all."""

import importlib.util
import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from xrk import io
from xrk.errors import ImageFileError, InputError, InputTypeError
from xrk.io import segments

HAVE_IMAGECODECS = importlib.util.find_spec("imagecodecs") is not None
HAVE_RASTERIO = importlib.util.find_spec("rasterio") is not None
needs_native = pytest.mark.skipif(segments._native is None, reason="the compiled module is not built")
DTYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"]
LAYOUTS = {"strips": {"rowsperstrip": 7}, "one strip": {}, "tiles": {"tile": (16, 32)}}
CODECS = ["none", "deflate", "lzw", "packbits", "zstd"]


def names(folder):
    return sorted(os.listdir(folder))


def pixels(shape, dtype, seed=0):
    """Runs, ramps and noise: something for every codec."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 120, shape)
    values[..., shape[-1] // 3 :] //= 40
    values[..., : shape[-1] // 4] = np.arange(shape[-1] // 4) % 100
    return values.astype(dtype)


def write_in_parts(sink, frames, rng):
    for page, frame in rng.sample(list(enumerate(frames)), len(frames)):
        cuts = sorted({0, len(frame), *(rng.randrange(len(frame) + 1) for _ in range(3))})
        for a, b in rng.sample(list(itertools.pairwise(cuts)), len(cuts) - 1):
            sink.write(slice(a, b), frame[a:b], page)


def read_by_others(path, array, dtype, codec, predictor):
    """What tifffile and GDAL read, where they can."""
    alone = codec in ("none", "deflate") and predictor != 3
    if HAVE_IMAGECODECS or alone:
        got = tifffile.imread(path)
        assert got.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(got.reshape(array.shape), array)
    if HAVE_RASTERIO and dtype != "f2":
        import rasterio

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with rasterio.open(path) as source:
                np.testing.assert_array_equal(source.read(1), array if array.ndim == 2 else array[0])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout(tmp_path, codec, layout, dtype):
    rng = random.Random(f"{codec} {layout} {dtype}")
    predictor = 3 if dtype[0] == "f" else 2
    for shape in [(40, 53), (1, 1), (1, 70), (33, 1), (2, 17, 53)]:
        array = pixels(shape, dtype)
        ways = list(itertools.product("<>", (False, True), (False, True)))
        for order, big, predicted in ways if shape == (40, 53) else rng.sample(ways, 2):
            path = tmp_path / "out.tif"
            options = {"compression": codec, "byteorder": order, "bigtiff": big, "predictor": predicted}
            with io.create(path, shape=shape, dtype=dtype, **LAYOUTS[layout], **options) as sink:
                write_in_parts(sink, array if array.ndim == 3 else array[None], rng)
            image = io.read(path)
            np.testing.assert_array_equal(image.array, array)
            assert (image.byteorder, image.bigtiff, image.compression) == (order, big, codec)
            kept = predicted and codec not in ("none", "packbits")
            assert {page.predictor for page in image.pages} == {predictor if kept else 1}
            assert {page.tile for page in image.pages} == {LAYOUTS[layout].get("tile")}
            read_by_others(path, array, dtype, codec, predictor if kept else 1)


@needs_native
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(CODECS), st.sampled_from(DTYPES), st.randoms())
@settings(max_examples=60)
def test_the_compiled_encoders_write_what_numpy_s_write(tmp_path_factory, height, width, codec, dtype, rng):
    """The same segments but for the codec: decoded by tifffile's or zlib, and the same bytes where there is none."""
    array = pixels((height, width), dtype, rng.randrange(99))
    layout = rng.choice(list(LAYOUTS.values()))
    folder = tmp_path_factory.mktemp("pair")
    options = {"shape": array.shape, "dtype": dtype, "compression": codec, "byteorder": rng.choice("<>"), **layout}
    options["threads"] = rng.choice([1, 3])
    with io.create(folder / "a.tif", **options) as sink:
        write_in_parts(sink, array[None], rng)
    np.testing.assert_array_equal(io.read(folder / "a.tif").array, array)
    if codec not in ("none", "deflate"):
        return
    native, segments._native, io.sink._native = segments._native, None, None
    try:
        with io.create(folder / "b.tif", **options) as sink:
            sink.write(slice(None), array)
    finally:
        segments._native = io.sink._native = native
    a, b = (tifffile.TiffFile(folder / name) for name in ("a.tif", "b.tif"))
    with a, b:
        for one, other in zip(*(raw_segments(f, codec) for f in (a, b)), strict=True):
            assert one == other


def raw_segments(tif, codec):
    page = tif.pages[0]
    found = []
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        tif.filehandle.seek(offset)
        data = tif.filehandle.read(count)
        found.append(zlib.decompress(data) if codec == "deflate" else data)
    return found


def test_the_bytes_do_not_depend_on_the_threads(tmp_path):
    array = pixels((300, 400), "u2")
    for threads in (1, 2, 5):
        with io.create(tmp_path / f"{threads}", like=None, shape=array.shape, dtype="u2", tile=(32, 32),
                       compression="deflate", threads=threads) as sink:  # fmt: skip
            sink.write(slice(None), array)
    assert len({(tmp_path / f"{threads}").read_bytes() for threads in (1, 2, 5)}) == 1


# --- floats


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given_dtype", ["f4", "f8"])
def test_floats_are_rounded_half_to_even_and_limited(tmp_path, dtype, layout, given_dtype):
    limits = np.iinfo(dtype)
    rng = np.random.default_rng(3)
    values = rng.uniform(limits.min - 0.1 * limits.max, 1.1 * limits.max, (40, 53))
    values[:, :12] = np.arange(12) / 2 + limits.min - 1
    values[0, 20:22] = np.inf, -np.inf
    values = values.astype(given_dtype)
    exact = np.rint(values.astype(np.float64))
    limited = np.count_nonzero((exact < limits.min) | (exact > limits.max))
    expected = exact.clip(limits.min, limits.max).astype(dtype)
    for codec in ("none", "lzw"):
        with io.create(
            tmp_path / "a.tif", shape=values.shape, dtype=dtype, compression=codec, **LAYOUTS[layout]
        ) as sink:
            counts = [sink.write(slice(a, b), values[a:b]) for a, b in ((11, 40), (0, 3), (3, 11))]
            assert sum(counts) == sink.limited == limited
        np.testing.assert_array_equal(io.read(tmp_path / "a.tif").array, expected)


def test_levels_undo_those_of_reading(tmp_path):
    array = np.random.default_rng(0).integers(0, 65536, (50, 41)).astype("u2")
    io.write(tmp_path / "a.tif", array)
    for dtype in ("f4", "f8"):
        with io.open(tmp_path / "a.tif") as source, io.create(tmp_path / "b.tif", like=source, tile=(16, 16)) as sink:
            for a in range(0, 50, 9):
                rows = slice(a, min(a + 9, 50))
                normalised = source.read(rows, dtype=dtype, levels=(-100, 70000))
                assert sink.write(rows, normalised, levels=(-100, 70000)) == 0
        np.testing.assert_array_equal(io.read(tmp_path / "b.tif").array, array)


# --- metadata, sizes


def test_what_the_arguments_say(tmp_path):
    array = pixels((2, 20, 30), "u2")
    with io.create(tmp_path / "a.tif", shape=array.shape, dtype="u2", resolution=(100.5, 50), resolution_unit="cm",
                   description="shot 7 \N{DEGREE SIGN}", rowsperstrip=3, compression="deflate") as sink:  # fmt: skip
        sink.report = {"a": 1}
        for page in (1, 0):
            sink.write(slice(None), array[page], page)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        first, second = tif.pages
        assert first.description == 'shot 7 \N{DEGREE SIGN}\n{"xrk": {"a": 1}}' and not second.description
        assert first.tags["XResolution"].value == (201, 2) and first.tags["ResolutionUnit"].value == 3
        assert first.rowsperstrip == second.rowsperstrip == 3
        assert [tag.code for tag in first.tags] == sorted(tag.code for tag in first.tags)
    assert io.read_report(tmp_path / "a.tif") == {"a": 1}


def test_like_a_source_with_other_storage(tmp_path):
    array = pixels((60, 50), ">u2")
    tifffile.imwrite(tmp_path / "a.tif", array, byteorder=">", description="x", metadata=None, resolution=(3, 4))
    options = {"tile": (32, 16), "compression": "deflate"}
    with io.open(tmp_path / "a.tif") as source, io.create(tmp_path / "b.tif", like=source, **options) as sink:
        sink.write(slice(None), source.read())
    image = io.read(tmp_path / "b.tif")
    assert (image.byteorder, image.description, image.compression) == (">", "x", "deflate")
    assert image.pages[0].tile == (32, 16) and image.resolution[:2] == (3.0, 4.0)
    np.testing.assert_array_equal(image.array, array)


@pytest.mark.parametrize(("side", "codec", "big"), [
    (40000, "none", False), (46341, "none", True), (40000, "lzw", True), (46000, "zstd", True),
])  # fmt: skip
def test_bigtiff_where_4_gb_could_be_exceeded(tmp_path, side, codec, big):
    with pytest.raises(KeyboardInterrupt), io.create(tmp_path / "a.tif", shape=(side, side), dtype="u2",
                                                     compression=codec, tile=(512, 512)) as sink:  # fmt: skip
        assert sink._big is big
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_an_imagej_stack_beyond_4_gb(tmp_path):
    """Classic TIFF all the same, its directory in front; what is not written is a hole in the file."""
    frame = pixels((30, 40), "u2")
    tifffile.imwrite(tmp_path / "a.tif", np.stack([frame] * 3), imagej=True, truncate=True, metadata={"Info": "kV"})
    like = io.read(tmp_path / "a.tif")
    side = 30000
    with pytest.raises(ZeroDivisionError), io.create(tmp_path / "b.tif", like=like, shape=(3, side, side)) as sink:
        assert not sink._big and sink._reserved
        sink.write(slice(0, 8), np.full((8, side), 7, "u2"), 2)
        sink.report = {"b": 2}
        sink._finish()
        sink._file.flush()
        partial = next(path for path in tmp_path.iterdir() if path.suffix == ".partial")
        with tifffile.TiffFile(partial) as tif:
            assert not tif.is_bigtiff and '{"xrk": {"b": 2}}' in tif.imagej_metadata["Info"]
            at = tif.pages[0].dataoffsets[0] + 2 * 2 * side * side
        assert np.fromfile(partial, "u2", 8, offset=at).tolist() == [7] * 8
        1 / 0  # noqa: B018
    assert names(tmp_path) == ["a.tif"]


def test_a_long_compressed_strip_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(io.sink, "LARGEST", 1000)
    array = pixels((64, 50), "u2")
    tifffile.imwrite(tmp_path / "a.tif", array, compression="zlib", rowsperstrip=64)
    with io.create(tmp_path / "b.tif", like=io.read(tmp_path / "a.tif")) as sink:
        sink.write(slice(None), array)
    assert "strips are cut to 10 rows" in sink.notes[0]
    image = io.read(tmp_path / "b.tif")
    assert image.pages[0].rowsperstrip == 10
    np.testing.assert_array_equal(image.array, array)


# --- whole or not at all


@pytest.mark.parametrize("codec", ["none", "deflate"])
def test_rows_that_are_missing_or_come_twice(tmp_path, codec):
    array, path = pixels((40, 30), "u2"), tmp_path / "a.tif"
    path.write_bytes(b"old")
    options = {"shape": (2, 40, 30), "dtype": "u2", "compression": codec, "rowsperstrip": 16}
    words = r"not complete: 7 rows of page 1 were never written \(the first is row 21\)"
    with pytest.raises(InputError, match=words), io.create(path, **options) as sink:
        sink.write(slice(None), array, 0)
        sink.write(slice(0, 21), array[:21], 1)
        sink.write(slice(28, 40), array[28:], 1)
    with pytest.raises(InputError, match="were written before"), io.create(path, **options) as sink:
        sink.write(slice(0, 21), array[:21])
        sink.write(slice(20, 25), array[20:25])
    assert names(tmp_path) == ["a.tif"] and path.read_bytes() == b"old"


def test_what_does_not_fit(tmp_path):
    array = pixels((40, 30), "u2")
    with pytest.raises(ZeroDivisionError), io.create(tmp_path / "a.tif", shape=(40, 30), dtype="u2") as sink:
        for rows, page, given_, error, words in [
            (slice(0, 41), 0, array, InputError, "slice of the rows 0 to 40"),
            (slice(3, 3), 0, array, InputError, "not empty"),
            (slice(0, 40, 2), 0, array, InputTypeError, "neighbouring rows"),
            (slice(0, 40), 1, array, InputError, "has pages 0 to 0"),
            (slice(0, 39), 0, array, InputError, r"are \(39, 30\), not \(40, 30\)"),
            (slice(0, 40), 0, array.astype("i4"), InputTypeError, "expected uint16 or floats"),
        ]:
            with pytest.raises(error, match=words):
                sink.write(rows, given_, page)
        with pytest.raises(InputError, match="black < white"):
            sink.write(slice(None), array.astype("f4"), levels=(2, 1))
        1 / 0  # noqa: B018
    nan = array.astype("f4")
    nan[3, 4] = np.nan
    for codec in ("none", "lzw"):
        sink = io.create(tmp_path / "a.tif", shape=(40, 30), dtype="u2", compression=codec)
        with pytest.raises(InputError, match=r"1 pixels .* are no numbers"):
            sink.write(slice(None), nan)
        with pytest.raises(InputError, match="is closed"):
            sink.write(slice(None), array)
    assert names(tmp_path) == []
    for options, error in [
        ({"shape": (4,)}, InputError), ({"dtype": "c8"}, InputTypeError), ({"tile": (10, 16)}, InputError),
        ({"tile": (16, 16), "rowsperstrip": 3}, InputError), ({"compression": "jpeg"}, InputError),
        ({"resolution": (0, 1)}, InputError), ({"byteorder": "|"}, InputError), ({"rowsperstrip": 0}, InputError),
    ]:  # fmt: skip
        with pytest.raises(error):
            io.create(tmp_path / "a.tif", **{"shape": (40, 30), "dtype": "u2", **options})
    assert names(tmp_path) == []


def test_reading_what_is_still_written(tmp_path):
    with io.create(tmp_path / "a.tif", shape=(400, 300), dtype="u2", compression="deflate") as sink:
        sink.write(slice(0, 399), pixels((399, 300), "u2"))
        partial = next(tmp_path.iterdir())
        with pytest.raises(ImageFileError, match="partial"):
            io.read(partial)
        sink.write(slice(399, 400), pixels((1, 300), "u2"))
    assert io.read(tmp_path / "a.tif").array.shape == (400, 300)


WRITER = """
    import sys
    from importlib import import_module
    import numpy as np
    tiff = import_module("xrk.io")
    rows = np.random.default_rng(0).integers(0, 60000, (64, 1024)).astype("u2")
    print("here", flush=True)
    while True:
        with tiff.create(sys.argv[1], shape=(512, 1024), dtype="u2", compression=sys.argv[2]) as sink:
            for start in range(0, 512, 64):
                sink.write(slice(start, start + 64), rows)
"""


def killed(path, codec, pauses):
    for pause in pauses:
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), codec]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"here\n"
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
        if path.exists() and path.read_bytes() != b"old":
            assert io.read(path).array.shape == (512, 1024)
        for partial in path.parent.glob("*.partial"):
            partial.unlink()
        yield path.exists() and path.stat().st_size > 3


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_process_leaves_a_whole_file_or_the_old_one(tmp_path):
    path = tmp_path / "out.tif"
    path.write_bytes(b"old")
    rng = random.Random(4)
    list(killed(path, "deflate", [rng.uniform(0, 0.1) for _ in range(4)]))


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    path, rng = tmp_path / "out.tif", random.Random(5)
    for codec in ("none", "deflate"):
        path.write_bytes(b"old")
        assert any(killed(path, codec, [rng.uniform(0, 0.2) for _ in range(50)]))


@pytest.mark.parametrize("codec", ["none", "deflate"])
def test_a_full_disk(tmp_path, codec):
    """The system's limit on the size of a file stands for it: write() fails in the middle, as it does there."""
    script = """
        import resource, signal, sys
        from importlib import import_module
        import numpy as np
        tiff = import_module("xrk.io")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300000, 300000))
        rows = np.random.default_rng(0).integers(0, 60000, (64, 1024)).astype("u2")
        try:
            with tiff.create(sys.argv[1], shape=(512, 1024), dtype="u2", compression=sys.argv[2]) as sink:
                for start in range(0, 512, 64):
                    sink.write(slice(start, start + 64), rows)
        except tiff.ImageFileError as error:
            print(error)
    """
    path = tmp_path / "out.tif"
    path.write_bytes(b"old")
    command = [sys.executable, "-c", textwrap.dedent(script), str(path), codec]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stdout == f"{path} cannot be written: File too large.\n" and not told.stderr
    assert names(tmp_path) == ["out.tif"] and path.read_bytes() == b"old"


def test_a_full_file_system(tmp_path):
    """On a file system of one megabyte, where this user may make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        (folder / "out.tif").write_bytes(b"old")
        array = np.random.default_rng(0).integers(0, 60000, (1024, 1024)).astype("u2")
        for codec in ("none", "deflate"):
            with pytest.raises(ImageFileError, match=r"out\.tif cannot be written: No space left on device\."):
                io.write(folder / "out.tif", array, compression=codec)
            assert names(folder) == ["out.tif"] and (folder / "out.tif").read_bytes() == b"old"
    finally:
        subprocess.run(["umount", str(folder)], check=True)
