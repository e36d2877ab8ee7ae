"""Whatever is wrong with a file: one ImageFileError that names it, no other exception, no message, no hang."""

import io as standard_io
import logging
import os
import random
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile

from xrk import io
from xrk.errors import ImageFileError
from xrk.io import source

FRAMES = np.random.default_rng(3).integers(0, 4000, (3, 20, 24)).astype("u2")
KINDS = {
    "plain": (FRAMES[0], {}),
    "strips": (FRAMES.astype("f4"), {"rowsperstrip": 6, "compression": "zlib"}),
    "tiles": (FRAMES, {"tile": (16, 16), "compression": "zlib", "predictor": True, "bigtiff": True}),
    "imagej": (FRAMES, {"imagej": True, "metadata": {"Info": "x", "Labels": ["a", "b", "c"]}}),
    "contiguous": (FRAMES, {"imagej": True, "truncate": True}),
    "ome": (FRAMES, {"ome": True, "byteorder": ">"}),
}


def content(array, **options):
    buffer = standard_io.BytesIO()
    tifffile.imwrite(buffer, array, photometric="minisblack", **options)
    return buffer.getvalue()


def attempt(path, data):
    """Read the bytes as a file; the pixels, or None where it is refused."""
    path.write_bytes(data)
    try:
        image = io.read(path)
    except ImageFileError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None
    assert image.array.ndim in (2, 3) and image.array.size
    return image.array


@pytest.fixture
def quiet(caplog, capfd):
    """Fails where anything is logged or printed."""
    with caplog.at_level(logging.DEBUG):
        yield
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", KINDS)
def test_cut_off_at_every_length(tmp_path, quiet, kind):
    array, options = KINDS[kind]
    data = content(array, **options)
    np.testing.assert_array_equal(attempt(tmp_path / "whole.tif", data), array)
    # A stack in ImageJ's form of one page that holds exactly its first frame is a file of one frame.
    first = len(data) - FRAMES.nbytes + FRAMES[0].nbytes if kind == "contiguous" else None
    for length in range(0, len(data), 3 if len(data) < 1500 else 13):
        pixels = attempt(tmp_path / "cut.tif", data[:length])
        if pixels is not None and length != first:  # only what nothing refers to may be missing
            np.testing.assert_array_equal(pixels, array)


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes(tmp_path, quiet, kind):
    array, options = KINDS[kind]
    data = content(array, **options)
    chance = random.Random(kind)
    refused = 0
    for _ in range(100):
        flipped = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(min(len(data), 700))
            flipped[at] = chance.choice((0, 255, chance.randrange(256), flipped[at] ^ (1 << chance.randrange(8))))
        refused += attempt(tmp_path / "flipped.tif", bytes(flipped)) is None
    assert refused > 10


def refusal(path, data=None):
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ImageFileError) as caught:
        io.read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_no_file(tmp_path):
    path = tmp_path / "in.tif"
    assert "does not exist" in refusal(path)
    assert "is a folder" in refusal(tmp_path)
    assert "is empty" in refusal(path, b"")
    assert "looks like a PNG file" in refusal(path, b"\x89PNG\r\n\x1a\n" + bytes(50))
    assert "is not a TIFF file" in refusal(path, b"just some text, and more of it")
    assert "is not a TIFF file" in refusal(path, b"II")
    assert refusal("\0.tif").startswith("\0.tif cannot be read")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.tif")
        assert "not a regular file" in refusal(tmp_path / "pipe.tif")


