"""A plain ``nn.Module`` as a `Graph`, at one concrete image size.

The module is called once with a tensor that has a shape and no data, and every operator that it calls is taken down
at the highest level (`conv2d`, not what it is made of). Sizes are concrete, so whatever the module computes from
``x.shape`` is a plain number. Nothing but the shapes is computed, and no part of torch is imported that inference does
not need anyway: torch.export and the meta device would load the compiler, 150 MiB of the caller's budget.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from xrk.errors import InputError, InputTypeError
from xrk.runtime.graph import Graph, Node, Plain, Value
from xrk.runtime.rows import Regrouped, Rowwise, Turned, is_map, with_rows
from xrk.runtime.symbols import Group, KnownMemory, Symbol, without_writing

__all__ = ["Call", "capture", "register"]

Handler = Callable[["Call"], Any]
_handlers: dict[str, Handler] = {}
_obstacles: dict[str, str] = {}  # why an operator has no handler, where its name does not tell

# Operators that may hand back memory of their input without saying so in their schema.
_MAY_ALIAS = {
    "aten::reshape",
    "aten::contiguous",
    "aten::to",
    "aten::flatten",
    "aten::type_as",
    "aten::dropout",
    "aten::alpha_dropout",
    "aten::feature_dropout",
    "aten::feature_alpha_dropout",
    "aten::channel_shuffle",
    "aten::einsum",
    "aten::unsafe_chunk",
    "aten::unsafe_split",
    "aten::_unsafe_view",
}

# Operators that hand on the same value in memory of its own.
_COPIES = {"aten::clone", "aten::_to_copy"}

# Operators that take nothing of a tensor but its dtype: what they make is known when the network is captured.
_MAKING = {"aten::new_zeros", "aten::new_ones", "aten::new_full"}

# Operators that may make a map of a small vector; every other one on small values is run as it is.
_SPREADING = {
    "aten::expand",
    "aten::upsample_nearest2d",
    "aten::_upsample_nearest_exact2d",
    "aten::upsample_bilinear2d",
    "aten::upsample_bicubic2d",
}


def register(*names: str) -> Callable[[Handler], Handler]:
    """Says how an operator becomes nodes: ``@register("aten::relu")`` on a function of a `Call`.

    It returns the `Value` (or the list of them) that the operator gives, or None where it cannot: then the operator is
    taken apart if torch knows how, and is unknown if not. Works in place are taken down as the plain operator.
    """

    def keep(handler: Handler) -> Handler:
        for name in names:
            _handlers[name] = handler
        return handler

    return keep


def explain(name: str, obstacle: str) -> None:
    """Says in the refusal of an operator why it cannot run in bands."""
    _obstacles[name] = obstacle


class Call:
    """One call of an operator while a network is captured.

    ``call["name"]`` is an argument by its name in the operator's schema, defaults filled in: a `Value` where the
    tensor is computed from the image, a tensor where it is known (weights), or a plain object.

    Attributes:
        name: "aten::conv2d". func: the overload. arguments: name -> what was passed.
    """

    def __init__(self, tracer: "_Tracer", func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.name: str = func._schema.name
        self.func = func
        self.arguments: dict[str, Any] = {}
        self._tracer = tracer
        for i, a in enumerate(func._schema.arguments):
            if i < len(args) and not a.kwarg_only:
                self.arguments[a.name] = args[i]
            elif a.name in kwargs:
                self.arguments[a.name] = kwargs[a.name]
            elif a.has_default_value():
                self.arguments[a.name] = a.default_value
        self._keyword_only = {a.name for a in func._schema.arguments if a.kwarg_only}

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument that not every overload has."""
        return self.arguments.get(name, default)

    @property
    def values(self) -> list[Value]:
        """Its arguments that are computed from the image, in order, also from within lists."""
        return [a for a in pytree.tree_leaves(self.arguments) if isinstance(a, Value)]

    def runner(self) -> Callable[[list[Any]], Any]:
        """A function that runs the operator with the tensors it is given in the place of `values`."""
        leaves, spec = pytree.tree_flatten(self.arguments)
        slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Value)]
        # Maps need not lie in memory as they did for the tracer, and a view would insist on that.
        func = torch.ops.aten.reshape.default if self.func is torch.ops.aten.view.default else self.func
        keyword_only = self._keyword_only

        def run(tensors: list[Any]) -> Any:
            filled = list(leaves)
            for slot, tensor in zip(slots, tensors, strict=True):
                filled[slot] = tensor
            arguments = pytree.tree_unflatten(filled, spec)
            positional = [a for name, a in arguments.items() if name not in keyword_only]
            return func(*positional, **{n: a for n, a in arguments.items() if n in keyword_only})

        return run

    def probe(self, rows: int = 1) -> Any:
        """What the operator gives for zeros, a single row where there is a row axis."""
        device = self._tracer.device
        zeros = []
        for v in self.values:
            shape = v.shape if v.row_axis is None else v.band_shape(min(rows, v.rows))
            zeros.append(torch.zeros(shape, dtype=v.dtype, device=device))
        return self.runner()(zeros)

    def add(self, node: Node) -> Value:
        """Takes down a node; returns its output."""
        self._tracer.nodes.append(node)
        return node.output

    def then(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """What another operator gives, for a handler that takes one apart; ``func`` must be known."""
        result = self._tracer._handle(Call(self._tracer, func, args, kwargs))
        if result is None:
            raise InputError(self._tracer._unknown_message(func._schema.name))
        return result

    def constant(self, tensor: torch.Tensor, row_axis: int | None = None, span: int = 1) -> Value:
        """A known tensor as a value."""
        return Value(tuple(tensor.shape), tensor.dtype, row_axis, constant=tensor, span=span)

    def rowwise(self, axis: int, *, view: bool = False, adapt: Callable[[torch.Tensor], torch.Tensor] | None = None):
        """An operator that keeps the rows of its one value to themselves.

        Args:
            axis: the row axis of its output.
            view: the result may be a view of the input.
            adapt: what runs instead of the operator itself, where sizes are among its arguments.
        """
        (v,) = self.values
        run = self.runner() if adapt is None else lambda tensors: adapt(tensors[0])
        like = run([torch.zeros(v.band_shape(1), dtype=v.dtype, device=self._tracer.device)])
        return self.add(Rowwise(self.name, run, [v], with_rows(like, axis, v.rows), view=view))

    def crops(self, value: Value, dim: int, count: int) -> None:
        """Takes down how many entries a slice of a map counts, see `Graph.margins`."""
        if is_map(value) and dim >= 2 and value.shape[dim] > 1:
            image = self._tracer.image[dim]
            margins, of_image = self._tracer.margins, -(-count * image // value.shape[dim])
            margins[dim - 2] = max(margins[dim - 2], of_image)

    def regrouped(self, value: Value, span: int) -> Value:
        """The same tensor with ``span`` entries of the row axis to a row."""
        return self._tracer.other_form(value, span, value.row_axis)

    def plain(self, output: Any = None) -> Value | list[Value]:
        """The operator run once on whole tensors; ``output``: tensors of the right shapes, by default from a probe."""
        like = self.probe() if output is None else output
        if isinstance(like, torch.Tensor):
            return self.add(Plain(self.name, self.runner(), self.values, Value(tuple(like.shape), like.dtype)))
        if not isinstance(like, list | tuple) or not all(isinstance(t, torch.Tensor) for t in like):
            raise InputError(
                f"The network reads a number that it computes ({self.name}) and decides by it; a plan cannot."
            )
        whole = self.add(Plain(self.name, self.runner(), self.values, Value((), torch.float64)))
        picks = []
        for i, t in enumerate(like):
            output = Value(tuple(t.shape), t.dtype)
            picks.append(self.add(Plain(self.name, lambda given, i=i: given[0][i], [whole], output)))
        return picks


# Operators whose handlers bring known tensors to the dtype of the map themselves, from all their digits.
_TAKES_ANY_DTYPE = {
    "aten::conv2d",
    "aten::convolution",
    "aten::conv_transpose2d",
    "aten::batch_norm",
    "aten::group_norm",
    "aten::instance_norm",
    "xrk::conv2d",
    "xrk::group_norm_apply",
}


class _Tracer(TorchDispatchMode):
    def __init__(self, device: torch.device, unknown: str) -> None:
        super().__init__()
        self.device = device
        self.unknown = unknown
        self.nodes: list[Node] = []
        self._inside: list[str] = []  # what is being taken apart, the network's own call first
        self._forms: dict[tuple[Value, int, int], Value] = {}
        self.failure: Exception | None = None
        self.narrow: tuple[torch.dtype, torch.dtype] | None = None  # the module's own dtype, that of its maps
        self.known = KnownMemory()
        self.image: tuple[int, ...] = ()
        self.margins = [0, 0]  # of rows and columns of the image, see `Graph`

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Torch would load its compiler to keep it away from this mode.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].device if not isinstance(args[0], Symbol) else self.device
        symbols = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Symbol)]
        try:
            if not symbols:
                self.known.see_writes(func, args, kwargs)
                return func(*args, **kwargs)  # a constant of the network: known now
            return self._take_down(func, args, kwargs, symbols)
        except Exception as error:
            self.failure = error
            raise

    def _take_down(self, func: Any, args: Any, kwargs: Any, symbols: list[Symbol]) -> Any:
        name = func._schema.name
        if name in _MAKING:
            return func(torch.empty(0, dtype=symbols[0].dtype, device=self.device), *args[1:], **kwargs)
        if name in ("aten::to", "aten::type_as") and not isinstance(args[0], Symbol):
            return args[0].to(self.device, symbols[0].dtype)  # a known tensor made like one of the image's
        for s in symbols:
            s.see_current(f"calls {name} on")
        exact = name in _TAKES_ANY_DTYPE and any(s.value.row_axis is not None for s in symbols)
        values = pytree.tree_map(
            lambda a: a.value if isinstance(a, Symbol) else a if exact else self._known(a), (args, kwargs)
        )
        if name == "aten::as_strided":
            raise InputError("The network calls aten::as_strided, whose result depends on the layout of its input.")
        plain_func = without_writing(func)
        target = args[0] if args else None
        if plain_func is None or (plain_func is not func and not isinstance(target, Symbol)):
            what = "" if isinstance(target, Symbol) else " what it computes from the image into a tensor of its own"
            raise InputError(
                f"The network writes{what} in place ({name}), which xrk cannot follow; make a new tensor of it, "
                "such as by a + b for a += b, torch.where or torch.cat."
            )
        self.known.read(a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor))
        call = Call(self, plain_func, *values)
        result = self._handle(call)
        if result is None:
            if plain_func is func and func._can_decompose():
                self._inside.append(name)
                with self:
                    made = func.decompose(*args, **kwargs)
                self._inside.pop()
                return made
            if self.unknown != "whole":
                raise InputError(self._unknown_message(call.name, _obstacles.get(call.name, "")))
            result = _whole(call)
        if plain_func is not func:
            if result.dtype != target.dtype:
                result = call.then(torch.ops.aten.to.dtype, result, target.dtype)
            if result.shape != tuple(target.shape):
                raise InputError(
                    f"The network calls {name}, which makes {result.shape} of {tuple(target.shape)} in place; "
                    "make a new tensor of it."
                )
            target.value = result
            target.group.version += 1
            target.version = target.group.version
            return target
        views = any(r.alias_info is not None for r in func._schema.returns) or name in _MAY_ALIAS
        inputs = {s.value: s.group for s in symbols}

        def wrap(v: Any) -> Any:
            if not isinstance(v, Value):
                return v
            group = symbols[0].group if views else (name not in _COPIES and inputs.get(v)) or Group()
            return Symbol(v, self.device, group)

        return pytree.tree_map(wrap, result)

    def _known(self, a: Any) -> Any:
        """A known tensor in the dtype of the maps, where the network is captured in another than its own."""
        other = self.narrow is not None and isinstance(a, torch.Tensor) and a.dtype == self.narrow[0]
        return a.to(self.narrow[1]) if other else a

    def _handle(self, call: Call) -> Any:
        if all(v.row_axis is None for v in call.values):
            if any(_is_large(v) for v in call.values):
                return _whole(call)
            made = _handlers[call.name](call) if call.name in _SPREADING else None
            return call.plain() if made is None else made
        handler = _handlers.get(call.name)
        if handler is None:
            return None
        given, values = dict(call.arguments), [v for v in call.values if v.row_axis is not None]
        result = handler(call)
        for form in (self._shared_rows, self._single_rows, self._map_rows):
            if result is not None:
                break
            forms = {v: form(v, values) for v in values}
            if any(v is not other for v, other in forms.items()):
                call.arguments = pytree.tree_map(lambda a, f=forms: f.get(a, a) if isinstance(a, Value) else a, given)
                result = handler(call)
        return result

    # The same tensor with other rows, where an operator cannot use those that it has.

    def _shared_rows(self, v: Value, all_values: list[Value]) -> Value:
        """Rows that all values have: rows of windows and rows of tokens meet."""
        return self.other_form(v, math.gcd(*(u.span for u in all_values)), v.row_axis)

    def _single_rows(self, v: Value, all_values: list[Value]) -> Value:
        """An entry a row, such as behind a pixel shuffle written out by hand."""
        return self.other_form(v, 1, v.row_axis)

    def _map_rows(self, v: Value, all_values: list[Value]) -> Value:
        """The third axis of four, whatever it meant before: what an operator on maps takes."""
        v = self.other_form(v, 1, v.row_axis)
        return self.other_form(v, 1, 2) if len(v.shape) == 4 and v.shape[0] == 1 else v

    def other_form(self, value: Value, span: int, axis: int) -> Value:
        """``value`` with other rows; made once, however many ask for it."""
        if (span, axis) == (value.span, value.row_axis):
            return value
        made = self._forms.get((value, span, axis))
        if made is None:
            if axis == value.row_axis:
                node: Node = Regrouped(value, span)
            else:
                output = Value(value.shape, value.dtype, axis, span=span)
                node = Turned("rows", value, output, lambda x, r0, r1: x.narrow(axis, r0, r1 - r0))
            self.nodes.append(node)
            made = self._forms[value, span, axis] = node.output
        return made

    def _unknown_message(self, name: str, why: str = "") -> str:
        reason = f" ({why})" if why else ""
        if self._inside:
            name, reason = self._inside[0], f" (in it {name}{', which ' + why if why else ''})"
        return (
            f"The network calls {name}{reason}, which xrk cannot run in bands of rows; "
            'pass unknown="whole" to run such operators on whole maps (memory grows with the image), '
            "or write the step with known operators."
        )


