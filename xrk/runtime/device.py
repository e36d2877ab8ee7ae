"""Where a network runs: the CPU, or an NVIDIA GPU."""

import contextlib
import copy
import ctypes

import torch
from torch import nn

from xrk.errors import DeviceError, InputTypeError


def resolve_device(device: str | torch.device | None, default: torch.device | None = None) -> torch.device:
    """The device that ``device`` means: "cpu", "cuda", "cuda:1", a torch.device; None is ``default``, or else the CPU.

    Raises:
        DeviceError: an unknown device, or one that is not there; the message lists what is there.
        InputTypeError: neither a text nor a torch.device.
    """
    if device is None:
        return default or torch.device("cpu")
    if not isinstance(device, str | torch.device):
        given = f"device={device!r} is a {type(device).__name__}"
        raise InputTypeError(f'{given}; expected None, "cpu", "cuda" or "cuda:N".')
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if wanted is not None and wanted.type == "cuda" and wanted.index is None and len(here) > 1:
        wanted = torch.device("cuda", torch.cuda.current_device())
    if wanted is not None and wanted.type == "cpu":
        return torch.device("cpu")
    if str(wanted) not in here:
        why = "is not here" if wanted is not None and wanted.type == "cuda" else "is no device that xrk can use"
        raise DeviceError(f"device={str(device)!r} {why}; usable here: {', '.join(here)}.")
    return wanted


def describe_device(device: torch.device) -> str:
    """ "cpu", or "cuda:0 (NVIDIA H100)" with the GPU's name."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def module_on(module: nn.Module, device: torch.device) -> nn.Module:
    """The module itself where it lies on ``device`` already, else a copy there: a caller's module is never moved."""
    if all(tensor.device == device for tensor in (*module.parameters(), *module.buffers())):
        return module
    return copy.deepcopy(module).to(device)


def give_back() -> None:
    """What was freed goes back to the system; glibc keeps the holes between what is held."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
