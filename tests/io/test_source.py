"""Windows of files, against numpy.pad of what tifffile and rasterio read whole."""

import importlib.util
import logging
import os
import threading
import warnings
import zlib

import hypothesis.strategies as st
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from malformed import PIXELS, File, packbits

from xrk import io
from xrk.errors import ImageFileError, InputError, InputTypeError
from xrk.io import source as source_module
from xrk.io.tiff_native import NotTaken

native = pytest.importorskip("xrk._native")

HAVE_IMAGECODECS = importlib.util.find_spec("imagecodecs") is not None
DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8")
SHAPES = ((40, 53), (1, 77), (77, 1), (1, 1))
LAYOUTS = {
    "one strip": {"rowsperstrip": 4096},
    "strips": {"rowsperstrip": 7},
    "tiles": {"tile": (16, 32)},
    "large tiles": {"tile": (96, 112), "bigtiff": True},
}
CODECS = {
    "none": None, "deflate": "zlib", "old deflate": 32946, "lzw": "lzw", "packbits": "packbits", "zstd": "zstd",
}  # fmt: skip
NEED_IMAGECODECS = {"lzw", "packbits", "zstd"}


@pytest.fixture
def rng():
    return np.random.default_rng(14)


def counts(rng, dtype, shape):
    """Half noise, half ramps: codecs see long and short strings."""
    values = rng.random(shape) * 200
    half = shape[-1] // 2
    values[..., half:] = np.arange(shape[-1] - half) * 3
    return values.astype(dtype)


def save(path, array, **options):
    tifffile.imwrite(path, array, **{"photometric": "minisblack", "metadata": None, **options})
    return path


def padded(array, rows, cols, halo, border):
    """What `read` gives, by padding the whole image."""
    mode = {"mode": border} if border != "constant" else {"mode": "constant", "constant_values": 0}
    whole = np.pad(array, halo, **mode)
    return whole[rows.start : rows.stop + 2 * halo, cols.start : cols.stop + 2 * halo]


@pytest.mark.parametrize("predictor", [False, True], ids=["plain", "predictor"])
@pytest.mark.parametrize("codec", CODECS)
def test_every_combination(tmp_path, rng, codec, predictor):
    if predictor and codec in ("none", "packbits"):
        pytest.skip("TIFF has predictors for the other codecs only")
    if not HAVE_IMAGECODECS and (codec in NEED_IMAGECODECS or predictor):
        pytest.skip("tifffile writes this with the package imagecodecs only")
    path = tmp_path / "in.tif"
    for layout, options in LAYOUTS.items():
        for shape in SHAPES:
            for dtype in DTYPES:
                for order in "<>":
                    array = counts(rng, dtype, shape)
                    save(path, array, byteorder=order, compression=CODECS[codec], predictor=predictor, **options)
                    with io.open(path, threads=2) as source:
                        case = f"{layout} {shape} {dtype} {order}"
                        assert source.reader == "xrk", case
                        assert (source.shape, source.dtype) == (shape, array.dtype), case
                        found = source.read(slice(None), slice(None), halo=3)
                    assert found.tobytes() == np.pad(array, 3, mode="reflect").tobytes(), case


