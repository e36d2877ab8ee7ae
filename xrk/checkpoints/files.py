"""From a checkpoint file to a state dict, without running anything that the file says.

torch's own files, zip and legacy (before 1.6), are read with ``weights_only=True`` to the CPU, wherever their tensors
lay; safetensors with the safetensors library; Keras's HDF5 files with h5py. The content decides, not the name.
"""

import hashlib
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from xrk.checkpoints.fitting import shown
from xrk.checkpoints.keras_blindspot import read_keras
from xrk.errors import CheckpointError, CheckpointFileError

__all__ = ["CheckpointFile", "read_state"]

# Where training scripts put the state dict, the one to prefer first: BasicSR, Lightning, torch's tutorials, VMamba.
_WRAPPERS = ("params_ema", "params", "state_dict", "model_state_dict", "model")
# What torch's own wrappers put before every name: DataParallel, torch.compile.
_PREFIXES = ("module.", "_orig_mod.")

_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_OTHER_KINDS = {
    b"sys_info\0": "a torch file of before 2017; load it and save it once more with a torch of today",
    b"\x93NUMPY": "a NumPy array",
    b"\x89PNG": "a PNG picture",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch that with 'git lfs pull'",
    b"<!DOCTYPE": "a web page, perhaps from a download that failed",
    b"<html": "a web page, perhaps from a download that failed",
    b"\x80": "a Python pickle that torch did not write; loading it would run code from the file",
}
_READABLE = "xrk reads checkpoints of torch (.pth, .pt, .ckpt), safetensors and Keras (.hdf5)"

# Neither torch nor safetensors compresses, and a zip archive packed again with compression gains some per cent on
# weights. A file that claims to hold more than this many times its own size is out to fill the memory.
_MOST_GROWTH = 4


@dataclass(frozen=True)
class CheckpointFile:
    """What was found out about a checkpoint's file on the way to its state dict.

    Attributes:
        path: of the file.
        size: bytes.
        sha256: of the whole file, hexadecimal.
        container: ``"torch zip"``, ``"torch legacy"``, ``"safetensors"`` or ``"keras hdf5"``.
        wrapper: keys under which the state dict lay, e.g. ``("params_ema",)``; empty where it was the whole file.
        ignored: entries beside the tensors that were left alone.
        metadata: texts from the header of a safetensors file; the versions that a Keras file names.
    """

    path: str
    size: int
    sha256: str
    container: str
    wrapper: tuple[str, ...]
    ignored: tuple[str, ...]
    metadata: dict[str, str]


