"""How the shipped ``stf`` was made: an EDVR-STF of few channels, on simulated processes.

    python -m xrk.training.stf --run runs/stf --steps 2310 --cooldown 300

Every window is another process of `xrk.processes` behind two other cameras of `xrk.cameras`, made as it is needed (some
tens of milliseconds); seeds below 1_000_000 are kept for evaluation. The loss is the mean over windows of log(mean
squared error + a floor), in units of the open beam, as for the single-image networks (`xrk.training.denoise`), and so
are the learning rate and what a run's folder holds: ``checkpoint.pt``, from which a killed run goes on, and ``log.csv``
(step, seconds, loss, PSNR on the validation windows, relative learning rate).

The network does not begin from nothing: it starts as the middle LR frame, enlarged, plus what the mean of the two key
frames has beyond their own low resolution, where that low resolution is what the LR frame shows. What is learnt is
where, and from where, to take that detail.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from xrk.cameras import Cameras
from xrk.models import EDVRSTF
from xrk.models.stf import DeformableConv, PCDAlignment, ResidualBlock
from xrk.processes import random_process
from xrk.training.optimizer import Muon
from xrk.training.training_run import TrainingRun, learning_rate

ARCHITECTURE = "edvr-stf"
CONFIG: dict[str, Any] = {
    "width": 24,
    "deformable_groups": 3,
    "extraction_blocks": 1,
    "reconstruction_blocks": 3,
    "tail": 12,
    "detail": True,
}
# Stored in float32: the details' filters sum to zero, which rounding would spoil.
EXACT = ("conv_first.weight", "conv_detail_hi.weight", "conv_last.weight", "conv_last.bias")
DESCRIPTION = (
    "Compact EDVR-STF for two cameras in time, four times as sharp and up to some tens of times as slow: melt pools,"
    " keyhole pores, spatter, sprays and cracks, at 100 to 40000 quanta per low-resolution pixel. It differs from the"
    " published network in its size and in a convolution that carries the key frames' detail past the poolings."
)
LIMITS = (
    "For video of two cameras: three low-resolution frames and the two high-resolution ones around them, four times as"
    " large, make one frame. Both must be aligned to about half a high-resolution pixel and have the same counts for"
    " the same signal; the open beam must fill a tenth to all of the range between the levels. Trained on simulated"
    " radiographs only, and shortly. What moved further between two key frames than about its own size is no sharper"
    " than the low-resolution frames show; faint detail that appears and goes between two key frames can be missing,"
    " and what stood in a key frame can linger as a faint shadow. Research use; not a medical device."
)
FIRST_SEED = 1_000_000
VALIDATION = (4, 8, 128)  # batches, windows in each, side in HR pixels
SCALE = 4
# Of the channels, the first ones hold what an HR frame has beyond its low resolution, one for each of its pixels in a
# LR pixel, and the next one the low resolution itself. Leaky ReLUs would damp what is negative: hence a shift.
_DETAIL, _SHIFT = SCALE * SCALE, 0.2
# A key frame's detail is trusted by sigmoid(_TRUST - _DOUBT |difference of low resolutions|) at first.
_TRUST, _DOUBT = 4.0, 300.0
_NOISE = 0.06
# Of a LR pixel and its neighbours in each of its HR pixels, linear between their middles: (4, 3).
_PLACES = (np.arange(SCALE) + 0.5) / SCALE - 0.5
_SHARES = np.stack([np.maximum(1 - np.abs(_PLACES - step), 0) for step in (-1, 0, 1)], 1)


@torch.no_grad()
def initialise(network: EDVRSTF) -> None:
    """Random weights, but for a path on which the network starts as described above."""
    width = network.conv_first.out_channels
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=0.1)
            nn.init.zeros_(module.bias)
    network.conv_first.weight[: _DETAIL + 1] = 0
    network.conv_first.weight[_DETAIL, 0, 1, 1] = 1
    network.conv2_hi.weight[: _DETAIL + 1] = 0
    detail, mean = _detail_filters()
    network.conv_detail_hi.weight[:_DETAIL] = detail[:, None]
    network.conv_detail_hi.weight[_DETAIL] = mean
    for block in (*network.feature_extraction, *network.reconstruction):
        block.conv2.weight *= 0
    align = network.pcd_align
    for pack in (*align.dcn_pack.values(), align.cas_dcnpack):
        nn.init.zeros_(pack.conv_offset.weight)
        nn.init.kaiming_normal_(pack.weight, a=0.1)
        _begin_as(pack.weight, 2 * torch.eye(width))  # the mask's sigmoid begins at a half
    align.cas_dcnpack.bias[:_DETAIL] = _SHIFT
    _begin_as(align.feat_conv["l1"].weight, torch.eye(width, 2 * width))
    _doubt_what_moved(align)
    fusion = network.fusion
    for conv in (fusion.temporal_attn1, fusion.spatial_attn5, fusion.spatial_attn_add2):
        conv.weight *= 0
    # A frame's weight begins at a half too. LR frame and key frames are held against each other, in both directions.
    low, keys = network.centre * width + _DETAIL, [(network.lr_frames + k) * width for k in (0, 1)]
    mix = fusion.feat_fusion.weight[:, :, 0, 0]
    mix[: _DETAIL + 5] = 0
    for k in range(_DETAIL):
        mix[k, [key + k for key in keys]] = 1
    mix[_DETAIL, low] = 2
    for i, key in enumerate(keys):
        for j, sign in enumerate((2, -2)):
            mix[_DETAIL + 1 + 2 * i + j, [low, key + _DETAIL]] = torch.tensor([sign, -sign], dtype=mix.dtype)
    _keep_small_differences(network.reconstruction[0])
    # Channel 4p + q is row p, column q of a LR pixel: first to which quarter of it, then where in the quarter.
    first, second = network.upconv1.weight, network.upconv2.weight
    first[: 4 * 4], second[:4] = 0, 0
    for p in range(SCALE):
        for q in range(SCALE):
            row = first[4 * (p % 2 * 2 + q % 2) + p // 2 * 2 + q // 2]
            row[SCALE * p + q, 1, 1] = 1
            for i in range(4):  # the differences, enlarged; half of each key frame's
                row[_DETAIL + 1 + i] = torch.from_numpy(np.outer(_SHARES[p], _SHARES[q])) * (-1) ** (i + 1) * 0.5 / 1.1
    for k in range(4):
        second[k, k, 1, 1] = 1
    network.conv_hr.weight[0] = 0
    network.conv_hr.weight[0, 0, 1, 1] = 1
    network.conv_last.weight *= 0
    network.conv_last.weight[0, 0, 1, 1] = 1
    network.conv_last.bias -= _SHIFT


@torch.no_grad()
def _doubt_what_moved(align: PCDAlignment) -> None:
    """Closes the detail's masks where a frame's low resolution differs from the reference's."""
    pack, width = align.dcn_pack["l1"], align.cas_dcnpack.bias.numel()
    seen = align.offset_conv1["l1"].weight
    seen[:2] = 0
    for row, sign in enumerate((1, -1)):  # both signs of the difference, over 3 x 3 LR pixels: noise averages out
        seen[row, _DETAIL] = sign / 9
        seen[row, width + _DETAIL] = -sign / 9
    for name in ("offset_conv2", "offset_conv3"):
        weight = getattr(align, name)["l1"].weight
        weight[:2] = 0
        weight[[0, 1], [0, 1], 1, 1] = 1
    groups = _DETAIL * pack.groups // width
    masks = slice(18 * pack.groups, 18 * pack.groups + 9 * groups)
    pack.conv_offset.weight[masks, :2] = -_DOUBT / 9
    pack.conv_offset.bias[masks] = _TRUST
    pack.weight[:_DETAIL, :_DETAIL] *= 0.5 / torch.sigmoid(torch.tensor(_TRUST))


