"""Operators that give each pixel from the same pixel: activations, arithmetic with broadcasting, channel norms."""

from typing import Any

import torch

from xrk.runtime.capture import Call, register
from xrk.runtime.graph import Value
from xrk.runtime.rows import Rowwise, is_map, with_rows

_UNARY = [
    "relu",
    "relu6",
    "sigmoid",
    "silu",
    "gelu",
    "tanh",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "mish",
    "softplus",
    "softsign",
    "log_sigmoid",
    "hardshrink",
    "softshrink",
    "threshold",
    "abs",
    "neg",
    "negative",
    "exp",
    "exp2",
    "expm1",
    "log",
    "log2",
    "log10",
    "log1p",
    "sqrt",
    "rsqrt",
    "square",
    "reciprocal",
    "sin",
    "cos",
    "tan",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "erf",
    "erfc",
    "floor",
    "ceil",
    "round",
    "trunc",
    "frac",
    "sign",
    "sgn",
    "nan_to_num",
    "isnan",
    "isinf",
    "isfinite",
    "logical_not",
    "clamp",
    "clamp_min",
    "clamp_max",
    "clip",
]
_BROADCAST = [
    "add",
    "sub",
    "mul",
    "div",
    "multiply",
    "divide",
    "subtract",
    "true_divide",
    "rsub",
    "pow",
    "maximum",
    "minimum",
    "fmax",
    "fmin",
    "where",
    "lerp",
    "addcmul",
    "addcdiv",
    "fmod",
    "remainder",
    "floor_divide",
    "atan2",
    "hypot",
    "gt",
    "ge",
    "lt",
    "le",
    "eq",
    "ne",
    "logical_and",
    "logical_or",
    "logical_xor",
    "masked_fill",
    "copysign",
    "xlogy",
]
_SAME = ["contiguous", "clone", "detach", "alias", "lift_fresh", "positive"]

# What can write its result into memory that it is given, at no cost over making its own.
_INTO = {"add", "sub", "mul", "div", "relu", "sigmoid", "silu", "tanh", "leaky_relu"}


