"""Files in, files out: layouts, dtypes, byte orders, metadata; each read and written again."""

import importlib.util

import numpy as np
import pytest
import tifffile

from xrk import io
from xrk.errors import ImageFileError, InputError, InputTypeError

HAVE_IMAGECODECS = importlib.util.find_spec("imagecodecs") is not None
needs_imagecodecs = pytest.mark.skipif(not HAVE_IMAGECODECS, reason="the package imagecodecs is not installed")


@pytest.fixture
def rng():
    return np.random.default_rng(10)


def save(path, array, **options):
    tifffile.imwrite(path, array, **{"photometric": "minisblack", "metadata": None, **options})
    return path


def counts(rng, dtype, shape=(40, 53)):
    return (rng.random(shape) * 200).astype(dtype)


def rewrite(path, **options):
    """Read, write like it, read again."""
    image = io.read(path)
    target = path.with_name("again.tif")
    io.write(target, image.array, like=image, **options)
    again = io.read(target)
    assert again.array.dtype == image.array.dtype
    np.testing.assert_array_equal(again.array, image.array)
    return image, again


def layout(image):
    return image.layout, image.bigtiff, image.byteorder, [(p.compression, p.predictor, p.tile) for p in image.pages]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"])
def test_every_dtype_in_both_byte_orders(tmp_path, rng, order, dtype):
    array = counts(rng, dtype)
    image, again = rewrite(save(tmp_path / "in.tif", array, byteorder=order))
    assert image.array.dtype == np.dtype(order + dtype)
    np.testing.assert_array_equal(image.array, array)
    assert layout(again) == layout(image)
    assert tifffile.imread(tmp_path / "again.tif").tobytes() == tifffile.imread(tmp_path / "in.tif").tobytes()


@pytest.mark.parametrize(
    "options",
    [
        {"rowsperstrip": 7},
        {"tile": (16, 32)},
        {"tile": (16, 32), "bigtiff": True},
        {"compression": "zlib", "predictor": True},
        {"compression": "zlib", "rowsperstrip": 9},
        {"compression": 32946, "tile": (32, 16), "predictor": True, "byteorder": ">"},
        {"photometric": "miniswhite"},
        pytest.param({"compression": "lzw", "predictor": True}, marks=needs_imagecodecs),
        pytest.param({"compression": "zstd", "tile": (16, 16)}, marks=needs_imagecodecs),
        pytest.param({"compression": "packbits"}, marks=needs_imagecodecs),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(40, 53), (3, 40, 53), (1, 1)], ids=str)
def test_layouts_survive(tmp_path, rng, options, shape):
    array = counts(rng, "u2", shape)
    image, again = rewrite(save(tmp_path / "in.tif", array, **options))
    np.testing.assert_array_equal(image.array, array)
    assert layout(again) == layout(image)
    assert [p.photometric for p in again.pages] == [p.photometric for p in image.pages]
    with tifffile.TiffFile(image.path) as old, tifffile.TiffFile(again.path) as new:
        for one, other in zip(old.pages, new.pages, strict=True):
            assert (one.rowsperstrip, one.tile, one.compression) == (other.rowsperstrip, other.tile, other.compression)


@needs_imagecodecs
def test_floating_point_predictor(tmp_path, rng):
    image, again = rewrite(save(tmp_path / "in.tif", counts(rng, "f4"), compression="zstd", predictor=True))
    assert image.pages[0].predictor == again.pages[0].predictor == 3


@needs_imagecodecs
@pytest.mark.parametrize("bits", [4, 10, 12, 14])
def test_packed_integers_state_their_levels(tmp_path, rng, bits):
    array = rng.integers(0, 2**bits, (31, 53)).astype("u1" if bits == 4 else "u2")
    image, again = rewrite(save(tmp_path / "in.tif", array, bitspersample=bits))
    np.testing.assert_array_equal(image.array, array)
    assert image.levels == (0, 2**bits - 1)
    assert again.levels is None and "packed" in image.notes[0]


@needs_imagecodecs
def test_a_lossy_compression_is_written_as_deflate(tmp_path, rng):
    image, again = rewrite(save(tmp_path / "in.tif", counts(rng, "u1", (64, 64)), compression="jpeg"))
    assert (image.compression, again.compression) == ("JPEG", "deflate")
    assert "JPEG" in image.notes[0]


def test_full_integers_state_no_levels(tmp_path, rng):
    """MaxSampleValue is the largest value used, by the format's definition, and no level."""
    path = save(tmp_path / "in.tif", counts(rng, "u2"), extratags=[(281, 3, 1, 4095, True)])
    assert io.read(path).levels is None


