"""`xrk.plan`: any network on images of one size, band by band, within a memory budget."""

import operator
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from xrk import loading
from xrk.errors import InputError, InputTypeError
from xrk.models.stf import TwoCameras
from xrk.models.stf_window import OneImage
from xrk.runtime.planner import Plan, make_plan
from xrk.runtime.whole import padded_size

__all__ = ["Plan", "plan"]


def plan(
    model: str | os.PathLike[str] | loading.Model | nn.Module,
    shape: Sequence[int],
    memory: int | str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    unknown: str = "refuse",
) -> Plan:
    """Plans how a network runs on images of one size: nothing runs yet but a check on a small image.

    The result of a plan equals the module on the whole image but for the rounding of sums, whatever the budget.

    Args:
        model: a name that `xrk.list_models` knows, the path of a checkpoint, what `xrk.load` gave, or any
            ``nn.Module`` in eval mode that takes a (1, C, H, W) tensor. A module is never changed or moved. Of an
            EDVR-STF or a Swin-STF it is the window as one image that is planned, see `xrk.models.stf_window.pack`; H
            and W are those of the low-resolution frames then.
        shape: (H, W), the network's own channels are then assumed; or (C, H, W) or (1, C, H, W). Of a model that xrk
            loads, H and W are a frame's: the plan's own are rounded up to the model's size multiple, as `xrk.enhance`
            pads a frame, and stand in ``plan.shape``.
        memory: the most memory to take, bytes or a text such as "512MiB", counted from the call of `plan` on: prepared
            weights, line buffers, scratch, maps that are kept whole and the output, not the caller's input. The plan
            then depends on model, shape, dtype, device and versions only. None: the fastest plan that fits what is
            free.
        device: "cpu", "cuda", "cuda:1"; by default where the module lies.
        dtype: of the computation; by default the module's. With torch.float16 or torch.bfloat16 maps and products are
            in 16 bits and sums in 32, while the input, the outputs, the last convolution and what is added to its
            result stay in the module's dtype. That is not exact: on the tests' networks outputs differ from the float64
            module's by at most 0.3 % (float16) or 2 % (bfloat16) of the largest, 0.002 % where a network only adds a
            small residual to its input. float16 ends at 65504: a network with larger maps needs bfloat16.
        unknown: an operator that is not known is refused by its name ("refuse"), or run on whole maps ("whole").

    Returns:
        A `Plan`: ``plan.run(x)`` takes the (1, C, H, W) tensor and returns what the module returns,
        ``plan.peak_bytes`` is the most memory it will take, ``print(plan)`` shows what goes where.

    Raises:
        InputError: a shape that the network cannot take, a module in training mode, an unknown operator.
        MemoryBudgetError: no plan fits; the message names the smallest that does. InputTypeError: another kind of
        model. DeviceError: the device is not there. ModelNotFoundError, CheckpointError, CheckpointFileError: see
        `xrk.load`.
    """
    if isinstance(model, str | os.PathLike):
        model = loading.load(model)
    module, multiple = (model.module, model.card.size_multiple) if isinstance(model, loading.Model) else (model, 1)
    if not isinstance(module, nn.Module):
        raise InputTypeError(
            f"The model is a {type(module).__name__}; expected a name, a path, what xrk.load gave, or a torch module."
        )
    if isinstance(module, TwoCameras):
        module = OneImage(module)
    *channels, height, width = _full_shape(module, shape)
    return make_plan(module, (*channels, *padded_size((height, width), multiple)), memory, device, dtype, unknown)


def _full_shape(module: nn.Module, shape: Any) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape if not isinstance(size, bool))
        whole = not isinstance(shape, bytes) and len(sizes) == len(shape)
    except TypeError:
        sizes, whole = (), False
    if not whole or len(sizes) not in (2, 3, 4) or min(sizes) < 1:
        raise InputError(f"shape={shape!r}; expected (H, W), (C, H, W) or (1, C, H, W), whole numbers from 1 up.")
    if len(sizes) == 2:
        sizes = (loading.channels_in(module), *sizes)
    return sizes if len(sizes) == 4 else (1, *sizes)