@pytest.mark.parametrize("codec", ["none", "deflate", "lzw", "packbits", "zstd"])
def test_rasterio_reads_and_writes_the_same(tmp_path, rng, codec):
    rasterio = pytest.importorskip("rasterio")
    for dtype in ("uint8", "uint16", "int16", "uint32", "int32", "float32", "float64"):
        for tiled in (False, True):
            for predictor in (1, 3 if dtype.startswith("f") else 2):
                array = counts(rng, dtype, (50, 70))
                path = tmp_path / f"{dtype}-{tiled}-{predictor}.tif"
                profile = {"driver": "GTiff", "height": 50, "width": 70, "count": 1, "dtype": dtype, "tiled": tiled}
                profile |= {"blockxsize": 32, "blockysize": 16} if tiled else {"blockysize": 11}
                profile |= {} if codec == "none" else {"compress": codec}
                profile |= {"predictor": predictor} if codec not in ("none", "packbits") else {}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that the file is not placed on the earth
                    with rasterio.open(path, "w", **profile) as target:
                        target.write(array, 1)
                    with rasterio.open(path) as peer:
                        theirs = peer.read(1)
                with io.open(path) as source:
                    assert source.reader == "xrk"
                    np.testing.assert_array_equal(source.read(), theirs)
                np.testing.assert_array_equal(theirs, array)


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("order", "<>")
def test_packed_pixels_state_their_levels(tmp_path, rng, bits, order):
    for shape in ((13, 37), (5, 4), (3, 2)):
        array = rng.integers(0, 2**bits, shape).astype("u2")
        stored = (array[..., None] >> np.arange(bits - 1, -1, -1) & 1).astype("u1").reshape(shape[0], -1)
        data = np.packbits(stored, axis=-1).tobytes()
        for compression, encode in (1, bytes), (8, zlib.compress):
            f = File(order)
            sides = {"HEIGHT": shape[0], "WIDTH": shape[1], "ROWS_PER_STRIP": shape[0]}
            page = f.page(encode(data), BITS=bits, COMPRESSION=compression, **sides)
            (tmp_path / "in.tif").write_bytes(f.build(page, data=encode(data)))
            with io.open(tmp_path / "in.tif") as source:
                assert source.reader == "xrk"
                assert source.levels == source.metadata.levels == (0, 2**bits - 1)
                np.testing.assert_array_equal(source.read(), array)
                found = source.read(slice(1, 3), slice(1, 2), halo=1, dtype="f4")
            expected = padded(array * (1 / (2**bits - 1)), slice(1, 3), slice(1, 2), 1, "reflect")
            np.testing.assert_array_equal(found, expected.astype("f4"))


WINDOWS = st.tuples(
    st.sampled_from(["none strips", "none tiles", "deflate strips", "deflate tiles"]),
    st.sampled_from([(1, 1), (1, 9), (9, 1), (2, 3), (33, 47), (64, 64)]),
    st.integers(0, 2**32),
    st.integers(0, 70),
    st.sampled_from(["reflect", "symmetric", "edge", "constant"]),
    st.sampled_from([None, "f2", "f4", "f8"]),
)


@pytest.fixture(scope="module")
def window_files(tmp_path_factory):
    """Files of every layout and shape that the windows are taken from, with their pixels."""
    rng, folder, files = np.random.default_rng(3), tmp_path_factory.mktemp("windows"), {}
    layouts = {
        "none strips": {"rowsperstrip": 5},
        "none tiles": {"tile": (16, 32)},
        "deflate strips": {"rowsperstrip": 5, "compression": "zlib"},
        "deflate tiles": {"tile": (16, 32), "compression": "zlib", "byteorder": ">"},
    }
    for name, options in layouts.items():
        for shape in [(1, 1), (1, 9), (9, 1), (2, 3), (33, 47), (64, 64)]:
            array = rng.integers(0, 65536, shape).astype("u2")
            path = save(folder / f"{name}-{shape[0]}x{shape[1]}.tif", array, **options)
            files[name, shape] = array, io.open(path, threads=2, cache=4096)
    yield files
    for _, source in files.values():
        source.close()


def _check_window(array, source, seed, halo, border, dtype):
    chance = np.random.default_rng(seed)
    (top, bottom), (left, right) = (sorted(chance.choice(n + 1, 2, replace=False).tolist()) for n in array.shape)
    rows, cols = slice(top, bottom), slice(left, right)
    levels = (100.0, 60000.5)
    found = source.read(rows, cols, halo=halo, border=border, dtype=dtype, levels=levels if dtype else None)
    if dtype is None:
        expected = padded(array, rows, cols, halo, border)
    else:
        values = ((array.astype("f8") - levels[0]) * (1.0 / (levels[1] - levels[0]))).astype(dtype)
        expected = padded(values, rows, cols, halo, border)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@given(WINDOWS)
@settings(max_examples=300)
def test_windows(window_files, window):
    layout, shape, *rest = window
    _check_window(*window_files[layout, shape], *rest)


@given(WINDOWS)
@settings(max_examples=60)
def test_windows_through_tifffile(window_files, window):
    layout, shape, *rest = window
    array, ours = window_files[layout, shape]
    with io.Source(ours.path, source_module.WholePixels(ours.path)) as source:
        assert source.reader == "tifffile"
        _check_window(array, source, *rest)


