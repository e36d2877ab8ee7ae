"""Windows of two videos: which frames are in one, how long they are kept, and what makes a frame of them."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from xrk import loading
from xrk.errors import InputError
from xrk.runtime.device import module_on
from xrk.runtime.whole import pad_by_reflection, padded_size
from xrk.video_counts import Conversion
from xrk.video_network import WindowNetwork
from xrk.video_sources import Frames

__all__ = ["NETWORK_SCALE", "Bicubic", "Frame", "Linear", "Method", "Network", "Video"]

NETWORK_SCALE = 4
Shape = tuple[int, int]

# False makes every window's features anew: what the benchmark compares with.
SHARED = True


class Frame:
    """A frame as the network sees it, and what has been made of it."""

    def __init__(self, values: np.ndarray | Tensor | None) -> None:
        self.values = values
        self.features: Tensor | None = None


class Method:
    """What makes a frame of a window.

    Attributes:
        frames: LR frames of a window. reach: from the middle one to the furthest. sees: whose values it looks at.
        description: how it runs, in words.
        made: features made so far, of LR and of HR frames. used: how often windows used one.
    """

    frames, reach = 1, 0
    sees = ("lr", "hr")
    description = "without a network"

    def __init__(self) -> None:
        self.made = {"lr": 0, "hr": 0}
        self.used = 0

    def frame(self, values: np.ndarray, camera: str) -> Frame:
        """Takes a frame in."""
        return Frame(values)

    def __call__(self, i: int, lr: Callable[[int], Frame], keys: tuple[Frame, Frame]) -> np.ndarray:
        """Values (H, W) of frame ``i``; ``lr(j)``: LR frame j, or the nearest that there is."""
        raise NotImplementedError


class Bicubic(Method):
    """LR frame i enlarged by cubic convolution."""

    sees = ("lr",)

    def __init__(self, size: Shape, ratio: int) -> None:
        super().__init__()
        self.size = size

    def __call__(self, i: int, lr: Callable[[int], Frame], keys: tuple[Frame, Frame]) -> np.ndarray:
        values = torch.from_numpy(lr(i).values)[None, None]
        return F.interpolate(values, self.size, mode="bicubic", align_corners=False)[0, 0].numpy()


class Linear(Method):
    """Between the two key frames, in the place that frame i has in time."""

    sees = ("hr",)

    def __init__(self, size: Shape, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio

    def __call__(self, i: int, lr: Callable[[int], Frame], keys: tuple[Frame, Frame]) -> np.ndarray:
        before, after = (key.values for key in keys)
        t = before.dtype.type(i % self.ratio / self.ratio)
        return (1 - t) * before + t * after if keys[0] is not keys[1] else before


class Network(Method):
    """A network, each frame's features made once.

    Args:
        sources: of LR and HR frames. size: (H, W) of theirs as the network sees them.
        Others as for `xrk.fuse_video`.
    """

    def __init__(
        self,
        model: loading.Model,
        sources: tuple[Frames, Frames],
        size: tuple[Shape, Shape],
        separation: int,
        memory: int | None,
        device: torch.device,
        runtime: str,
    ) -> None:
        super().__init__()
        module = module_on(model.module, device)
        self.frames = module.lr_frames
        self.offsets = [separation * (k - module.centre) for k in range(self.frames)]
        self.reach = self.offsets[-1]
        self.padded, self.size = padded_size(size[0], module.size_multiple), size[1]
        count = sources[0].count
        kept = 2 * self.reach + 1 if count is None else min(2 * self.reach + 1, count)
        # Frames as they were read, as the network sees them, and a result on its way.
        raw = sources[0].dtype.itemsize
        item = next(module.parameters()).element_size()
        small = math.prod(self.padded)
        large = NETWORK_SCALE**2 * small
        read = max(math.prod(source.shape) for source in sources)
        beside = item * (small * (kept + 2) + 3 * large) + read * (raw + 8) + large * (raw + 8)
        self.network = WindowNetwork(
            module, self.padded, kept=kept + 2, memory=memory, beside=beside, whole=runtime == "whole"
        )
        self.description = self.network.description
        self.made = self.network.made

    def frame(self, values: np.ndarray, camera: str) -> Frame:
        network = self.network
        full = self.padded if camera == "lr" else tuple(NETWORK_SCALE * side for side in self.padded)
        x = torch.from_numpy(values).to(network.device, network.dtype)[None, None]
        return Frame(x if values.shape == full else pad_by_reflection(x, full))

    def _features(self, frame: Frame, camera: str) -> Tensor:
        if frame.features is None:
            frame.features = self.network.features(camera, frame.values)
            if camera == "hr" and SHARED:
                frame.values = None  # its features are all that windows need
        return frame.features

    def __call__(self, i: int, lr: Callable[[int], Frame], keys: tuple[Frame, Frame]) -> np.ndarray:
        window = [lr(i + offset) for offset in self.offsets]
        features = [self._features(frame, "lr") for frame in window] + [self._features(key, "hr") for key in keys]
        self.used += len(features)
        middle = window[len(window) // 2].values
        result = self.network.image(features, middle)[0, 0, : self.size[0], : self.size[1]]
        if not SHARED:
            for frame in (*window, *keys):
                frame.features = None
        if not torch.isfinite(result).all():
            bad = int((~torch.isfinite(result)).sum())
            raise InputError(
                f"The network's output is not finite at {bad} of {result.numel()} pixels of frame {i}; expected levels "
                "near the frames' values."
            )
        return result.cpu().numpy()


class Video:
    """Frames of both cameras as far as windows need them, and the results one after the other.

    Attributes:
        clipped: pixels of the results so far that left the range of the dtype.
        hand_back: makes of a result the kind of array that the HR frames are.
    """

    def __init__(
        self, lr: Frames, hr: Frames, conversion: Conversion, method: Method, ratio: int, start: int = 0
    ) -> None:
        self.lr_source, self.hr_source, self.conversion, self.method = lr, hr, conversion, method
        self.ratio, self.at, self.hand_back = ratio, start, hr.hand_back
        self.clipped = 0
        self._lr: dict[int, Frame] = {}
        self._hr: dict[int, Frame] = {}
        self._begun = False

    def next(self) -> np.ndarray | None:
        """The next frame; None after the last one."""
        i, reach = self.at, self.method.reach
        if not self._begun:
            self._begun = True
            self.lr_source.skip(max(i - reach, 0))
            self.hr_source.skip(i // self.ratio)
        while self.lr_source.given <= i + reach and self._read(self.lr_source, self._lr, "lr"):
            pass
        count = self.lr_source.given
        if count <= i:
            self._check_end(count)
            return None
        if count <= i + reach and count < self.method.frames:
            raise InputError(
                f"The low-resolution sequence ended after {count} frames; expected at least the {self.method.frames} "
                "of a window."
            )
        values = self.method(i, lambda j: self._lr[min(max(j, 0), count - 1)], self._keys(i))
        result, clipped = self.conversion.result(values)
        self.at, self.clipped = i + 1, self.clipped + clipped
        for frames, least in ((self._lr, self.at - reach), (self._hr, self.at // self.ratio)):
            for j in [j for j in frames if j < least]:
                del frames[j]
        return result

    def _keys(self, i: int) -> tuple[Frame, Frame]:
        k = i // self.ratio
        while self.hr_source.given <= k + 1 and self._read(self.hr_source, self._hr, "hr"):
            pass
        if k not in self._hr:
            raise InputError(
                f"The high-resolution sequence ended after {self.hr_source.given} key frames; at ratio={self.ratio} "
                f"low-resolution frame {i} needs key frame {k}."
            )
        return self._hr[k], self._hr.get(k + 1, self._hr[k])

    def _read(self, source: Frames, frames: dict[int, Frame], camera: str) -> bool:
        counts = source.next()
        if counts is None:
            return False
        seen = camera in self.method.sees
        number = source.given - 1
        values = getattr(self.conversion, camera)(counts, f"{source.name} frame {number}") if seen else None
        frames[number] = self.method.frame(values, camera) if seen else Frame(None)
        return True

    def _check_end(self, count: int) -> None:
        hr, most = self.hr_source, (count - 1) // self.ratio + 2
        # Of an iterator only one frame more tells.
        more = hr.given == most and hr.peek() is not None if hr.count is None else hr.count > most
        if more:
            raise InputError(
                f"The low-resolution sequence ended after {count} frames; at ratio={self.ratio} at most {most} "
                "high-resolution key frames go with them, and there are more."
            )
