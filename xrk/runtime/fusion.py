"""Operators joined where that saves a pass over memory: each rule keeps what the network computes.

* batch norm after a convolution that nothing else reads: into its weights;
* a sum with another map and an activation after such a convolution: into its last step;
* nearest up-sampling, padding or pixel shuffle before a concatenation: written where its result belongs.
"""

from xrk.runtime.graph import Graph, Node, Value
from xrk.runtime.nodes_convolution import Convolution
from xrk.runtime.nodes_elementwise import BatchNorm
from xrk.runtime.nodes_interpolation import NearestUpsampling
from xrk.runtime.nodes_shape import Concatenation, PixelShuffle
from xrk.runtime.rows import Rowwise

__all__ = ["fuse"]


def fuse(graph: Graph) -> None:
    """Joins what can be joined, in place."""
    _fold_norms(graph)
    _join_sums(graph)
    _join_activations(graph)
    _write_in_place(graph)
    graph.prune()


def _only_reader(graph: Graph, readers: dict[Value, list[Node]], value: Value) -> Node | None:
    found = readers.get(value, [])
    return found[0] if len(found) == 1 and value not in graph.outputs else None


def _replace(graph: Graph, node: Node, first: Node) -> None:
    """``first`` now makes what ``node`` made."""
    graph.nodes.remove(node)
    first.output = node.output
    first.output.producer = first


def _fold_norms(graph: Graph) -> None:
    readers = graph.consumers()
    for node in list(graph.nodes):
        after = _only_reader(graph, readers, node.output) if isinstance(node, Convolution) else None
        if isinstance(after, BatchNorm):
            node.norm = after.statistics
            _replace(graph, after, node)


def _join_sums(graph: Graph) -> None:
    """conv(x) + y, where y is there before: the convolution must come after what makes y."""
    readers = graph.consumers()
    for node in list(graph.nodes):
        after = _only_reader(graph, readers, node.output) if isinstance(node, Convolution) else None
        if after is None or not isinstance(after, Rowwise) or after.label != "aten::add" or len(after.inputs) != 2:
            continue
        if (
            after not in graph.nodes
            or len(node.inputs) > 1
            or not after.plain_sum
            or after.inputs[0] is after.inputs[1]
        ):
            continue
        other = after.inputs[1] if after.inputs[0] is node.output else after.inputs[0]
        if other.shape != node.output.shape or other.row_axis != 2 or other.dtype != node.output.dtype:
            continue
        at = graph.nodes.index(after)
        graph.nodes[at] = node
        graph.nodes.remove(node)
        node.inputs.append(other)
        node.output = after.output
        node.output.producer = node


def _join_activations(graph: Graph) -> None:
    readers = graph.consumers()
    for node in list(graph.nodes):
        after = _only_reader(graph, readers, node.output) if isinstance(node, Convolution) else None
        if after is not None and isinstance(after, Rowwise) and after.label == "aten::relu":
            node.activation = "relu"
            _replace(graph, after, node)


def _write_in_place(graph: Graph) -> None:
    readers = graph.consumers()
    for node in list(graph.nodes):
        if not isinstance(node, NearestUpsampling | PixelShuffle):
            continue
        after = _only_reader(graph, readers, node.output)
        if isinstance(after, Concatenation) and after.axis == 1:
            i = after.inputs.index(node.output)
            after.parts[i] = node
            after.inputs[i] = node.inputs[0]
            graph.nodes.remove(node)
