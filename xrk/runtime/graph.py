"""A network as a graph of values and nodes, and what a node must know to be run in bands of rows.

A `Value` is a tensor of the network at one concrete image size. Most have a *row axis*: the axis that runs down the
image. Values without one (a gate of squeeze-excite, a constant) are *small*: they are held whole.

There are three kinds of nodes:

* `RowLocal`: some rows of the output come from a window of rows of each input. It is run in bands.
* `Summarise`: looks at all rows of its inputs, band by band, and gives a state: the first half of a `RowGlobal`
  operator. The second half, `Apply`, is row-local and takes the state as a small input.
* `Plain`: run once, on whole tensors, as the operator it is.

An operator of its own plugs in with `xrk.runtime.capture.register`: the handler makes such nodes of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

__all__ = ["Apply", "Graph", "Node", "Plain", "RowGlobal", "RowLocal", "Summarise", "Value"]


@dataclass(eq=False)
class Value:
    """One tensor of the network.

    Attributes:
        shape: its sizes.
        dtype: its dtype.
        row_axis: the axis that runs down the image; None for a value that is held whole.
        constant: the tensor itself, where it is known before the network runs.
        producer: the node that makes it; None for the network's input and for constants.
        span: entries of the row axis that make one row: 1 for a map; W where the axis runs over all pixels of the
            image, row after row, as a transformer's tokens do.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    row_axis: int | None = None
    constant: torch.Tensor | None = None
    producer: "Node | None" = field(default=None, repr=False)
    span: int = 1

    @property
    def rows(self) -> int:
        """How many rows it has."""
        assert self.row_axis is not None
        return self.shape[self.row_axis] // self.span

    @property
    def bytes(self) -> int:
        """Bytes of all of it."""
        return self._count(self.shape)

    def bytes_of(self, rows: int) -> int:
        """Bytes of a band of so many rows."""
        return self._count(self.band_shape(rows))

    def band_shape(self, rows: int) -> tuple[int, ...]:
        """Its shape with another number of rows."""
        axis = self.row_axis
        assert axis is not None
        return (*self.shape[:axis], rows * self.span, *self.shape[axis + 1 :])

    def part(self, tensor: torch.Tensor, a: int, b: int) -> torch.Tensor:
        """Rows [a, b) of a tensor that holds rows from 0 on: a view."""
        return tensor.narrow(self.row_axis, a * self.span, (b - a) * self.span)

    def alike(self, dtype: torch.dtype | None = None) -> "Value":
        """Another value of the same shape and rows."""
        return Value(self.shape, dtype or self.dtype, self.row_axis, span=self.span)

    def _count(self, shape: Sequence[int]) -> int:
        count = self.dtype.itemsize
        for size in shape:
            count *= size
        return count


class Node:
    """An operator with its inputs and its one output.

    Attributes:
        label: what a user would call it, for messages and for `print(plan)`.
        inputs: the values it reads.
        output: the value it makes.
        home: the device it runs on, set when a plan is made, before `prepare`.
    """

    label: str = ""
    home: torch.device = torch.device("cpu")
    inputs: list[Value]
    output: Value

    def _make(self, inputs: Sequence[Value], output: Value) -> None:
        self.inputs = list(inputs)
        self.output = output
        output.producer = self

    @property
    def weight_bytes(self) -> int:
        """Bytes that `prepare` allocates and that stay for the life of the plan."""
        return 0

    def prepare(self) -> None:
        """Whatever is done once per plan, before the first run."""


class RowLocal(Node, ABC):
    """A node whose output rows each come from a window of rows of its inputs.

    The executor asks for each output row once and from the top down. It passes exactly the rows that `need` names.

    Attributes:
        border: rows of zeros that may be asked for above and below the inputs in ``bordered``: `need(0, ...)` may begin
            at -border and end at rows + border. Every other window lies inside the image.
        heights: how often a plan asks for so many rows at once; set when the plan is made, before `prepare`. Where it
            is empty, `prepare` must not hold much: the node is run once, on a small image.
        bordered: positions of these inputs; the first, unless a node says otherwise.
        whole_inputs: positions of inputs with a row axis that are read in another order than from the top down. They
            are materialised first, and passed whole.
        apart: maps in ``whole_inputs`` are made in a segment of their own each, where none needs the other; what one of
            them was made of is freed before the next is begun.
        reads_in_place: the result may be a view of an input (so the executor copies it before the input's memory is
            used again).
        writes_out: `compute` can write into memory that it is given.
    """

    heights: Mapping[int, int] = MappingProxyType({})
    border: int = 0
    bordered: frozenset[int] = frozenset([0])
    whole_inputs: frozenset[int] = frozenset()
    apart: bool = False
    reads_in_place: bool = False
    writes_out: bool = False

    @abstractmethod
    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        """Rows [a, b) of input ``i`` that output rows [r0, r1) come from; 0 <= r0 < r1 <= output.rows.

        Both ends never go down as r0 and r1 go up, and the first is the lowest row that any output row from r0 to r1
        needs. a == b says that none is needed. Not asked for small inputs and those in ``whole_inputs``.
        """

    @abstractmethod
    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        """Output rows [r0, r1).

        ``rows`` has the rows [a, b) of each input that `need` names (None where there are none), and small and whole
        inputs as they are. They are never written to. ``out`` is where the result shall be, a view of the band's
        shape with any strides, or None; only a node with ``writes_out`` is given one, and then returns it.
        """

    def round_up(self, row: int) -> int:
        """The end of a band that computes nothing twice, at ``row`` or a little below (a multiple of a stride)."""
        return row

    @property
    def work(self) -> int:
        """Products per output row; 0 where they do not count."""
        return 0

    def scratch(self, r0: int, r1: int) -> int:
        """Bytes that `compute` holds at once beside its inputs, its result and what the executor gives it."""
        return 0


