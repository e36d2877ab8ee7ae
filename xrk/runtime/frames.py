"""A network on frames of any size: pad to its size multiple, run the plan, resize, crop."""

import zlib
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from xrk.errors import InputError, MemoryBudgetError
from xrk.runtime.budget import SMALLEST
from xrk.runtime.planner import Plan, make_plan
from xrk.runtime.streaming import Stream
from xrk.runtime.whole import check_output, pad_by_reflection, padded_size, resize_cubic, run_whole

__all__ = ["FrameRunner", "group_rows"]

# Rows that the caller works on at a time before and after the network, and the fewer ones of wide frames.
ROWS, GROUP = 256, 1 << 20

# The last plan of a network: what a loop over frames of one size asks for again and again. The key says what the plan
# was made from, its weights' values among it, for the plan holds them in a layout of its own.
_plans: WeakKeyDictionary[nn.Module, tuple[tuple, Plan]] = WeakKeyDictionary()

Read = Callable[[int, int], torch.Tensor]
Write = Callable[[slice, torch.Tensor], None]


def group_rows(width: int) -> int:
    """Rows of a frame that are worked on at a time: a multiple of 16."""
    return min(ROWS, max(16, GROUP // width // 16 * 16))


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
        self.group = group_rows(shape[1])
        tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
        self.dtype = tensors[0].dtype if tensors else torch.float32
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.plan: Plan | None = None
        if whole:
            self.description = "whole image"
            if memory is not None:
                raise MemoryBudgetError('runtime="whole" keeps to no budget; leave out memory=, or runtime=.')
            return
        streamed = output_scale == 1.0
        try:
            self.plan = _plan(module, (1, 1, *self.padded), memory, beside, streamed, self._whole_bytes())
        except InputError as error:
            if memory is not None:
                raise
            self.description = f"whole image, for it cannot be planned: {error}"
        else:
            self.description = f"bands of {self.plan.band} rows, at most {self.plan.peak_bytes / 2**20:.1f} MiB"
            self._planned = self.description

    @property
    def lag(self) -> int:
        """The most rows that `run` reads ahead of those that it has yet to hand on."""
        return self.plan.lag if self.plan is not None and self.plan.streamed else self.shape[0]

    def _whole_bytes(self) -> int:
        """What is held beside a plan that is not streamed: the input, and another one where it is padded."""
        height, width = self.shape
        padded = self.padded[0] * self.padded[1] if self.padded != self.shape else 0
        return self.dtype.itemsize * (height * width + padded)

    def run(self, read: Read, write: Write) -> None:
        """Runs the network on one frame.

        read: (first, end) -> those rows of the frame as the network sees it, (end - first, W), of the module's dtype
            and on its device. All are asked for from the top down, once or, by networks that look at the whole image
            first, several times; a few of the last ones again at the end.
        write: takes rows of the result from the top down: their place in the frame, and (rows, W).
        """
        if self.plan is not None and self.plan.streamed:
            groups = _Groups(self.group, self.shape, write)
            self.plan.stream(Stream(self._padded(read), groups.take, self.device))
            self._describe()
            return
        x = read(0, self.shape[0])
        if self.plan is None:
            y = run_whole(self.module, x[None, None], self.size_multiple, self.output_scale)
            full = self.shape
        else:
            padded = x if self.padded == self.shape else pad_by_reflection(x, self.padded)
            y, full = self.plan.run(padded[None, None]), self.padded
            self._describe()
            check_output(y, self.padded, self.output_scale)
        for rows, part in _resized(y[0, 0], full, self.shape, self.group):
            write(rows, part)

    def _describe(self) -> None:
        """Where memory ran out in the last run, its description says so."""
        self.description = "; ".join([self._planned, *self.plan.shrunk])

    def _padded(self, read: Read) -> Read:
        """The same for the padded frame."""
        if self.padded == self.shape:
            return read
        (height, width), (padded_height, padded_width) = self.shape, self.padded
        rows, columns = (
            np.pad(np.arange(side), (0, padded - side), mode="reflect" if side > 1 else "edge")
            for side, padded in ((height, padded_height), (width, padded_width))
        )
        across = torch.from_numpy(columns)

        def padded(a: int, b: int) -> torch.Tensor:
            parts = [read(a, min(b, height))] if a < height else []
            if b > height:
                below = rows[max(a, height) : b]
                first = int(below.min())
                parts.append(read(first, int(below.max()) + 1)[torch.from_numpy(below - first)])
            part = torch.cat(parts) if len(parts) > 1 else parts[0]
            return part if padded_width == width else part[:, across.to(part.device)]

        return padded


class _Groups:
    """Rows of any number, cropped and handed on in groups of one size: what works on them should do so in one go."""

    def __init__(self, group: int, shape: tuple[int, int], write: Write) -> None:
        self.group, self.shape, self.write = group, shape, write
        self.held: torch.Tensor | None = None
        self.first = 0

    def take(self, row: int, rows: torch.Tensor) -> None:
        height, width = self.shape
        rows = rows[: max(height - row, 0), :width]
        while len(rows):
            size = min(self.group, height - self.first)
            if self.held is None:
                self.held = torch.empty((size, width), dtype=rows.dtype, device=rows.device)
            at = row - self.first
            count = min(size - at, len(rows))
            self.held[at : at + count].copy_(rows[:count])
            row, rows = row + count, rows[count:]
            if at + count == size:
                whole, self.held = self.held, None
                first, self.first = self.first, self.first + size
                self.write(slice(first, first + size), whole)


def _resized(
    output: torch.Tensor, full: tuple[int, int], shape: tuple[int, int], group: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of an output that is resized to ``full`` and cropped to ``shape`` some rows at a time."""
    for start in range(0, shape[0], group):
        rows = slice(start, min(start + group, shape[0]))
        part = resize_cubic(output, full, rows) if output.shape != full else output[rows]
        yield rows, part[:, : shape[1]]


def _plan(
    module: nn.Module, shape: tuple[int, int, int, int], memory: int | None, beside: int, streamed: bool, whole: int
) -> Plan:
    """``whole``: bytes beside a plan that turns out not to be streamed, besides ``beside``."""
    left = None if memory is None else max(memory - beside, SMALLEST)
    key = (shape, left, streamed, torch.get_num_threads(), torch.get_default_dtype(), _fingerprint(module))
    last = _plans.get(module)
    if last is not None and last[0] == key:
        return last[1]
    _plans.pop(module, None)  # its prepared weights go before new ones are made
    try:
        plan = make_plan(module, shape, left, streamed=streamed)
        if not plan.streamed and left is not None and plan.peak_bytes + whole > left:
            beside += whole
            plan = make_plan(module, shape, max(left - whole, SMALLEST))
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