@pytest.mark.parametrize("path", native.supported_simd())
@pytest.mark.parametrize("dtype", DTYPES)
def test_normalised_values_are_rounded_once(tmp_path, rng, dtype, path):
    array = (rng.standard_normal((7, 300)) * 50 + 60).clip(0, 127).astype(dtype)
    if dtype[0] == "f":
        with np.errstate(over="ignore"):
            array[0, :7] = [np.nan, np.inf, -np.inf, 1e-7, -0.0, 6e4, 3e38]
    before = native.simd()
    native.set_simd(path)
    try:
        with io.open(save(tmp_path / "in.tif", array, compression="zlib")) as source:
            for kind in ("f2", "f4", "f8"):
                for black, white in ((0.0, 127.0), (3.25, 3.2500001), (-1e3, 1e6)):
                    found = source.read(dtype=kind, levels=(black, white))
                    with np.errstate(over="ignore", invalid="ignore"):
                        expected = ((array.astype("f8") - black) * (1.0 / (white - black))).astype(kind)
                    np.testing.assert_array_equal(found, expected)
    finally:
        native.set_simd(before)


def test_without_libraries_of_its_own(tmp_path, rng):
    """zlib alone does for deflate; without any, tifffile reads."""
    array = counts(rng, "u2", (60, 70))
    path = save(tmp_path / "in.tif", array, compression="zlib", tile=(32, 32))
    try:
        native.allow_tiff_library("libdeflate", False)
        with io.open(path) as source:
            assert source.reader == "xrk"
            np.testing.assert_array_equal(source.read(), array)
        native.allow_tiff_library("zlib", False)
        with io.open(path) as source:
            assert source.reader == "tifffile"
            np.testing.assert_array_equal(source.read(), array)
    finally:
        native.allow_tiff_library("libdeflate", True)
        native.allow_tiff_library("zlib", True)
    with pytest.raises(ValueError, match="no library 'xz'"):
        native.allow_tiff_library("xz", True)


def test_every_segment_is_decoded_once(tmp_path, rng):
    array = counts(rng, "u2", (200, 240))
    path = save(tmp_path / "in.tif", array, compression="zlib", tile=(32, 48))
    with io.open(path, threads=2) as source:
        for top in range(0, 200, 50):
            for left in range(0, 240, 60):
                window = source.read(slice(top, top + 50), slice(left, left + 60), halo=11, dtype="f4")
                assert window.shape == (72, 82)
        assert source._pixels.decoded_segments == 7 * 5
    with io.open(path, threads=2, cache=6 * (32 * 48 * 2 + 64)) as source:
        for top in range(0, 200, 10):
            source.read(slice(top, top + 10), slice(None))
        assert source._pixels.cached_bytes <= 6 * (32 * 48 * 2 + 64)
        assert source._pixels.decoded_segments < 2 * 7 * 5


@pytest.mark.parametrize("cache", [0, 1 << 20])
@pytest.mark.parametrize("options", [{}, {"rowsperstrip": 9}, {"tile": (64, 1600)}], ids=str)
def test_narrow_windows_of_wide_rows(tmp_path, rng, options, cache):
    """Row by row, or from strips that are kept: neither reads rows of which little is wanted for nothing."""
    for order in "<>":
        array = counts(rng, "u2", (90, 1510))
        path = save(tmp_path / "in.tif", array, byteorder=order, **options)
        with io.open(path, threads=2, cache=cache) as source:
            for top, bottom, left, right in [(0, 90, 1400, 1510), (40, 41, 0, 30), (1, 89, 7, 8)]:
                rows, cols = slice(top, bottom), slice(left, right)
                for dtype in (None, "f4"):
                    found = source.read(rows, cols, halo=6, dtype=dtype)
                    values = array if dtype is None else (array * (1.0 / 65535)).astype(dtype)
                    np.testing.assert_array_equal(found, padded(values, rows, cols, 6, "reflect"))
            assert source._pixels.cached_bytes <= cache


def test_out_may_be_part_of_a_larger_array(tmp_path, rng):
    array = counts(rng, "u2", (30, 40))
    for options in ({}, {"compression": "zlib"}, {"byteorder": ">"}, {"tile": (16, 16)}):
        with io.open(save(tmp_path / "in.tif", array, **options)) as source:
            large = np.full((40, 60), 7, "u2")
            window = large[3:37, 5:49]
            assert source.read(slice(0, 30), slice(0, 40), halo=2, border="edge", out=window) is window
            np.testing.assert_array_equal(window, np.pad(array, 2, mode="edge"))
            window[...] = 7
            assert (large == 7).all()
            for wrong in (large, window[:, ::-1], np.empty((34, 44)), np.empty((34, 44), ">u2"), window[::-1]):
                with pytest.raises(InputError, match="out"):
                    source.read(slice(0, 30), slice(0, 40), halo=2, out=wrong)
            large.flags.writeable = False
            with pytest.raises(InputError, match="writable"):
                source.read(slice(0, 30), slice(0, 40), halo=2, out=large[3:37, 5:49])
            with pytest.raises(InputTypeError, match="numpy array"):
                source.read(out=[1])


