"""Runs a captured graph node by node, each in bands over whole values: the nodes without the executor.

Nodes get exactly the rows that they ask for, in memory of their own; what they then read beyond is not there.
"""

import torch
from torch import Tensor

from xrk.runtime.graph import Graph, Node, Plain, RowLocal, Summarise, Value
from xrk.runtime.rows import layout

CPU = torch.device("cpu")


def interpret(graph: Graph, x: Tensor, band: int, missing: str | None = None) -> object:
    """What the captured module returns for ``x``, every node run in bands of ``band`` of its own rows.

    The nodes are prepared, once, by the caller. With ``missing`` "top" or "bottom" the outermost row of the image that
    a band's window has there is zero: what a node sees that asks for a row too few.
    """
    known: dict[Value, object] = {graph.input: _held(graph.input, x)}
    for node in graph.nodes:
        known[node.output] = _run(node, [_known(v, known) for v in node.inputs], band, missing)
    return graph.structure([_known(v, known) for v in graph.outputs])


def _known(value: Value, known: dict[Value, object]) -> object:
    return value.constant if value.constant is not None and value not in known else known[value]


def _held(value: Value, tensor: Tensor) -> Tensor:
    return layout(value, value.rows, CPU).copy_(tensor)


def _run(node: Node, inputs: list[object], band: int, missing: str | None) -> object:
    if isinstance(node, Plain):
        return node.run(inputs)
    if isinstance(node, Summarise):
        state = node.operator.begin()
        for r0, r1 in _bands(node.inputs[0].rows, band):
            rows = [_band(v, t, r0, r1) for v, t in zip(node.inputs, inputs, strict=True)]
            state = node.operator.summarise(rows, r0, r1, state)
        return node.operator.finish(state)
    assert isinstance(node, RowLocal)
    return _run_in_bands(node, inputs, band, missing)


def _run_in_bands(node: RowLocal, inputs: list[object], band: int, missing: str | None) -> Tensor:
    y = layout(node.output, node.output.rows, CPU).fill_(float("nan") if node.output.dtype.is_floating_point else 0)
    before = [(-node.border, -node.border)] * len(inputs)
    for r0, r1 in _bands(node.output.rows, band):
        rows: list[object] = []
        for i, (value, tensor) in enumerate(zip(node.inputs, inputs, strict=True)):
            if value.row_axis is None or i in node.whole_inputs:
                rows.append(tensor)
                continue
            a, b = node.need(i, r0, r1)
            border = node.border if i in node.bordered else 0
            assert -border <= a <= b <= value.rows + border, f"{node.label}: rows [{a}, {b}) of {value.rows}"
            assert (a >= before[i][0] and b >= before[i][1]) or a == b, f"{node.label}: its needs go back up"
            before[i] = max((a, b), before[i])
            rows.append(_band(value, tensor, a, b) if a < b else None)
            if missing == "top" and 0 < a < b:
                rows[-1].narrow(value.row_axis, 0, 1).zero_()
            elif missing == "bottom" and a < b < value.rows:
                rows[-1].narrow(value.row_axis, b - a - 1, 1).zero_()
        kept = [t.clone() if isinstance(t, Tensor) else t for t in rows]
        out = layout(node.output, r1 - r0, CPU) if node.writes_out else None
        part = node.compute(r0, r1, rows, out)
        assert out is None or part is out, f"{node.label}: it was given memory and returned other"
        for mine, copy in zip(rows, kept, strict=True):
            assert not isinstance(mine, Tensor) or torch.equal(mine.nan_to_num(), copy.nan_to_num()), (
                f"{node.label}: it wrote to what it was given"
            )
        assert tuple(part.shape) == node.output.band_shape(r1 - r0), f"{node.label}: {tuple(part.shape)}"
        y.narrow(node.output.row_axis, r0, r1 - r0).copy_(part)
    return y


def _bands(rows: int, band: int) -> list[tuple[int, int]]:
    return [(r, min(r + band, rows)) for r in range(0, rows, band)]


def _band(value: Value, tensor: Tensor, a: int, b: int) -> Tensor:
    """Rows [a, b) in memory of their own; zeros beyond the image."""
    band = layout(value, b - a, CPU).fill_(0)
    low, high = max(a, 0), min(b, value.rows)
    if low < high:
        band.narrow(value.row_axis, low - a, high - low).copy_(tensor.narrow(value.row_axis, low, high - low))
    return band
