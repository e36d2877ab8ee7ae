"""Which code an operator runs as, decided in one place, asked for by `xrk.info()` and never changed silently.

An operator says once, where it is defined, what is meant to run it on which kind of device::

    from xrk.kernels import dispatch

    dispatch.register(
        "layer_norm",
        cpu=dispatch.Native("layer_norm"),                                     # a function of xrk._native
        cuda=dispatch.Triton("xrk.kernels.normalization.triton_layer_norm"),  # a module, imported when first needed
    )
    dispatch.register("conv2d", cpu=dispatch.Torch("oneDNN's convolution"), cuda=None)  # None: no kernel yet

and takes it at each call, after its arguments have been checked::

    path, code = dispatch.take("layer_norm", x.device, x.dtype)
    if path == "native":      # code is the function of xrk._native
        ...
    elif path == "triton":    # code is the module, its launchers inside
        ...
    else:                     # "torch" or "reference": code is None
        ...

Where what was meant to run is not there (no extension, no Triton, no kernel for that device), the path is "reference"
and the first call of that operator on that kind of device warns, with the reason. So it is for float64 where Triton's
kernels are meant: they compute in float32, the reference exactly.
"""

import functools
import importlib
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch


class Path(NamedTuple):
    """What runs an operator: "native (avx2)", "triton", "torch" or "reference", and why."""

    path: str
    why: str


@dataclass(frozen=True)
class Native:
    """The C++ function of this name in `xrk._native`."""

    function: str


@dataclass(frozen=True)
class Triton:
    """The module (full name) that holds the Triton kernels and their launchers; imported when first needed."""

    module: str


@dataclass(frozen=True)
class Torch:
    """Torch's own operators, on purpose: nothing written here would be faster. `why` says what that is."""

    why: str


class FallbackWarning(UserWarning):
    """An operator runs as its slow reference, because what was meant to run it is not there."""


_OPS: dict[str, dict[str, Native | Triton | Torch | None]] = {}


def register(op: str, *, cpu: Native | Torch | None, cuda: Triton | Torch | None) -> None:
    """Says what is meant to run `op` on a CPU and on a CUDA device; None where only the reference is written.

    Raises ValueError for a name that is registered already with something else.
    """
    meant = {"cpu": cpu, "cuda": cuda}
    if _OPS.setdefault(op, meant) != meant:
        raise ValueError(f"op is {op!r}, which is registered already with other code")


def ops() -> list[str]:
    """The names of all registered operators, sorted."""
    return sorted(_OPS)


def path_of(op: str, device: str | torch.device | None = None) -> Path:
    """Which path `op` takes on `device` (by default a CUDA device where there is one, else the CPU), and why.

    Raises ValueError for an operator that is not registered.
    """
    if op not in _OPS:
        raise ValueError(f"op is {op!r}; expected one of {', '.join(ops())}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    path, _, why = _decide(op, torch.device(device).type)
    if path == "native":
        path = f"native ({native().simd()})"
    return Path(path, why)


def take(op: str, device: torch.device, dtype: torch.dtype | None = None) -> tuple[str, Any]:
    """The path of `op` for tensors of `dtype` on `device`, and its code: a function ("native"), a module or None."""
    return _take(op, device.type, dtype == torch.float64)


def native() -> ModuleType | None:
    """The compiled module `xrk._native`, or None where it cannot be imported."""
    return _import("xrk._native")[0]


def forget() -> None:
    """Decides and warns anew from here on: for tests that take something away."""
    _import.cache_clear()
    _take.cache_clear()


@functools.cache
def _take(op: str, device_type: str, exact: bool) -> tuple[str, Any]:
    path, code, why = _decide(op, device_type)
    if path == "triton" and exact:
        path, code, why = "reference", None, "Triton's kernels compute in float32; give float32 for speed"
    if path == "reference":
        message = f"xrk.kernels.{op} runs as its slow reference on {device_type}: {why}"
        warnings.warn(message, FallbackWarning, stacklevel=3)
    return path, code


def _decide(op: str, device_type: str) -> tuple[str, Any, str]:
    """(path, code, why)."""
    meant = _OPS[op].get(device_type)
    if meant is None:
        return "reference", None, f"no kernel is written for {device_type}"
    if isinstance(meant, Torch):
        return "torch", None, meant.why
    if isinstance(meant, Native):
        module, problem = _import("xrk._native")
        if module is None:
            return "reference", None, f"the compiled module xrk._native cannot be imported ({problem})"
        function = getattr(module, meant.function, None)
        if function is None:
            why = f"the compiled module {module.__file__} has no {meant.function}: it was built from older sources"
            return "reference", None, why
        return "native", function, "the compiled module xrk._native is there"
    triton, problem = _import("triton")
    if triton is None:
        return "reference", None, f"Triton cannot be imported ({problem}); pip install triton"
    return "triton", importlib.import_module(meant.module), f"Triton {triton.__version__} is there"


@functools.cache
def _import(name: str) -> tuple[ModuleType | None, str]:
    """A module and no problem, or None and what the problem is."""
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, str(error)
