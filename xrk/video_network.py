"""A network that fuses two cameras, in the steps that a video is made in: frames' features once, then window by window.

Every step is a network of its own with one map in and one map out, so that the runtime can plan it band by band:

    features    of one frame, LR or HR; nothing of the frames around it is in them
    alignment   of one frame's features to those of the window's middle frame
    image       of the aligned features of a window
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xrk.errors import InputError, MemoryBudgetError
from xrk.models.stf import Pyramid, TwoCameras
from xrk.models.stf_window import image_of
from xrk.runtime.budget import SMALLEST
from xrk.runtime.planner import Plan, make_plan
from xrk.runtime.whole import _exact

__all__ = ["WindowNetwork"]

MIB = 2.0**20


def _packed(levels: Pyramid) -> Tensor:
    """A pyramid as one map of the finest level's size: four pixels of a coarser level in one, and so on."""
    if len(levels) == 1:
        return levels[0]
    maps = [levels[0]]
    for level, step in zip(levels[1:], (2, 4), strict=True):
        missing = -level.shape[1] % step**2
        if missing:
            empty = level.new_zeros((level.shape[0], missing, *level.shape[2:]))
            level = torch.cat([level, empty], 1)
        maps.append(nn.functional.pixel_shuffle(level, step))
    return torch.cat(maps, 1)