def test_arguments_that_do_not_fit(tmp_path, rng):
    with io.open(save(tmp_path / "in.tif", counts(rng, "u2", (30, 40)))) as source:
        everything = slice(None)
        for rows in (slice(0, 31), slice(5, 5), slice(-3, 4), slice(0, 10, 2), slice(0.0, 4)):
            with pytest.raises(InputError, match="rows="):
                source.read(rows, everything)
        with pytest.raises(InputTypeError, match="cols is a int"):
            source.read(everything, 3)
        for options in (
            {"page": 1},
            {"page": -1},
            {"halo": -1},
            {"halo": 1.5},
            {"halo": (1, 2, 3)},
            {"border": "wrap"},
        ):
            with pytest.raises(InputError, match=f"{next(iter(options))}="):
                source.read(everything, everything, **options)
        with pytest.raises(InputError, match="without a dtype"):
            source.read(levels=(0, 1))
        for dtype in ("i4", "c8", ">f4", "nonsense"):
            with pytest.raises(InputTypeError, match="float16, float32 or float64"):
                source.read(dtype=dtype)
        for levels in ((1, 1), (2, 1), (0, np.inf), (0, np.nan), (0, 1e-320)):
            with pytest.raises(InputError, match="black < white"):
                source.read(dtype="f4", levels=levels)
        with pytest.raises(InputTypeError, match="two finite numbers"):
            source.read(dtype="f4", levels="ab")
    with pytest.raises(InputError, match="is closed"):
        source.read()
    for options in ({"threads": 0}, {"cache": -1}):
        with pytest.raises(InputError, match=next(iter(options))):
            io.open(tmp_path / "in.tif", **options)


def test_default_levels_are_the_dtypes_range(tmp_path, rng):
    expected = {"u1": (0, 255), "i1": (-128, 127), "u2": (0, 65535), "i4": (-(2**31), 2**31 - 1), "f4": (0, 1)}
    for dtype, levels in expected.items():
        array = counts(rng, dtype, (8, 9))
        with io.open(save(tmp_path / "in.tif", array)) as source:
            assert source.levels == levels and source.metadata.levels is None
            values = (array.astype("f8") - levels[0]) * (1.0 / (levels[1] - levels[0]))
            np.testing.assert_array_equal(source.read(dtype="f4"), values.astype("f4"))


def test_pages_and_hyperstacks(tmp_path, rng):
    stack = counts(rng, "u2", (6, 20, 30))
    hyper = stack.reshape(3, 2, 20, 30)
    tifffile.imwrite(tmp_path / "plain.tif", stack, compression="zlib", photometric="minisblack")
    tifffile.imwrite(tmp_path / "imagej.tif", hyper, imagej=True, metadata={"axes": "ZCYX", "Info": "x"})
    tifffile.imwrite(tmp_path / "hidden.tif", stack, imagej=True, truncate=True)
    tifffile.imwrite(tmp_path / "ome.tif", hyper, ome=True, metadata={"axes": "TCYX"}, photometric="minisblack")
    tifffile.imwrite(tmp_path / "bigome.tif", stack, ome=True, bigtiff=True, byteorder=">", photometric="minisblack")
    for name in ("plain", "imagej", "hidden", "ome", "bigome"):
        with io.open(tmp_path / f"{name}.tif") as source:
            assert source.reader == "xrk" and source.shape == (6, 20, 30) and len(source.pages) == 6, name
            assert source.contiguous == (name == "hidden")
            kind = {"hidden": "imagej", "bigome": "ome"}.get(name, name)
            assert source.metadata.kind == source.kind == kind
            for page in (5, 0, 3):
                found = source.read(slice(4, 9), slice(3, 30), page=page, halo=2)
                np.testing.assert_array_equal(found, padded(stack[page], slice(4, 9), slice(3, 30), 2, "reflect"))
        np.testing.assert_array_equal(io.read(tmp_path / f"{name}.tif").array, stack)


