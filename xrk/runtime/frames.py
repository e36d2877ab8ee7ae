"""A network on frames of any size: pad to its size multiple, run the plan, resize, crop."""

import zlib
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import nn

from xrk.errors import InputError, MemoryBudgetError
from xrk.runtime.budget import SMALLEST
from xrk.runtime.planner import Plan, make_plan
from xrk.runtime.whole import check_output, pad_by_reflection, padded_size, resize_cubic, run_whole

__all__ = ["FrameRunner"]

# Rows that the caller works on at a time before and after the network.
ROWS = 256

# The last plan of a network: what a loop over frames of one size asks for again and again. The key says what the plan
# was made from, its weights' values among it, for the plan holds them in a layout of its own.
_plans: WeakKeyDictionary[nn.Module, tuple[tuple, Plan]] = WeakKeyDictionary()


class FrameRunner:
    """Runs one network on frames of one size.

    Args:
        module: takes (1, 1, H', W') and gives (1, 1, H' * output_scale, W' * output_scale), H' and W' multiples of
            ``size_multiple``.
        shape: (H, W) of the frames.
        memory: the most bytes that a run and what its caller holds take; None for what is free.
        beside: what the caller holds: the input and what becomes of the output.
        whole: run the module itself on whole frames.

    Raises:
        InputError: the network cannot take frames of this size; or a budget was given and it has an operator that
            the runtime does not know.
        MemoryBudgetError: the budget is too small; the message names the smallest.
    """

    def __init__(
        self,
        module: nn.Module,
        shape: tuple[int, int],
        *,
        size_multiple: int = 1,
        output_scale: float = 1.0,
        memory: int | None = None,
        beside: int = 0,
        whole: bool = False,
    ) -> None:
        self.module, self.shape = module, shape
        self.size_multiple, self.output_scale = size_multiple, output_scale
        self.padded = padded_size(shape, size_multiple)
        tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
        self.dtype = tensors[0].dtype if tensors else torch.float32
        self.plan: Plan | None = None
        if whole:
            self.description = "whole image"
            if memory is not None:
                raise MemoryBudgetError('runtime="whole" keeps to no budget; leave out memory=, or runtime=.')
            return
        try:
            self.plan = _plan(module, (1, 1, *self.padded), memory, beside)
        except InputError as error:
            if memory is not None:
                raise
            self.description = f"whole image, for it cannot be planned: {error}"
        else:
            self.description = f"bands of {self.plan.band} rows, at most {self.plan.peak_bytes / 2**20:.1f} MiB"
            self._planned = self.description

    def __call__(self, x: torch.Tensor) -> "Rows":
        """What the network gives for (H, W), of the module's dtype and on its device."""
        if self.plan is None:
            y = run_whole(self.module, x[None, None], self.size_multiple, self.output_scale)
            return Rows(y[0, 0], self.shape, self.shape)
        if self.shape != self.padded:
            x = pad_by_reflection(x, self.padded)
        y = self.plan.run(x[None, None])
        self.description = "; ".join([self._planned, *self.plan.shrunk])
        check_output(y, self.padded, self.output_scale)
        return Rows(y[0, 0], self.padded, self.shape)


class Rows:
    """An output that is resized to ``full`` and cropped to ``shape`` some rows at a time."""

    def __init__(self, output: torch.Tensor, full: tuple[int, int], shape: tuple[int, int]) -> None:
        self.output, self.full, self.shape = output, full, shape

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows from the top down, each with their place in the frame; (rows, W), on the output's device."""
        for start in range(0, self.shape[0], ROWS):
            rows = slice(start, min(start + ROWS, self.shape[0]))
            resized = self.output.shape != self.full
            part = resize_cubic(self.output, self.full, rows) if resized else self.output[rows]
            yield rows, part[:, : self.shape[1]]


def _plan(module: nn.Module, shape: tuple[int, int, int, int], memory: int | None, beside: int) -> Plan:
    left = None if memory is None else max(memory - beside, SMALLEST)
    key = (shape, left, torch.get_num_threads(), torch.get_default_dtype(), _fingerprint(module))
    last = _plans.get(module)
    if last is not None and last[0] == key:
        return last[1]
    _plans.pop(module, None)  # its prepared weights go before new ones are made
    try:
        plan = make_plan(module, shape, left)
    except MemoryBudgetError as error:
        least = error.smallest + beside
        raise MemoryBudgetError(
            f"memory={memory} bytes are too few for frames of {shape[2]} x {shape[3]}: the smallest plan takes "
            f"{error.smallest}, and {beside} are needed for the frame and the result; expected at least "
            f"memory={least} ({least / 2**20:.1f} MiB).",
            least,
        ) from None
    _plans[module] = (key, plan)
    return plan


def _fingerprint(module: nn.Module) -> int:
    """Of the values of all weights; a caller may change them between two frames."""
    total = 0
    for name, tensor in module.state_dict(keep_vars=True).items():
        values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        total = zlib.crc32(values, zlib.crc32(name.encode(), total))
    return total
