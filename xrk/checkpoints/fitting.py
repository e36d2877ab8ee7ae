"""Which network a state dict belongs to, and what does not fit.

Everything here works on names and shapes; candidates are built on torch's meta device, without memory for a single
weight. Tensors are touched by `build` alone, after every one of them has been found to fit.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xrk.errors import CheckpointError
from xrk.models import ARCHITECTURES

__all__ = [
    "Fit",
    "Format",
    "Shapes",
    "best_fit",
    "build",
    "differences",
    "dimension",
    "same_tensors",
    "shown",
    "vote",
    "width",
]

Shapes = Mapping[str, tuple[int, ...]]

# Lightning and the like put their own attribute's name before every key: "model.encoder.conv1.weight".
_MOST_PREFIXES = 3


@dataclass(frozen=True)
class Format:
    """How the checkpoints of one upstream project are recognised.

    Attributes:
        title: the project and its class, for messages.
        architecture: the network they belong to, a key of ``xrk.models.ARCHITECTURES``.
        configuration: the constructor's arguments, read from the shapes. It is asked about foreign and damaged state
            dicts too, so it must answer with a default where a tensor is missing.
        conventions: how the network is to be run, given the configuration: the card's fields ``domain``, ``noise``,
            ``size_multiple``, ``output_scale`` and ``limits``.
        rename: this project's name of a tensor -> the network's own.
        reshape: the network's own name of a tensor and its shape in the file -> its shape in the network, where a
            project stores the same numbers in another shape.
        colour: whether files for several channels load too, though no radiograph goes through them.
    """

    title: str
    architecture: str
    configuration: Callable[[Shapes], dict[str, Any]]
    conventions: Callable[[dict[str, Any]], dict[str, Any]]
    rename: Callable[[str], str] = str
    reshape: Callable[[str, tuple[int, ...]], tuple[int, ...]] = lambda name, shape: shape
    colour: bool = False


@dataclass(frozen=True)
class Fit:
    """A state dict held against one network.

    Attributes:
        format: the upstream project whose naming was assumed.
        config: constructor's arguments of ``format.architecture``.
        keys: the network's name of a tensor -> its name in the state dict.
        missing: names and shapes that the network has and the state dict has not.
        unexpected: names and shapes that the state dict has and the network has not.
        misshapen: names with the shape found and the shape expected.
        matching: number of tensors that fit.
    """

    format: Format
    config: dict[str, Any]
    keys: dict[str, str]
    missing: dict[str, tuple[int, ...]]
    unexpected: dict[str, tuple[int, ...]]
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    matching: int

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)

    def problems(self, at_most: int = 10) -> list[str]:
        """What does not fit, worst first, one phrase each; beyond `at_most` only their number."""
        return _phrases(self.misshapen, self.missing, self.unexpected, at_most)


def differences(found: Shapes, expected: Shapes, at_most: int = 10) -> list[str]:
    """What keeps tensors from being the expected ones, in the phrases of `Fit.problems`; empty where all fit."""
    misshapen = {k: (found[k], shape) for k, shape in expected.items() if k in found and found[k] != shape}
    missing = {k: shape for k, shape in expected.items() if k not in found}
    return _phrases(misshapen, missing, {k: shape for k, shape in found.items() if k not in expected}, at_most)


def _phrases(
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]], missing: Shapes, unexpected: Shapes, at_most: int
) -> list[str]:
    found = [f"{k} is {got}, expected {expected}" for k, (got, expected) in misshapen.items()]
    found += [f"{k} {shape} is missing" for k, shape in missing.items()]
    found += [f"{shown(k)} {shape} is unexpected" for k, shape in unexpected.items()]
    left_out = len(found) - at_most
    return found[:at_most] + ([f"and {left_out} more"] if left_out > 0 else [])


def shown(name: str) -> str:
    """A name from a file as a message may show it: on one line, without control characters, not endless."""
    return name if len(name) <= 100 and name.isprintable() else f"{name[:100]!a}..."


def dimension(shapes: Shapes, name: str, axis: int, default: int) -> int:
    """Length of one axis of one tensor; `default` where there is no such tensor, axis or length."""
    shape = shapes.get(name, ())
    return shape[axis] if axis < len(shape) and shape[axis] > 0 else default


def width(shapes: Shapes, multiples: Mapping[str, int], default: int) -> int:
    """The width that most tensors speak for, given how many times the width each one's first axis is.

    A vote, so that one damaged tensor does not decide what all others are compared with.
    """
    return vote((dimension(shapes, name, 0, 0) // multiple for name, multiple in multiples.items()), default)


def vote(numbers: Iterable[int], default: int) -> int:
    """What most of the numbers that are not 0 are; `default` where there is none."""
    votes = Counter(numbers)
    del votes[0]
    return votes.most_common(1)[0][0] if votes else default


def best_fit(shapes: Shapes, formats: Iterable[Format]) -> Fit | None:
    """The candidate that fits, else the one most of whose tensors do; None if no name at all is known."""
    best = None
    for form in formats:
        for prefix in _common_prefixes(shapes):
            candidate = _fit(shapes, form, prefix)
            if candidate is not None and (best is None or _merit(candidate) > _merit(best)):
                best = candidate
            if best is not None and best.fits:
                return best
    return best


def build(fit: Fit, state: Mapping[str, Tensor]) -> nn.Module:
    """The network in float32 with the weights of `state`, in eval mode, without gradients.

    The module takes copies of the tensors; no random number is drawn.

    Raises:
        CheckpointError: a tensor is of a dtype that holds no weights, or holds NaN or infinite values.
    """
    module = _on_meta(fit.format.architecture, fit.config)
    weights = {}
    for name, slot in module.state_dict().items():
        if name in fit.keys:
            weights[name] = _weight(name, state[fit.keys[name]], slot.dtype).reshape(slot.shape)
        else:
            weights[name] = torch.zeros(slot.shape, dtype=slot.dtype, device="cpu")
    module.load_state_dict(weights, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def same_tensors(architecture: str, config: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two configurations of a network have the same names and shapes."""
    try:
        return _expected_shapes(architecture, config) == _expected_shapes(architecture, other)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        return False  # sizes that no tensor can have