def test_a_reduced_copy_is_no_page(tmp_path, rng):
    array = counts(rng, "u2", (40, 40))
    with tifffile.TiffWriter(tmp_path / "in.tif") as writer:
        writer.write(array, subifds=1)
        writer.write(array[::2, ::2], subfiletype=1)
        writer.write(array[::4, ::4], subfiletype=1)
    with io.open(tmp_path / "in.tif") as source:
        assert source.shape == (40, 40) and "reduced" in source.notes[0]


def test_what_tifffile_reads_is_logged(tmp_path, rng, caplog, monkeypatch):
    array = counts(rng, "u2", (20, 30))
    path = save(tmp_path / "in.tif", array)

    def refuse(*_):
        raise NotTaken("written for this test")

    monkeypatch.setattr(source_module, "NativePixels", refuse)
    with caplog.at_level(logging.INFO, "xrk.io"), io.open(path) as source:
        np.testing.assert_array_equal(source.read(halo=1), np.pad(array, 1, mode="reflect"))
        assert source.reader == "tifffile" and source.pages[0].compression == 1
    (record,) = caplog.records
    assert record.getMessage() == f"{path} is read by tifffile, page by page: written for this test."
    with pytest.raises(InputError, match="is closed"):
        source.read()


def test_files_that_only_tifffile_reads(tmp_path, caplog):
    """Bits in reversed order, which scanners of old wrote."""
    f, path = File(), tmp_path / "in.tif"
    path.write_bytes(f.build(f.page() | {266: f.tag(266, 3, 2)}))
    with caplog.at_level(logging.INFO, "xrk.io"), io.open(path) as source:
        assert source.reader == "tifffile" and source.shape == (32, 32)
        pixels = np.unpackbits(np.frombuffer(PIXELS, "u1")).reshape(-1, 8)[:, ::-1]
        np.testing.assert_array_equal(source.read(), np.packbits(pixels).view("<u2").reshape(32, 32))
    assert "bits in reversed order" in caplog.text


def test_prefetch_and_schedules(tmp_path, rng):
    array = counts(rng, "u2", (160, 160))
    path = save(tmp_path / "in.tif", array, compression="zlib", tile=(32, 32))
    schedule = [
        (slice(top, top + 40), slice(left, left + 40)) for top in range(0, 160, 40) for left in (0, 40, 80, 120)
    ]
    with io.open(path) as source:
        source.prefetch(slice(0, 64), slice(0, 160)).result()
        assert source._pixels.decoded_segments == 10
        source.read(slice(0, 64), slice(0, 160))
        assert source._pixels.decoded_segments == 10
        found = list(source.windows(schedule, ahead=3, halo=5, dtype="f4"))
        assert len(found) == 16 and source._pixels.decoded_segments == 25
        for window, (rows, cols) in zip(found, schedule, strict=True):
            np.testing.assert_array_equal(window, source.read(rows, cols, halo=5, dtype="f4"))
        some = source.windows(schedule)
        next(some)
        some.close()
        with pytest.raises(InputError, match="page=3"):
            list(source.windows([(slice(0, 1), slice(0, 1), 3)]))
        with pytest.raises(InputError, match="ahead"):
            next(source.windows(schedule, ahead=0))
    assert not [t for t in threading.enumerate() if t.name.startswith("xrk-io")]


def test_threads_share_one_source(tmp_path, rng):
    array = counts(rng, "u2", (300, 200))
    path = save(tmp_path / "in.tif", array, compression="zlib", rowsperstrip=13)
    wrong = []

    def work(seed):
        chance = np.random.default_rng(seed)
        for _ in range(40):
            top = int(chance.integers(0, 280))
            if not np.array_equal(source.read(slice(top, top + 20), slice(0, 200)), array[top : top + 20]):
                wrong.append(top)

    with io.open(path, threads=2, cache=1 << 14) as source:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_file_that_is_cut_short_while_it_is_open(tmp_path, rng):
    for options in ({}, {"compression": "zlib"}):
        path = save(tmp_path / "in.tif", counts(rng, "u2", (400, 300)), rowsperstrip=50, **options)
        with io.open(path) as source:
            source.read(slice(0, 1), slice(0, 1))
            os.truncate(path, 3000)
            with pytest.raises(ImageFileError, match="cut short while it was read"):
                source.read()


