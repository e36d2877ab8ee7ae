"""Convolutions made ready once for many bands: weights in the layout that they are read in, ReLU and sum inside.

In float32 on a CPU with wide vectors this is `xrk.kernels.PackedConv2d`. Groups, and other CPUs, are left to oneDNN,
with weights in the layout that it computes in: the one place that knows torch's private names for that (its own
compiler's, `torch.ops.mkldnn`). Where they are not there, or the rows are of another dtype or elsewhere, torch's public
operators compute the same.

Which layout oneDNN computes in depends on the rows at a time and on the threads; given weights in another one, it
brings them into its own at every call, which can take ten times as long as the convolution. So the heights of all
bands are known beforehand: the weights get the layout that most rows are computed in, and a band whose height asks for
another is taken in parts that do not.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xrk.kernels import PackedConv2d, dispatch, packed_values

__all__ = ["Convolve", "packs", "prepare_convolution", "prepared_bytes", "prepares", "transforms"]

# Channels from which products in Winograd's transform were measured to be quicker.
TRANSFORMED = 32

Convolve = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""Takes rows (1, C, h, W), a residual of the result's shape or None, and memory for the result or None; gives
act(conv(rows) + bias + residual). The memory may be the residual's own; it is channels-last, and dense unless the
convolution `packs`."""


def prepare_convolution(
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: int,
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    width: int,
    heights: Mapping[int, int],
    transformed: bool = False,
) -> Convolve:
    """A convolution ready to run.

    Args:
        weight: (O, C / groups, K, L), on the device it will run on, in the dtype of the rows.
        bias: (O,) or None.
        stride, dilation, groups: as for `torch.nn.functional.conv2d`.
        padding: columns of zeros on both sides; there are none above and below.
        activation: "relu" or None.
        width: columns of the rows that will come.
        heights: how often results of so many rows will be asked for; others work, but may take long. If it is empty,
            the public operators will do.
        transformed: products in Winograd's transform where the convolution `packs`; it must be one that `transforms`.
    """
    if heights and packs(weight.device, weight.dtype, groups):
        step, apart = tuple(stride), tuple(dilation)
        return PackedConv2d(weight, bias, step, (padding, padding), apart, activation, transformed)
    geometry = [[0, padding], list(stride), list(dilation), groups]
    if heights and prepares(weight.device, weight.dtype):
        return _in_own_layout(weight, bias, geometry, activation, width, heights)
    weight = weight.contiguous(memory_format=torch.channels_last)
    return _plain(weight, bias, geometry, activation)