def _unpacked(packed: Tensor, channels: int) -> Pyramid:
    """The way back; ``channels`` of every level."""
    levels, at = [packed[:, :channels]], channels
    for step in (2, 4):
        width = -(-channels // step**2)
        level = nn.functional.pixel_unshuffle(packed[:, at : at + width], step)
        levels.append(level[:, :channels])
        at += width
    return tuple(levels)


def _packed_channels(channels: int) -> int:
    return channels + -(-channels // 4) + -(-channels // 16)


class _Step(nn.Module):
    """A step of a network whose parameters it shares."""

    def __init__(self, of: TwoCameras) -> None:
        super().__init__()
        self.of = of
        self.channels = of.conv_first.out_channels

    def weights(self) -> int:
        """Bytes of those parameters that the step uses, at most."""
        return sum(p.numel() * p.element_size() for name, p in self.of.named_parameters() if self.uses(name))

    def uses(self, name: str) -> bool:
        raise NotImplementedError


_FRONT = ("conv_first", "conv1_hi", "conv2_hi", "conv_detail_hi", "feature_extraction", "conv_l2_", "conv_l3_")


class _LRFeatures(_Step):
    def forward(self, x: Tensor) -> Tensor:
        return _packed(self.of.lr_pyramid(x))

    def uses(self, name: str) -> bool:
        return name.startswith(_FRONT)


class _HRFeatures(_LRFeatures):
    def forward(self, x: Tensor) -> Tensor:
        return _packed(self.of.hr_pyramid(x))


class _Alignment(_Step):
    def forward(self, both: Tensor) -> Tensor:
        """``both``: a frame's features, and behind them those of the middle frame."""
        frame, middle = both.chunk(2, 1)
        return self.of.pcd_align(_unpacked(frame, self.channels), _unpacked(middle, self.channels))

    def uses(self, name: str) -> bool:
        return name.startswith("pcd_align")


class _Image(_Step):
    plain = False  # the network's own operators, not those that run in bands

    def forward(self, window: Tensor) -> Tensor:
        """``window``: the aligned features of all frames, and behind them the middle LR frame."""
        count = self.of.lr_frames + 2
        frames = [window[:, i * self.channels : (i + 1) * self.channels] for i in range(count)]
        image = self.of.image if self.plain else functools.partial(image_of, self.of)
        return image(frames, window[:, count * self.channels :])

    def uses(self, name: str) -> bool:
        return not name.startswith((*_FRONT, "pcd_align"))


class WindowNetwork:
    """Runs a network for windows of two videos step by step, on frames of one size.

    Args:
        module: in eval mode, on its device.
        shape: (h, w) of the LR frames, multiples of what the module asks for.
        kept: frames whose features the caller holds at once.
        memory: the most bytes to take, the caller's frames and kept features among them; None for what is free.
        beside: bytes of the caller's frames and results.
        whole: run the steps themselves instead of plans of them.

    Attributes:
        made: features made so far, of LR and of HR frames. windows: images made so far.
        held_bytes: kept features and a window's aligned ones.
        peak_bytes: the most bytes that a run takes with ``beside``; None where nothing is planned.
        description: how the steps run, in words.

    Raises:
        MemoryBudgetError: the budget is too small; the message names the smallest. InputError: a budget was given and
            the network has an operator that the runtime does not know.
    """

    def __init__(
        self,
        module: TwoCameras,
        shape: tuple[int, int],
        *,
        kept: int,
        memory: int | None = None,
        beside: int = 0,
        whole: bool = False,
    ) -> None:
        self.module, self.shape = module, shape
        own = next(module.parameters())
        self.device, self.dtype = own.device, own.dtype
        height, width = shape
        self.channels = module.conv_first.out_channels
        self.packed = _packed_channels(self.channels) if module.align else self.channels
        self.frames = module.lr_frames + 2
        self.made = {"lr": 0, "hr": 0}
        self.windows = 0
        self._steps: dict[str, tuple[_Step, tuple[int, int, int, int]]] = {
            "lr": (_LRFeatures(module).eval(), (1, module.in_channels, height, width)),
            "hr": (_HRFeatures(module).eval(), (1, module.in_channels, 4 * height, 4 * width)),
            "align": (_Alignment(module).eval(), (1, 2 * self.packed, height, width)),
            "image": (_Image(module).eval(), (1, self.frames * self.channels + module.in_channels, height, width)),
        }
        if not module.align:
            del self._steps["align"]
        pixel = self.dtype.itemsize * height * width
        # The features that are kept, a window's aligned ones, and two frames' put together for their alignment.
        self.held_bytes = pixel * (kept * self.packed + self._steps["image"][1][1])
        self.held_bytes += pixel * 2 * self.packed if module.align else 0
        self._window: Tensor | None = None
        self._plans: dict[str, Plan] = {}
        self.peak_bytes: int | None = None
        if whole:
            self._steps["image"][0].plain = True
            self.description = "whole frames"
            if memory is not None:
                raise MemoryBudgetError('runtime="whole" keeps to no budget; leave out memory=, or runtime=.')
            return
        try:
            self._plan(memory, beside + self.held_bytes)
        except InputError as error:
            if memory is not None:
                raise
            self._plans.clear()
            self._steps["image"][0].plain = True
            self.description = f"whole frames, for they cannot be planned: {error}"

    def _plan(self, memory: int | None, beside: int) -> None:
        # All plans hold their weights at the same time, laid out as each of them needs them: what that takes is known
        # once they are made.
        weights = {name: step.weights() for name, (step, _) in self._steps.items()}
        wanted, smallest = list(self._steps), set()
        while wanted:
            for name in wanted:
                self._plans.pop(name, None)
                others = beside + sum(size for other, size in weights.items() if other != name)
                left = None if memory is None else max(memory - others, SMALLEST)
                step, shape = self._steps[name]
                try:
                    self._plans[name] = make_plan(step, shape, left, unknown="whole")
                except MemoryBudgetError as error:
                    smallest.add(name)
                    self._plans[name] = make_plan(step, shape, error.smallest, unknown="whole")
            weights = {name: plan.parts.get("prepared weights", 0) for name, plan in self._plans.items()}
            above = {name: plan.peak_bytes - weights[name] for name, plan in self._plans.items()}
            fixed = beside + sum(weights.values())
            self.peak_bytes = fixed + max(above.values())
            wanted = [] if memory is None else [name for name in self._plans if fixed + above[name] > memory]
            if smallest.intersection(wanted):
                least = fixed + max(above[name] for name in smallest)
                raise MemoryBudgetError(
                    f"memory={memory} bytes are too few for low-resolution frames of {self.shape[0]} x "
                    f"{self.shape[1]}: expected at least memory={least} ({least / MIB:.1f} MiB), of which "
                    f"{beside / MIB:.1f} MiB are for frames and the features that windows share.",
                    least,
                )
        bands = ", ".join(f"{name} {plan.band}" for name, plan in self._plans.items())
        self.description = f"bands of rows ({bands}), at most {self.peak_bytes / MIB:.1f} MiB"

    def _run(self, name: str, x: Tensor) -> Tensor:
        plan = self._plans.get(name)
        if plan is not None:
            return plan.run(x)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False), _exact():
            return self._steps[name][0](x)

    def features(self, camera: str, frame: Tensor) -> Tensor:
        """All that windows need of a frame, (1, channels, h, w).

        camera: "lr" or "hr". frame: (1, in_channels, h, w) or, of the HR camera, (1, in_channels, 4 h, 4 w).
        """
        self.made[camera] += 1
        return self._run(camera, frame)

    def image(self, frames: Sequence[Tensor], middle: Tensor) -> Tensor:
        """The wanted frame, (1, in_channels, 4 h, 4 w).

        frames: what `features` gave for the window's frames, LR frames first. middle: the middle LR frame.
        """
        self.windows += 1
        channels, reference = self.channels, frames[self.module.centre]
        if self._window is None:
            shape = self._steps["image"][1]
            self._window = torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=torch.channels_last)
        window = self._window
        places: dict[int, int] = {}  # a frame that stands for another one as well is aligned once
        for i, frame in enumerate(frames):
            part = window[:, i * channels : (i + 1) * channels]
            if id(frame) in places:
                part.copy_(window[:, places[id(frame)] * channels :][:, :channels])
                continue
            places[id(frame)] = i
            part.copy_(self._run("align", torch.cat([frame, reference], 1)) if self.module.align else frame)
        window[:, self.frames * channels :] = middle
        return self._run("image", window)
