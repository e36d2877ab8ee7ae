"""Small networks and sequences for the tests of video, and what a result must be, written out window by window."""

import numpy as np
import torch
from torch import nn

from xrk.models import EDVRSTF, SwinSTF

SMALL_EDVR = {"width": 8, "deformable_groups": 2, "extraction_blocks": 1, "reconstruction_blocks": 1, "tail": 4}
SMALL_SWIN = {"width": 12, "window": (5, 4, 4), "heads": 3, "depths": (2, 1), "hidden": 16, "tail": 4}


def seeded(module_class=EDVRSTF, seed=0, **changes):
    """A network whose every tensor matters and whose answer stays near the range of the frames."""
    torch.manual_seed(seed)
    module = module_class(**(SMALL_EDVR if module_class is EDVRSTF else SMALL_SWIN) | changes)
    for name, part in module.named_modules():
        if name.endswith("conv_offset"):
            nn.init.normal_(part.weight, 0, 0.05)
            nn.init.normal_(part.bias, 0, 0.7)
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(part, 0, 0.5)
    with torch.no_grad():
        module.conv_last.weight *= 0.5
        module.conv_last.bias += 0.4 if module_class is SwinSTF else 0.0
    return module.eval().requires_grad_(False)


def sequences(count, keys, shape=(8, 12), dtype=np.uint16, seed=0):
    """LR frames (count, h, w) and key frames (keys, 4 h, 4 w): a disc that moves, and noise."""
    rng = np.random.default_rng(seed)

    def frames(number, height, width, step):
        rows, columns = np.mgrid[:height, :width] / height
        places = np.arange(number)[:, None, None] * step
        scene = 0.3 + 0.4 * (np.hypot(rows - 0.5, columns - 0.2 - places) < 0.25)
        values = np.clip(scene + 0.05 * rng.standard_normal((number, height, width)), 0, 1)
        return (
            values.astype(dtype) if np.dtype(dtype).kind == "f" else np.rint(values * np.iinfo(dtype).max).astype(dtype)
        )

    height, width = shape
    return frames(count, height, width, 0.02), frames(keys, 4 * height, 4 * width, 0.1)


def window_of(i, count, keys, ratio, separation, lr_frames=3):
    """The numbers of a window's LR frames, and of its key frames."""
    reach = lr_frames // 2
    lr = [min(max(i + separation * k, 0), count - 1) for k in range(-reach, reach + 1)]
    before = i // ratio
    return lr, [before, min(before + 1, keys - 1)]


def by_the_module(module, lr, hr, i, ratio, separation=1, levels=(0, 65535)):
    """Frame ``i`` in float64: the plain module on its window, frames padded at the bottom and at the right."""
    black, white = levels
    multiple = module.size_multiple
    height, width = lr.shape[1:]
    more = (-height % multiple, -width % multiple)

    def tensor(frames, scale):
        values = (frames.astype(np.float64) - black) / (white - black)
        padded = np.pad(values, ((0, 0), (0, scale * more[0]), (0, scale * more[1])), mode="reflect")
        return torch.from_numpy(padded.astype(np.float32))[None, :, None]

    of_lr, of_hr = window_of(i, len(lr), len(hr), ratio, separation, module.lr_frames)
    with torch.inference_mode():
        y = module(tensor(lr[of_lr], 1), tensor(hr[of_hr], 4))[0, 0, : 4 * height, : 4 * width]
    return y.numpy().astype(np.float64) * (white - black) + black
