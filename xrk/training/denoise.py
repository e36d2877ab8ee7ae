"""The recipe that made the shipped ``resnet18-unet``: one command, seeded, logged, validated, resumable.

    python -m xrk.training.denoise --run runs/resnet18-unet --steps 12000

The network learns in the variance-stabilised domain (noise of standard deviation 1 everywhere). The loss is the mean
over patches of log(mean squared error of the linear signal + a floor). The logarithm is what PSNR measures and makes
one dose count as much as another. PSNR takes it over whole radiographs, though, where the hard parts decide; the floor
is about a whole radiograph's error, so that an empty patch does not weigh ten times as much as one full of edges. The
learning rate is constant after a short warm-up and falls to zero over the last
``--cooldown`` steps, so that a run can be prolonged: resume it with more steps before its cooldown began.

``--start`` begins from shipped weights: what was learnt so far is not learnt again. They may be of a network with fewer
channels or blocks (``--width``, ``--decoder-channels``, ``--full-resolution-skip``, ``--input-blocks``): it is grown.

Everything a run needs to go on lies in its folder: ``checkpoint.pt`` (written atomically every ``--save`` steps),
``log.csv``, and the pool of signals. A killed run goes on from its last checkpoint when started again.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from xrk.models.resnet18_unet import ResNet18UNet
from xrk.training.data import Patches, build_pool
from xrk.training.optimizer import Muon

CONFIG = {
    "width": 20,
    "decoder_channels": (64, 48, 64, 40, 20),
    "full_resolution_skip": 16,
    "batch_norm": False,
    "input_blocks": 3,
}


def initialise(network: ResNet18UNet) -> None:
    """He initialisation; every residual branch and the head start near zero, so that the network starts as identity."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, module in network.named_modules():
        if name.startswith("encoder.layer") and name.endswith("conv2"):
            module.weight.data *= 0.2
    for block in network.input_blocks:
        block.conv.weight.data *= 0.2
    network.segmentation_head[0].weight.data *= 0.05
    contrast_only(network)


def contrast_only(network: ResNet18UNet) -> None:
    """Make every filter that sees the image sum to zero: noise has unit variance at every level, so the level is noise.

    With replicated borders this makes the network commute with adding a constant to the image, exactly.
    """
    for module in (network.encoder.conv1, network.input_skip):
        module.weight.data -= module.weight.data.mean((1, 2, 3), keepdim=True)


@torch.no_grad()
def grow(network: ResNet18UNet, state: dict[str, Tensor]) -> None:
    """Give ``network`` the weights of one with fewer channels or blocks: it computes the same, and can learn more.

    New channels keep their initial filters, but nothing that was there listens to them yet; new blocks add nothing yet
    (Chen et al., "Net2Net: Accelerating Learning via Knowledge Transfer", 2016, by zeros instead of by copies).

    Raises:
        ValueError: a tensor of ``state`` is larger than the network's, or the network has none of that name.
    """
    own = network.state_dict()
    for name, value in own.items():
        if name.startswith("input_blocks") and name not in state:
            value.zero_()
    for name, old in state.items():
        new = own.get(name)
        if new is None or new.ndim != old.ndim or any(a > b for a, b in zip(old.shape, new.shape, strict=True)):
            found = "none" if new is None else tuple(new.shape)
            raise ValueError(f"{name}: a tensor {tuple(old.shape)} does not fit into the network's, {found}")
        if old.ndim < 2:
            new[: len(old)] = old
            continue
        inputs = torch.arange(old.shape[1])
        if name.startswith("decoder.blocks") and name.endswith("conv1.0.weight"):  # reads [the level below | the skip]
            level = int(name.split(".")[2])
            below, grown = (
                s[f"decoder.blocks.{level - 1}.conv2.0.weight" if level else "encoder.layer4.1.conv2.weight"].shape[0]
                for s in (state, own)
            )
            inputs[below:] += grown - below
        new[: len(old)] = 0
        new[: len(old), inputs] = old.to(new.dtype)


def psnr_loss(output: Tensor, target: Tensor, weight: Tensor, floor: float = 0.02) -> Tensor:
    """Mean over patches of log(weighted mean squared error + floor)."""
    return torch.log((weight * (output - target) ** 2).mean((1, 2, 3)) + floor).mean()


def learning_rate(step: int, steps: int, cooldown: int, warmup: int = 200) -> float:
    """Relative rate: linear warm-up, constant, then 1 - sqrt down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    left = steps - step
    return 1.0 if left >= cooldown else 1 - math.sqrt(1 - max(left, 0) / cooldown)


def validate(network: nn.Module, batches: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Mean reduction of the weighted squared error against the noisy input, in dB, over fixed batches."""
    gains = []
    with torch.inference_mode():
        for noisy, target, weight in batches:
            before = (weight * (noisy - target) ** 2).mean((1, 2, 3))
            after = (weight * (network(noisy) - target) ** 2).mean((1, 2, 3))
            gains.append(10 * torch.log10(before / after))
    return float(torch.cat(gains).mean())


