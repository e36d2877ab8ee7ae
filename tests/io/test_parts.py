"""Strips and tiles that are too large to be decoded at once come in parts, with the same pixels."""

import os
import subprocess
import sys
import textwrap
import threading
import zlib

import numpy as np
import pytest
import tifffile

from xrk import io
from xrk.errors import ImageFileError
from xrk.io import tiff_native

_native = pytest.importorskip("xrk._native")
CODECS = ["lzw", "packbits", "deflate", "zstd"]


@pytest.fixture
def small(monkeypatch):
    """Segments of more than 64 KiB come in parts of 2."""
    monkeypatch.setattr(tiff_native, "WHOLE", 1 << 16)
    monkeypatch.setattr(io.source, "WHOLE", 0)


def parts(source):
    return source._pixels.decoded_segments


@pytest.mark.parametrize("dtype", ["u1", "i2", "u4", "f4"])
@pytest.mark.parametrize("layout", [{"rowsperstrip": 700}, {"rowsperstrip": 500}, {"tile": (352, 608)}], ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_pixels(tmp_path, small, codec, layout, dtype):
    rng = np.random.default_rng(1)
    array = (rng.integers(0, 99, (700, 1300)) + 3 * np.arange(1300)).astype(dtype)
    array[300:350] = 7  # and rows that hardly need a byte
    predictor = False if codec == "packbits" else None
    with io.create(tmp_path / "a.tif", shape=array.shape, dtype=dtype, compression=codec, predictor=predictor,
                   byteorder=">", **layout) as sink:  # fmt: skip
        sink.write(slice(None), array)
    np.testing.assert_array_equal(io.read(tmp_path / "a.tif").array, array)
    with io.open(tmp_path / "a.tif", cache=0) as source:
        # From the top down, back to the top, and all of it at once.
        for rows in [(0, 40), (40, 300), (380, 391), (10, 20), (650, 700), (0, 700)]:
            read = source.read(slice(*rows), slice(3, 1299), halo=2, border="symmetric")
            expected = np.pad(array, 2, mode="symmetric")[rows[0] : rows[1] + 4, 3:1303]
            np.testing.assert_array_equal(read, expected)
        assert parts(source) > 6


@pytest.mark.parametrize("codec", CODECS)
def test_from_the_top_down_each_part_is_decoded_once(tmp_path, codec):
    array = np.random.default_rng(2).integers(0, 9, (4096, 2200)).astype("u1")
    with io.create(tmp_path / "a.tif", shape=array.shape, dtype="u1", compression=codec, rowsperstrip=4096) as sink:
        sink.write(slice(None), array)
    reader = _native.TiffReader(os.open(tmp_path / "a.tif", os.O_RDONLY), 0, 1 << 22)
    out = np.empty((256, 2200), "u1")
    for top in range(0, 4096, 256):
        reader.read(0, top, 0, out)
        np.testing.assert_array_equal(out, array[top : top + 256])
    assert reader.decoded_segments <= 70 + 16  # parts of 128 KiB; one more where a group ends inside one


def test_deflate_by_other_writers(tmp_path, small):
    array = np.random.default_rng(2).integers(0, 999, (300, 400)).astype("u2")
    tifffile.imwrite(tmp_path / "a.tif", array, compression="zlib", rowsperstrip=300)
    np.testing.assert_array_equal(io.read(tmp_path / "a.tif").array, array)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damage_is_one_sentence(tmp_path, small, codec, damage):
    array = np.random.default_rng(2).integers(0, 999, (300, 400)).astype("u2")
    path = tmp_path / "a.tif"
    with io.create(path, shape=array.shape, dtype="u2", compression=codec, rowsperstrip=300, predictor=False) as sink:
        sink.write(slice(None), array)
    with tifffile.TiffFile(path, mode="r+b") as tif:
        offset, count = tif.pages[0].dataoffsets[0], tif.pages[0].databytecounts[0]
        if damage == "cut":
            tif.pages[0].tags[279].overwrite([count // 2])
    if damage == "changed":
        content = bytearray(path.read_bytes())
        content[offset + count - 5 : offset + count] = b"\xff\xff\xff\xff\xff"
        if codec in ("lzw", "packbits"):  # without a sum: codes that were never made, or literals that do not end
            content[offset : offset + 9] = b"\xff" * 9 if codec == "lzw" else b"\x7f" * 9
        path.write_bytes(content)
    if codec == "packbits" and damage == "changed":
        io.read(path)  # any bytes are PackBits
        return
    with pytest.raises(ImageFileError, match=r"a\.tif is damaged at byte \d+: the .* data of strip 1 of 1 "):
        io.read(path)
    with io.open(path, cache=0) as source, pytest.raises(ImageFileError, match="strip 1 of 1"):
        source.read(slice(290, 300))


def test_several_threads_and_closing(tmp_path, small):
    array = np.random.default_rng(2).integers(0, 999, (600, 3000)).astype("u2")
    with io.create(tmp_path / "a.tif", shape=array.shape, dtype="u2", compression="zstd", rowsperstrip=600) as sink:
        sink.write(slice(None), array)
    wrong = []
    with io.open(tmp_path / "a.tif", cache=0) as source:

        def read(first):
            for top in range(first, 560, 60):
                if not np.array_equal(source.read(slice(top, top + 40)), array[top : top + 40]):
                    wrong.append(top)

        threads = [threading.Thread(target=read, args=(first,)) for first in (0, 30, 200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def encoded(path, data, shape):
    """One strip of 16-bit pixels, as deflate made it."""
    tifffile.imwrite(path, iter([data]), shape=shape, dtype="u2", compression="zlib", rowsperstrip=shape[0])


def test_memory_does_not_depend_on_the_strip(tmp_path):
    """A strip of 64 MiB, read from the top down in a process that grows by a fraction of that."""
    rows = np.random.default_rng(0).integers(0, 9, (64, 8192)).astype("u2").tobytes()
    deflate = zlib.compressobj(1)
    data = b"".join(deflate.compress(rows) for _ in range(64)) + deflate.flush()
    path = tmp_path / "a.tif"
    encoded(path, data, (4096, 8192))
    script = """
        import resource, sys, zlib
        import numpy as np
        import xrk.io
        with xrk.io.open(sys.argv[1], cache=1 << 20) as source:
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            sums = {zlib.crc32(source.read(slice(top, top + 64))) for top in range(0, 4096, 64)}
        print(len(sums), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(told[0]) == 1
    assert int(told[1]) < 16 << 10  # the cache, parts of a megabyte, and two windows


def test_a_bomb_is_refused(tmp_path):
    bomb = zlib.compress(bytes(260 << 20), 1)
    path = tmp_path / "a.tif"
    encoded(path, bomb, (130 << 10, 1024))
    with pytest.raises(ImageFileError, match="grows from"):
        io.open(path)


def test_without_a_library_that_streams_tifffile_reads(tmp_path, small):
    array = np.random.default_rng(2).integers(0, 999, (300, 400)).astype("u2")
    tifffile.imwrite(tmp_path / "a.tif", array, compression="zlib", rowsperstrip=300)
    _native.allow_tiff_library("zlib", False)
    try:
        with io.open(tmp_path / "a.tif", cache=0) as source:
            assert source.reader == "tifffile"
            np.testing.assert_array_equal(source.read(), array)
    finally:
        _native.allow_tiff_library("zlib", True)
