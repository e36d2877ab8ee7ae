"""Files in, a file out: the fused video as a TIFF stack, whole or not at all; a cancelled run goes on later."""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from xrk import io
from xrk.errors import ImageFileError, InputError, InputTypeError
from xrk.loading import Model, sha256_of
from xrk.progress import told
from xrk.video import VideoReport, fuse_video

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["fuse_video_file"]

_MAGIC = b"xrk frames 1\n"
_TAIL = struct.Struct("<QI")  # behind every frame: how many of its pixels were clipped, and the CRC-32 of its bytes


def fuse_video_file(
    lr: str | os.PathLike[str],
    hr: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    resume: bool = True,
    progress: Any = None,
    **options: Any,
) -> VideoReport:
    """Fuses the files of two cameras into a TIFF stack, written whole or not at all.

    Frames that are done lie in ``<dst>.frames`` until all are: whatever ends a run, the same call goes on behind the
    last whole frame, and gives the bytes that it would have given at once. That file goes when ``dst`` is there; so
    much room is needed twice.

    Args:
        lr, hr: paths as for `xrk.fuse_video`: TIFF stacks, or data sets of HDF5 files ("file.h5::/data/set").
        dst: the file to write, uncompressed, one page for each frame; `xrk.io.read_report` reads the report in it.
        resume: go on with frames that an earlier run of the same call left. Those of another call are thrown away.
        progress: True for a bar, or a function that is called with (frames done, frames); earlier runs' frames count.
        options: others of `xrk.fuse_video`, but for ``start`` and ``report``.

    Returns:
        The `xrk.video.VideoReport`; ``frames`` and ``clipped`` count earlier runs' frames too.

    Raises:
        What `xrk.fuse_video` raises, and ImageFileError for a file that cannot be written.
    """
    for name, path in (("lr", lr), ("hr", hr), ("dst", dst)):
        if not isinstance(path, str | os.PathLike):
            raise InputTypeError(f"{name} is a {type(path).__name__}; expected a path (arrays go to xrk.fuse_video).")
    if unknown := {"start", "report"} & options.keys():
        raise InputError(f"{', '.join(sorted(unknown))} means nothing to fuse_video_file; leave it out.")
    dst = Path(dst)
    io.check_writable(dst)
    inputs = [Path(os.fspath(path).partition("::")[0]) for path in (lr, hr)]
    io.check_apart({"video": dst}, {"input": inputs, "model": options.get("model")})
    # A first look tells what a frame is: what was kept is of use only to the same call on the same files.
    frames, report = fuse_video(lr, hr, report=True, **options)
    count, height, width = report.shape
    identity = _identity(report, lr, hr, inputs, options.get("model"))
    with _Kept(dst.with_name(f"{dst.name}.frames"), identity, (height, width), np.dtype(report.dtype), resume) as kept:
        before, clipped = kept.done, kept.clipped
        with told(progress, count, "frame") as tell:
            if before:
                tell(before, count)
            for frame in _behind(before, frames, count):
                kept.add(np.asarray(frame), report.clipped + clipped - kept.clipped)
                tell(kept.done, count)
        report.start, report.frames, report.clipped, report.shape = 0, kept.done, kept.clipped, (count, height, width)
        with io.create(dst, shape=report.shape, dtype=kept.dtype) as sink:
            for page in range(count):
                sink.write(slice(None), kept.frame(page), page)
            names = {"lr": Path(lr).name, "hr": Path(hr).name}
            sink.report = {"fuse_video": {**_repeatable(report), "file": names}}
        kept.remove()
    return report


def _behind(first: int, frames: Generator[Any, int | None, None], count: int) -> Iterator[Any]:
    """The frames from number ``first`` on."""
    with closing(frames):
        if first < count:
            yield frames.send(first)
            yield from frames


def _repeatable(report: VideoReport) -> dict[str, Any]:
    """What is the same in every run, one that went on where another had ended too."""
    entries = report.to_dict(timing=False)
    return {name: value for name, value in entries.items() if name not in ("start", "features", "used")}


def _identity(report: VideoReport, lr: Any, hr: Any, inputs: list[Path], model: Any) -> str:
    """Of everything that the frames depend on."""
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in inputs]
    what = {**_repeatable(report), "lr": os.fspath(lr), "hr": os.fspath(hr), "files": files}
    if not isinstance(model, str | os.PathLike):
        what["network"] = _network(model)  # no file's sha256 tells one of the caller's own from another
    for name in ("frames", "clipped"):
        del what[name]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _network(model: Any) -> str | None:
    """Of the tensors of a module, or of what `xrk.load` gave, and of the latter's card."""
    if model is None:
        return None
    if isinstance(model, Model):
        return json.dumps(model.card.to_dict()) + sha256_of(model.module)
    return sha256_of(model)


class _Kept:
    """Whole frames in a file, one behind the other; what is cut off at its end, or does not belong to this call, goes.

    Attributes:
        done: frames in it. clipped: pixels clipped in them.
    """

    def __init__(self, path: Path, identity: str, shape: tuple[int, int], dtype: np.dtype, resume: bool) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self._frame_bytes = dtype.itemsize * shape[0] * shape[1]
        self._head = _MAGIC + identity.encode() + b"\n"
        self.done = self.clipped = 0
        try:
            self._file = open(path, "r+b" if path.exists() else "x+b")  # noqa: SIM115
            self._claim()
            found = self._file.read(len(self._head))
            if not found.startswith(_MAGIC[: len(found)]):
                raise ImageFileError(f"{path} is in the way, and no run left it; move it, or choose another output.")
            if resume and found == self._head:
                self._count()
            else:
                self._file.seek(0)
                self._file.truncate()
                self._file.write(self._head)
                self._file.flush()
        except ImageFileError:
            self._file.close()
            raise
        except OSError as error:
            raise ImageFileError(f"{path} cannot be written: {error.strerror or error}.") from error

    def __enter__(self) -> "_Kept":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if not self.done:
            self.path.unlink(missing_ok=True)

    def _claim(self) -> None:
        """Keeps another process from writing into the same file, where the system can."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ImageFileError(f"{self.path} is in use: another run is making the same file.") from None

    def _place(self, frame: int) -> int:
        return len(self._head) + frame * (self._frame_bytes + _TAIL.size)

    def _count(self) -> None:
        """Frames up to the first that is not whole."""
        while True:
            pixels, tail = self._file.read(self._frame_bytes), self._file.read(_TAIL.size)
            if len(tail) < _TAIL.size:
                break
            clipped, checksum = _TAIL.unpack(tail)
            if zlib.crc32(pixels) != checksum:
                break
            self.done, self.clipped = self.done + 1, self.clipped + clipped
        self._file.truncate(self._place(self.done))

    def add(self, frame: np.ndarray, clipped: int) -> None:
        pixels = np.ascontiguousarray(frame).tobytes()
        try:
            self._file.seek(self._place(self.done))
            self._file.write(pixels + _TAIL.pack(clipped, zlib.crc32(pixels)))
            self._file.flush()
        except OSError as error:
            raise ImageFileError(f"{self.path} cannot be written: {error.strerror or error}.") from error
        self.done, self.clipped = self.done + 1, self.clipped + clipped

    def frame(self, number: int) -> np.ndarray:
        self._file.seek(self._place(number))
        return np.frombuffer(self._file.read(self._frame_bytes), self.dtype).reshape(self.shape)

    def remove(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)
        self.done = 0