def train(run: Path, arguments: argparse.Namespace) -> None:
    run.mkdir(parents=True, exist_ok=True)
    build_pool(run / "pool.npy", arguments.scenes, workers=max(1, torch.get_num_threads()))
    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    config = {key: getattr(arguments, key) for key in CONFIG}
    network = ResNet18UNet(**config)
    initialise(network)
    if arguments.start:
        grow(network, load_file(arguments.start))
    network = network.to(device, memory_format=torch.channels_last)
    average = ResNet18UNet(**config).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    average.load_state_dict(network.state_dict())
    matrices = [p for n, p in network.named_parameters() if p.ndim == 4 and min(p.shape[0], p[0].numel()) > 8]
    others = [p for p in network.parameters() if not any(p is m for m in matrices)]
    if arguments.optimizer == "muon":
        optimizers = [Muon(matrices, lr=arguments.lr), torch.optim.AdamW(others, lr=0.1 * arguments.lr)]
    else:
        optimizers = [torch.optim.AdamW(network.parameters(), lr=arguments.lr, betas=(0.9, 0.99), weight_decay=1e-4)]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    validation_scenes = max(1, arguments.scenes // 24)  # the last ones; the network never sees them
    patches = Patches(run / "pool.npy", arguments.size, arguments.seed, slice(-validation_scenes))
    held_out = Patches(run / "pool.npy", 192, 987654321, slice(-validation_scenes, None))
    batches = [tuple(torch.from_numpy(x).to(device) for x in held_out.batch(8)) for _ in range(4)]
    step, spent = 0, 0.0
    ahead = ThreadPoolExecutor(1)  # draws the next batch while the network learns from this one

    def draw() -> tuple[list[Tensor], dict]:
        return [torch.from_numpy(x) for x in patches.batch(arguments.batch)], patches.state()

    checkpoint = run / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        network.load_state_dict(saved["network"])
        average.load_state_dict(saved["average"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        patches.restore(saved["generator"])
        step, spent = saved["step"], saved["seconds"]
        print(f"resumed at step {step} after {spent:.0f} s", flush=True)
    drawn = ahead.submit(draw)
    start, loss_sum, loss_count = time.monotonic() - spent, 0.0, 0
    while step < arguments.steps:
        rate = learning_rate(step, arguments.steps, arguments.cooldown)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, base in zip(groups, rates, strict=True):
            group["lr"] = base * rate
        batch, generator = drawn.result()
        drawn = ahead.submit(draw)
        noisy, target, weight = (x.to(device) for x in batch)
        loss = psnr_loss(network(noisy), target, weight)
        network.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        contrast_only(network)
        step += 1
        with torch.no_grad():
            decay = min(0.995, 1 - 1 / (1 + step / 4))
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
        loss_sum, loss_count = loss_sum + loss.item(), loss_count + 1
        if step % arguments.log == 0 or step == arguments.steps:
            spent = time.monotonic() - start
            gain = validate(average, batches)
            with (run / "log.csv").open("a") as log:
                log.write(f"{step},{spent:.0f},{loss_sum / loss_count:.4f},{gain:.3f},{rate:.3f}\n")
            print(f"step {step}  {spent:.0f} s  loss {loss_sum / loss_count:.4f}  gain {gain:.3f} dB", flush=True)
            loss_sum, loss_count = 0.0, 0
        if step % arguments.save == 0 or step == arguments.steps:
            saved = {
                "config": config,
                "network": network.state_dict(),
                "average": average.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "generator": generator,
                "step": step,
                "seconds": time.monotonic() - start,
            }
            partial = checkpoint.with_suffix(".partial")
            torch.save(saved, partial)
            os.replace(partial, checkpoint)
    ahead.shutdown()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of this run: pool, checkpoint, log")
    parser.add_argument("--start", type=Path, help="weights (.safetensors) to begin a new run from")
    parser.add_argument("--width", type=int, default=CONFIG["width"])
    parser.add_argument("--decoder-channels", type=int, nargs=5, default=CONFIG["decoder_channels"])
    parser.add_argument("--full-resolution-skip", type=int, default=CONFIG["full_resolution_skip"])
    parser.add_argument("--input-blocks", type=int, default=CONFIG["input_blocks"])
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--cooldown", type=int, default=3000, help="last steps, over which the rate falls to zero")
    parser.add_argument("--scenes", type=int, default=2400, help="random scenes in the pool")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=192, help="side of the patches in pixels")
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--lr", type=float, default=0.006)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=int, default=100, help="validate and log every so many steps")
    parser.add_argument("--save", type=int, default=100, help="write the checkpoint every so many steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(batch_norm=CONFIG["batch_norm"])
    arguments = parser.parse_args(argv)
    np.seterr(all="raise", under="ignore")
    train(arguments.run, arguments)


if __name__ == "__main__":
    main()
