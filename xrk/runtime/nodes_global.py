"""Operators that look at the whole image: group and instance norms, reductions over rows."""

import math
from typing import Any

import torch

from xrk.kernels import group_norm_apply, group_norm_merge, group_norm_summarise
from xrk.runtime.capture import Call, register
from xrk.runtime.graph import Apply, RowGlobal, Summarise, Value
from xrk.runtime.nodes_elementwise import BatchNorm
from xrk.runtime.nodes_pooling import adaptive
from xrk.runtime.rows import Rowwise, channels_last, is_map, wide, wide_bytes, with_rows

__all__ = ["GroupNorm", "Reduction"]


class GroupNorm(RowGlobal):
    """`xrk.kernels.group_norm` in bands; the state is its (1, G, 3) summary in float64."""

    label = "aten::group_norm"

    def __init__(self, x: Value, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float):
        self.x, self.groups, self.eps = x, groups, eps
        self.weight, self.bias = weight, bias
        self.activation: str | None = None

    def begin(self) -> torch.Tensor | None:
        return None

    def summarise(self, rows: list[torch.Tensor], r0: int, r1: int, state: Any) -> torch.Tensor:
        band = group_norm_summarise(channels_last(rows[0]), self.groups)
        return band if state is None else group_norm_merge(state, band)

    def apply(self, rows: list[torch.Tensor], r0: int, r1: int, state: Any) -> torch.Tensor:
        return group_norm_apply(channels_last(rows[0]), state, self.weight, self.bias, self.eps, self.activation)

    @property
    def state_bytes(self) -> int:
        return self.groups * 24


class Reduction(RowGlobal):
    """A reduction over the rows and any other axes, joined band by band.

    Sums are joined in float64, variances by Chan's rule; maxima and minima are exact.
    """

    def __init__(self, label: str, x: Value, kind: str, dims: tuple[int, ...], keepdim: bool, like: torch.Tensor):
        """``kind``: "mean", "sum", "norm" (Euclidean), "amax", "amin", "var" or "std"; ``like``: shaped as it is."""
        self.label, self.kind, self.dims, self.keepdim = label, kind, dims, keepdim
        self.count = math.prod(x.shape[d] for d in dims)
        self.dtype = like.dtype

        self.x = x

    correction: float = 1.0

    def summarise_scratch(self, rows: int) -> int:
        return wide_bytes(self.x, rows) if self.kind in ("var", "std") else 0

    def begin(self) -> None:
        return None

    def summarise(self, rows: list[torch.Tensor], r0: int, r1: int, state: Any) -> Any:
        x = rows[0]
        if self.kind in ("amax", "amin"):
            band = getattr(x, self.kind)(self.dims, True)
            join = torch.maximum if self.kind == "amax" else torch.minimum
            return band if state is None else join(state, band)
        if self.kind in ("mean", "sum", "norm"):
            dtype = wide(x[:0]).dtype
            if self.kind == "norm":
                band = torch.linalg.vector_norm(x, 2, self.dims, True, dtype=dtype).double().square_()
            else:
                band = x.sum(self.dims, True, dtype=dtype).double()
            return band if state is None else state + band
        count = math.prod(x.shape[d] for d in self.dims)
        var, mean = torch.var_mean(wide(x), self.dims, correction=0, keepdim=True)
        band = (count, mean.double(), var.double() * count)
        if state is None:
            return band
        total = state[0] + count
        gap = band[1] - state[1]
        share = count / total
        return total, state[1] + gap * share, state[2] + band[2] + gap.square() * (state[0] * share)

    def finish(self, state: Any) -> torch.Tensor:
        if self.kind == "mean":
            state = state / self.count
        elif self.kind == "norm":
            state = state.sqrt()
        elif self.kind in ("var", "std"):
            state = state[2] / max(self.count - self.correction, 0.0)
            state = state.sqrt() if self.kind == "std" else state
        y = state.to(self.dtype)
        if self.keepdim:
            return y
        return y.reshape([size for d, size in enumerate(y.shape) if d not in self.dims])


@register("aten::group_norm")
def _group_norm(call: Call) -> Any:
    x = call["input"]
    if not is_map(x) or isinstance(call["weight"], Value) or isinstance(call["bias"], Value):
        return None
    return _norm(call, GroupNorm(x, call["num_groups"], call["weight"], call["bias"], call["eps"]))