_LARGE = 1 << 20


def _is_large(value: Value) -> bool:
    return value.bytes > _LARGE


def _whole(call: Call) -> Any:
    """An operator on whole tensors whose shapes are found without computing it: this loads torch's shape functions."""
    metas = [torch.empty(v.shape, dtype=v.dtype, device="meta") for v in call.values]
    like = pytree.tree_map(lambda t: t.to("meta") if isinstance(t, torch.Tensor) else t, call.arguments)
    shadow = Call(call._tracer, call.func, (), {})
    shadow.arguments = like
    result = shadow.runner()(metas)
    made = call.plain(result)
    for v in made if isinstance(made, list) else [made]:
        if len(v.shape) == 4 and v.shape[0] == 1:
            v.row_axis = 2
    return made


def capture(
    module: nn.Module, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, unknown: str
) -> Graph:
    """The graph of ``module`` for an input of ``shape`` (1, C, H, W).

    Args:
        module: in eval mode; it is called once, without data, and left as it is.
        dtype, device: of the input; tensors of the module in another dtype are converted, never in the module.
        unknown: "refuse" an operator that is not known, or run it "whole".

    Raises:
        InputError: an operator is unknown, the network decides by what it computes, refuses the shape, or works in
            place where another tensor shares the memory.
        InputTypeError: it returns something other than tensors.
    """
    from xrk.runtime import handlers  # noqa: F401  (they register themselves)

    x = Value(tuple(shape), dtype, row_axis=2)
    tracer = _Tracer(device, unknown)
    own = next((t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), dtype)
    if own != dtype:
        tracer.narrow = (own, dtype)
    tracer.image = x.shape
    tracer.known.read((*module.parameters(), *module.buffers()))
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        symbol = Symbol(x, device, Group())
        try:
            with tracer:
                result = module(symbol)
        except (InputError, InputTypeError):
            raise
        except Exception as error:
            if isinstance(tracer.failure, InputError | InputTypeError):
                raise tracer.failure from None
            raise InputError(
                f"The network {type(module).__name__} cannot take an input of shape {tuple(shape)}, or decides by "
                f"what it computes: {error} ({type(error).__name__})."
            ) from error
    leaves, spec = pytree.tree_flatten(result)
    outputs = []
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            raise InputTypeError(
                f"The network {type(module).__name__} returns a {type(leaf).__name__}; expected tensors only."
            )
        if isinstance(leaf, Symbol):
            leaf.see_current("returns")
            outputs.append(leaf.value)
        else:
            outputs.append(Value(tuple(leaf.shape), leaf.dtype, constant=leaf))
    graph = Graph(x, tracer.nodes, outputs, lambda tensors: pytree.tree_unflatten(tensors, spec), tuple(tracer.margins))
    graph.prune()
    return graph
