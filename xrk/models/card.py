"""The card of a network: what it is, what it expects of an image, where its weights come from, what it can do.

A shipped network has its card beside its weights (``weights/NAME.json``); for a checkpoint from elsewhere the card is
derived from the tensors. The front door reads how to run the network from the card and nowhere else.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any

from xrk.errors import InputError

__all__ = ["DOMAINS", "NOISE_HANDLING", "OUTPUT_SCALES", "Card"]

DOMAINS = ("unit", "symmetric", "stabilised")
NOISE_HANDLING = ("estimate", "none")
OUTPUT_SCALES = (0.5, 1.0, 2.0, 3.0, 4.0, 8.0)

_TEXTS = ("name", "architecture", "description", "licence", "limits")
_OBJECTS = ("config", "training", "figures")


@dataclass(frozen=True)
class Card:
    """What there is to know about one network with its weights.

    Attributes:
        name: what ``xrk.load`` knows it by, or the stem of the file it came from.
        architecture: a key of ``xrk.models.ARCHITECTURES``.
        config: the arguments of that architecture's constructor.
        domain: what the network sees, an affine map of the counts or the stabilised counts:

            * ``"unit"``: n = (counts - black) / (white - black);
            * ``"symmetric"``: 2 n - 1, and (y + 1) / 2 on the way back;
            * ``"stabilised"``: the generalised Anscombe transform of the counts, noise of standard deviation 1.
        noise: what ``noise=None`` means for this network: ``"estimate"`` the line of the noise model from the image,
            or ``"none"``.
        size_multiple: height and width must be multiples of this many pixels.
        output_scale: height of the output over height of the input: 1.0; 0.5; or 2.0, 3.0, 4.0, 8.0 of a network for
            super-resolution, which `xrk.enhance` does not run.
        description: one sentence.
        parameters: number of parameters, buffers not counted.
        sha256: of the weights file, 64 hexadecimal digits in lower case.
        licence: of the weights and of the data they were trained on.
        training: what it was trained on, for how long, on what.
        figures: what it was measured to do.
        limits: where it must not be trusted.
        source: path of the file a checkpoint was read from; None for shipped weights.

    Raises:
        InputError: a field has a type or a value that a card cannot have.
    """

    name: str
    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    domain: str = "unit"
    noise: str = "none"
    size_multiple: int = 1
    output_scale: float = 1.0
    description: str = ""
    parameters: int = 0
    sha256: str | None = None
    licence: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    limits: str = ""
    source: str | None = None

    def __post_init__(self) -> None:
        for name in _TEXTS:
            self._require(name, isinstance(getattr(self, name), str), "a text")
        for name in ("name", "architecture"):
            self._require(name, getattr(self, name) != "", "a text that is not empty")
        for name in _OBJECTS:
            # Through JSON and back: tuples become lists here already, so that a card equals its copy from a file,
            # and nobody else holds a reference into it.
            object.__setattr__(self, name, self._plain_json(name))
        self._require("domain", self.domain in DOMAINS, f"one of {', '.join(DOMAINS)}")
        self._require("noise", self.noise in NOISE_HANDLING, f"one of {', '.join(NOISE_HANDLING)}")
        self._require("size_multiple", _is_count(self.size_multiple) and self.size_multiple > 0, "a positive integer")
        self._require("parameters", _is_count(self.parameters), "an integer from 0 up")
        self._require("output_scale", self.output_scale in OUTPUT_SCALES, "0.5, 1.0, 2.0, 3.0, 4.0 or 8.0")
        object.__setattr__(self, "output_scale", float(self.output_scale))
        digits = self.sha256 is None or (isinstance(self.sha256, str) and re.fullmatch("[0-9a-f]{64}", self.sha256))
        self._require("sha256", bool(digits), "64 hexadecimal digits in lower case, or null")
        self._require("source", self.source is None or isinstance(self.source, str), "a text, or null")

    def to_dict(self) -> dict[str, Any]:
        """The card as a dict that ``json`` can write; `from_dict` makes an equal card of it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, entries: Any) -> "Card":
        """The card that a JSON object describes.

        Raises:
            InputError: not an object, a field is unknown, missing or has a wrong value.
        """
        if not isinstance(entries, dict):
            raise InputError(f"A model card must be a JSON object, got {type(entries).__name__}.")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(str(name) for name in entries if name not in fields):
            raise InputError(f"A model card has no field {unknown[0]!r}; its fields are {', '.join(fields)}.")
        for name in ("name", "architecture"):
            if name not in entries:
                raise InputError(f"A model card needs the field {name!r}.")
        return cls(**entries)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"The field {name!r} of a model card must be {expected}, got {getattr(self, name)!r}.")

    def _plain_json(self, name: str) -> dict[str, Any]:
        value = getattr(self, name)
        self._require(name, isinstance(value, dict), "a JSON object")
        try:
            return json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise InputError(f"The field {name!r} of a model card must be plain JSON: {error}.") from None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
