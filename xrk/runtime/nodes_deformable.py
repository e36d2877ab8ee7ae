"""Deformable convolutions: rows that the network itself computes where to take from.

Which rows of the map an output row looks at is only known when its offsets are, and nothing bounds them. So the map is
kept whole, as what is read out of order is, and a segment ends where it is made; offsets, masks and all that follows
run in bands. To keep the offsets instead, look for the largest and hold as many rows would take more: three values for
each tap and group against a group's channels (EDVR-STF: 216 channels of offsets and masks for a map of 128), and it
would end in the whole map all the same where a single offset is large.
"""

from typing import Any

import torch

from xrk.kernels.deformable.deform_conv2d import deform_rows
from xrk.runtime.capture import Call, register
from xrk.runtime.graph import RowLocal, Value
from xrk.runtime.rows import Rowwise, channels_last, is_map

__all__ = ["Deformed"]

_BLOCK = 1 << 18  # bytes that a thread works in, see csrc/cpu/deform_path.h


class Deformed(RowLocal):
    """`xrk.kernels.deform_conv2d` of a whole map at the rows whose offsets are there."""

    label = "xrk::deform_conv2d"
    whole_inputs = frozenset([0])
    apart = True  # a video's frames are aligned one by one

    def __init__(
        self,
        x: Value,
        offset: Value,
        mask: Value | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: int,
        padding: int,
        dilation: int,
    ) -> None:
        self.weight, self.bias = weight, bias
        self.stride, self.padding, self.dilation = stride, padding, dilation
        inputs = [x, offset] if mask is None else [x, offset, mask]
        self._make(inputs, Value((1, weight.shape[0], *offset.shape[2:]), x.dtype, 2))

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        return r0, r1

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        x, offset, *mask = rows
        numbers = (self.stride, self.padding, self.dilation)
        mask = mask[0] if mask else None
        return deform_rows(channels_last(x), offset, mask, self.weight, self.bias, *numbers, r0 * self.stride)

    @property
    def work(self) -> int:
        return self.weight.numel() * self.output.shape[3]

    def scratch(self, r0: int, r1: int) -> int:
        # Offsets and masks are copied where they are narrow, or their channels do not lie together; the weights always.
        copied = sum(v.bytes_of(r1 - r0) * 4 // min(4, v.dtype.itemsize) for v in self.inputs[1:])
        return copied + 2 * 4 * self.weight.numel() + _BLOCK * torch.get_num_threads()


@register("xrk::deform_conv2d")
def _deform_conv2d(call: Call) -> Any:
    x, weight, bias = call["x"], call["weight"], call["bias"]
    if not is_map(x) or isinstance(weight, Value) or isinstance(bias, Value):
        return None
    given = [call.constant(t, 2) if isinstance(t, torch.Tensor) else t for t in (call["offset"], call["mask"])]
    if not all(v is None or is_map(v) for v in given):
        return None
    if x.producer is None:  # the caller's tensor, whose channels come first
        x = call.add(Rowwise("aten::contiguous", lambda tensors: channels_last(tensors[0]), [x], x.alike()))
    return call.add(Deformed(x, *given, weight, bias, call["stride"], call["padding"], call["dilation"]))