def test_pages_keep_their_own_metadata(tmp_path, rng):
    stack = counts(rng, "u2", (3, 20, 30))
    path = tmp_path / "in.tif"
    with tifffile.TiffWriter(path, byteorder=">") as writer:
        for n, frame in enumerate(stack):
            writer.write(
                frame, metadata=None, description=f"page {n} \N{DEGREE SIGN}".encode(), software="camera 3",
                datetime="2020:01:02 03:04:05", resolution=((1000, 3), (7, 2)), resolutionunit=3,
                extratags=[(271, 2, 0, "Maker", False), (274, 3, 1, 6, False), (65000, 12, 1, 1.5 + n, False)],
            )  # fmt: skip
    image, again = rewrite(path, report={"key": 1})
    assert image.resolution == (1000 / 3, 3.5, "cm")
    assert [p.tags for p in again.pages] == [p.tags for p in image.pages]
    assert [p.resolution for p in again.pages] == [((1000, 3), (7, 2))] * 3
    with tifffile.TiffFile(again.path) as tif:
        page = tif.pages[1]
        assert page.description == "page 1 \N{DEGREE SIGN}"
        values = [page.tags[code].value for code in (271, 274, 305, 306, 65000)]
        assert values == ["Maker", 6, "camera 3", "2020:01:02 03:04:05", 2.5]
    assert again.description == 'page 0 \N{DEGREE SIGN}\n{"xrk": {"key": 1}}'


def test_values_that_no_longer_hold_are_left_out(tmp_path, rng):
    path = save(tmp_path / "in.tif", counts(rng, "u2"), extratags=[(280, 3, 1, 3, True), (281, 3, 1, 180, True)])
    rewrite(path)
    with tifffile.TiffFile(tmp_path / "again.tif") as tif:
        assert not {280, 281} & {tag.code for tag in tif.pages[0].tags}


def test_reduced_copies_are_noted(tmp_path, rng):
    frame = counts(rng, "u2", (64, 64))
    with tifffile.TiffWriter(tmp_path / "in.tif") as writer:
        writer.write(frame, metadata=None)
        writer.write(frame[::2, ::2], subfiletype=1, metadata=None)
    image, again = rewrite(tmp_path / "in.tif")
    np.testing.assert_array_equal(image.array, frame)
    assert len(image.notes) == 1 and not again.notes


@pytest.mark.parametrize("truncate", [False, True])
def test_imagej_stacks(tmp_path, rng, truncate):
    array = counts(rng, "u2", (2, 3, 20, 30))
    metadata = {"axes": "TCYX", "Info": "kV = 130", "Labels": list("abcdef"), "spacing": 0.5, "unit": "mm"}
    path = tmp_path / "in.tif"
    tifffile.imwrite(path, array, imagej=True, metadata=metadata, truncate=truncate, resolution=(10, 20))
    image, again = rewrite(path, report={"model": "m"})
    assert (image.kind, image.contiguous, image.array.shape) == ("imagej", truncate, (6, 20, 30))
    assert (again.kind, again.contiguous, again.report) == ("imagej", truncate, {"model": "m"})
    with tifffile.TiffFile(path) as old, tifffile.TiffFile(again.path) as new:
        np.testing.assert_array_equal(new.asarray(), array)
        assert len(new.pages) == len(old.pages) == (1 if truncate else 6)
        assert new.series[0].axes == old.series[0].axes == "TCYX"
        assert new.pages[0].description == old.pages[0].description
        expected = old.imagej_metadata | {"Info": 'kV = 130\n{"xrk": {"model": "m"}}'}
        assert new.imagej_metadata == expected


def test_cut_imagej_stack(tmp_path, rng):
    path = tmp_path / "in.tif"
    tifffile.imwrite(path, counts(rng, "u2", (4, 20, 30)), imagej=True, truncate=True)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(ImageFileError, match="cut off: its description states 4 frames"):
        io.read(path)


