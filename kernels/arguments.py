"""Checks of the operators' arguments: the same sentences from every path, before any work is done.

Each raises TypeError for another kind or dtype, ValueError for another shape, layout or device, and names the argument,
what it is and what was expected.
"""

from collections.abc import Sequence
from typing import Any

import torch

# The dtypes that feature maps have. Sums and states are float32, or float64 for float64 maps.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What maps of this dtype are computed in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_map(x: Any, name: str, dims: str) -> None:
    """`x` is a tensor of a map's dtype, with one dimension per word of `dims` ("B C H W"), none of them of size 0.

    A leading "..." in `dims` stands for any number of dimensions.
    """
    check_tensor(x, name)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {_name(x.dtype)}; expected float16, bfloat16, float32 or float64")
    words = dims.split()
    wrong = x.ndim < len(words) - 1 if words[0] == "..." else x.ndim != len(words)
    if wrong:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({', '.join(words)})")
    if any(size == 0 for size in x.shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected at least 1 in each dimension")


def check_tensor(x: Any, name: str) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a torch tensor")


def check_parameter(parameter: Any, name: str, shape: Sequence[int], x: torch.Tensor) -> None:
    """`parameter` is None, or a tensor of this shape on `x`'s device, of `x`'s dtype or float32."""
    if parameter is None:
        return
    check_tensor(parameter, name)
    if tuple(parameter.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(parameter.shape)}; expected {tuple(shape)}")
    if parameter.dtype not in (x.dtype, compute_dtype(x.dtype)):
        accepted = " or ".join(dict.fromkeys(_name(d) for d in (x.dtype, compute_dtype(x.dtype))))
        raise TypeError(f"{name} has dtype {_name(parameter.dtype)}; expected {accepted}")
    check_device(parameter, name, x)


def check_like(y: Any, name: str, x: torch.Tensor) -> None:
    """`y` is None, or a tensor of `x`'s shape, dtype and device."""
    if y is None:
        return
    check_tensor(y, name)
    if y.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(y.shape)}; expected x's, {tuple(x.shape)}")
    if y.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {_name(y.dtype)}; expected x's, {_name(x.dtype)}")
    check_device(y, name, x)


def check_device(y: torch.Tensor, name: str, x: torch.Tensor) -> None:
    if y.device != x.device:
        raise ValueError(f"{name} is on {y.device}; expected x's device, {x.device}")


def check_channels_last(x: torch.Tensor, name: str) -> None:
    """`x` (B, C, H, W) lies in memory as (B, H, W, C); bands of rows of one image do."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and strides {tuple(x.stride())}; "
            f"expected {name}.contiguous(memory_format=torch.channels_last)"
        )


def check_choice(value: Any, name: str, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def check_positive(value: float, name: str) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}; expected a positive finite number")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