def _fit(shapes: Shapes, form: Format, prefix: str = "") -> Fit | None:
    """Hold the tensors, whose names all begin with `prefix`, against one format; None if none of them is known."""
    keys: dict[str, str] = {}
    twins = {}
    for key, shape in shapes.items():
        if keys.setdefault(form.rename(key.removeprefix(prefix)), key) != key:
            twins[key] = shape
    found = {name: form.reshape(name, shapes[key]) for name, key in keys.items()}
    config = form.configuration(found)
    try:
        expected = _expected_shapes(form.architecture, config)
    except (RuntimeError, ValueError, OverflowError):
        return None  # sizes that no tensor can have
    if not expected.keys() & found.keys():
        return None
    # Networks saved before torch 0.4.1 lack the counters, which evaluation does not use.
    missing = {k: s for k, s in expected.items() if k not in found and not k.endswith("num_batches_tracked")}
    unexpected = {k: s for k, s in found.items() if k not in expected} | twins
    both = expected.keys() & found.keys()
    misshapen = {k: (found[k], expected[k]) for k in expected if k in both and found[k] != expected[k]}
    return Fit(form, config, keys, missing, unexpected, misshapen, len(both) - len(misshapen))


def _weight(name: str, found: Tensor, dtype: torch.dtype) -> Tensor:
    # A counter that was halved along with the weights is still a counter; an integer in a weight's place is
    # a quantised network, whose scale is stored elsewhere.
    if found.is_complex() or found.dtype == torch.bool or (dtype.is_floating_point and not found.is_floating_point()):
        raise CheckpointError(
            f"The tensor {name} has dtype {str(found.dtype).removeprefix('torch.')}, expected a floating one; "
            "save the weights in float32 or float16."
        )
    value = found.to(torch.float32 if found.is_floating_point() else dtype, copy=True).contiguous()
    if not torch.isfinite(value).all():
        raise CheckpointError(f"The tensor {name} holds NaN or infinite values, so the network cannot be used.")
    return value if dtype.is_floating_point else value.to(dtype)


def _on_meta(architecture: str, config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return ARCHITECTURES[architecture](**config)


def _expected_shapes(architecture: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in _on_meta(architecture, config).state_dict().items()}


def _common_prefixes(names: Iterable[str]) -> list[str]:
    """An empty text, then the leading components that all names share, one more at a time."""
    split = [name.split(".")[:-1] for name in names]
    prefixes = [""]
    for components in list(zip(*split, strict=False))[:_MOST_PREFIXES]:
        if len(set(components)) > 1:
            break
        prefixes.append(f"{prefixes[-1]}{components[0]}.")
    return prefixes


def _merit(fit: Fit) -> tuple[bool, int, int]:
    return fit.fits, fit.matching, -len(fit.missing) - len(fit.unexpected)
