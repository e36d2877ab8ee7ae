"""Where the frames of a video come from: arrays, TIFF stacks, HDF5 data sets, lists and iterators.

A `Frames` gives frames in order, one after the other, and holds none: a sequence may be longer than memory.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from xrk import arrays, io, radiograph
from xrk.errors import ImageFileError, InputError, InputTypeError, XrkError

__all__ = ["Frames", "open_frames"]

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf", ".nxs", ".nx", ".he5")
_EXPECTED = (
    "expected an array (N, H, W), the path of a TIFF stack or of an HDF5 file (file.h5::/data/set), a data set, or an "
    "iterable of frames (H, W)"
)


class Frames:
    """Frames of one camera, from the first on.

    Attributes:
        name: "low-resolution" or "high-resolution", for errors.
        count: how many there are; None where only the end of an iterator tells.
        shape: (H, W) of every frame. dtype: in the machine's byte order.
        levels: (black, white) that a file states, or None.
        hand_back: makes of a result, (H, W), the kind of array that the frames are.
        check: is given every frame that is taken, and what to call it.
        given: frames given or passed over so far.
    """

    def __init__(
        self,
        name: str,
        frames: Iterator[Any],
        first: tuple[tuple[int, int], np.dtype],
        count: int | None = None,
        skip: Callable[[int], None] | None = None,
        levels: tuple[float, float] | None = None,
        hand_back: Callable[[np.ndarray], Any] = lambda result: result,
    ) -> None:
        """``frames``: gives arrays. ``first``: shape and dtype. ``skip``: passes over so many frames unread."""
        self.name, self.count, self.levels, self.hand_back = name, count, levels, hand_back
        self.shape, self.dtype = first[0], first[1].newbyteorder("=")
        self.check: Callable[[np.ndarray, str], None] | None = None
        self.given = 0
        self._frames, self._skip, self._taken = frames, skip, 0
        self._peeked: np.ndarray | None = None

    def next(self) -> np.ndarray | None:
        """The next frame, (H, W), C-contiguous and in the machine's byte order; None after the last one.

        Raises InputError and InputTypeError for a frame that is not like the first one, and what ``check`` raises.
        """
        frame, self._peeked = self.peek(), None
        self.given += frame is not None
        return frame

    def peek(self) -> np.ndarray | None:
        """What `next` will give."""
        if self._peeked is None:
            self._peeked = self._take()
        return self._peeked

    def skip(self, count: int) -> None:
        """Passes over so many frames, as far as there are any."""
        if count and self._peeked is not None:
            self.next()
            count -= 1
        if self._skip is not None:
            self._skip(count)
            self._taken += count
            self.given += count
            return
        for _ in range(count):
            if self.next() is None:
                return

    def _take(self) -> np.ndarray | None:
        try:
            frame = next(self._frames)
        except StopIteration:
            return None
        number, self._taken = self._taken, self._taken + 1
        incoming = _accepted(frame, f"{self.name} frame {number}")
        if incoming.shape != self.shape:
            raise InputError(
                f"The {self.name} frame {number} has shape {incoming.shape}; the frames before it have {self.shape}."
            )
        if incoming.dtype.newbyteorder("=") != self.dtype:
            raise InputTypeError(
                f"The {self.name} frame {number} has dtype {incoming.dtype.name}; the frames before it have "
                f"{self.dtype.name}."
            )
        taken = incoming.frame(0)
        if self.check is not None:
            self.check(taken, f"{self.name} frame {number}")
        return taken


def open_frames(given: Any, name: str, stack: ExitStack) -> Frames:
    """The frames behind any of the kinds above; what is opened for them, ``stack`` closes.

    Raises:
        InputError: no frames, or a shape that is none of a sequence of frames. InputTypeError: another kind or dtype.
        ImageFileError: a file that cannot be read.
    """
    if isinstance(given, str | os.PathLike):
        return _of_file(os.fspath(given), name, stack)
    if isinstance(given, io.Source):
        return _of_tiff(given, name)
    if isinstance(given, np.ndarray | torch.Tensor) or hasattr(given, "__dlpack__"):
        incoming = _accepted(given, f"{name} sequence")
        return _indexed(name, incoming.shape, incoming.dtype, incoming.frame, hand_back=incoming.hand_back)
    if all(hasattr(given, a) for a in ("shape", "dtype", "__getitem__")):  # h5py, zarr, dask: read frame by frame
        return _indexed(name, tuple(given.shape), _checked_dtype(given.dtype, name), lambda i: np.asarray(given[i]))
    if isinstance(given, list | tuple):
        return _listed(list(given), name)
    if isinstance(given, Iterable):
        return _iterated(iter(given), name)
    raise InputTypeError(f"The {name} sequence is a {type(given).__name__}; {_EXPECTED}.")


def _accepted(array: Any, name: str) -> arrays.Incoming:
    if isinstance(array, np.ma.MaskedArray):
        raise InputTypeError(f"The {name} is a MaskedArray; expected a plain array: pass its filled() form.")
    try:
        return arrays.accept(array)
    except InputTypeError as error:
        raise InputTypeError(f"The {name} cannot be used: {error}") from None


def _checked_dtype(dtype: Any, name: str) -> np.dtype:
    try:
        return radiograph.check_dtype(str(dtype).removeprefix("torch."))
    except InputTypeError as error:
        raise InputTypeError(f"The {name} sequence cannot be used: {error}") from None


def _indexed(name: str, shape: tuple[int, ...], dtype: np.dtype, frame: Callable[[int], Any], **rest: Any) -> Frames:
    """Frames that can be had in any order, ``frame(i)``; a single one may be (H, W)."""
    _check_sequence(shape, name)
    count = shape[0] if len(shape) == 3 else 1
    place = 0

    def frames() -> Iterator[Any]:
        nonlocal place
        while place < count:
            place += 1
            yield frame(place - 1)

    def skip(frames: int) -> None:
        nonlocal place
        place += frames

    return Frames(name, frames(), (shape[-2:], dtype), count, skip, **rest)


def _check_sequence(shape: tuple[int, ...], name: str) -> None:
    if len(shape) not in (2, 3):
        raise InputError(f"The {name} sequence has shape {shape}; {_EXPECTED}.")
    try:
        radiograph.check_shape(shape)
    except InputError as error:
        raise InputError(f"The {name} sequence cannot be used: {error}") from None


def _listed(given: list[Any], name: str) -> Frames:
    """A list of frames: its length is known, and so is what each of them is."""
    if not given:
        raise InputError(f"The {name} sequence is empty; {_EXPECTED}.")
    seen = [_accepted(frame, f"{name} frame {i}") for i, frame in enumerate(given)]
    found = _indexed(name, (len(seen), *_frame_shape(seen[0], name)), seen[0].dtype, given.__getitem__)
    for i, frame in enumerate(seen):
        if frame.shape != seen[0].shape:
            raise InputError(f"The {name} frame {i} has shape {frame.shape}; the first one has {seen[0].shape}.")
        if frame.dtype.newbyteorder("=") != found.dtype:
            raise InputTypeError(
                f"The {name} frame {i} has dtype {frame.dtype.name}; the first one has {found.dtype.name}."
            )
    found.hand_back = seen[0].hand_back
    return found


def _iterated(frames: Iterator[Any], name: str) -> Frames:
    """The first frame is taken at once: it tells what the others are like."""
    try:
        first = next(frames)
    except StopIteration:
        raise InputError(f"The {name} sequence is empty; {_EXPECTED}.") from None
    incoming = _accepted(first, f"{name} frame 0")

    def again() -> Iterator[Any]:
        yield first
        yield from frames

    kind = (_frame_shape(incoming, name), incoming.dtype)
    return Frames(name, again(), kind, hand_back=incoming.hand_back)


def _frame_shape(incoming: arrays.Incoming, name: str) -> tuple[int, int]:
    if len(incoming.shape) != 2 or 0 in incoming.shape:
        raise InputError(f"The {name} frame 0 has shape {incoming.shape}; {_EXPECTED}.")
    return incoming.shape


def _of_tiff(source: io.Source, name: str) -> Frames:
    levels = source.metadata.levels
    return _indexed(
        name, tuple(source.shape), _checked_dtype(source.dtype, name), lambda i: source.read(page=i), levels=levels
    )


def _of_file(path: str, name: str, stack: ExitStack) -> Frames:
    file, _, inside = path.partition("::")
    if inside or file.lower().endswith(HDF5_SUFFIXES):
        return _of_hdf5(file, inside, name, stack)
    return _of_tiff(stack.enter_context(io.open(path)), name)


def _of_hdf5(path: str, inside: str, name: str, stack: ExitStack) -> Frames:
    try:
        import h5py
    except ImportError:
        raise ImageFileError(f"{path} is an HDF5 file; reading it needs h5py: pip install 'xrk[hdf5]'.") from None
    if not os.path.exists(path):
        raise ImageFileError(f"{path} does not exist.")
    try:
        file = stack.enter_context(h5py.File(path, "r"))
        found = _stacks(file, h5py)
        dataset = file.get(inside) if inside else file[found[0]] if len(found) == 1 else None
    except XrkError:
        raise
    except Exception as error:  # h5py raises almost anything on damaged files
        raise ImageFileError(f"{path} cannot be read as HDF5: {error}.") from error
    if not isinstance(dataset, h5py.Dataset):
        wanted = f"no data set {inside!r}" if inside else "not one data set of three axes"
        names = ", ".join(found) if found else "none"
        raise ImageFileError(f"{path} has {wanted}; name one as {path}::/name (those of three axes: {names}).")

    if dataset.shape is None:
        raise ImageFileError(f"{path}::{dataset.name} holds no values; expected frames.")

    def frame(i: int) -> np.ndarray:
        try:
            return np.asarray(dataset[i] if dataset.ndim == 3 else dataset[()])
        except Exception as error:
            raise ImageFileError(f"Frame {i} of {path}::{dataset.name} cannot be read: {error}.") from error

    return _indexed(name, tuple(dataset.shape), _checked_dtype(dataset.dtype, name), frame)


def _stacks(file: Any, h5py: Any) -> list[str]:
    """Names of the data sets with three axes."""
    found: list[str] = []
    file.visititems(
        lambda name, item: found.append(f"/{name}") if isinstance(item, h5py.Dataset) and item.ndim == 3 else None
    )
    return found
