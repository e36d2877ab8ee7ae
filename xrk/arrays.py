"""Kinds of arrays: what a caller may hand in, and how the result becomes the same kind again.

==========================================  ==================================================================
in                                          out
==========================================  ==================================================================
numpy.ndarray (memmap and other subclasses)  numpy.ndarray
numpy.ma.MaskedArray (masked = invalid)      numpy.ma.MaskedArray with the same mask
torch.Tensor, any device                     torch.Tensor on that device, without a gradient
``.dims`` and ``.copy(data=...)``            what ``.copy(data=result)`` gives (xarray.DataArray)
``__dlpack__``                               what the library's own ``from_dlpack`` gives, on the same device (CuPy,
                                             JAX, any library of the array API); numpy if it offers none
``__cuda_array_interface__`` only            torch.Tensor on that GPU (it has the same interface)
``__array_interface__``, ``__array__``       numpy.ndarray
==========================================  ==================================================================
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xrk.errors import InputTypeError
from xrk.radiograph import check_dtype

_EXPECTED = "expected a numpy array, a torch tensor, or an array with DLPack, __array_interface__ or __array__."


@dataclass(frozen=True)
class Incoming:
    """An image as it came: its frames are read one at a time, its result is handed back in the same kind."""

    array: np.ndarray | torch.Tensor  # a tensor only where the pixels do not lie in host memory
    dtype: np.dtype  # one of radiograph.DTYPES, in the caller's byte order
    hand_back: Callable[[np.ndarray], Any]  # takes the result, (H, W) or (N, H, W) like the image
    mask: np.ndarray | None = None  # bool, the image's shape: a MaskedArray's own mask
    device: torch.device | None = None  # the GPU the pixels lie on

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def frames(self) -> int:
        return 1 if self.array.ndim == 2 else self.array.shape[0]

    def frame(self, i: int) -> np.ndarray:
        """Frame ``i``, (H, W), C-contiguous and in native byte order; a view where the image is so already."""
        frame = self.array if self.array.ndim == 2 else self.array[i]
        if isinstance(frame, torch.Tensor):
            frame = frame.cpu().numpy()
        native = self.dtype.newbyteorder("=")
        # The view changes how the dtype is spelt only: numpy may call the machine's own order "<".
        return np.require(frame, native, "CA").view(native)


def accept(image: Any) -> Incoming:
    """The image behind any of the kinds in this file's table; nothing is copied that lies in host memory.

    Raises InputTypeError for anything else and for dtypes that xrk does not enhance.
    """
    if isinstance(image, np.ma.MaskedArray):
        return _masked(image)
    if isinstance(image, np.ndarray):
        if isinstance(image, np.matrix):
            raise InputTypeError("The image is a numpy.matrix; expected a plain array: pass numpy.asarray(image).")
        return Incoming(_plain(image), check_dtype(image.dtype), _same)
    if isinstance(image, torch.Tensor):
        return _tensor(image, lambda tensor: tensor)
    if isinstance(image, str | bytes) or hasattr(image, "__fspath__"):
        raise InputTypeError(f"The image is a {type(image).__name__}; {_EXPECTED} For a file: xrk.enhance_file.")
    if _copies_with_data(image):
        array = _as_numpy(image)
        return Incoming(array, check_dtype(array.dtype), lambda result: image.copy(data=result))
    if hasattr(image, "__dlpack__"):
        return _dlpack(image)
    if hasattr(image, "__cuda_array_interface__"):
        return _tensor(_guarded(lambda: torch.as_tensor(image, device="cuda"), image), lambda tensor: tensor)
    array = _as_numpy(image)
    return Incoming(array, check_dtype(array.dtype), _same)


def host_array(array: Any, name: str) -> np.ndarray:
    """Any of those kinds as a plain numpy array of any dtype; ``name`` is what an error calls it."""
    if isinstance(array, torch.Tensor):
        return _guarded(lambda: array.detach().cpu().numpy(), array, name)
    if isinstance(array, np.ndarray):
        return _plain(array)
    if hasattr(array, "__dlpack__"):
        if _on_host(array, name):
            return _dlpack_on_host(array, name)
        array = _guarded(lambda: torch.from_dlpack(array), array, name)
    elif hasattr(array, "__cuda_array_interface__"):
        array = _guarded(lambda: torch.as_tensor(array, device="cuda"), array, name)
    else:
        return _as_numpy(array, name)
    return array.cpu().numpy()


def _same(result: np.ndarray) -> np.ndarray:
    return result


def _plain(array: np.ndarray) -> np.ndarray:
    return array.view(np.ndarray) if type(array) is not np.ndarray else array


def _masked(image: np.ma.MaskedArray) -> Incoming:
    mask = np.ma.getmask(image)

    def hand_back(result: np.ndarray) -> np.ma.MaskedArray:
        own = mask if mask is np.ma.nomask else mask.copy()
        return np.ma.MaskedArray(result, mask=own, fill_value=image.fill_value)

    data = np.ma.getdata(image, subok=False)
    return Incoming(data, check_dtype(image.dtype), hand_back, None if mask is np.ma.nomask else mask)


def _tensor(tensor: torch.Tensor, wrap: Callable[[torch.Tensor], Any]) -> Incoming:
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        what = "has no data (device meta)" if tensor.device.type == "meta" else f"has the layout {tensor.layout}"
        raise InputTypeError(f"The tensor {what}; expected a dense tensor.")
    dtype = check_dtype(str(tensor.dtype).removeprefix("torch."))
    tensor = tensor.detach().resolve_neg()
    device = tensor.device

    def hand_back(result: np.ndarray) -> Any:
        return wrap(torch.from_numpy(result).to(device))

    if device.type == "cpu":
        return Incoming(tensor.numpy(), dtype, hand_back)
    return Incoming(tensor, dtype, hand_back, device=device if device.type == "cuda" else None)


def _dlpack(image: Any) -> Incoming:
    from_dlpack = _from_dlpack_of(image)
    if _on_host(image, "image"):
        array = _dlpack_on_host(image, "image")
        return Incoming(array, check_dtype(array.dtype), from_dlpack or _same)
    tensor = _guarded(lambda: torch.from_dlpack(image), image)
    return _tensor(tensor, from_dlpack or (lambda result: result.cpu().numpy()))


def _on_host(image: Any, name: str) -> bool:
    return int(_guarded(image.__dlpack_device__, image, name)[0]) == 1  # kDLCPU


def _dlpack_on_host(image: Any, name: str) -> np.ndarray:
    # Not every CPU array goes through DLPack (read-only ones, foreign byte orders); most of those have another way in.
    try:
        return np.from_dlpack(image)
    except Exception:
        return _as_numpy(image, name)


def _from_dlpack_of(image: Any) -> Callable[[Any], Any] | None:
    """``from_dlpack`` of the library that ``image`` comes from."""
    if hasattr(image, "__array_namespace__"):
        library = image.__array_namespace__()
    else:
        library = sys.modules.get(type(image).__module__.partition(".")[0])
    return getattr(library, "from_dlpack", None)


def _copies_with_data(image: Any) -> bool:
    copy = getattr(image, "copy", None)
    if not callable(copy) or not hasattr(image, "dims"):
        return False
    try:
        return "data" in inspect.signature(copy).parameters
    except ValueError:  # a built-in without a signature
        return False


def _as_numpy(image: Any, name: str = "image") -> np.ndarray:
    if not any(hasattr(image, a) for a in ("__array__", "__array_interface__", "__array_struct__")):
        raise InputTypeError(f"The {name} is a {type(image).__name__}; {_EXPECTED}")
    return _guarded(lambda: np.asarray(image), image, name)


def _guarded(convert: Callable[[], Any], image: Any, name: str = "image") -> Any:
    """What a foreign library raises while it hands over its data may be anything; the caller gets one sentence."""
    try:
        return convert()
    except Exception as error:
        given = f"The {name}, a {type(image).__name__}, cannot be read as an array: {error}"
        raise InputTypeError(f"{given}; {_EXPECTED}") from error