@pytest.mark.parametrize(
    ("options", "array", "words"),
    [
        ({"photometric": "rgb"}, np.zeros((8, 8, 3), "u1"), "colour"),
        ({"photometric": "palette", "colormap": np.zeros((3, 256), "u2")}, np.zeros((8, 8), "u1"), "colour"),
        ({"planarconfig": "contig"}, np.zeros((8, 8, 2), "u2"), "2 samples per pixel"),
        ({"planarconfig": "separate", "photometric": 1}, np.zeros((3, 8, 8), "u2"), "3 samples per pixel"),
        ({}, np.zeros((8, 8), "c8"), "64-bit complex"),
        ({}, np.zeros((8, 8), "u8"), "64-bit unsigned integer"),
        ({}, np.zeros((8, 8), bool), "1-bit unsigned integer"),
        ({"volumetric": True, "tile": (2, 16, 16)}, np.zeros((4, 16, 16), "u2"), "volumes"),
    ],
)
def test_kinds_of_images_that_are_not_taken(tmp_path, options, array, words):
    tifffile.imwrite(tmp_path / "in.tif", array, **{"photometric": "minisblack", **options})
    assert words in refusal(tmp_path / "in.tif")


def test_threads_do_not_mix_up_their_errors(tmp_path):
    good, bad = tmp_path / "good.tif", tmp_path / "bad.tif"
    good.write_bytes(content(FRAMES))
    bad.write_bytes(patched(t257=2**31))  # tifffile logs an error for it

    def fails(path):
        try:
            io.read(path)
        except ImageFileError:
            return True
        return False

    paths = [good, bad] * 40
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(fails, paths)) == [path == bad for path in paths]


def test_pages_of_different_sizes(tmp_path):
    with tifffile.TiffWriter(tmp_path / "in.tif") as writer:
        writer.write(FRAMES[0])
        writer.write(FRAMES[0, :10])
    assert "different sizes" in refusal(tmp_path / "in.tif")


def test_pages_that_never_end(tmp_path):
    """Three pages, of which the last one points to the second."""
    data = bytearray(content(FRAMES))
    first = struct.unpack_from("<I", data, 4)[0]
    links, offset = [], first
    while offset:
        links.append((offset, offset + 2 + 12 * struct.unpack_from("<H", data, offset)[0]))
        offset = struct.unpack_from("<I", data, links[-1][1])[0]
    struct.pack_into("<I", data, links[2][1], links[1][0])
    assert "never end" in refusal(tmp_path / "in.tif", bytes(data))


def patched(**values):
    """A file that declares other values in the tags of these codes (t256=...) than it has."""
    buffer = standard_io.BytesIO(content(FRAMES[0], metadata=None, description="x"))
    with tifffile.TiffFile(buffer, mode="r+b") as tif:
        for code, value in values.items():
            tif.pages[0].tags[int(code[1:])].overwrite(value)
    return buffer.getvalue()


def test_sizes_that_are_not_there(tmp_path, monkeypatch):
    path = tmp_path / "in.tif"
    assert "more than xrk takes" in refusal(path, patched(t256=2**31 - 1, t257=2**31 - 1, t278=2**31))
    assert "too short" in refusal(path, patched(t256=2**20, t257=2**20, t278=2**20))
    assert "lists 1 strips where its size asks for" in refusal(path, patched(t257=2**30))
    assert "declares 0 x 20 pixels" in refusal(path, patched(t256=0))
    assert "stored as TIFF compression 999" in refusal(path, patched(t259=999))
    monkeypatch.setattr(source, "available_memory", lambda: FRAMES[0].nbytes - 1)
    assert "more than the free memory" in refusal(path, patched())


def test_deflate_data_that_inflates_without_end(tmp_path):
    """80 MB of zeros in 350 kB, where 2048 bytes are due."""
    bomb = zlib.compress(bytes(80_000_000), 1)
    page = content(np.zeros((32, 32), "u2"), compression="zlib", rowsperstrip=32, metadata=None)
    with tifffile.TiffFile(standard_io.BytesIO(page + bytes(len(page) % 2) + bomb), mode="r+b") as tif:
        tif.pages[0].tags[273].overwrite([len(page) + len(page) % 2])
        tif.pages[0].tags[279].overwrite([len(bomb)])
        data = tif.filehandle._fh.getvalue()
    assert "the deflate data of strip 1 of 1 hold more than the 2048 bytes" in refusal(tmp_path / "in.tif", data)
