"""Files that appear whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from xrk.errors import ImageFileError

__all__ = ["atomic_file", "check_target"]


def check_target(path: str | os.PathLike) -> Path:
    """Whether a file can be written at `path`; returns the place it really goes to (links followed).

    Raises ImageFileError where the folder is missing or not writable, or where a folder or a device has this name.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ImageFileError(f"{path} is a folder; name the file to write in it.")
    if target.exists() and not target.is_file():
        raise ImageFileError(f"{path} is not a regular file; xrk replaces files whole and cannot write there.")
    if not target.parent.is_dir():
        raise ImageFileError(f"{path} cannot be written: the folder {target.parent} does not exist.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ImageFileError(f"{path} cannot be written: no permission to write in the folder {target.parent}.")
    return target


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Binary file, open for writing and reading, that takes the name `path` only once it is complete.

    It is written as ``<name>.<random>.partial`` in the same folder, flushed to the disk and renamed. After any
    exception, a keyboard interrupt included, the partial file is removed and an older file under `path` is
    untouched. A killed process leaves the older file and a ``.partial``, never half a file under `path`.

    Raises ImageFileError where the file cannot be written.
    """
    target = check_target(path)
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
    try:
        # "x": never someone else's file. The mode follows the user's umask, as for any other new file.
        with open(partial, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        _sync_folder(target.parent)
    except ImageFileError:
        raise
    except OSError as error:
        raise ImageFileError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
