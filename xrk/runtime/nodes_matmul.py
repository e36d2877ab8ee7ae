"""Matrix products: linear layers, attention within a row's windows, attention between channels."""

from collections.abc import Callable
from typing import Any

import torch

from xrk.runtime.capture import Call, register
from xrk.runtime.graph import RowGlobal, Summarise, Value
from xrk.runtime.rows import Rowwise, wide, wide_bytes, with_rows

__all__ = ["Product"]


class Product(RowGlobal):
    """A product summed over the rows of the image, such as Q K^T over all pixels: bands are joined in float64."""

    def __init__(
        self, label: str, run: Callable[[list[Any]], torch.Tensor], inputs: list[Value], like: torch.Tensor
    ) -> None:
        self.label, self.run, self.dtype, self.values = label, run, like.dtype, like.numel()
        self.inputs = inputs

    def begin(self) -> None:
        return None

    def summarise(self, rows: list[torch.Tensor], r0: int, r1: int, state: Any) -> torch.Tensor:
        band = self.run([wide(t) for t in rows])
        return band.double() if state is None else state.add_(band)

    def finish(self, state: torch.Tensor) -> torch.Tensor:
        return state.to(self.dtype)

    @property
    def state_bytes(self) -> int:
        return 8 * self.values

    def summarise_scratch(self, rows: int) -> int:
        return 8 * self.values + sum(wide_bytes(v, rows) for v in self.inputs)


@register("aten::linear")
def _linear(call: Call) -> Any:
    v = call["input"]
    if call.values != [v] or v.row_axis == len(v.shape) - 1:
        return None
    like = call.probe()
    node = Rowwise(call.name, call.runner(), [v], with_rows(like, v.row_axis, v.rows), work=like.numel() * v.shape[-1])
    return call.add(node)


@register("aten::matmul", "aten::bmm")
def _matmul(call: Call) -> Any:
    pair = [call.get("self"), call.get("other", call.get("mat2"))]
    if min(len(t.shape) for t in pair) < 2:
        return None
    # Where the rows of each are, counted from the end: 1 columns, 2 lines, more: one of the batch's axes.
    places = [len(t.shape) - t.row_axis if isinstance(t, Value) and t.row_axis is not None else None for t in pair]
    if None not in places and not _same_rows(*pair):
        return None
    if places == [1, 2]:
        return _summed(call)
    at = max(place or 0 for place in places)
    alone = next((t for t, place in zip(pair, places, strict=True) if place is None), None)
    if places[0] == 1 or places[1] == 2 or {*places} - {at, None}:
        return None
    if at > 2 and alone is not None and len(alone.shape) >= at and alone.shape[-at] > 1:
        return None
    like, rows = call.probe(), next(v.rows for v in call.values if v.row_axis is not None)
    output = with_rows(like, like.ndim - at, rows)
    return call.add(Rowwise(call.name, call.runner(), call.values, output, work=like.numel() * pair[0].shape[-1]))


@register("aten::einsum")
def _einsum(call: Call) -> Any:
    terms, arrow, result = call["equation"].replace(" ", "").partition("->")
    pairs = list(zip(terms.split(","), call["tensors"], strict=True))
    rowed = [(term, t) for term, t in pairs if isinstance(t, Value) and t.row_axis is not None]
    if not arrow or "." in terms or not all(_same_rows(t, rowed[0][1]) for _, t in rowed):
        return None
    letter = rowed[0][0][rowed[0][1].row_axis]
    if terms.count(letter) != len(rowed) or any(term[t.row_axis] != letter for term, t in rowed):
        return None
    if letter not in result:
        return _summed(call)
    output = with_rows(call.probe(), result.index(letter), rowed[0][1].rows)
    return call.add(Rowwise(call.name, call.runner(), call.values, output))


def _summed(call: Call) -> Value:
    like = call.probe()
    operator = Product(call.name, call.runner(), call.values, like)
    return call.add(Summarise(operator, call.values, Value(tuple(like.shape), like.dtype)))


def _same_rows(a: Value, b: Value) -> bool:
    return (a.rows, a.span) == (b.rows, b.span)


@register("aten::scaled_dot_product_attention")
def _attention(call: Call) -> Any:
    """Where each query sees its own part of a row only; over the whole image torch takes it apart, to be refused."""
    three = [call["query"], call["key"], call["value"]]
    first = three[0]
    if not all(isinstance(t, Value) and t.row_axis == first.row_axis for t in three) or call["dropout_p"]:
        return None
    if first.row_axis >= len(first.shape) - 2 or not all(_same_rows(t, first) for t in three):
        return None
    mask = call["attn_mask"]
    if mask is not None and mask.ndim >= len(first.shape) - first.row_axis:
        return None
    return call.add(Rowwise(call.name, call.runner(), call.values, three[2].alike()))