def test_ome(tmp_path, rng):
    array = counts(rng, "u2", (2, 3, 20, 30))
    path = tmp_path / "in.ome.tif"
    metadata = {"axes": "TCYX", "SignificantBits": 12, "PhysicalSizeX": 0.1, "PhysicalSizeXUnit": "mm"}
    tifffile.imwrite(path, array, ome=True, metadata=metadata, photometric="minisblack")
    image, again = rewrite(path, report={"model": '<&"--\N{DEGREE SIGN}'})
    assert (image.kind, image.levels) == ("ome", (0, 4095))
    assert (again.kind, again.levels) == ("ome", (0, 4095))
    assert again.report == {"model": '<&"--\N{DEGREE SIGN}'} == io.read_report(again.path)
    with tifffile.TiffFile(again.path) as tif:
        assert (tif.series[0].axes, tif.series[0].shape) == ("TCYX", array.shape)
        np.testing.assert_array_equal(tif.asarray(), array)
        assert 'PhysicalSizeX="0.1"' in tif.ome_metadata
    assert rewrite(again.path.rename(path), report={"second": 1})[1].report == {
        "second": 1,
        "input_report": {"model": '<&"--\N{DEGREE SIGN}'},
    }


def test_tifffile_still_reads_its_own_description(tmp_path, rng):
    path = tmp_path / "in.tif"
    tifffile.imwrite(path, counts(rng, "u2", (2, 20, 30)), photometric="minisblack", metadata={"pixel_mm": 0.1})
    _, again = rewrite(path, report={"n": float("nan"), "s": np.float32(0.5), "t": (1, 2)})
    assert again.report == {"n": None, "s": 0.5, "t": [1, 2]}
    with tifffile.TiffFile(again.path) as tif:
        assert tif.series[0].kind == "shaped" and tif.shaped_metadata[0]["pixel_mm"] == 0.1


def test_a_real_frame(tmp_path, shared_data):
    image = io.read(shared_data / "radiographs" / "synchrotron" / "radiography_2BM_0020.tif")
    assert (image.array.shape, image.array.dtype, image.kind) == ((500, 500), np.dtype(">u2"), "imagej")
    io.write(tmp_path / "out.tif", image.array, like=image, report={"a": 1})
    again = io.read(tmp_path / "out.tif")
    np.testing.assert_array_equal(again.array, image.array)
    assert again.layout == image.layout and again.description == image.description and again.report == {"a": 1}
    assert [entry for entry in again.imagej if entry[0] != b"info"] == list(image.imagej)


@pytest.mark.parametrize("compression", [None, "none", "deflate"])
def test_writing_an_array_alone(tmp_path, rng, compression):
    array = counts(rng, ">i2", (2, 30, 20))
    io.write(tmp_path / "out.tif", array[:, ::-1, ::2], compression=compression, report={"a": 1})
    image = io.read(tmp_path / "out.tif")
    np.testing.assert_array_equal(image.array, array[:, ::-1, ::2])
    assert image.byteorder == ">" and image.compression == (compression or "none")
    assert image.description == '{"xrk": {"a": 1}}' and image.report == {"a": 1}


def test_the_same_call_gives_the_same_bytes(tmp_path, rng):
    array = counts(rng, "u2")
    for name in "ab":
        io.write(tmp_path / name, array, compression="deflate", report={"x": 1.5})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_cannot_be_written(tmp_path, rng):
    array = counts(rng, "u2")
    like = io.read(save(tmp_path / "in.tif", array))
    path = tmp_path / "out.tif"
    with pytest.raises(InputError, match=r"\(H, W\)"):
        io.write(path, array[0])
    with pytest.raises(InputError, match="not empty"):
        io.write(path, array[:0])
    with pytest.raises(InputTypeError, match="complex64"):
        io.write(path, array.astype("c8"))
    with pytest.raises(InputError, match="shape"):
        io.write(path, array[1:], like=like)
    with pytest.raises(InputError, match="lossless"):
        io.write(path, array, compression="lossless")
    assert not path.exists()


@pytest.mark.skipif(HAVE_IMAGECODECS, reason="the package imagecodecs is installed")
def test_codecs_that_need_the_extra(tmp_path, rng, monkeypatch):
    array = counts(rng, "u2")
    monkeypatch.setattr(io.segments, "_native", None)
    with pytest.raises(ImageFileError, match=r"lzw needs the package imagecodecs \(pip install 'xrk\[codecs\]'\)"):
        io.check_writable(tmp_path / "out.tif", compression="lzw")
    with pytest.raises(ImageFileError, match=r"zstd needs"):
        io.write(tmp_path / "out.tif", array, compression="zstd")
    path = save(tmp_path / "in.tif", array)
    patch_tag(path, 259, 34712)  # JPEG 2000, which xrk does not read by itself
    with pytest.raises(ImageFileError, match=r"cannot be read: JPEG2000 needs the package imagecodecs"):
        io.read(path)


def patch_tag(path, code, value):
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tif.pages[0].tags[code].overwrite(value)