@torch.no_grad()
def _keep_small_differences(block: ResidualBlock) -> None:
    """Leaves a difference of low resolutions as it is where it is small: noise, mostly; from twice that on it is none.

    Of |x| that is |x| - 2 relu(|x| - n) + relu(|x| - 2n). Leaky ReLUs left x in two channels, x and -x.
    """
    seen, given = block.conv1, block.conv2
    for i in range(4):  # LR above and below the one key frame, above and below the other
        channel, other = _DETAIL + 1 + i, _DETAIL + 1 + (i ^ 1)
        for j, share in enumerate((-2, 1)):
            hidden = 2 * i + j
            seen.weight[hidden] = 0
            seen.weight[hidden, channel, 1, 1] = 1
            seen.bias[hidden] = -(j + 1) * _NOISE
            given.weight[channel, hidden, 1, 1] = share
            given.weight[other, hidden, 1, 1] = -0.1 * share


def _begin_as(weight: Tensor, matrix: Tensor) -> None:
    """A small part of what it was, nothing of it for the detail, plus a matrix (outputs, inputs) in the middle tap."""
    weight *= 0.01
    weight[: _DETAIL + 1] = 0
    weight[:, :, 1, 1] += matrix


def _detail_filters() -> tuple[Tensor, Tensor]:
    """(16, 12, 12) and (12, 12): an HR pixel less its place in the enlarged means of 3 x 3 LR pixels; their middle."""
    rows = np.repeat(_SHARES, SCALE, 1) / SCALE  # (4, 12)
    filters = -np.einsum("pi,qj->pqij", rows, rows)
    for p in range(SCALE):
        for q in range(SCALE):
            filters[p, q, SCALE + p, SCALE + q] += 1
    mean = np.zeros((3 * SCALE, 3 * SCALE))
    mean[SCALE : 2 * SCALE, SCALE : 2 * SCALE] = 1 / SCALE**2
    return tuple(torch.from_numpy(x.astype(np.float32)) for x in (filters.reshape(-1, *mean.shape), mean))


