"""Rows of a frame between the host and a GPU: of 16-bit frames only their counts cross the bus, both ways.

The counts go up from pinned memory and become the network's values there; its answer becomes counts there, and comes
back as these. Both conversions are csrc/cuda's, and give what the host's give.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

try:
    from xrk import _native
except ImportError:  # a checkout whose extension is not built still works, only slower
    _native = None

__all__ = ["Answer", "DeviceRows", "device_rows"]

KINDS = {torch.float32: "float32", torch.float16: "float16"}
AHEAD = 2  # groups of rows on their way up at a time


class Answer(NamedTuple):
    """Rows of a network's answer as they lie on the device."""

    values: torch.Tensor
    ready: Any  # an event behind what made them; None where the device is the host


def kernels_of(device: torch.device) -> Any:
    """The conversions compiled for this device, or None."""
    return _native.cuda if device.type == "cuda" and _native is not None and _native.HAVE_CUDA else None


def device_rows(
    device: torch.device, dtype: torch.dtype, counts: np.dtype, shift: float, unit: float
) -> "DeviceRows | None":
    """The way to this device and back, for values (count - shift) / unit of this dtype; None where there is none."""
    kernels = kernels_of(device)
    if kernels is None or dtype not in KINDS or counts.newbyteorder("=") != np.uint16:
        return None
    return DeviceRows(kernels, device, dtype, shift, unit)


class DeviceRows:
    """Counts up, counts down. `up` and `hand` belong to the network's thread, `down` may run in another one."""

    def __init__(self, kernels: Any, device: torch.device, dtype: torch.dtype, shift: float, unit: float) -> None:
        """`device_rows` is the way to make one."""
        self._kernels, self._device, self._dtype = kernels, device, dtype
        self._shift, self._unit = float(shift), float(unit)
        self._is_cuda = device.type == "cuda"
        self._up = [_Staging(self._is_cuda) for _ in range(AHEAD)]
        self._down = _Staging(self._is_cuda)
        self._beside = torch.cuda.Stream(device) if self._is_cuda else None

    def value(self, count: float) -> float:
        """What the network is given for this count."""
        return (count - self._shift) / self._unit

    def up(self, counts: np.ndarray) -> torch.Tensor:
        """Rows (rows, W) of uint16, C-contiguous, as the network's values on the device."""
        staging = self._up.pop(0)
        self._up.append(staging)
        return self._values(staging, counts)

    def hand(self, values: torch.Tensor) -> Answer:
        """Rows of the answer, for `down` or `to_host`."""
        values = values.to(self._dtype).contiguous()
        if not self._is_cuda:
            return Answer(values, None)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        values.record_stream(self._beside)
        return Answer(values, ready)

    def to_host(self, answer: Answer) -> np.ndarray:
        """The answer's values, float32."""
        if answer.ready is not None:
            answer.ready.synchronize()
        return answer.values.float().cpu().numpy()

    def down(self, counts: np.ndarray, answer: Answer) -> tuple[np.ndarray, int]:
        """counts + (answer - what the network was given for them) * unit as uint16, and how many were clipped."""
        if not self._is_cuda:
            return self._changed(counts, answer.values)
        with torch.cuda.device(self._device), torch.cuda.stream(self._beside):
            answer.ready.wait(self._beside)
            return self._changed(counts, answer.values)

    def _changed(self, counts: np.ndarray, after: torch.Tensor) -> tuple[np.ndarray, int]:
        x = self._sent(self._down, counts)
        before = self._normalised(x)
        clipped = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._kernels.apply_residual(
            x.data_ptr(), before.data_ptr(), after.data_ptr(), self._unit, x.data_ptr(), x.numel(),
            KINDS[self._dtype], clipped.data_ptr(), self._stream(),
        )  # fmt: skip
        return self._down.fetch(x), int(clipped)

    def _values(self, staging: "_Staging", counts: np.ndarray) -> torch.Tensor:
        if not self._is_cuda:
            return self._normalised(self._sent(staging, counts))
        with torch.cuda.device(self._device):
            return self._normalised(self._sent(staging, counts))

    def _sent(self, staging: "_Staging", counts: np.ndarray) -> torch.Tensor:
        return staging.send(counts, self._device)

    def _normalised(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape, dtype=self._dtype, device=self._device)
        self._kernels.normalise(
            x.data_ptr(), self._shift, 1.0 / self._unit, out.data_ptr(), x.numel(), KINDS[self._dtype], self._stream()
        )
        return out

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream if self._is_cuda else 0


class _Staging:
    """Memory of the host that rows pass through, pinned for a GPU; one copy at a time."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._memory: torch.Tensor | None = None
        self._sent: Any = None  # an event behind the last copy

    def _room(self, shape: tuple[int, ...]) -> torch.Tensor:
        size = int(np.prod(shape))
        if self._sent is not None:
            self._sent.synchronize()
            self._sent = None
        if self._memory is None or self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint16, pin_memory=self._pinned)
        return self._memory[:size].view(shape)

    def send(self, counts: np.ndarray, device: torch.device) -> torch.Tensor:
        """The counts on the device, in memory of their own, once its stream comes to them."""
        room = self._room(counts.shape)
        np.copyto(room.numpy(), counts)
        if not self._pinned:
            return room.clone()
        x = room.to(device, non_blocking=True)
        self._sent = torch.cuda.Event()
        self._sent.record(torch.cuda.current_stream(device))
        return x

    def fetch(self, x: torch.Tensor) -> np.ndarray:
        """The device's counts, in memory of their own."""
        room = self._room(tuple(x.shape))
        room.copy_(x)
        return room.numpy().copy()
