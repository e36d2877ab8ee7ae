"""Models by name or by file: a network in eval mode together with its card.

A shipped model is a pair of files in ``xrk/weights``: ``NAME.safetensors``, whose tensors may be float16, and
``NAME.json``, its card.
"""

import difflib
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xrk.checkpoints import CheckpointDescription, assemble, describe_checkpoint, read_state
from xrk.errors import CheckpointError, CheckpointFileError, InputError, InputTypeError, ModelNotFoundError
from xrk.models import ARCHITECTURES, Card

__all__ = ["CheckpointDescription", "Model", "inspect_checkpoint", "list_models", "load", "ready", "sha256_of"]

inspect_checkpoint = describe_checkpoint

_WEIGHTS = Path(__file__).parent / "weights"
_CHECKPOINT_SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors", ".hdf5", ".h5")

# Loading takes longer than enhancing a small frame, and integrators call `enhance` in a loop.
_MOST_LOADED = 4
_loaded: "OrderedDict[tuple[Any, ...], Model]" = OrderedDict()
_lock = threading.Lock()


@dataclass(frozen=True, repr=False, eq=False)
class Model:
    """A network with its card.

    Attributes:
        card: what the network expects and where it comes from.
        module: the network; (1, 1, H, W) in, as the card says. From `load` it is in eval mode, float32, on the CPU and
            takes no gradient; it is shared by all who load the same model, so copy it before changing it.
    """

    card: Card
    module: nn.Module

    def enhance(self, image: Any, **options: Any) -> Any:
        """`xrk.enhance` with this model."""
        from xrk.enhancement import enhance  # it imports this file

        return enhance(image, model=self, **options)

    def __repr__(self) -> str:
        card = self.card
        return f"<xrk.Model {card.name!r}: {card.architecture}, {card.parameters} parameters, {card.domain} domain>"


def load(model: str | os.PathLike[str] | nn.Module, *, rotations: Sequence[int] | None = None) -> Model:
    """A shipped model by its name, a checkpoint by its path, or a torch module of your own.

    A text that is the name of a shipped model means that model, whatever lies in the working folder. A shipped
    model's weights are checked against the sha256 in its card. The last few models are kept, so that loading an
    unchanged file again costs nothing and gives the same `Model`.

    A module has no card. It is taken to see counts mapped to 0 .. 1 (the domain "unit", no noise model), to map
    (1, 1, H, W) to the same shape, and to take any size. Where it does otherwise, say so with a card of your own:
    ``xrk.Model(dataclasses.replace(xrk.load(module).card, domain="symmetric", size_multiple=32), module)``. The module
    is not copied and not changed; put it in eval mode first.

    Args:
        model: a name that `list_models` gives, a file of torch (.pth, .pt, .ckpt), safetensors or Keras (.hdf5; needs
            h5py), or a torch module.
        rotations: of a blind-spot network's branches, for a file that does not tell, see `xrk.models.BlindSpot`.

    Raises:
        ModelNotFoundError: the text is neither a name nor a file. CheckpointFileError: the file cannot be read, or
        loading it would run code. CheckpointError: its tensors fit no known network. InputTypeError: not a text, a
        path or a module, or rotations that are no whole numbers. InputError: ``rotations`` beside a module.
    """
    if isinstance(model, nn.Module):
        if rotations is not None:
            raise InputError("rotations= is for a file that does not tell them; a module has its own.")
        return Model(_own_card(model), model)
    if not isinstance(model, str | os.PathLike):
        raise InputTypeError(f"A model is a name, a path or a torch module, got {type(model).__name__}.")
    text = os.fspath(model)
    if not isinstance(text, str):
        raise InputTypeError(f"A model is given by a text or a pathlib.Path, got {type(text).__name__}.")
    if rotations is not None:
        several = isinstance(rotations, Iterable)
        rotations = tuple(rotations) if several else rotations
        if not several or any(isinstance(r, bool) or not isinstance(r, Integral) for r in rotations):
            raise InputTypeError(f"rotations={rotations!r}; expected quarter turns, such as (0, 1, 2, 3).")
    names = _shipped_names()
    if isinstance(model, str):
        if text in names:
            return _kept(_WEIGHTS / f"{text}.safetensors", text, rotations)
        looks_like_path = text.endswith(_CHECKPOINT_SUFFIXES) or os.path.basename(text) != text
        if not text or not (looks_like_path or os.path.lexists(text)):
            if text in ARCHITECTURES:
                raise ModelNotFoundError(
                    f"xrk has the network {text!r} but ships no weights of that name; pass the path of a checkpoint. "
                    f"Shipped models: {', '.join(names) or 'none'}."
                )
            close = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
            raise ModelNotFoundError(
                f"There is no model {text!r} and no file of that name"
                + (f"; did you mean {close[0]!r}? " if close else ". ")
                + f"Shipped models: {', '.join(names) or 'none'}."
            )
    return _kept(Path(text), None, rotations)