def _norm(call: Call, operator: GroupNorm) -> Value:
    summary = Summarise(operator, [operator.x])
    call.add(summary)
    return call.add(Apply(summary, Value(operator.x.shape, operator.x.dtype, 2)))


@register("aten::instance_norm")
def _instance_norm(call: Call) -> Any:
    x = call["input"]
    if not is_map(x) or isinstance(call["weight"], Value) or isinstance(call["bias"], Value):
        return None
    if call["use_input_stats"]:
        return _norm(call, GroupNorm(x, x.shape[1], call["weight"], call["bias"], call["eps"]))
    known = call["running_mean"], call["running_var"], call["weight"], call["bias"], call["eps"]
    return call.add(BatchNorm(x, *known))


@register("xrk::group_norm_summarise")
def _xrk_summarise(call: Call) -> Any:
    x = call["x"]
    if not is_map(x):
        return None
    operator = GroupNorm(x, call["num_groups"], None, None, 1e-5)
    return call.add(Summarise(operator, [x], Value((1, call["num_groups"], 3), torch.float64)))


@register("xrk::group_norm_apply")
def _xrk_apply(call: Call) -> Any:
    x, state = call["x"], call["state"]
    if not is_map(x) or not isinstance(state, Value) or isinstance(call["weight"], Value):
        return None
    return call.add(Rowwise(call.name, call.runner(), [x, state], Value(x.shape, x.dtype, 2)))


@register("aten::mean", "aten::sum", "aten::amax", "aten::amin", "aten::var", "aten::std")
def _reduce(call: Call) -> Any:
    v = call["self"]
    kind = call.name.split("::")[1]
    given = call.get("dim")
    dims = [given] if isinstance(given, int) else list(given or range(len(v.shape)))
    dims = tuple(sorted(d % len(v.shape) for d in dims))
    keepdim = bool(call.get("keepdim", False))
    like = call.probe(rows=1)
    if v.row_axis not in dims:
        axis = v.row_axis if keepdim else v.row_axis - sum(d < v.row_axis for d in dims)
        return call.add(Rowwise(call.name, call.runner(), [v], with_rows(like, axis, v.rows)))
    operator = Reduction(call.name, v, kind, dims, keepdim, like)
    if kind in ("var", "std"):
        correction = call.get("correction")
        unbiased = call.get("unbiased")
        operator.correction = float(correction) if correction is not None else float(unbiased is not False)
    return call.add(Summarise(operator, [v], Value(tuple(like.shape), like.dtype)))


@register("aten::norm", "aten::linalg_vector_norm")
def _vector_norm(call: Call) -> Any:
    """The Euclidean norm; others where they leave the rows alone."""
    v = call["self"]
    order, given = call.get("p", call.get("ord")), call.get("dim")
    dims = [given] if isinstance(given, int) else list(given or range(len(v.shape)))
    dims = tuple(sorted(d % len(v.shape) for d in dims))
    keepdim, like = bool(call.get("keepdim", False)), call.probe()
    if v.row_axis not in dims:
        axis = v.row_axis if keepdim else v.row_axis - sum(d < v.row_axis for d in dims)
        return call.add(Rowwise(call.name, call.runner(), [v], with_rows(like, axis, v.rows)))
    if order not in (None, 2):
        return None
    operator = Reduction(call.name, v, "norm", dims, keepdim, like)
    return call.add(Summarise(operator, [v], Value(tuple(like.shape), like.dtype)))


@register("aten::max", "aten::min")
def _extreme(call: Call) -> Any:
    """Over everything; with a dim there would be indices too."""
    if "dim" in call.arguments or "other" in call.arguments:
        return None
    func = torch.ops.aten.amax.default if call.name == "aten::max" else torch.ops.aten.amin.default
    return call.then(func, call["self"])


@register("aten::adaptive_avg_pool2d", "aten::adaptive_max_pool2d")
def _adaptive_pool(call: Call) -> Any:
    v = call["self"]
    if not is_map(v):
        return None
    kind = "avg" if "avg" in call.name else "max"
    size = list(call["output_size"])
    size = size * 2 if len(size) == 1 else size
    if size == [1, 1]:
        func = torch.ops.aten.mean.dim if kind == "avg" else torch.ops.aten.amax.default
        y = call.then(func, v, [2, 3], True)
    else:
        y = adaptive(call, kind, v, size)
    # The maximum also gives indices, which nothing that runs in bands can use.
    return y if kind == "avg" else [y, None]