@register(*(f"aten::{name}" for name in (*_UNARY, *_BROADCAST)))
def _elementwise(call: Call) -> Any:
    rowed = [v for v in call.values if v.row_axis is not None]
    longest = max(rowed, key=lambda v: v.shape[v.row_axis])
    from_end, span, rows = len(longest.shape) - longest.row_axis, longest.span, longest.rows
    for v in rowed:
        if v.shape[v.row_axis] == 1:
            continue
        if len(v.shape) - v.row_axis != from_end or v.span != span:
            return None
        if v.rows != rows:
            raise ValueError(f"maps of {rows} and {v.rows} rows meet in {call.name}")
    for name, a in call.arguments.items():
        if isinstance(a, Value) and a.row_axis is None and _runs_along(a, from_end) > 1:
            # As long as the image: only what was expanded to be so, which broadcasting does as well.
            origin = a.producer.inputs[0] if a.producer is not None and a.producer.label == "aten::expand" else a
            if _runs_along(origin, from_end) > 1:
                return None
            call.arguments[name] = origin
        if isinstance(a, torch.Tensor) and _runs_along(a, from_end) > 1:
            if a.shape[a.ndim - from_end] % span:
                return None
            # A known map, such as a table of positions.
            call.arguments[name] = call.constant(a, a.ndim - from_end, span)
            rows = max(rows, _runs_along(a, from_end) // span)
    # Row counts other than one and the image's cannot be broadcast.
    inputs = call.values
    if any(v.row_axis is not None and v.shape[v.row_axis] not in (1, rows * span) for v in inputs):
        return None
    like = call.probe()
    output = with_rows(like, like.ndim - from_end, rows)
    short = call.name.split("::")[1]
    into = _into(call) if short in _INTO else None
    node = Rowwise(call.name, call.runner(), inputs, output, into=into)
    node.plain_sum = short == "add" and call.get("alpha", 1) == 1
    return call.add(node)


def _runs_along(t: Any, from_end: int) -> int:
    return t.shape[len(t.shape) - from_end] if len(t.shape) >= from_end else 1


def _into(call: Call) -> Any:
    packet = getattr(torch.ops.aten, call.name.split("::")[1])
    name = {"Tensor": "out", "default": "out"}.get(call.func._overloadname)
    overload = getattr(packet, name, None) if name else None
    if overload is None or any(isinstance(a, list) for a in call.arguments.values()):
        return None
    order = list(call.arguments.items())
    names = {a.name for a in overload._schema.arguments if not a.kwarg_only}

    def run(tensors: list[Any], out: torch.Tensor) -> None:
        given = iter(tensors)
        filled = {n: next(given) if isinstance(a, Value) else a for n, a in order}
        overload(*(a for n, a in filled.items() if n in names), out=out,
                 **{n: a for n, a in filled.items() if n not in names})  # fmt: skip

    return run


@register(*(f"aten::{name}" for name in _SAME))
def _same(call: Call) -> Any:
    return call.values[0]


@register("aten::to", "aten::_to_copy", "aten::type_as")
def _to(call: Call) -> Any:
    v = call.values[0]
    like = call.probe()
    if like.dtype == v.dtype:
        return v
    return call.add(
        Rowwise(call.name, lambda t, dtype=like.dtype: t[0].to(dtype), [v], with_rows(like, v.row_axis, v.rows))
    )


@register("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout", "aten::feature_alpha_dropout")
def _dropout(call: Call) -> Any:
    return None if call["train"] else call.values[0]


@register("aten::prelu")
def _prelu(call: Call) -> Any:
    v = call["self"]
    if isinstance(call["weight"], Value) or (v.row_axis == 1 and call["weight"].numel() > 1):
        return None
    return call.add(Rowwise(call.name, call.runner(), [v], v.alike()))


@register("aten::layer_norm", "aten::rms_norm")
def _layer_norm(call: Call) -> Any:
    v = call["input"]
    if len(call.values) > 1 or v.row_axis >= len(v.shape) - len(call["normalized_shape"]):
        return None  # a norm over rows: torch takes it apart
    return call.add(Rowwise(call.name, call.runner(), [v], v.alike()))


@register("aten::zeros_like", "aten::ones_like", "aten::full_like")
def _filled(call: Call) -> Any:
    return call.rowwise(call["self"].row_axis)


@register("aten::softmax", "aten::log_softmax", "aten::_softmax", "aten::_log_softmax", "aten::cumsum", "aten::glu")
def _along_another_axis(call: Call) -> Any:
    v = call["self"]
    if call["dim"] % len(v.shape) == v.row_axis:
        return None
    return call.add(Rowwise(call.name, call.runner(), [v], with_rows(call.probe(), v.row_axis, v.rows)))


@register("aten::batch_norm")
def _batch_norm(call: Call) -> Any:
    """In inference it is one product and one sum a pixel; `fusion` moves it into a convolution where it can."""
    v = call["input"]
    known = [call[n] for n in ("weight", "bias", "running_mean", "running_var")]
    if call["training"] or not is_map(v) or any(isinstance(t, Value) for t in known) or known[2] is None:
        return None
    return call.add(BatchNorm(v, known[2], known[3], known[0], known[1], call["eps"]))


class BatchNorm(Rowwise):
    """y = x * scale + shift for each channel, both from float64; see `xrk.kernels.fold_batch_norm`."""

    def __init__(
        self,
        x: Value,
        mean: torch.Tensor,
        var: torch.Tensor,
        gamma: torch.Tensor | None,
        beta: torch.Tensor | None,
        eps: float,
    ) -> None:
        self.statistics = (mean, var, gamma, beta, eps)
        super().__init__("aten::batch_norm", self._scale, [x], x.alike())

    def prepare(self) -> None:
        mean, var, gamma, beta, eps = self.statistics
        scale = torch.rsqrt(var.double() + eps)
        scale = scale if gamma is None else scale * gamma.double()
        shift = -mean.double() * scale
        shift = shift if beta is None else shift + beta.double()
        dtype = self.output.dtype
        self._factor, self._shift = (t.to(dtype).view(1, -1, 1, 1) for t in (scale, shift))

    def _scale(self, tensors: list[Any]) -> torch.Tensor:
        return torch.addcmul(self._shift, tensors[0], self._factor)

    @property
    def weight_bytes(self) -> int:
        return 2 * self.output.shape[1] * self.output.dtype.itemsize
