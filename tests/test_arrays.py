import sys
from array import array as python_array
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from xrk import arrays
from xrk.errors import InputTypeError


def _round_trip(image):
    """What the caller gets for a result that is the image itself, frame by frame."""
    incoming = arrays.accept(image)
    frames = [incoming.frame(i) for i in range(incoming.frames)]
    assert all(f.flags.c_contiguous and f.flags.aligned and f.dtype.isnative and f.ndim == 2 for f in frames)
    result = np.stack(frames).astype(incoming.dtype) if len(incoming.shape) == 3 else frames[0].astype(incoming.dtype)
    return incoming, incoming.hand_back(result)


# --- numpy


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6)])
def test_numpy(order, shape):
    image = np.arange(np.prod(shape)).reshape(shape).astype(f"{order}u2")
    incoming, back = _round_trip(image)
    assert incoming.shape == shape
    assert back.dtype == image.dtype
    np.testing.assert_array_equal(back, image)


def test_a_plain_frame_is_not_copied():
    image = np.zeros((3, 4, 5), np.float32)
    image.flags.writeable = False
    assert np.shares_memory(arrays.accept(image).frame(1), image)


def test_strides_and_alignment():
    base = np.arange(200, dtype=np.int32).reshape(10, 20)
    misaligned = np.frombuffer(b"x" + base.tobytes(), np.uint8)[1:].view(np.int32).reshape(10, 20)
    assert not misaligned.flags.aligned
    for view in (base[::-1, ::2], base.T, base[3:4, ::-3], np.broadcast_to(base[0], (6, 20)), misaligned):
        _, back = _round_trip(view)
        np.testing.assert_array_equal(back, view)


def test_memory_map(tmp_path):
    image = np.memmap(tmp_path / "frame.raw", np.uint16, "w+", shape=(5, 6))
    image[:] = 7
    _, back = _round_trip(image)
    assert type(back) is np.ndarray
    np.testing.assert_array_equal(back, 7)


def test_masked_array():
    image = np.ma.MaskedArray(np.arange(12, dtype=">i2").reshape(3, 4), mask=np.eye(3, 4, dtype=bool), fill_value=-1)
    incoming, back = _round_trip(image)
    np.testing.assert_array_equal(incoming.mask, image.mask)
    assert type(back) is np.ma.MaskedArray
    np.testing.assert_array_equal(back.mask, image.mask)
    np.testing.assert_array_equal(back.data, image.data)
    assert back.fill_value == -1
    assert not np.shares_memory(back.mask, image.mask)
    incoming, back = _round_trip(np.ma.MaskedArray(np.ones((2, 2))))
    assert incoming.mask is None
    assert back.mask is np.ma.nomask


def test_matrix_is_refused():
    with pytest.raises(InputTypeError, match=r"numpy.matrix; expected .*numpy.asarray"):
        arrays.accept(np.ones((2, 2)).view(np.matrix))


# --- torch


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.float32, torch.float64])
def test_torch(dtype):
    image = torch.arange(60).to(dtype).reshape(3, 4, 5)
    incoming, back = _round_trip(image)
    assert np.shares_memory(incoming.frame(0), image.numpy())
    assert type(back) is torch.Tensor
    assert (back.dtype, back.device, back.shape) == (image.dtype, image.device, image.shape)
    assert torch.equal(back.to(torch.float64), image.to(torch.float64))
    _, back = _round_trip(image.permute(2, 1, 0)[:, ::2])
    assert torch.equal(back.to(torch.float64), image.to(torch.float64).permute(2, 1, 0)[:, ::2])


def test_torch_gradients_and_parameters():
    image = torch.nn.Parameter(torch.rand(4, 5))
    _, back = _round_trip(image)
    assert type(back) is torch.Tensor
    assert not back.requires_grad
    assert torch.equal(back, image.detach())


def test_torch_negative_view():
    image = torch._neg_view(torch.ones(3, 4))
    _, back = _round_trip(image)
    assert torch.equal(back, -torch.ones(3, 4))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.complex64])
def test_other_torch_dtypes(dtype):
    with pytest.raises(InputTypeError, match=f"{str(dtype).removeprefix('torch.')}; expected one of uint8"):
        arrays.accept(torch.zeros(4, 5, dtype=dtype))


