"""Operators of xrk as torch knows them: `torch.ops.xrk.*`, to be seen by torch.compile and torch.export as one step.

They are what `torch.library.custom_op` makes, but for one thing: the first call of such a one imports torch's compiler,
150 MiB and some seconds that a process without torch.compile has no use for.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Operator", "operator"]


def operator(
    name: str, schema: str | None = None, forward_only: bool = False
) -> Callable[[Callable[..., Any]], "Operator"]:
    """Defines ``name`` ("xrk::conv2d") as the decorated function, on every device.

    The function writes to none of its arguments and returns new tensors. ``schema``: as `torch.library.define` takes
    it, by default from the function's annotations. ``forward_only``: gradients raise RuntimeError; without it they must
    be registered.
    """
    return lambda function: Operator(name, function, schema, forward_only)


class Operator:
    """A defined operator."""

    def __init__(self, name: str, function: Callable[..., Any], schema: str | None, forward_only: bool) -> None:
        self.name = name
        if schema is None:
            schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))

        @functools.wraps(function)
        def run(*args: Any) -> Any:
            # Where the compiler is loaded, it shall not look into the operator.
            body = _uncompiled(function) if "torch._dynamo" in sys.modules else function
            # Autocast would take torch's products in it to 16 bits, against the dtypes of its arguments.
            lowered = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
            with contextlib.ExitStack() as stack:
                for kind in lowered:
                    stack.enter_context(torch.autocast(kind, enabled=False))
                return body(*args)

        torch.library.impl(name, "default", run)
        if forward_only:
            torch.library.register_autograd(name, functools.partial(_refuse, name))

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A decorator: from inputs of the right shapes to outputs of the right shapes, without data."""
        return torch.library.register_fake(self.name, function)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """As `torch.library.register_autograd`."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)


@functools.cache
def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)


def _refuse(name: str, _ctx: Any, *_grads: Any) -> None:
    raise RuntimeError(f"{name.replace('::', '.kernels.')} has no gradient; call it under torch.no_grad()")