def test_errors_name_the_byte(tmp_path, rng):
    path = save(tmp_path / "in.tif", counts(rng, "u2", (40, 30)), compression="zlib", rowsperstrip=20)
    with tifffile.TiffFile(path) as tif:
        offset = tif.pages[0].dataoffsets[1]
    with open(path, "r+b") as file:
        file.seek(offset + 10)
        file.write(b"\xff" * 20)
    with io.open(path) as source:
        source.read(slice(0, 20), slice(None))
        with pytest.raises(io.ImageFileError, match=f"damaged at byte {offset}: the deflate data of strip 2 of 2"):
            source.read(slice(0, 21), slice(None))


def test_a_last_strip_that_is_as_high_as_the_others(tmp_path, rng):
    """Some writers fill it up; the rest is not part of the image."""
    array = counts(rng, "u2", (32, 30))
    for options in ({"compression": "zlib"}, {"compression": "zlib", "predictor": True}, {}):
        if options.get("predictor") and not HAVE_IMAGECODECS:
            continue
        path = save(tmp_path / "in.tif", array, rowsperstrip=16, **options)
        with tifffile.TiffFile(path, mode="r+b") as tif:
            tif.pages[0].tags[257].overwrite(27)
        np.testing.assert_array_equal(io.read(path).array, array[:27])


@pytest.mark.parametrize("reader", [source_module.NativePixels, source_module.WholePixels])
def test_significant_bits_of_an_ome_file_are_its_levels(tmp_path, reader):
    path = tmp_path / "o.tif"
    full = np.full((3, 8, 9), 4095, "u2")
    tifffile.imwrite(path, full, ome=True, metadata={"axes": "TYX", "SignificantBits": 12})
    pixels = reader(path, 0, 1) if reader is source_module.NativePixels else reader(path)
    with io.Source(path, pixels) as source:
        assert source.levels == source.metadata.levels == (0, 4095)
        assert source.read(page=2, dtype="f4").max() == 1


@pytest.mark.parametrize("rows", [32, 5])
def test_strips_whose_byte_counts_are_left_out(tmp_path, rows):
    """Uncompressed strips are as long as their pixels."""
    f, row_bytes = File(), len(PIXELS) // 32
    page = f.page(ROWS_PER_STRIP=rows)
    del page[279]
    starts = range(0, len(PIXELS), rows * row_bytes)
    page[273] = f.tag(273, 4, *(16 + start for start in starts))
    (tmp_path / "old.tif").write_bytes(f.build(page))
    with io.open(tmp_path / "old.tif") as source:
        assert source.reader == "xrk" and np.array_equal(source.read(), np.frombuffer(PIXELS, "u2").reshape(32, 32))
    page[273] = f.tag(273, 4, *(1 << 20 for start in starts))
    (tmp_path / "old.tif").write_bytes(f.build(page))
    with pytest.raises(ImageFileError, match=r"strip 1 of .* is cut off"):
        io.open(tmp_path / "old.tif")
    page[259] = f.tag(259, 3, 32773)
    (tmp_path / "old.tif").write_bytes(f.build(page))
    with pytest.raises(ImageFileError, match="without tag 279"):
        io.open(tmp_path / "old.tif")


@pytest.mark.parametrize("predictor", [2, 3])
def test_packbits_with_a_predictor(tmp_path, predictor):
    pixels = np.random.default_rng(1).integers(0, 9, (32, 32)).astype("u2" if predictor == 2 else "f4")
    if predictor == 2:
        coded = np.diff(pixels, axis=1, prepend=pixels.dtype.type(0))
    else:
        planes = pixels.astype(">f4").view("u1").reshape(32, 32, 4).transpose(0, 2, 1).reshape(32, -1)
        coded = np.diff(planes, axis=1, prepend=np.uint8(0))
    f, data = File(), packbits(coded.tobytes())
    bits = {"BITS": 8 * pixels.itemsize, "FORMAT": 1 if predictor == 2 else 3}
    path = tmp_path / "p.tif"
    path.write_bytes(f.build(f.page(data, COMPRESSION=32773, PREDICTOR=predictor, **bits), data=data))
    with io.open(path) as source:
        assert source.reader == "xrk" and np.array_equal(source.read(), pixels)
    if predictor == 2 and importlib.util.find_spec("imagecodecs"):
        assert np.array_equal(tifffile.imread(path), pixels)
