"""Which rows come from which: windows over rows, and operators that keep every row to itself."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from xrk.runtime.graph import RowLocal, Value

__all__ = ["ROWS", "Rowwise", "Window", "channels_last", "clip", "is_map", "layout", "row_view"]


def is_map(value: Any) -> bool:
    """A (1, C, H, W) value whose row axis is the third."""
    return isinstance(value, Value) and len(value.shape) == 4 and value.row_axis == 2 and value.shape[0] == 1


def clip(row: int, low: int, high: int) -> int:
    """``row``, or the end of [low, high] that it lies beyond."""
    return low if row < low else min(row, high)


def row_view(tensor: torch.Tensor, axis: int, a: int, b: int) -> torch.Tensor:
    """Rows [a, b) of a tensor: itself where they are all of it."""
    return tensor if a == 0 and b == tensor.shape[axis] else tensor.narrow(axis, a, b - a)


def layout(value: Value, rows: int, device: torch.device, memory: torch.Tensor | None = None) -> torch.Tensor:
    """Memory for a band of ``value``, row after row; channels-last within the rows of a map.

    ``memory``: bytes to use, as many as the band has; by default new ones.

    A map of one channel has the strides of channels-last too, so that no operator takes it for the other layout.
    """
    axis, shape = value.row_axis, value.band_shape(rows)
    order = [axis, *(i for i in range(len(shape)) if i != axis)]
    if len(shape) == 4 and axis == 2:
        order = [0, 2, 3, 1]
    sizes = [shape[i] for i in order]
    made = torch.empty(sizes, dtype=value.dtype, device=device) if memory is None else None
    made = memory.view(value.dtype).view(sizes) if made is None else made
    return made.permute([order.index(i) for i in range(len(shape))])


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself, or a copy that is dense and channels-last, by its strides too where there is one channel."""
    if x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    n, c, h, w = x.shape
    if c == 1 and x.is_contiguous():
        return x.as_strided(x.shape, (h * w, 1, w, 1))
    return torch.empty((n, h, w, c), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2).copy_(x)


class Window:
    """Output row r looks at input rows [r * stride - before, r * stride - before + extent)."""

    def __init__(self, stride: int, before: int, extent: int) -> None:
        self.stride, self.before, self.extent = stride, before, extent

    def of(self, r0: int, r1: int) -> tuple[int, int]:
        """The rows, not clipped, that output rows [r0, r1) look at."""
        return r0 * self.stride - self.before, (r1 - 1) * self.stride - self.before + self.extent


ROWS = "rows"


class Rowwise(RowLocal):
    """An operator that makes each output row from the same row of its inputs, run on a band as it is.

    Args:
        run: takes the inputs' tensors, in order.
        output: with as many rows as the inputs that have several.
        view: the result may be a view of an input.
        work: products per output row.
        into: takes the inputs' tensors and the memory for the result, where the operator can write there.
    """

    plain_sum: bool = False  # a + b, no factor

    def __init__(
        self,
        label: str,
        run: Callable[[list[Any]], torch.Tensor],
        inputs: Sequence[Value],
        output: Value,
        *,
        view: bool = False,
        work: int = 0,
        into: Callable[[list[Any], torch.Tensor], Any] | None = None,
    ) -> None:
        self.label = label
        self.run = run
        self.into = into
        self.reads_in_place = view
        self.writes_out = into is not None
        self._work = work
        self._make(inputs, output)
        # An input of a single row is repeated, as broadcasting has it.
        self._single = [v.row_axis is not None and v.rows == 1 < output.rows for v in self.inputs]

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        return (0, 1) if self._single[i] else (r0, r1)

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        if out is not None:
            self.into(rows, out)
            return out
        return self.run(rows)

    @property
    def work(self) -> int:
        return self._work
