import numpy as np
import pytest

from xrk.errors import InputError, InputTypeError
from xrk.runtime.budget import parse_memory


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (None, None),
        (1 << 20, 1 << 20),
        (np.int64(123456789), 123456789),
        ("1048576", 1048576),
        ("512MiB", 512 << 20),
        ("2GiB", 2 << 30),
        ("1.5 GB", 1_500_000_000),
        (" 0.1 gb ", 100_000_000),
        ("3000000 B", 3_000_000),
        ("2048 KiB", 2 << 20),
        ("5000kB", 5_000_000),
        ("1TiB", 1 << 40),
        (".5 TB", 500_000_000_000),
    ],
)
def test_sizes(given, size):
    assert parse_memory(given) == size


@pytest.mark.parametrize(
    "given", ["", "lots", "GiB", "2 GiBs", "-1GiB", "1e9", "nan", "2 G", 0, -5, 1000, "1kB", "0 GiB"]
)
def test_what_is_no_usable_size(given):
    with pytest.raises(InputError, match=r"memory=.*expected") as caught:
        parse_memory(given)
    assert repr(given) in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("given", [True, 2.5e9, [1], b"2GiB"])
def test_what_is_no_size_at_all(given):
    with pytest.raises(InputTypeError, match=f"{type(given).__name__}; expected") as caught:
        parse_memory(given)
    assert isinstance(caught.value, TypeError)
