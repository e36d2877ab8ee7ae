"""A network in a narrower dtype: its maps and products are, but not its ends.

A 16-bit frame has more significant bits than float16's 11. So the input and the outputs stay in the module's own dtype,
and with them what ends the network: the last convolution, and the sums, gates and shuffles behind it, among them the
residual that a restoration network adds to its input.
"""

import torch

from xrk.runtime.graph import Graph, Node, Plain, RowLocal, Value
from xrk.runtime.nodes_convolution import Convolution
from xrk.runtime.nodes_elementwise import BatchNorm
from xrk.runtime.nodes_shape import PixelShuffle
from xrk.runtime.rows import Rowwise

__all__ = ["widen_ends"]

_ELEMENTWISE = ("add", "sub", "rsub", "mul", "div", "neg", "clamp", "relu", "leaky_relu", "tanh", "sigmoid")


def widen_ends(graph: Graph, dtype: torch.dtype) -> None:
    """Makes ``dtype`` that of the input and the outputs of a graph, in place, before its nodes are joined."""
    narrow = graph.input
    graph.input = Value(narrow.shape, dtype, narrow.row_axis)
    _Ends(graph, narrow, dtype).widen()
    graph.nodes.insert(0, _cast(graph.input, narrow))
    graph.prune()


def _cast(x: Value, output: Value) -> Node:
    kind = Plain if x.row_axis is None else Rowwise
    return kind("aten::to", lambda tensors: tensors[0].to(output.dtype), [x], output)


class _Ends:
    def __init__(self, graph: Graph, narrow: Value, dtype: torch.dtype) -> None:
        self.graph, self.dtype, self.readers = graph, dtype, graph.consumers()
        self.wide: dict[Value, Value] = {narrow: graph.input}

    def widen(self) -> None:
        self.graph.outputs = [self._wide(v) if self._is_narrow(v) else v for v in self.graph.outputs]

    def _is_narrow(self, v: Value) -> bool:
        return v.dtype.is_floating_point and v.dtype.itemsize < self.dtype.itemsize and v.constant is None

    def _wide(self, v: Value) -> Value:
        """``v`` in the wider dtype: made so, where nothing else reads it, or converted."""
        if v in self.wide:
            return self.wide[v]
        node, read_once = v.producer, len(self.readers.get(v, [])) + self.graph.outputs.count(v) == 1
        if v.row_axis is None or not read_once or not _can_be_wide(node):
            return self._converted(v)
        # The last convolution is as far back as the end reaches.
        widen = self._converted if isinstance(node, Convolution) else self._wide
        rowed = [u.row_axis is not None and self._is_narrow(u) for u in node.inputs]
        node.inputs = [widen(u) if w else u for u, w in zip(node.inputs, rowed, strict=True)]
        v.dtype = self.dtype
        self.wide[v] = v
        return v

    def _converted(self, v: Value) -> Value:
        if v not in self.wide:
            cast = _cast(v, v.alike(self.dtype))
            self.graph.nodes.insert(self.graph.nodes.index(v.producer) + 1, cast)
            self.wide[v] = cast.output
        return self.wide[v]


def _can_be_wide(node: Node | None) -> bool:
    """Whether a node computes in whatever dtype its input has."""
    if isinstance(node, Rowwise):
        return node.label.removeprefix("aten::") in _ELEMENTWISE or isinstance(node, BatchNorm)
    return isinstance(node, RowLocal) and isinstance(node, Convolution | PixelShuffle)
