"""Operators that name the axes of a tensor anew: views, permutations, and what adds, drops or repeats axes.

A map, its pixels as tokens (B, H W, C), its windows as a batch, a pixel shuffle by hand: in each the image's
rows still lie one after the other along one axis, some entries to a row (`Value.span`).
"""

import math
from typing import Any

import torch

from xrk.runtime.capture import Call, register
from xrk.runtime.graph import Value
from xrk.runtime.nodes_shape import spread
from xrk.runtime.rows import Rowwise, Turned, is_map


@register("aten::view", "aten::reshape", "aten::_unsafe_view", "aten::flatten", "aten::unflatten")
def _view(call: Call) -> Any:
    v = call["self"]
    shape = _new_shape(call, v)
    if shape == v.shape:
        return v
    found = _rows_in(v, shape)
    if found is None:
        return None
    axis, rows = found
    v = call.regrouped(v, v.shape[v.row_axis] // rows)
    span = shape[axis] // rows

    def reshape(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(*shape[:axis], t.shape[v.row_axis] // v.span * span, *shape[axis + 1 :])

    output = Value(shape, v.dtype, axis, span=span)
    return call.add(Rowwise(call.name, lambda tensors: reshape(tensors[0]), [v], output, view=True))


def _rows_in(v: Value, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Where the rows of ``v`` lie in the same numbers read as ``shape``: the axis, and how many rows; None if nowhere.

    What lies before the row axis must lie before it again. Then an entry of the new axis is a part of a row (its rows
    stay), or several rows (as many are called one from then on).
    """
    before, row = math.prod(v.shape[: v.row_axis]), v.span * math.prod(v.shape[v.row_axis + 1 :])
    found = []
    for axis in range(len(shape)):
        entry = math.prod(shape[axis + 1 :])
        if math.prod(shape[:axis]) != before:
            continue
        if row % entry == 0:
            # Axes of size 1 leave a choice: the first axis is the batch, if there is a batch.
            found.append((v.rows, row == entry and (axis > 0 or v.rows > 1), axis))
        elif entry % row == 0 and (axis > 0 or shape[0] > 1):
            found.append((shape[axis], False, axis))
    if not found:
        return None
    rows, _, axis = max(found)
    return axis, rows


def _new_shape(call: Call, v: Value) -> tuple[int, ...]:
    count = len(v.shape)
    if call.name == "aten::flatten":
        first, last = call["start_dim"] % count, call["end_dim"] % count
        return (*v.shape[:first], math.prod(v.shape[first : last + 1]), *v.shape[last + 1 :])
    if call.name == "aten::unflatten":
        dim = call["dim"] % count
        sizes, whole = list(call["sizes"]), v.shape[dim]
    else:
        sizes, whole = list(call.get("size") or call.get("shape")), math.prod(v.shape)
    if -1 in sizes:
        sizes[sizes.index(-1)] = whole // -math.prod(sizes)
    if math.prod(sizes) != whole:
        raise ValueError(f"a tensor of shape {v.shape} is viewed as {sizes}")
    return (*v.shape[:dim], *sizes, *v.shape[dim + 1 :]) if call.name == "aten::unflatten" else tuple(sizes)


@register("aten::permute", "aten::transpose", "aten::swapaxes", "aten::movedim")
def _permute(call: Call) -> Any:
    v = call["self"]
    order = _order(call, len(v.shape))
    if order is None:
        return None
    if order != [0, 1, 3, 2] or not is_map(v):
        return call.rowwise(order.index(v.row_axis), view=True)
    # Columns become rows.
    output = Value(tuple(v.shape[i] for i in order), v.dtype, 2)
    return call.add(Turned(call.name, v, output, lambda x, r0, r1: x[:, :, :, r0:r1].permute(order)))


def _order(call: Call, count: int) -> list[int] | None:
    order = list(range(count))
    if call.name == "aten::permute":
        return [d % count for d in call["dims"]]
    if call.name == "aten::movedim":
        source, target = call.get("source"), call.get("destination")
        if not isinstance(source, int):
            return None
        moved = order.pop(source % count)
        order.insert(target % count, moved)
        return order
    first, second = (call.get(f"dim{i}", call.get(f"axis{i}")) for i in (0, 1))
    first, second = first % count, second % count
    order[first], order[second] = order[second], order[first]
    return order


@register("aten::unsqueeze")
def _unsqueeze(call: Call) -> Any:
    v = call["self"]
    dim = call["dim"] % (len(v.shape) + 1)
    return call.rowwise(v.row_axis + (dim <= v.row_axis), view=True)


@register("aten::squeeze")
def _squeeze(call: Call) -> Any:
    v = call["self"]
    given = call.get("dim")
    dims = range(len(v.shape)) if given is None else [given] if isinstance(given, int) else given
    gone = {d % len(v.shape) for d in dims if v.shape[d] == 1}
    if v.row_axis in gone:
        return None
    axis = v.row_axis - sum(d < v.row_axis for d in gone)
    return call.rowwise(axis, view=True, adapt=lambda t: t.squeeze(tuple(gone))) if gone else v


@register("aten::select", "aten::unbind")
def _select(call: Call) -> Any:
    v = call["self"]
    dim = call["dim"] % len(v.shape)
    if dim == v.row_axis:
        return None
    if call.name == "aten::select":
        return call.rowwise(v.row_axis - (dim < v.row_axis), view=True)
    return [call.then(torch.ops.aten.select.int, v, dim, i) for i in range(v.shape[dim])]


@register("aten::stack")
def _stack(call: Call) -> Any:
    dim = call["dim"] % (len(call.values[0].shape) + 1)
    parts = [call.then(torch.ops.aten.unsqueeze.default, t, dim) for t in call["tensors"]]
    return call.then(torch.ops.aten.cat.default, parts, dim)


@register("aten::expand")
def _expand(call: Call) -> Any:
    v = call["self"]
    if v.row_axis is None:
        return spread(call, tuple(call["size"][2:])) if len(call["size"]) == 4 else None
    size = list(call["size"])
    extra = len(size) - len(v.shape)
    axis = v.row_axis + extra
    shape = tuple(v.shape[i - extra] if s == -1 else s for i, s in enumerate(size))
    if shape[axis] != v.shape[v.row_axis]:
        return None
    if shape == v.shape:
        return v
    return call.rowwise(
        axis, view=True, adapt=lambda t: t.expand(*shape[:axis], t.shape[v.row_axis], *shape[axis + 1 :])
    )


@register("aten::repeat")
def _repeat(call: Call) -> Any:
    v = call["self"]
    extra = len(call["repeats"]) - len(v.shape)
    axis = v.row_axis + extra
    return call.rowwise(axis) if call["repeats"][axis] == 1 else None