def size_multiple(config: dict[str, Any]) -> int:
    return 4


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon moves it: kernels with more than a few inputs and outputs, not what begins at zero."""
    return parameter.ndim == 4 and min(parameter.shape[0], parameter[0].numel()) > 8 and "conv_offset" not in name


def quick_gradients(network: EDVRSTF) -> None:
    """Makes its deformable convolutions sample by `grid_sample`: the same values, and gradients in far less time.

    `xrk.kernels.deform_conv2d` is made for running a network; its gradient on a CPU is plain torch, tap by tap.
    """
    for module in network.modules():
        if isinstance(module, DeformableConv):
            module.forward = partial(_deformed, module)


def _deformed(module: DeformableConv, x: Tensor, motion: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    groups = module.groups
    offset, mask = module.conv_offset(motion).split((groups * 18, groups * 9), 1)
    offset = offset.reshape(batch * groups, 3, 3, 2, height, width)
    taps = torch.arange(-1, 2, device=x.device, dtype=x.dtype)
    down = offset[:, :, :, 0] + taps[:, None, None, None] + torch.arange(height, device=x.device)[:, None]
    right = offset[:, :, :, 1] + taps[:, None, None] + torch.arange(width, device=x.device)
    grid = torch.stack([(2 * right + 1) / width - 1, (2 * down + 1) / height - 1], -1)
    maps = x.reshape(batch * groups, channels // groups, height, width)
    found = F.grid_sample(maps, grid.view(batch * groups, 9 * height, width, 2), align_corners=False)
    found = found.view(batch, groups, -1, 9, height, width) * torch.sigmoid(mask).view(
        batch, groups, 1, 9, height, width
    )
    y = module.weight.flatten(1) @ found.view(batch, channels * 9, height * width)
    return y.view(x.shape) + module.bias[:, None, None]


# --- data -------------------------------------------------------------------------------------------------------------


class Windows:
    """Endless windows of random processes, seen by random cameras.

    Args:
        size: side of a window in HR pixels, a multiple of 16.
        seed: of everything random; `state` and `restore` carry the generator over a restart.
        seeds: range of the processes' seeds.
    """

    def __init__(self, size: int, seed: int, seeds: tuple[int, int] = (FIRST_SEED, 2**31)) -> None:
        self.size = size
        self.seeds = seeds
        self.rng = np.random.default_rng(seed)

    def state(self) -> dict:
        return self.rng.bit_generator.state

    def restore(self, state: dict) -> None:
        self.rng.bit_generator.state = state

    def cameras(self) -> Cameras:
        rng = self.rng

        def spread(low: float, high: float) -> float:
            return float(np.exp(rng.uniform(np.log(low), np.log(high))))

        white = spread(6000, 62000)
        return Cameras(
            scale=SCALE,
            ratio=round(spread(3, 40)),
            lr_quanta=spread(100, 40000),
            hr_quanta=spread(300, 30000),
            lr_shutter=float(rng.uniform(0.1, 1.0)),
            hr_shutter=float(rng.uniform(0.0, 0.4)),
            lr_blur=float(rng.choice([0.0, rng.uniform(0.2, 0.9)], p=[0.3, 0.7])),
            hr_blur=float(rng.uniform(0.3, 1.0)),
            shift=(0.0, 0.0) if rng.random() < 0.6 else tuple(map(float, rng.normal(0, 0.4, 2))),
            white=white,
            black=white * float(rng.uniform(0, 0.3)),
            read_noise=white * spread(1e-5, 2e-3),
        )

    def window(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], np.float32]:
        """LR frames (3, h, w), key frames (2, H, W) and truth (H, W) in units of 16 bits, and the open beam's share."""
        rng, cameras = self.rng, self.cameras()
        seed = int(rng.integers(*self.seeds))
        process = random_process(seed, (self.size, self.size), 2 * cameras.ratio)
        index, apart = int(rng.integers(cameras.ratio)), int(rng.choice([1, 2, 3, 4], p=[0.55, 0.2, 0.15, 0.1]))
        key, next_key, last = 1, 2, 3 * cameras.ratio
        kind = rng.random()
        if kind < 0.03:  # a sequence's first frames
            key, next_key = 0, 1
        elif kind < 0.06:  # its last ones: no further key frame
            next_key, last = 1, cameras.ratio + index
        index += key * cameras.ratio
        times, keys = [max(index - apart, 0), index, min(index + apart, last)], [key, next_key]
        lq = np.stack([cameras.lr_frame(process, i, seed) for i in times])
        hq = np.stack([cameras.hr_frame(process, k, seed) for k in keys])
        frames = [lq, hq, cameras.truth(process, times[1])[None]]
        turns, mirrored = int(rng.integers(4)), rng.random() < 0.5
        for i, frame in enumerate(frames):
            turned = np.rot90(frame, turns, (1, 2))
            frames[i] = np.ascontiguousarray(turned[..., ::-1] if mirrored else turned).astype(np.float32) / 65535
        return frames[0], frames[1], frames[2][0], np.float32((cameras.white - cameras.black) / 65535)

    def batch(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """lq (B, 3, 1, h, w), hq (B, 2, 1, H, W), truth (B, 1, H, W), the open beam (B)."""
        lq, hq, truth, beam = (np.stack(x) for x in zip(*(self.window() for _ in range(count)), strict=True))
        return tuple(torch.from_numpy(x) for x in (lq[:, :, None], hq[:, :, None], truth[:, None], beam))


# --- the run ----------------------------------------------------------------------------------------------------------


def errors(output: Tensor, truth: Tensor, beam: Tensor) -> Tensor:
    """Mean squared error of each window, in units of the open beam squared."""
    return ((output - truth) ** 2).mean((1, 2, 3)) / beam**2


def psnr_loss(output: Tensor, truth: Tensor, beam: Tensor, floor: float = 1e-5) -> Tensor:
    """Mean over windows of log(mean squared error + floor)."""
    return torch.log(errors(output, truth, beam) + floor).mean()


def validate(network: nn.Module, batches: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> float:
    """Mean PSNR over fixed windows, in dB of the open beam."""
    with torch.inference_mode():
        values = [-10 * torch.log10(errors(network(lq, hq), truth, beam)) for lq, hq, truth, beam in batches]
    return float(torch.cat(values).mean())


def train(run: Path, arguments: argparse.Namespace) -> None:
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    network = EDVRSTF(**CONFIG)
    initialise(network)
    network = network.to(arguments.device, memory_format=torch.channels_last)
    named = list(network.named_parameters())
    optimizers = [
        Muon([p for n, p in named if is_matrix(n, p)], lr=arguments.lr),
        torch.optim.AdamW([p for n, p in named if not is_matrix(n, p)], lr=0.2 * arguments.lr, weight_decay=0.0),
    ]
    windows = Windows(arguments.size, arguments.seed)
    count, each, size = VALIDATION
    held_out = Windows(size, 987654321, (500_000, FIRST_SEED))
    batches = [tuple(x.to(arguments.device) for x in held_out.batch(each)) for _ in range(count)]
    described = {"model": ARCHITECTURE, "config": CONFIG}
    training = TrainingRun(run, network, optimizers, described, (0.99, 4))
    quick_gradients(network)  # not the average, which is validated as it is shipped
    training.resume(windows)
    while training.step < arguments.steps:
        rate = learning_rate(training.step, arguments.steps, arguments.cooldown, warmup=50)
        lq, hq, truth, beam = (x.to(arguments.device) for x in windows.batch(arguments.batch))
        training.learn(psnr_loss(network(lq, hq), truth, beam), rate, most=5.0)
        last = training.step == arguments.steps
        if last or training.step % arguments.log == 0:
            training.log(validate(training.average, batches), rate)
        if last or training.step % arguments.save == 0:
            training.save(windows.state())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of this run: checkpoint, log")
    parser.add_argument("--steps", type=int, default=2310)
    parser.add_argument("--cooldown", type=int, default=300, help="last steps, over which the rate falls to zero")
    parser.add_argument("--batch", type=int, default=2, help="windows in a step")
    parser.add_argument("--size", type=int, default=128, help="side of the windows in HR pixels, a multiple of 16")
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=int, default=50, help="validate and log every so many steps")
    parser.add_argument("--save", type=int, default=50, help="write the checkpoint every so many steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    train(arguments.run, arguments)


if __name__ == "__main__":
    main()
