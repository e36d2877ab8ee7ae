"""What the caller may write for ``memory=``: bytes, or a number with a unit."""

import operator
import re
from fractions import Fraction

from xrk.errors import InputError, InputTypeError

SMALLEST = 1 << 20  # below one MiB not even the weights of the smallest network fit

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[_letter + "B"] = 1000**_power
    _UNITS[_letter + "IB"] = 1024**_power
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*")
_EXPECTED = 'expected None, a whole number of bytes, or a text such as "512MiB" or "1.5 GB".'


def parse_memory(memory: int | str | None) -> int | None:
    """The budget in bytes; None stays None.

    Units: B, kB, MB, GB, TB (powers of 1000) and KiB, MiB, GiB, TiB (powers of 1024), in upper or lower case.

    Raises:
        InputError: a text that is no size, or less than 1 MiB.
        InputTypeError: neither a whole number nor a text.
    """
    if memory is None:
        return None
    if isinstance(memory, str):
        match = _PATTERN.fullmatch(memory)
        unit = _UNITS.get(match[2].upper()) if match else None
        if unit is None:
            raise InputError(f"memory={memory!r} is not a size; {_EXPECTED}")
        size = int(Fraction(match[1]) * unit)
    elif isinstance(memory, bool):
        raise InputTypeError(f"memory={memory!r} is a bool; {_EXPECTED}")
    else:
        try:
            size = operator.index(memory)
        except TypeError:
            raise InputTypeError(f"memory={memory!r} is a {type(memory).__name__}; {_EXPECTED}") from None
    if size < SMALLEST:
        raise InputError(f"memory={memory!r} is {size} bytes; expected at least 1 MiB ({SMALLEST} bytes).")
    return size