def test_tensors_without_dense_data():
    with pytest.raises(InputTypeError, match="sparse_coo; expected a dense tensor"):
        arrays.accept(torch.ones(3, 3).to_sparse())
    with pytest.raises(InputTypeError, match=r"device meta.*expected a dense tensor"):
        arrays.accept(torch.ones(3, 3, device="meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_torch_on_a_gpu():
    image = torch.arange(60, device="cuda").to(torch.uint16).reshape(3, 4, 5)
    incoming, back = _round_trip(image)
    assert incoming.device == back.device == image.device
    assert torch.equal(back, image)

    class OnlyCuda:
        __cuda_array_interface__ = image.__cuda_array_interface__

    incoming, back = _round_trip(OnlyCuda())
    assert incoming.device == back.device == image.device
    assert torch.equal(back, image)


# --- other libraries


class Exchanged:
    """An array of a foreign library that knows DLPack only."""

    def __init__(self, data, device=None):
        self.data = data
        self.device = device

    def __dlpack__(self, **options):
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device or self.data.__dlpack_device__()


class Standard(Exchanged):
    """One whose library follows the array API standard."""

    def __array_namespace__(self, **_):
        return SimpleNamespace(from_dlpack=lambda other: Standard(np.from_dlpack(other)))


def test_dlpack_of_a_library_with_from_dlpack():
    image = Standard(np.arange(20, dtype=np.uint16).reshape(4, 5))
    incoming, back = _round_trip(image)
    assert np.shares_memory(incoming.frame(0), image.data)
    assert type(back) is Standard
    np.testing.assert_array_equal(back.data, image.data)


def test_dlpack_of_a_library_whose_module_has_from_dlpack(monkeypatch):
    library = SimpleNamespace(from_dlpack=lambda other: Exchanged(np.from_dlpack(other)))
    monkeypatch.setitem(sys.modules, "foreign_arrays", library)
    monkeypatch.setattr(Exchanged, "__module__", "foreign_arrays.core")
    _, back = _round_trip(Exchanged(np.ones((4, 5), np.float32)))
    assert type(back) is Exchanged


def test_dlpack_of_a_library_without():
    image = Exchanged(torch.arange(20, dtype=torch.float64).reshape(4, 5))
    _, back = _round_trip(image)
    assert type(back) is np.ndarray
    np.testing.assert_array_equal(back, image.data.numpy())


def test_dlpack_that_fails():
    with pytest.raises(InputTypeError, match="Exchanged; expected"):
        arrays.accept(Exchanged(None, device=(1, 0)))
    with pytest.raises(InputTypeError, match=r"Exchanged, cannot be read as an array: .*expected"):
        arrays.accept(Exchanged(None, device=(2, 99)))


class TwoWays(Exchanged):
    def __array__(self, dtype=None, copy=None):
        return np.ones((2, 2))


def test_dlpack_that_fails_where_there_is_another_way():
    np.testing.assert_array_equal(_round_trip(TwoWays(None, device=(1, 0)))[1], np.ones((2, 2)))


class Interface:
    def __init__(self, data):
        self.data = data
        self.__array_interface__ = data.__array_interface__


def test_array_interface():
    image = Interface(np.arange(20, dtype=">u2").reshape(4, 5))
    _, back = _round_trip(image)
    assert type(back) is np.ndarray
    assert back.dtype == image.data.dtype
    np.testing.assert_array_equal(back, image.data)


def test_pillow_image():
    image = pytest.importorskip("PIL.Image").fromarray(np.arange(20, dtype=np.uint16).reshape(4, 5))
    _, back = _round_trip(image)
    np.testing.assert_array_equal(back, np.arange(20).reshape(4, 5))


class Labelled:
    """What xarray.DataArray looks like from outside."""

    dims = ("y", "x")

    def __init__(self, data, name="radiograph"):
        self.data, self.name = data, name

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.data, dtype)

    def copy(self, deep=True, data=None):
        return Labelled(data, self.name)


def test_labelled_array():
    image = Labelled(np.arange(20, dtype=np.int16).reshape(4, 5), "shot 7")
    _, back = _round_trip(image)
    assert (type(back), back.name) == (Labelled, "shot 7")
    np.testing.assert_array_equal(back.data, image.data)


class Refuses:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("not today")


@pytest.mark.parametrize("image", [None, 5, [[1, 2], [3, 4]], {"a": 1}, object(), python_array("H", [1, 2])])
def test_what_is_no_array(image):
    with pytest.raises(InputTypeError, match=f"is a {type(image).__name__}; expected a numpy array") as caught:
        arrays.accept(image)
    assert isinstance(caught.value, TypeError)


def test_paths_are_sent_to_the_other_door(tmp_path):
    for image in ("frame.tif", tmp_path / "frame.tif", b"frame.tif"):
        with pytest.raises(InputTypeError, match=r"For a file: xrk\.enhance_file"):
            arrays.accept(image)


def test_what_raises_on_conversion():
    with pytest.raises(InputTypeError, match="Refuses, cannot be read as an array: not today; expected"):
        arrays.accept(Refuses())


@pytest.mark.parametrize(
    "kind",
    [
        np.asarray,
        torch.as_tensor,
        Standard,
        Interface,
        lambda a: Exchanged(torch.as_tensor(a)),
        Labelled,
        np.ma.asarray,
    ],
)
def test_host_array(kind):
    mask = np.eye(3, 4, dtype=bool)
    plain = arrays.host_array(kind(mask), "mask")
    assert type(plain) is np.ndarray
    assert plain.dtype == bool
    np.testing.assert_array_equal(plain, mask)


def test_host_array_names_what_it_is_for():
    with pytest.raises(InputTypeError, match="The mask is a list; expected"):
        arrays.host_array([[True]], "mask")
    with pytest.raises(InputTypeError, match="The mask, a Tensor, cannot be read as an array"):
        arrays.host_array(torch.ones(2, 2, dtype=torch.bfloat16), "mask")
