"""Convolutions made ready once for many bands: weights in the layout that oneDNN computes in, ReLU and sum inside.

The one place that knows torch's private names for them (its own compiler's, `torch.ops.mkldnn`). Where they are not
there, or the rows are not float32 on a CPU, torch's public operators compute the same.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Convolve", "prepare_convolution"]

Convolve = Callable[[Tensor, Tensor | None], Tensor]
"""Takes rows (1, C, h, W) and a residual of the result's shape or None; gives act(conv(rows) + bias + residual)."""


def prepare_convolution(
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    rows: Sequence[int],
) -> tuple[Convolve, int]:
    """A convolution ready to run, and the bytes that its own copy of the weights holds.

    Args:
        weight: (O, C / groups, K, L), on the device it will run on, in the dtype of the rows.
        bias: (O,) or None.
        stride, padding, dilation, groups: as for `torch.nn.functional.conv2d`.
        activation: "relu" or None.
        rows: (1, C, h, W), a usual band's shape; other heights work as well.
    """
    geometry = [list(padding), list(stride), list(dilation), groups]
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and _usable():
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(rows))
        # The copy's layout is oneDNN's own: channels in blocks of 8 or 16, the last one filled up.
        outputs, inputs = (-(-size // 8) * 8 if size > 4 else size for size in weight.shape[:2])
        held = outputs * inputs * weight[0, 0].numel() * weight.itemsize
        return _fused(packed, bias, geometry, activation), held
    weight = weight.contiguous(memory_format=torch.channels_last)
    return _plain(weight, bias, geometry, activation), 0


def _fused(weight: Tensor, bias: Tensor | None, geometry: list, activation: str | None) -> Convolve:
    convolve = torch.ops.mkldnn._convolution_pointwise.default
    convolve_add = torch.ops.mkldnn._convolution_pointwise.binary

    def run(rows: Tensor, residual: Tensor | None) -> Tensor:
        if residual is None:
            return convolve(rows, weight, bias, *geometry, activation or "none", [], "")
        return convolve_add(rows, residual, weight, bias, *geometry, "add", 1.0, activation, [], "")

    return run


def _plain(weight: Tensor, bias: Tensor | None, geometry: list, activation: str | None) -> Convolve:
    padding, stride, dilation, groups = geometry

    def run(rows: Tensor, residual: Tensor | None) -> Tensor:
        y = F.conv2d(rows, weight, bias, stride, padding, dilation, groups)
        if residual is not None:
            y += residual
        return y.relu_() if activation == "relu" else y

    return run


_checked: bool | None = None


def _usable() -> bool:
    """Whether the private operators are here and give what the public ones give; found out once, on a small case."""
    global _checked
    if _checked is None:
        _checked = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and _agrees()
    return _checked


def _agrees() -> bool:
    x, residual = (((torch.arange(c * 20.0) * 0.37) % 1 - 0.5).view(1, c, 4, 5) for c in (8, 16))
    weight, bias = ((torch.arange(16 * 8 * 9.0) * 0.71) % 1 - 0.5).view(16, 8, 3, 3), torch.linspace(-1, 1, 16)
    geometry = [[1, 1], [1, 1], [1, 1], 1]
    try:
        with torch.inference_mode():
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape))
            for other in (None, residual):
                fused = _fused(packed, bias, geometry, "relu")(x, other)
                if not torch.allclose(fused, _plain(weight, bias, geometry, "relu")(x, other), rtol=0, atol=1e-5):
                    return False
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True
