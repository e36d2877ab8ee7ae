"""Tensors without data that stand for values while a network is captured, and who shares memory with whom.

A value never changes; a tensor that is written to in place gets another one. The tensors that share its memory would
have to get others too: they are not looked for, but refused where they are read, or returned, after the write.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xrk.errors import InputError
from xrk.runtime.graph import Value
from xrk.runtime.rows import is_map

__all__ = ["Group", "KnownMemory", "Symbol", "without_writing"]


class Group:
    """The tensors that share one memory, or may do so; `version` counts the writes to it."""

    version = 0


class Symbol(torch.Tensor):
    """A tensor of the caller's device with a shape and no data, standing for a `Value`."""

    value: Value
    group: Group
    version: int

    @staticmethod
    def __new__(cls, value: Value, device: torch.device, group: Group) -> "Symbol":
        symbol = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=_strides(value), dtype=value.dtype, device=device, requires_grad=False
        )
        symbol.value, symbol.group, symbol.version = value, group, group.version
        return symbol

    __torch_function__ = torch._C._disabled_torch_function_impl

    def see_current(self, what: str) -> None:
        """Refuses what was written to through a tensor that shares its memory: its value is that of before."""
        if self.version != self.group.version:
            raise InputError(
                f"The network {what} a tensor that was written to through another view of it; "
                "write the step without working in place."
            )

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        # Torch's own gives back this very tensor where its strides fit. The network's may have others, and be copied.
        return torch.ops.aten.contiguous.default(self, memory_format=memory_format)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise InputError(f"The network calls {func} outside its forward pass; it cannot be captured.")


def _strides(value: Value) -> tuple[int, ...]:
    """Channels-last for a map, and row-major for all else."""
    order = list(range(len(value.shape)))
    if is_map(value):
        order = [0, 2, 3, 1]
    strides, step = [0] * len(order), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(value.shape[axis], 1)
    return tuple(strides)


class KnownMemory:
    """The memory of known tensors that a graph reads, or the next call of the module."""

    def __init__(self) -> None:
        self._read: dict[int, Any] = {}

    def read(self, tensors: Iterable[torch.Tensor]) -> None:
        """The numbers of these must stay what they are."""
        for t in tensors:
            if not isinstance(t, Symbol):
                memory = t.untyped_storage()
                self._read[memory._cdata] = memory

    def see_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        """Refuses a call that writes there: the graph would see what is written later."""
        if not func._schema.is_mutable:
            return
        for i, a in enumerate(func._schema.arguments):
            if a.alias_info is None or not a.alias_info.is_write:
                continue
            for t in pytree.tree_leaves(args[i] if i < len(args) else kwargs.get(a.name)):
                if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata in self._read:
                    raise InputError(
                        f"The network writes in place ({func._schema.name}) to a parameter or buffer, or to a tensor "
                        "that it has computed with before; a plan needs a network that keeps no state: make a new "
                        "tensor of it."
                    )


def without_writing(func: Any) -> Any:
    """The operator itself; the plain form of one that works in place on its first argument; else None."""
    if not func._schema.is_mutable:
        return func
    name = func._schema.name.split("::")[1]
    first = func._schema.arguments[0]
    writes = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if not name.endswith("_") or name in ("copy_", "fill_", "zero_") or writes != [first]:
        return None
    packet = getattr(getattr(torch.ops, func.namespace), name[:-1], None)
    return getattr(packet, func._overloadname, None) if packet is not None else None
