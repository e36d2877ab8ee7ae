"""The blind-spot network's weights as Keras writes them (HDF5), and xrk's own files of it.

Only the numbers are read: datasets of the layer groups. ``model_config``, which holds Python byte-code, is left alone.
A whole model has the groups under ``model_weights``, a weights-only file at the root. The branch that all four
rotations share is a model of its own with a name that Keras invents; it is the group that holds 34 tensors.

Files do not say how their branches were turned. Under TensorFlow 1 the rotations were 0, 1, 2, 3; under TensorFlow 2
the same code runs all four branches with rotation 3, because Keras evaluates its lambdas late. Which one trained a file
follows from its Keras version: from 2.3 on it was TensorFlow 2.2 or later, and "2.2.4-tf" was written by both.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xrk.checkpoints.fitting import Format, Shapes, dimension
from xrk.errors import CheckpointError, CheckpointFileError

__all__ = ["FORMAT", "chosen_rotations", "fold", "read_keras"]

_LAYERS = [f"enc_conv{n}" for n in range(7)] + [
    f"dec_conv{n}" for n in ("5", "5b", "4", "4b", "3", "3b", "2", "2b", "1a", "1b")
]
_KINDS = {"kernel": "weight", "bias": "bias", "a": "a", "b": "b"}


def read_keras(path: str | os.PathLike[str], most_bytes: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a Keras file under the network's names and in torch's order of axes, and the file's versions.

    Args:
        most_bytes: a file that claims to hold more is refused before anything is read.

    Raises:
        CheckpointFileError: h5py is not installed, or the file is damaged, larger than it can be, or not Keras's.
    """
    try:
        import h5py
    except ImportError:
        raise CheckpointFileError(f"{path} is an HDF5 file; reading it needs h5py: pip install 'xrk[hdf5]'.") from None
    try:
        with h5py.File(path, "r") as file:
            root = file["model_weights"] if isinstance(file.get("model_weights"), h5py.Group) else file
            if "layer_names" not in root.attrs:
                raise CheckpointFileError(
                    f"{path} is an HDF5 file, but not one of Keras's: it has no layer_names; expected a Keras model or "
                    "its weights."
                )
            versions = {
                name: _text(holder.attrs[name])
                for holder in (root, file)
                for name in ("keras_version", "backend")
                if name in holder.attrs
            }
            datasets = {}
            for layer in root.values():
                if isinstance(layer, h5py.Group):
                    datasets |= _datasets(layer, h5py)
            if sum(d.nbytes for d in datasets.values()) > most_bytes or any(d.external for d in datasets.values()):
                raise CheckpointFileError(f"{path} claims to hold more numbers than its bytes can; it is damaged.")
            return {name: _tensor(name, d, path) for name, d in datasets.items()}, versions
    except CheckpointFileError:
        raise
    except Exception as error:  # h5py raises almost anything on damaged files
        raise CheckpointFileError(f"{path} is a damaged HDF5 file: {error}.") from None


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _datasets(layer: Any, h5py: Any) -> dict[str, Any]:
    """The datasets of one layer group, under the network's names; links to other places are not followed."""
    found: dict[str, Any] = {}
    layer.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
    order = [_text(name) for name in layer.attrs.get("weight_names", [])]
    parts = [name.split("/") for name in (order if set(order) == set(found) else found)]
    known = all(len(p) > 1 and p[-2] in _LAYERS for p in parts)
    if len(parts) == 2 * len(_LAYERS) and not known:  # the branch under names of somebody else: in order of creation
        names = [f"{layer}.{kind}" for layer in _LAYERS for kind in ("weight", "bias")]
        return dict(zip(names, (found["/".join(p)] for p in parts), strict=True))
    named = {}
    for p in parts:
        kind = p[-1].split(":")[0]
        holder = "noise" if kind in ("a", "b") else (p[-2] if len(p) > 1 else layer.name.rsplit("/", 1)[-1])
        named[f"{holder}.{_KINDS.get(kind, kind)}"] = found["/".join(p)]
    return named