def read_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], CheckpointFile]:
    """Read a checkpoint's tensors, on the CPU, under the names that the network's module gives them.

    Wrappers around the state dict are opened (``params_ema`` before ``params``, ``state_dict``,
    ``model_state_dict``, ``model``, nested too), and ``module.`` is taken off where it stands before every name.

    Raises:
        CheckpointFileError: no such file, not readable, damaged, of another kind, or with Python objects in it whose
            loading would run code.
        CheckpointError: the file was read and holds no state dict.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            kind = "a directory; name the checkpoint file in it" if path.is_dir() else "not a regular file"
            raise CheckpointFileError(f"{path} is {kind}.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            container = _container(path, file, size)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            if container == "safetensors":
                content, metadata = _safetensors(path)
            elif container == "keras hdf5":
                content, metadata = read_keras(path, _MOST_GROWTH * size)
            else:
                content, metadata = _torch(path, file), {}
    except CheckpointFileError:
        raise
    except FileNotFoundError:
        raise CheckpointFileError(f"There is no checkpoint file {path}.") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise CheckpointFileError(f"The checkpoint file {path} cannot be read: {reason}.") from None
    state, wrapper, ignored = _state_dict(path, content)
    _check_tensors(path, state, size)
    return state, CheckpointFile(str(path), size, sha256, container, wrapper, ignored, metadata)


def _container(path: Path, file: BinaryIO, size: int) -> str:
    """Tell the container from the first bytes; refuse what is none."""
    head = file.read(64)
    if not head:
        raise CheckpointFileError(f"{path} is empty; {_READABLE}.")
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path, file, size)
        return "torch zip"
    if _LEGACY_MAGIC in head[:32]:
        return "torch legacy"
    # The length of a JSON object, in eight bytes of which the upper ones are zero, and its first brace.
    if head[4:9] == b"\0\0\0\0{":
        return "safetensors"
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "keras hdf5"
    kind = next((kind for magic, kind in _OTHER_KINDS.items() if head.startswith(magic)), "neither, or is damaged")
    raise CheckpointFileError(f"{_READABLE}; {path} is {kind}.")


def _check_zip(path: Path, file: BinaryIO, size: int) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except Exception:  # zipfile raises more than BadZipFile on damaged directories
        raise CheckpointFileError(f"{path} is a truncated or damaged zip archive.") from None
    names = [member.filename for member in members]
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointFileError(
            f"{path} is a TorchScript archive, which holds code; {_save_tensors('torch.jit.load(file).state_dict()')}."
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointFileError(f"{path} is a zip archive that torch.save did not write; {_READABLE}.")
    if sum(member.file_size for member in members) > _MOST_GROWTH * size:
        raise CheckpointFileError(f"{path} would unpack to many times its size, which no checkpoint does.")


def _torch(path: Path, file: BinaryIO) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        message = str(error)
    foreign = re.search(r"GLOBAL ([\w.]+)", message)
    if foreign or "Only persistent_load of storage" in message:
        what = f"the Python object {foreign[1]}" if foreign else "a pickled module"
        raise CheckpointFileError(
            f"{path} holds {what} beside its tensors, as a whole pickled module or a training script's settings do, "
            f"and loading that would run code from the file; {_save_tensors('module.state_dict()')}."
        )
    raise CheckpointFileError(f"{path} begins like a torch checkpoint, but is truncated or damaged.")


def _save_tensors(state: str) -> str:
    return f"save the tensors alone where it was made, torch.save({state}, path)"


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            # Copies: the library's tensors may lie in the mapped file, which somebody may overwrite.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise CheckpointFileError(f"{path} is not a whole safetensors file: {error}.") from None


def _state_dict(path: Path, content: Any) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """The tensors, the wrappers they lay in, and the names of what lay beside them."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a state dict: names with tensors.")
    wrapper: tuple[str, ...] = ()
    ignored: list[str] = []
    while inner := [name for name in _WRAPPERS if _may_hold_tensors(content.get(name))]:
        ignored += [str(name) for name in content if name != inner[0]]
        content = content[inner[0]]
        wrapper += (inner[0],)
        if len(wrapper) > 4:  # a dict may contain itself
            break
    tensors = {k: v.detach() for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        found = ", ".join(shown(str(name)) for name in list(content)[:10]) or "nothing"
        raise CheckpointError(f"{path} holds no state dict; among its entries ({found}) is no tensor.")
    ignored += [str(name) for name in content if name not in tensors]
    return _without_prefixes(tensors), wrapper, tuple(ignored)


def _may_hold_tensors(entry: Any) -> bool:
    return isinstance(entry, Mapping) and any(isinstance(value, Tensor | Mapping) for value in entry.values())


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _check_tensors(path: Path, state: Mapping[str, Tensor], size: int) -> None:
    """Every tensor must be plain numbers that really lie in the file: a few bytes can claim terabytes otherwise."""
    storages = {}
    for name, tensor in state.items():
        plain = type(tensor) is Tensor and tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.is_nested:
            raise CheckpointError(f"{path}: the tensor {shown(name)} is not a plain dense one; xrk reads no others.")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise CheckpointError(
                f"{path}: the tensor {shown(name)} {tuple(tensor.shape)} repeats numbers of the file."
            )
    if sum(storages.values()) > _MOST_GROWTH * size:
        raise CheckpointFileError(f"{path} claims to hold more numbers than its {size} bytes can; it is damaged.")