def prepares(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights get a layout of their own, and results can be written into memory that is given."""
    return device.type == "cpu" and dtype == torch.float32 and _usable()


def packs(device: torch.device, dtype: torch.dtype, groups: int = 1) -> bool:
    """Whether a convolution is `xrk.kernels.PackedConv2d`, which writes into memory of any strides."""
    module = dispatch.native()
    # An extension that was built from older sources has no such functions.
    wide = hasattr(module, "packed_doubled_conv2d") and module.simd() != "baseline"
    return wide and groups == 1 and device.type == "cpu" and dtype == torch.float32


def transforms(weight: Sequence[int], stride: tuple[int, ...], dilation: tuple[int, ...]) -> bool:
    """Whether a packed convolution of weights (O, C, K, L) is quicker in Winograd's transform."""
    plain = tuple(weight[2:]) == (3, 3) and stride == dilation == (1, 1)
    return plain and min(weight[:2]) >= TRANSFORMED


def prepared_bytes(
    weight: Sequence[int], dtype: torch.dtype, device: torch.device, groups: int = 1, transformed: bool = False
) -> int:
    """The bytes of prepared weights of shape (O, C / groups, K, L): outputs are filled up to blocks."""
    if packs(device, dtype, groups):
        return 4 * packed_values(weight, transformed)
    itemsize = dtype.itemsize
    outputs, *rest = weight
    block = next((b for b in (8, 16) if outputs <= b), 24)
    return functools.reduce(int.__mul__, rest, -(-outputs // block) * block) * itemsize


def _in_own_layout(
    weight: Tensor, bias: Tensor | None, geometry: list, activation: str | None, width: int, heights: Mapping[int, int]
) -> Convolve:
    _, (step, _), dilation, groups = geometry
    extent = dilation[0] * (weight.shape[2] - 1) + 1
    threads = torch.get_num_threads()

    def rows(height: int) -> tuple[int, ...]:
        return 1, weight.shape[1] * groups, (height - 1) * step + extent, width

    def layout(height: int) -> bytes:
        return _layout(tuple(weight.shape), tuple(map(tuple, geometry[:3])), groups, rows(height), threads)

    computed: Counter[bytes] = Counter()
    for height, count in heights.items():
        computed[layout(height)] += height * count
    own = max(computed, key=computed.__getitem__)
    usual = next(height for height in heights if layout(height) == own)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(rows(usual)))
    parts = {h: _split(h, lambda n: layout(n) == own) for h in heights if layout(h) != own}
    run = _fused(packed, bias, geometry, activation)
    return _in_parts(run, parts, step, extent) if parts else run


@functools.cache
def _layout(
    weight: tuple[int, ...], geometry: tuple[tuple[int, ...], ...], groups: int, rows: tuple[int, ...], threads: int
) -> bytes:
    """The layout in which oneDNN wants weights of this shape for these rows; torch tells it of given weights only."""
    empty = torch.empty(weight, memory_format=torch.channels_last)
    packed = torch.ops.mkldnn._reorder_convolution_weight(empty, *geometry, groups, rows)
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy())


def _split(height: int, fits: Callable[[int], bool]) -> list[int]:
    """Heights that fit and add up to ``height``, the highest first; what is left over where none fits."""
    parts = []
    while height:
        part = next((n for n in range(height, 0, -1) if fits(n)), height)
        parts.append(part)
        height -= part
    return parts


def _in_parts(run: Convolve, parts: Mapping[int, Sequence[int]], step: int, extent: int) -> Convolve:
    def run_parts(rows: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor:
        height = (rows.shape[2] - extent) // step + 1
        if len(parts.get(height, ())) < 2:
            return run(rows, residual, out)
        made, at = [], 0
        for part in parts[height]:
            window = rows[:, :, at * step : (at + part - 1) * step + extent]
            beside = None if residual is None else residual[:, :, at : at + part]
            place = None if out is None else out[:, :, at : at + part]
            made.append(run(window, beside, beside if residual is out else place))
            at += part
        return torch.cat(made, 2) if out is None else out

    return run_parts


def _fused(weight: Tensor, bias: Tensor | None, geometry: list, activation: str | None) -> Convolve:
    convolve = torch.ops.mkldnn._convolution_pointwise.default
    convolve_add = torch.ops.mkldnn._convolution_pointwise.binary
    convolve_onto = torch.ops.mkldnn._convolution_pointwise_.binary

    def run(rows: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor:
        if out is not None:
            # The operators make their own result, but for this one, which adds to memory that is there.
            if residual is None:
                out.zero_()
            elif residual is not out:
                out.copy_(residual)
            return convolve_onto(out, rows, weight, bias, *geometry, "add", 1.0, activation, [], "")
        if residual is None:
            return convolve(rows, weight, bias, *geometry, activation or "none", [], "")
        return convolve_add(rows, residual, weight, bias, *geometry, "add", 1.0, activation, [], "")

    return run


def _plain(weight: Tensor, bias: Tensor | None, geometry: list, activation: str | None) -> Convolve:
    padding, stride, dilation, groups = geometry

    def run(rows: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor:
        y = F.conv2d(rows, weight, bias, stride, padding, dilation, groups)
        if residual is not None:
            y = torch.add(y, residual, out=y if out is None else out)
        elif out is not None:
            y = out.copy_(y)
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
            torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy()
            memory = torch.empty(1, 4, 5, 16).permute(0, 3, 1, 2)
            for other, out in ((None, None), (residual, None), (None, memory), (residual, memory)):
                expected = _plain(weight, bias, geometry, "relu")(x, other, None)
                found = _fused(packed, bias, geometry, "relu")(x, other, out)
                if not all(
                    torch.allclose(y, expected, rtol=0, atol=1e-5) for y in (found, found if out is None else out)
                ):
                    return False
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True