def list_models() -> list[Card]:
    """The cards of the shipped models, sorted by name."""
    return [_shipped_card(name) for name in _shipped_names()]


def ready(model: Any) -> Model:
    """The model that is to run: named, in a file, a module, or loaded already.

    Raises:
        What `load` raises. InputError: it is in training mode. InputTypeError: it is nothing of that, or its weights
        are neither float32 nor float64.
    """
    if isinstance(model, str | os.PathLike | nn.Module):
        model = load(model)
    if not isinstance(model, Model):
        raise InputTypeError(
            f"The model is a {type(model).__name__}; expected a name, the path of a checkpoint, what xrk.load gave, or "
            "a torch module."
        )
    if any(part.training for part in model.module.modules()):
        raise InputError(f"The module of {model.card.name} is in training mode; call .eval() on it first.")
    dtypes = {p.dtype for p in model.module.parameters() if p.is_floating_point()}
    if not dtypes <= {torch.float32} and dtypes != {torch.float64}:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise InputTypeError(f"The weights of {model.card.name} are {names}; expected float32 (or float64) throughout.")
    return model


def sha256_of(module: nn.Module) -> str:
    """Of a module's tensors, with their names, shapes and dtypes: no file's sha256 tells one's own modules apart."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _own_card(module: nn.Module) -> Card:
    """What a module without a card is taken for."""
    kind = type(module).__name__
    architecture = next((name for name, known in ARCHITECTURES.items() if known is type(module)), kind)
    return Card(
        name=kind,
        architecture=architecture,
        config={"in_channels": channels_in(module)},
        description="A torch module without a card.",
        parameters=sum(p.numel() for p in module.parameters()),
    )


def channels_in(module: nn.Module) -> int:
    """Of the image that a module takes: as it says itself, for it may rearrange it, or by its first convolution."""
    said = getattr(module, "in_channels", None)
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    return said if isinstance(said, int) else 1 if first is None else first.in_channels


def _kept(path: Path, shipped_name: str | None, turned: tuple[int, ...] | None) -> Model:
    with _lock:
        key = _identity(path, shipped_name, turned)
        if key in _loaded:
            _loaded.move_to_end(key)
            return _loaded[key]
        model = _read(path, shipped_name, turned)
        # A file that changes while it is read must not stand for what it became.
        if key is not None and key == _identity(path, shipped_name, turned):
            for old in [k for k in _loaded if k[:3] == key[:3]]:
                del _loaded[old]
            _loaded[key] = model
            if len(_loaded) > _MOST_LOADED:
                _loaded.popitem(last=False)
        return model


def _identity(path: Path, *how: Any) -> tuple[Any, ...] | None:
    """What a file must keep for a loaded model to stand for it; None where there is no file to look at."""
    try:
        absolute = path.absolute()
        status = absolute.stat()
        return str(absolute), *how, status.st_ino, status.st_mtime_ns, status.st_size
    except (OSError, ValueError):
        return None


def _read(path: Path, shipped_name: str | None, rotations: tuple[int, ...] | None) -> Model:
    card = None if shipped_name is None else _shipped_card(shipped_name)
    # Tensors made in a caller's inference mode could never be trained, and others get the same ones.
    with torch.inference_mode(False):
        state, file = read_state(path)
        if card is not None and file.sha256 != card.sha256:
            raise CheckpointFileError(
                f"The weights of {shipped_name} have the sha256 {file.sha256}, but their card says {card.sha256}: "
                "install xrk again."
            )
        try:
            derived, module = assemble(state, file, None if card is None else card.to_dict(), rotations)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        # A quarter less time on a CPU: convolutions of few channels need no reordering then.
        module = module.to(memory_format=torch.channels_last)
    return Model(derived if card is None else card, module)


def _shipped_names() -> list[str]:
    return sorted(path.stem for path in _WEIGHTS.glob("*.json") if path.with_suffix(".safetensors").is_file())


def _shipped_card(name: str) -> Card:
    path = _WEIGHTS / f"{name}.json"
    try:
        return Card.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, InputError) as error:
        raise CheckpointFileError(f"The model card {path} cannot be read: {error} Install xrk again.") from None
