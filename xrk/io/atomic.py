"""Files that appear whole or not at all."""

import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from xrk.errors import ImageFileError, InputError

__all__ = ["atomic_file", "check_apart", "check_target"]


def check_target(path: str | os.PathLike) -> Path:
    """Whether a file can be written at `path`; returns the place it really goes to (links followed).

    Raises ImageFileError where the folder is missing or not writable, or where a folder or a device has this name.
    """
    try:
        target = Path(os.path.realpath(path))
    except ValueError as error:  # a name with a zero byte
        raise ImageFileError(f"{str(path)!r} cannot be written: {error}.") from None
    if target.is_dir():
        raise ImageFileError(f"{path} is a folder; name the file to write in it.")
    if target.exists() and not target.is_file():
        raise ImageFileError(f"{path} is not a regular file; xrk replaces files whole and cannot write there.")
    if not target.parent.is_dir():
        raise ImageFileError(f"{path} cannot be written: the folder {target.parent} does not exist.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ImageFileError(f"{path} cannot be written: no permission to write in the folder {target.parent}.")
    return target


def check_apart(outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Whether every file to be written is another than all that are read, and than all others to be written.

    outputs, inputs: what each file is called in the message, and its path, or a list of paths. What is not a path
    (None, an array) is passed over, and so are inputs that are not there. It does not matter how a file is named: by
    a link, a hard link, or in capitals where the system does not mind.

    Raises InputError.
    """
    read: dict[Any, str] = {}
    for name, path in _paths(inputs):
        if os.path.exists(path):
            read.setdefault(_identity(path), name)
    written: dict[Any, str] = {}
    for name, path in _paths(outputs):
        file = _identity(path)
        if file in read:
            raise InputError(f"The {name} {path} would overwrite the {read[file]}; choose another name.")
        if file in written:
            raise InputError(f"The {written[file]} and the {name} would both be written to {path}; name another file.")
        written[file] = name


def _paths(files: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in files.items():
        for path in value if isinstance(value, list | tuple) else (value,):
            if isinstance(path, str | os.PathLike):
                yield name, os.fspath(path)


def _identity(path: str) -> Any:
    """Equal for two names of one file, whether it is there already or not."""
    try:
        status = os.stat(path)
    except ValueError:  # a name with a zero byte, which no file has
        return path
    except OSError:
        real = os.path.realpath(path)
        return real.casefold() if sys.platform in ("win32", "darwin") else real
    return status.st_dev, status.st_ino


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
