"""Arguments of this package's functions: each is checked where it comes in, and told of in one sentence."""

import math
import operator
import os
from numbers import Real
from typing import Any

import numpy as np

from xrk.errors import InputError, InputTypeError

__all__ = ["array_of", "black_and_white", "check_path", "whole_number"]


def check_path(path: Any) -> None:
    """InputTypeError unless this is a text or a path."""
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise InputTypeError(f"path is a {type(path).__name__}; expected a text or a pathlib.Path.")


def whole_number(value: Any, name: str, least: int, most: int | None = None, unit: str = "") -> int:
    """The number as an int. InputTypeError where it is none, as True is; InputError where it leaves [least, most]."""
    limits = f"{least} or more" if most is None else f"{least} to {most}"
    expected = f"expected a whole number{unit}, {limits}."
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise InputTypeError(f"{name}={value!r}; {expected}")
    if number < least or (most is not None and number > most):
        raise InputError(f"{name}={value!r}; {expected}")
    return number


def black_and_white(levels: Any, name: str = "levels") -> tuple[float, float]:
    """The pair (black, white) as floats. InputTypeError for no pair of numbers, InputError unless black < white."""
    expected = f"expected {name}=(black, white), two finite numbers with black < white"
    try:
        pair = tuple(levels)
    except TypeError:
        pair = ()
    if isinstance(levels, str) or len(pair) != 2 or not all(isinstance(v, Real) for v in pair):
        raise InputTypeError(f"{name}={levels!r}; {expected}.")
    try:
        black, white = float(pair[0]), float(pair[1])
    except OverflowError:
        raise InputError(f"{name} span a range that float64 cannot hold; {expected}.") from None
    if not (math.isfinite(black) and math.isfinite(white)):
        raise InputError(f"{name}=({black:g}, {white:g}) are not finite; {expected}.")
    if black >= white:
        raise InputError(f"{name}=({black:g}, {white:g}) are {'equal' if black == white else 'reversed'}; {expected}.")
    # The range and its inverse are both factors later on.
    if not (math.isfinite(white - black) and math.isfinite(1.0 / (white - black))):
        raise InputError(f"{name}=({black:g}, {white:g}) span a range that float64 cannot hold; {expected}.")
    return black, white


def array_of(values: Any) -> np.ndarray:
    """As `numpy.asarray`; InputError for rows of different lengths."""
    try:
        return np.asarray(values)
    except ValueError as error:
        raise InputError(f"The pixels are no array: {error}") from error
