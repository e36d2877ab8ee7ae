"""Arguments of this package's functions: each is checked where it comes in, and told of in one sentence."""

import math
import operator
import os
from typing import Any

import numpy as np

from xrk.errors import InputError, InputTypeError

__all__ = ["array_of", "black_and_white", "check_path", "whole_number"]


def check_path(path: Any) -> None:
    """InputTypeError unless this is a text or a path."""
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise InputTypeError(f"path is a {type(path).__name__}; expected a text or a pathlib.Path.")


def whole_number(value: Any, name: str, least: int, most: int | None = None, unit: str = "") -> int:
    """The number as an int. InputTypeError where it is none, InputError where it is out of [least, most]."""
    limits = f"{least} or more" if most is None else f"{least} to {most}"
    expected = f"expected a whole number{unit}, {limits}."
    try:
        number = operator.index(value)
    except TypeError:
        raise InputTypeError(f"{name}={value!r}; {expected}") from None
    if number < least or (most is not None and number > most):
        raise InputError(f"{name}={value!r}; {expected}")
    return number


def black_and_white(levels: Any) -> tuple[float, float]:
    """The pair (black, white), two finite numbers of which the second is larger."""
    try:
        black, white = (float(v) for v in levels)
    except (TypeError, ValueError):
        raise InputTypeError(f"levels={levels!r}; expected (black, white), two numbers.") from None
    if not (black < white and math.isfinite(white - black) and math.isfinite(1.0 / (white - black))):
        raise InputError(f"levels=({black:g}, {white:g}); expected two finite numbers, black < white.")
    return black, white


def array_of(values: Any) -> np.ndarray:
    """As `numpy.asarray`; InputError for rows of different lengths."""
    try:
        return np.asarray(values)
    except ValueError as error:
        raise InputError(f"The pixels are no array: {error}") from error
