"""Operators joined where that saves a pass over memory: each rule keeps what the network computes.

* batch norm after a convolution that nothing else reads: into its weights;
* a sum with another map and an activation after such a convolution: into its last step;
* nearest up-sampling by two, perhaps beside a skip, before a 3x3 convolution: into that, which then has 4/9 of the
  products;
* nearest up-sampling or pixel shuffle before a concatenation: written where its result belongs.

And one map made twice where that saves memory: `make_twice`.
"""

import copy

import torch

from xrk.runtime.graph import Graph, Node, RowLocal, Value
from xrk.runtime.nodes_convolution import Convolution, UpsampledConvolution
from xrk.runtime.nodes_elementwise import BatchNorm
from xrk.runtime.nodes_interpolation import NearestUpsampling
from xrk.runtime.nodes_shape import Concatenation, PixelShuffle
from xrk.runtime.rows import Rowwise

__all__ = ["fuse", "make_twice"]

# Fewest channels, of the small map and of the result, for which four 2x2 convolutions are quicker than one 3x3.
DOUBLED_CHANNELS = 8
# A map is made twice if that is at most this part of all products.
TWICE = 50


def fuse(graph: Graph) -> None:
    """Joins what can be joined, in place."""
    _fold_norms(graph)
    _join_sums(graph)
    _join_activations(graph)
    _join_doublings(graph)
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


def _join_doublings(graph: Graph) -> None:
    for node in [n for n in graph.nodes if isinstance(n, NearestUpsampling) and n.factor == (2, 2)]:
        readers = graph.consumers()
        after, rest, first = _only_reader(graph, readers, node.output), [], 0
        joined = after if isinstance(after, Concatenation) and after.axis == 1 else None
        if joined is not None:
            at = joined.inputs.index(node.output)
            rest, first = [*joined.inputs[:at], *joined.inputs[at + 1 :]], sum(joined.sizes[:at])
            after = _only_reader(graph, readers, joined.output)
        if not isinstance(after, Convolution) or not _worth_doubling(after, node.inputs[0]):
            continue
        graph.nodes.remove(node)
        if len(rest) > 1:
            graph.nodes[graph.nodes.index(joined)] = others = Concatenation(rest, 1)
            rest = [others.output]
        elif joined is not None:
            graph.nodes.remove(joined)
        doubled = UpsampledConvolution(after, node.inputs[0], first, rest[0] if rest else None)
        graph.nodes[graph.nodes.index(after)] = doubled


def _worth_doubling(node: Convolution, x: Value) -> bool:
    """Whether the four small convolutions are possible, and were measured to be quicker."""
    plain = (node.stride, node.padding, node.dilation, node.groups) == ((1, 1), (1, 1), (1, 1), 1)
    here = node.weight.device.type == "cpu" and node.output.dtype in (torch.float32, torch.float64)
    return (
        plain
        and here
        and node.weight.shape[2:] == (3, 3)
        and len(node.inputs) == 1
        and min(x.shape[1], node.output.shape[1]) >= DOUBLED_CHANNELS
    )


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


def make_twice(graph: Graph) -> bool:
    """Gives late readers of a map that is quickly made from the image a copy of their own; whether there is such a map.

    A skip around all but the whole network is kept for as many rows as the network looks ahead: in a U-Net that is
    most of all that is kept. The image is there anyway.
    """
    found, half = False, len(graph.nodes) // 2
    most = sum(n.work * n.output.rows for n in graph.nodes if isinstance(n, RowLocal)) // TWICE
    for node in list(graph.nodes):
        readers = graph.consumers().get(node.output, [])
        at = [graph.nodes.index(reader) for reader in readers]
        late = [i for i in at if i > min(at) and i - min(at) >= half]
        made_by = _from_image(graph, node)
        if not late or sum(n.work * n.output.rows for n in made_by) > most or not made_by:
            continue
        copies: dict[Value, Value] = {}
        for n in made_by:
            again = copy.copy(n)
            again.inputs, again.output = [copies.get(v, v) for v in n.inputs], n.output.alike()
            again.output.producer = again
            copies[n.output] = again.output
            graph.nodes.insert(min(late), again)
            late = [i + 1 for i in late]
        for i in late:
            graph.nodes[i].inputs = [copies.get(v, v) if v is node.output else v for v in graph.nodes[i].inputs]
        found = True
    return found


def _from_image(graph: Graph, node: Node) -> list[RowLocal]:
    """The nodes that make a node's output from the image, in order; none if one of them is not row-local."""
    needed, made_by = {node.output}, []
    for n in reversed(graph.nodes[: graph.nodes.index(node) + 1]):
        if n.output in needed:
            if not isinstance(n, RowLocal) or n.whole_inputs:
                return []
            made_by.append(n)
            needed.update(n.inputs)
    return made_by[::-1]
