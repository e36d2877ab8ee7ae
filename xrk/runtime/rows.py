"""Which rows come from which: windows over rows, and operators that keep every row to itself."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from xrk.runtime.graph import RowLocal, Value

__all__ = [
    "Regrouped",
    "Rowwise",
    "Turned",
    "Window",
    "as_channels_last",
    "channels_last",
    "clip",
    "is_map",
    "layout",
    "wide",
    "wide_bytes",
    "with_rows",
]


def is_map(value: Any) -> bool:
    """A (1, C, H, W) value whose row axis is the third."""
    return isinstance(value, Value) and _is_channels_last(value) and value.shape[0] == 1


def _is_channels_last(value: Value) -> bool:
    return len(value.shape) == 4 and value.row_axis == 2 and value.span == 1


def with_rows(like: torch.Tensor, axis: int, rows: int) -> Value:
    """The value whose single row looks like ``like``, with so many rows along ``axis``."""
    span = like.shape[axis]
    return Value((*like.shape[:axis], rows * span, *like.shape[axis + 1 :]), like.dtype, axis, span=span)


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in at least float32, as a sum over many pixels needs it."""
    return x.float() if x.dtype.itemsize < 4 else x


def wide_bytes(value: Value, rows: int) -> int:
    """What `wide` allocates for a band."""
    return 4 // value.dtype.itemsize * value.bytes_of(rows) if value.dtype.itemsize < 4 else 0


def clip(row: int, low: int, high: int) -> int:
    """``row``, or the end of [low, high] that it lies beyond."""
    return low if row < low else min(row, high)


def layout(value: Value, rows: int, device: torch.device, memory: torch.Tensor | None = None) -> torch.Tensor:
    """Memory for a band of ``value``, row after row; channels-last within the rows of a map.

    ``memory``: bytes to use, as many as the band has; by default new ones.

    A map of one channel has the strides of channels-last too, so that no operator takes it for the other layout.
    """
    axis, shape = value.row_axis, value.band_shape(rows)
    order = [axis, *(i for i in range(len(shape)) if i != axis)]
    if _is_channels_last(value):
        order = [0, 2, 3, 1]
    sizes = [shape[i] for i in order]
    made = torch.empty(sizes, dtype=value.dtype, device=device) if memory is None else None
    made = memory.view(value.dtype).view(sizes) if made is None else made
    return made.permute([order.index(i) for i in range(len(shape))])


def as_channels_last(x: torch.Tensor) -> torch.Tensor | None:
    """``x`` where it is a dense map with its channels last; None where it is not.

    The result has the memory of ``x`` and the strides of such a map also where a size of 1 leaves them open: operators
    would take it for the other layout, and kernels refuse it.
    """
    _, c, h, w = x.shape
    strides = (h * w * c, 1, w * c, c)
    if x.stride() == strides:
        return x
    settled = all(size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), strides, strict=True))
    return x.as_strided(x.shape, strides) if settled else None


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """`as_channels_last`, or a copy that is."""
    same = as_channels_last(x)
    if same is not None:
        return same
    n, c, h, w = x.shape
    return torch.empty((n, h, w, c), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2).copy_(x)


class Window:
    """Output row r looks at input rows [r * stride - before, r * stride - before + extent)."""

    def __init__(self, stride: int, before: int, extent: int) -> None:
        self.stride, self.before, self.extent = stride, before, extent

    def of(self, r0: int, r1: int) -> tuple[int, int]:
        """The rows, not clipped, that output rows [r0, r1) look at."""
        return r0 * self.stride - self.before, (r1 - 1) * self.stride - self.before + self.extent


class Regrouped(RowLocal):
    """The same tensor with more or fewer entries of the row axis called a row."""

    label = "rows"
    reads_in_place = True

    def __init__(self, x: Value, span: int) -> None:
        self.span = span
        self._make([x], Value(x.shape, x.dtype, x.row_axis, span=span))

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        span = self.inputs[0].span
        return r0 * self.span // span, -(-r1 * self.span // span)

    def round_up(self, row: int) -> int:
        step = math.lcm(self.span, self.inputs[0].span) // self.span
        return -(-row // step) * step

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        before = r0 * self.span % self.inputs[0].span
        return rows[0].narrow(self.output.row_axis, before, (r1 - r0) * self.span)


class Turned(RowLocal):
    """Rows in another order, or columns for rows: a vertical flip, a roll, a transposition. Read from the whole map."""

    whole_inputs = frozenset([0])

    def __init__(self, label: str, x: Value, output: Value, row: Any) -> None:
        """``row``: takes the whole input and r0, r1 and gives these output rows, perhaps as a view."""
        self.label, self._row = label, row
        self._make([x], output)

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        return 0, self.inputs[i].rows

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        y = self._row(rows[0], r0, r1)
        return y.contiguous(memory_format=torch.channels_last if is_map(self.output) else torch.contiguous_format)


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