class RowGlobal(ABC):
    """An operator that must see the whole image before it can give its first row, written so that it sees bands.

    `summarise` is called for the bands of the inputs from the top down, each row once, then `finish` once. Then, if
    the operator has rows as output, `apply` is called for the bands, again from the top down, each row once. A state
    is any object; what `begin` returns must be new for every run, and the same bands must give the same bits. A call
    that runs out of memory must leave the state as it was: it is made again with fewer rows.
    All inputs have the same number of rows, and the output as many as they.

    Attributes:
        apply_rows: `apply` is called for multiples of so many rows, but for the last.
        apply_work, summarise_work: products per row of each half; 0 where they do not count.
        at_once: what both halves give together, from the whole inputs' tensors in one call, where that is quicker.
        at_once_scratch: bytes that this holds beside inputs and result.
    """

    label: str = ""
    at_once: Callable[[list[torch.Tensor]], torch.Tensor] | None = None
    at_once_scratch: int = 0
    apply_rows: int = 1
    apply_work: int = 0
    summarise_work: int = 0

    @abstractmethod
    def begin(self) -> Any:
        """The state of no rows at all."""

    @abstractmethod
    def summarise(self, rows: list[torch.Tensor], r0: int, r1: int, state: Any) -> Any:
        """The state with rows [r0, r1) of every input added; ``state`` may be changed in place."""

    def finish(self, state: Any) -> Any:
        """What `apply` is given; for an operator whose result has no rows (a pooled vector), the result tensor."""
        return state

    def apply(self, rows: list[torch.Tensor], r0: int, r1: int, state: Any) -> torch.Tensor:
        """Output rows [r0, r1) from the same rows of the inputs. ``state`` may carry what a scan hands downwards."""
        raise NotImplementedError

    @property
    def state_bytes(self) -> int:
        """Bytes of the largest state."""
        return 0

    def summarise_scratch(self, rows: int) -> int:
        """Bytes that `summarise` holds beside inputs and state, for a band of so many rows."""
        return 0

    def apply_scratch(self, rows: int) -> int:
        """Bytes that `apply` holds beside inputs, state and result, for a band of so many rows."""
        return 0


class Summarise(Node):
    """The first half of a `RowGlobal` operator: rows in, a state out."""

    def __init__(self, operator: RowGlobal, inputs: Sequence[Value], output: Value | None = None) -> None:
        """``output``: the result where it is a tensor without rows; by default a state that only `Apply` can read."""
        self.operator = operator
        self.label = operator.label
        self._make(inputs, Value((), torch.float64) if output is None else output)


class Apply(RowLocal):
    """The second half of a `RowGlobal` operator: rows and the state in, rows out."""

    def __init__(self, summary: Summarise, output: Value) -> None:
        self.operator = summary.operator
        self.label = summary.label
        self._make([*summary.inputs, summary.output], output)

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        return r0, r1

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        return self.operator.apply(rows[:-1], r0, r1, rows[-1])

    def round_up(self, row: int) -> int:
        return -(-row // self.operator.apply_rows) * self.operator.apply_rows

    @property
    def work(self) -> int:
        return self.operator.apply_work

    def scratch(self, r0: int, r1: int) -> int:
        return self.operator.apply_scratch(r1 - r0)


class Plain(Node):
    """An operator run once on whole tensors; inputs with a row axis are materialised first.

    Attributes:
        work: products of all of it; 0 where they do not count.
        scratch: bytes that it holds beside inputs and output, where they count.
        by_rows: the output lies row after row, as `rows.layout` would have it; an operator as it is may do otherwise.
    """

    work: int = 0
    scratch: int = 0
    by_rows: bool = False

    def __init__(self, label: str, run: Callable[[list[Any]], Any], inputs: Sequence[Value], output: Value) -> None:
        """``run`` takes the inputs' tensors, in order."""
        self.label = label
        self.run = run
        self._make(inputs, output)


@dataclass
class Graph:
    """A captured network.

    Attributes:
        input: the image.
        nodes: every node after those that make its inputs.
        outputs: what the module returns, in the order of `structure`.
        structure: puts a list of tensors back into what the module returns.
        margins: (rows, columns) of the image that its slices count at most: of a larger image each leaves something,
            and leaves something out.
    """

    input: Value
    nodes: list[Node]
    outputs: list[Value]
    structure: Callable[[list[torch.Tensor]], Any]
    margins: tuple[int, int] = (0, 0)

    def consumers(self) -> dict[Value, list[Node]]:
        """The nodes that read each value, each as often as it reads it."""
        found: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in node.inputs:
                found.setdefault(value, []).append(node)
        return found

    def run_at_once(self) -> None:
        """Operators of two halves that have one call for whole maps run in it."""
        found: dict[Node, Plain] = {}
        for node in self.nodes:
            if isinstance(node, Apply) and node.operator.at_once is not None:
                operator = node.operator
                whole = Plain(operator.label, operator.at_once, node.inputs[:-1], node.output)
                whole.work, whole.scratch = operator.apply_work * node.output.rows, operator.at_once_scratch
                whole.by_rows = True
                found[node] = whole
        self.nodes = [found.get(node, node) for node in self.nodes]
        self.prune()

    def prune(self) -> None:
        """Drops what no output depends on."""
        wanted = set(self.outputs)
        kept = []
        for node in reversed(self.nodes):
            if node.output in wanted:
                kept.append(node)
                wanted.update(node.inputs)
        self.nodes = kept[::-1]
