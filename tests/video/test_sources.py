"""The same frames from every kind of source, and sources that are no video."""

import numpy as np
import pytest
import torch
from videos import sequences

import xrk
from xrk.errors import ImageFileError, InputError

LR, HR = sequences(5, 2)
EXPECTED = list(xrk.fuse_video(LR, HR, ratio=4, model="linear"))


def fused(lr, hr, **options):
    return [np.asarray(frame) for frame in xrk.fuse_video(lr, hr, ratio=4, **{"model": "linear"} | options)]


class Lazy:
    """Has the face of a data set that is read frame by frame: zarr's, dask's."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, []

    def __getitem__(self, i):
        self.read.append(i)
        return self.array[i]


@pytest.mark.parametrize(
    "make",
    [
        lambda a: a.astype(">u2"),
        lambda a: a[:, ::-1].copy()[:, ::-1],
        torch.from_numpy,
        list,
        tuple,
        iter,
        Lazy,
        lambda a: (frame for frame in a),
        lambda a: [torch.from_numpy(frame) for frame in a],
    ],
)
def test_kinds(make):
    assert np.array_equal(fused(make(LR), make(HR)), EXPECTED)
    assert np.array_equal(fused(make(LR), HR, model="bicubic"), fused(LR, HR, model="bicubic"))


def test_lazy_ones_are_read_frame_by_frame():
    lr, hr = Lazy(LR), Lazy(HR)
    frames = xrk.fuse_video(lr, hr, ratio=4, model="linear")
    assert lr.read == [] and hr.read == []
    next(frames)
    assert lr.read == [0] and hr.read == [0, 1]
    lr = Lazy(LR)
    next(xrk.fuse_video(lr, HR, ratio=4, model="linear", start=3))
    assert lr.read == [3]


@pytest.mark.parametrize("compression", ["none", "zstd", "deflate"])
def test_tiff_stacks(tmp_path, compression):
    names = tmp_path / "lr.tif", tmp_path / "hr.tif"
    for name, stack in zip(names, (LR, HR), strict=True):
        xrk.io.write(name, stack, compression=compression)
    assert np.array_equal(fused(*names), EXPECTED)
    assert np.array_equal(fused(*map(str, names)), EXPECTED)
    with xrk.io.open(names[0]) as lr, xrk.io.open(names[1]) as hr:
        assert np.array_equal(fused(lr, hr), EXPECTED)


def test_a_file_of_one_page_is_a_sequence_of_one_frame(tmp_path):
    xrk.io.write(tmp_path / "key.tif", HR[0])
    assert np.array_equal(fused(LR[:4], tmp_path / "key.tif"), [HR[0]] * 4)


def test_files_are_closed(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["lr"], file["hr"] = LR, HR
    for take in (0, 1, 5):
        frames = xrk.fuse_video(f"{tmp_path}/v.h5::lr", f"{tmp_path}/v.h5::hr", ratio=4, model="linear")
        for _ in range(take):
            next(frames)
        frames.close()
        with h5py.File(tmp_path / "v.h5", "r+"):  # which an open file does not allow
            pass
    with pytest.raises(InputError):
        xrk.fuse_video(f"{tmp_path}/v.h5::lr", HR, ratio=1, model="linear")
    with h5py.File(tmp_path / "v.h5", "r+"):
        pass


def test_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "scan.h5"
    with h5py.File(path, "w") as file:
        file["fast/data"], file["slow/data"], file["note"] = LR.astype(">u2"), HR, np.arange(3, dtype="u2")
        assert np.array_equal(fused(file["fast/data"], file["slow"]["data"]), EXPECTED)
    assert np.array_equal(fused(f"{path}::/fast/data", f"{path}::slow/data"), EXPECTED)
    with h5py.File(tmp_path / "one.nxs", "w") as file:
        file["entry/frames"] = LR
    assert np.array_equal(fused(tmp_path / "one.nxs", HR), EXPECTED)
    for name, words in ((str(path), "/fast/data, /slow/data"), (f"{path}::/fast", "'/fast'"), (f"{path}::x", "'x'")):
        with pytest.raises(ImageFileError, match=words):
            xrk.fuse_video(name, HR, ratio=4, model="linear")
    with h5py.File(path, "a") as file:
        file["nothing"] = h5py.Empty("u2")
    with pytest.raises(ImageFileError, match="/nothing holds no values"):
        xrk.fuse_video(f"{path}::nothing", HR, ratio=4, model="linear")
    with pytest.raises(InputError, match=r"\(3,\)"):
        xrk.fuse_video(f"{path}::note", HR, ratio=4, model="linear")
    (tmp_path / "broken.h5").write_bytes(b"\x89HDF\r\n\x1a\nand nothing else")
    for name in ("broken.h5", "absent.h5", "absent.tif"):
        with pytest.raises(ImageFileError, match=name):
            xrk.fuse_video(tmp_path / name, HR, ratio=4, model="linear")


def test_levels_that_a_file_states(tmp_path):
    import tifffile

    lr, hr = ((x >> 4).astype(np.uint16) for x in (LR, HR))
    for name, stack in (("lr.tif", lr), ("hr.tif", hr)):
        tifffile.imwrite(tmp_path / name, stack, ome=True, metadata={"axes": "TYX", "SignificantBits": 12})
    frames, report = xrk.fuse_video(tmp_path / "lr.tif", tmp_path / "hr.tif", ratio=4, model="bicubic", report=True)
    assert report.levels == report.hr_levels == (0.0, 4095.0)
    assert np.array_equal(list(frames), fused(lr, hr, model="bicubic", levels=(0, 4095)))
