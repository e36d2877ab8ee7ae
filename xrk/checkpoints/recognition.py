"""The table of known checkpoint formats, and the way from tensors to a network with its card."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from xrk.checkpoints import (
    dncnn,
    keras_blindspot,
    mambair,
    mambair_unet,
    original_resnet18_unet,
    segmentation_models_pytorch,
    xfusion,
)
from xrk.checkpoints.files import CheckpointFile
from xrk.checkpoints.fitting import Fit, Format, best_fit, build, same_tensors, shown
from xrk.checkpoints.relatives import relative
from xrk.errors import CheckpointError, InputError
from xrk.models import ARCHITECTURES, Card

__all__ = ["FORMATS", "assemble", "recognise", "require_fit"]

FORMATS: tuple[Format, ...] = (
    segmentation_models_pytorch.FORMAT,
    original_resnet18_unet.FORMAT,
    dncnn.FORMAT,
    keras_blindspot.FORMAT,
    mambair_unet.FORMAT,
    mambair.FORMAT,
    xfusion.EDVR_FORMAT,
    xfusion.SWIN_FORMAT,
)

_CARD_KEY = "xrk_card"


def recognise(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """The architecture and its constructor's arguments, from the names and shapes of a state dict alone.

    Raises:
        CheckpointError: no known network has these tensors; lists what does not fit the nearest, at most ten.
    """
    fit = require_fit(state)
    return fit.format.architecture, fit.config


def require_fit(state: Mapping[str, Tensor]) -> Fit:
    """Like `recognise`, with all that was found out."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    fit = best_fit(shapes, FORMATS)
    family = None if fit is not None and fit.fits else relative(shapes)
    if family is not None:
        raise CheckpointError(f"This is a checkpoint of {family.title}, which xrk does not run: {family.reason}.")
    if fit is None:
        first = ", ".join(f"{shown(name)} {shape}" for name, shape in list(shapes.items())[:10])
        raise CheckpointError(
            f"None of the {len(shapes)} tensors has a name that a network of xrk ({', '.join(ARCHITECTURES)}) has; "
            f"they begin with {first}."
        )
    if not fit.fits:
        raise CheckpointError(
            f"The tensors fit no network that xrk knows; compared with {fit.format.architecture} "
            f"({fit.format.title}), the nearest: {'; '.join(fit.problems())}."
        )
    return fit


def assemble(
    state: Mapping[str, Tensor],
    file: CheckpointFile,
    entries: Mapping[str, Any] | None = None,
    rotations: Sequence[int] | None = None,
) -> tuple[Card, nn.Module]:
    """A network and its card from what `read_state` gave.

    The card follows from the tensors. `entries`, fields of a card, take precedence; by default those that a
    safetensors file carries in its header as JSON under ``xrk_card``. `rotations` are those of a blind-spot network's
    branches, which a Keras file may not tell.

    Raises:
        CheckpointError: the tensors fit no network, are not finite, the network is not for single-channel images, or
            the fields are no card or contradict the tensors; rotations are needed, or given for another network.
    """
    fit = require_fit(state)
    if rotations is not None and fit.format is not keras_blindspot.FORMAT:
        raise CheckpointError(f"rotations= belongs to a blind-spot network; this is a {fit.format.architecture}.")
    if file.container == "keras hdf5" or rotations is not None:
        turned = keras_blindspot.chosen_rotations(file.metadata, rotations)
        state = keras_blindspot.fold(state, turned)
        fit = require_fit(state)
        fit = replace(fit, config=fit.config | {"rotations": list(dict.fromkeys(turned))})
    _require_grey(fit)
    derived = _derived_card(fit, file)
    card = derived
    if entries is None:
        entries = _header_entries(file)
    if entries:
        try:
            card = Card.from_dict(derived.to_dict() | dict(entries))
        except InputError as error:
            raise CheckpointError(str(error)) from None
        config = _agreed_config(card, derived)
        fit = replace(fit, config=config)
        card = replace(card, config=config)
    module = build(fit, state)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return replace(card, parameters=parameters, sha256=file.sha256, source=derived.source), module


def _require_grey(fit: Fit) -> None:
    inputs = fit.config["in_channels"]
    outputs = fit.config.get("out_channels", inputs)  # a network that adds to its input has as many
    if (inputs, outputs) != (1, 1) and not fit.format.colour:
        raise CheckpointError(
            f"This {fit.format.architecture} turns {inputs} channels into {outputs}; "
            "xrk enhances radiographs and needs a network with one channel in and one out."
        )


def _derived_card(fit: Fit, file: CheckpointFile) -> Card:
    return Card(
        name=Path(file.path).stem,
        architecture=fit.format.architecture,
        config=fit.config,
        description=f"A checkpoint from outside, in the format of {fit.format.title}.",
        licence="The file states none.",
        source=file.path,
        **fit.format.conventions(fit.config),
    )


def _header_entries(file: CheckpointFile) -> dict[str, Any]:
    if _CARD_KEY not in file.metadata:
        return {}
    try:
        entries = json.loads(file.metadata[_CARD_KEY])
    except ValueError as error:
        raise CheckpointError(f"The model card in the file's header is not JSON: {error}.") from None
    if not isinstance(entries, dict):
        raise CheckpointError("The model card in the file's header is not a JSON object.")
    return entries


def _agreed_config(card: Card, derived: Card) -> dict[str, Any]:
    """The constructor's arguments, where card and tensors say the same; what no tensor tells, the card may."""
    stated = {"architecture": card.architecture, "output_scale": card.output_scale, **card.config}
    found = {"architecture": derived.architecture, "output_scale": derived.output_scale, **derived.config}
    for name, value in stated.items():
        is_free = name in card.config and name in found and value != found[name]
        if is_free:
            is_free = same_tensors(derived.architecture, derived.config | {name: value}, derived.config)
        if name not in found or (value != found[name] and not is_free):
            raise CheckpointError(
                f"The model card says {name} = {value!r}, but the tensors say {found.get(name, 'nothing of it')!r}."
            )
    if card.size_multiple % derived.size_multiple:
        raise CheckpointError(
            f"The model card says size_multiple = {card.size_multiple}, "
            f"but this network needs a multiple of {derived.size_multiple}."
        )
    return derived.config | card.config
