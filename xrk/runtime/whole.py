"""A network run on a whole frame at once: pad to its size multiple, run, resize, crop.

The oracle of every later plan: what the plain module gives on the padded image.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from xrk.errors import InputError


def run_whole(module: nn.Module, x: torch.Tensor, size_multiple: int = 1, output_scale: float = 1.0) -> torch.Tensor:
    """``module`` on the whole of ``x``, whatever its size.

    Args:
        module: takes (1, 1, H', W') and gives (1, 1, H' * output_scale, W' * output_scale), H' and W' multiples of
            ``size_multiple``. It gets a copy, so a module that works in place leaves ``x`` alone.
        x: (1, 1, H, W), floating point, on the module's device, H and W >= 1. It is padded at the bottom and at the
            right by repeated reflection as `numpy.pad(mode="reflect")` does it (edge where a side is 1).
        output_scale: 1.0; or 0.5 for a network whose output has half the resolution, which is then resized by
            `resize_cubic` to the padded size.

    Returns:
        (1, 1, H, W), in the module's dtype.

    Raises:
        InputError: the module cannot take the padded image, or its output has another shape than it should.
    """
    height, width = x.shape[-2:]
    padded = padded_size((height, width), size_multiple)
    with torch.inference_mode(), torch.autocast(x.device.type, enabled=False), _exact():
        try:
            y = module(pad_by_reflection(x, padded))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise InputError(
                f"The network {type(module).__name__} cannot take an input of shape {(1, 1, *padded)}: {error}"
            ) from error
        check_output(y, padded, output_scale)
        if y.shape[-2:] != padded:
            y = resize_cubic(y, padded)
        return y[..., :height, :width]


def padded_size(shape: tuple[int, int], multiple: int) -> tuple[int, int]:
    """(H, W), each rounded up to a multiple."""
    height, width = (-(-side // multiple) * multiple for side in shape)
    return height, width


def check_output(y: Any, padded: tuple[int, int], output_scale: float) -> None:
    """Raises InputError where a network's answer to (1, 1, *padded) is no tensor of the shape it should have."""
    expected = (1, 1, *(round(side * output_scale) for side in padded))
    if not isinstance(y, torch.Tensor) or y.shape != expected:
        given = tuple(y.shape) if isinstance(y, torch.Tensor) else f"a {type(y).__name__}"
        raise InputError(f"The network gave {given} for an input of shape {(1, 1, *padded)}; expected {expected}.")


# These settings are the whole process's: the first thread in makes them, the last one out takes them back.
_lock = threading.Lock()
_inside = 0
_callers: list[Any] = []


def _exact_settings() -> list[tuple[Any, str, Any]]:
    b = torch.backends
    products = (b.cudnn.conv, b.cuda.matmul, b.mkldnn.conv, b.mkldnn.matmul)
    settings = [(part, "fp32_precision", "ieee") for part in products]
    return [*settings, (b.cudnn, "benchmark", False), (b.cudnn, "deterministic", True)]


@contextmanager
def _exact() -> Iterator[None]:
    """Products in full float32, never TF32 or bfloat16, and algorithms that give the same bits every time."""
    global _inside, _callers
    with _lock:
        if _inside == 0:
            _callers = [getattr(part, name) for part, name, _ in _exact_settings()]
            for part, name, value in _exact_settings():
                setattr(part, name, value)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for (part, name, _), value in zip(_exact_settings(), _callers, strict=True):
                    setattr(part, name, value)


def pad_by_reflection(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A copy of ``x``, longer at the bottom and at the right."""
    height, width = x.shape[-2:]
    out = x.new_empty((*x.shape[:-2], *size))
    out[..., :height, :width] = x
    out[..., :height, width:] = x[..., _reflected(width, size[1], x.device)]
    out[..., height:, :] = out[..., _reflected(height, size[0], x.device), :]
    return out


def _reflected(length: int, target: int, device: torch.device) -> torch.Tensor:
    """Which of ``length`` samples stand at length ... target - 1; a reflected signal has the period 2 (length - 1)."""
    index = torch.arange(length, target, device=device) % max(2 * (length - 1), 1)
    return torch.minimum(index, 2 * (length - 1) - index)


def resize_cubic(x: torch.Tensor, size: tuple[int, int], rows: slice = slice(None)) -> torch.Tensor:
    """Enlarges (..., h, w) to (..., H, W), or to those ``rows`` of it, with Keys' cubic kernel, a = -0.5.

    Centres lie at half pixels. At the border the weights that fall outside are dropped and the rest are scaled to sum
    1, as Pillow's bicubic does it (with a mode "F" image it gives the same values). Same dtype as ``x``; H >= h and
    W >= w.
    """
    for axis, target in zip((-2, -1), size, strict=True):
        index, weight = _cubic_taps(x.shape[axis], target)
        if axis == -2:
            index, weight = index[:, rows], weight[:, rows]
        shape = [1] * x.ndim
        shape[axis] = index.shape[1]
        index, weight = (torch.as_tensor(a, device=x.device) for a in (index, weight))
        taps = [x.index_select(axis, i) * w.to(x.dtype).view(shape) for i, w in zip(index, weight, strict=True)]
        x = (taps[0] + taps[1]) + (taps[2] + taps[3])
    return x


def _cubic_taps(length: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (4, target), int64, and weights (4, target), float64, of the four samples around each new one."""
    centre = (np.arange(target) + 0.5) * (length / target) - 0.5
    index = np.floor(centre).astype(np.int64) + np.arange(-1, 3)[:, None]
    t = np.abs(index - centre)
    near = (1.5 * t - 2.5) * t * t + 1.0
    far = ((-0.5 * t + 2.5) * t - 4.0) * t + 2.0
    weight = np.where(t < 1.0, near, np.where(t < 2.0, far, 0.0))
    weight[(index < 0) | (index >= length)] = 0.0
    return index.clip(0, length - 1), weight / weight.sum(axis=0)