def _tensor(name: str, dataset: Any, path: Any) -> Tensor:
    if dataset.dtype.kind != "f":
        raise CheckpointFileError(f"{path}: {name} holds {dataset.dtype}; expected floating point numbers.")
    value = torch.from_numpy(np.asarray(dataset[()], "<f4").reshape(dataset.shape))
    return value.permute(3, 2, 0, 1).contiguous() if value.ndim == 4 else value


def chosen_rotations(versions: Mapping[str, str], rotations: Sequence[int] | None) -> tuple[int, ...]:
    """The rotations that a Keras file was trained with: those given, else what its Keras version implies.

    Raises:
        CheckpointError: nothing is given, and the version is missing or both TensorFlow 1 and 2 wrote it; or what is
            given are not quarter turns.
    """
    if rotations is not None:
        turned = tuple(rotations)
        if not turned or any(r not in (0, 1, 2, 3) for r in turned):
            raise CheckpointError(f"rotations={turned!r}; expected quarter turns, each 0, 1, 2 or 3.")
        return turned
    version = versions.get("keras_version", "")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or version.startswith("2.2.4-tf"):
        raise CheckpointError(
            f"the file was written by Keras {version or 'of an unknown version'}, which does not tell how its branches "
            "are turned; pass rotations=(0, 1, 2, 3) for TensorFlow 1 or rotations=(3, 3, 3, 3) for TensorFlow 2."
        )
    return (3, 3, 3, 3) if (int(numbers[1]), int(numbers[2])) >= (2, 3) else (0, 1, 2, 3)


def fold(state: Mapping[str, Tensor], rotations: Sequence[int]) -> dict[str, Tensor]:
    """Weights for branches of all ``rotations``, as weights for one branch of each: the first 1x1 kernel reads sums.

    Raises:
        CheckpointError: the kernel does not read as many branches as there are rotations.
    """
    kernel, features = state.get("conv1x1_1.weight"), len(state.get("enc_conv0.bias", ()))
    if kernel is None:
        return dict(state)
    if kernel.ndim != 4 or kernel.shape[1] != 2 * features * len(rotations):
        raise CheckpointError(
            f"conv1x1_1.weight is {tuple(kernel.shape)}; expected {len(rotations)} branches in its second axis, one "
            f"for each of rotations={tuple(rotations)}."
        )
    groups: dict[int, Tensor] = {}
    for rotation, part in zip(rotations, kernel.chunk(len(rotations), dim=1), strict=True):
        groups[rotation] = groups[rotation] + part.double() if rotation in groups else part.double()
    return dict(state) | {"conv1x1_1.weight": torch.cat(list(groups.values()), dim=1).float()}


def _configuration(shapes: Shapes) -> dict[str, Any]:
    features = dimension(shapes, "enc_conv0.weight", 0, 48)
    branches = dimension(shapes, "conv1x1_1.weight", 1, 8 * features) // (2 * features)
    learnt = "-".join(name for name, key in (("poisson", "noise.a"), ("gaussian", "noise.b")) if key in shapes)
    return {
        "in_channels": dimension(shapes, "enc_conv0.weight", 1, 1),
        "rotations": list(range(min(max(branches, 1), 4))) if branches != 1 else [3],
        "features": features,
        "std": "std.weight" in shapes,
        "noise": learnt or None,
        "spot": 1,
        "centre": 0.0,
        "unit": 1.0,
        "residual": False,
    }


def _conventions(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "domain": "unit",
        "noise": "fit",
        "size_multiple": 1,
        "output_scale": 1.0,
        "limits": "Noise must be independent from pixel to pixel: what is correlated with its neighbours stays.",
    }


FORMAT = Format("self-supervised Poisson-Gaussian denoising", "blindspot", _configuration, _conventions)
