"""The recipe that made the shipped networks: one command, seeded, logged, validated, resumable.

    python -m xrk.training.denoise --run runs/resnet18-unet --steps 12000
    python -m xrk.training.denoise --model lxie-net --run runs/lxie-net --steps 3000 --cooldown 1000 --lr 0.01
    python -m xrk.training.denoise --model blindspot --run runs/blindspot --steps 1000 --frames synchrotron/

The network learns in the variance-stabilised domain (noise of standard deviation 1 everywhere). The loss is the mean
over patches of log(mean squared error of the linear signal + a floor). The logarithm is what PSNR measures and makes
one dose count as much as another. PSNR takes it over whole radiographs, though, where the hard parts decide; the floor
is about a whole radiograph's error, so that an empty patch does not weigh ten times as much as one full of edges.
``blindspot`` has a loss of its own, without a clean image in it; ``--frames`` gives it real noisy frames as well. The
learning rate is constant after a short warm-up and falls to zero over the last
``--cooldown`` steps, so that a run can be prolonged: resume it with more steps before its cooldown began.

``--start`` begins from shipped weights: what was learnt so far is not learnt again. For ``resnet18-unet`` they may be
of a network with fewer channels or blocks (``--width``, ``--decoder-channels``, ``--full-resolution-skip``,
``--input-blocks``): it is grown.

Everything a run needs to go on lies in its folder: ``checkpoint.pt`` (written atomically every ``--save`` steps),
``log.csv``, and the pool of signals. A killed run goes on from its last checkpoint when started again.
"""

from __future__ import annotations

import argparse
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from xrk import io
from xrk.errors import InputError
from xrk.models import BlindSpot
from xrk.noise import estimate_noise
from xrk.training import blindspot_net, lxie_net, resnet18_unet
from xrk.training.data import Patches, build_pool
from xrk.training.optimizer import Muon
from xrk.training.training_run import TrainingRun, learning_rate

# Each says what its network is built of, how it starts, and which of its weights Muon moves.
NETWORKS = {"resnet18-unet": resnet18_unet, "lxie-net": lxie_net, "blindspot": blindspot_net}


def validate(network: nn.Module, batches: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Mean reduction of the weighted squared error against the noisy input, in dB, over fixed batches."""
    gains = []
    with torch.inference_mode():
        for noisy, target, weight in batches:
            before = (weight * (noisy - target) ** 2).mean((1, 2, 3))
            after = (weight * (network(noisy) - target) ** 2).mean((1, 2, 3))
            gains.append(10 * torch.log10(before / after))
    return float(torch.cat(gains).mean())


def real_frames(folder: Path, network: nn.Module) -> tuple[np.ndarray, dict[str, Any]]:
    """The TIFF files of a folder as the network sees them, (N, H, W) float32: stabilised, their noise estimated.

    Beside them what a card tells of them: how many, of what size, and the sha256 of their counts.

    Raises:
        InputError: the folder has no TIFF file, or the network learns from clean images.
    """
    if not (isinstance(network, BlindSpot) and network.std is not None):
        raise InputError("--frames are noisy frames without a clean one; expected a network that learns from noise.")
    paths = sorted(folder.glob("*.tif"))
    if not paths:
        raise InputError(f"The folder {folder} has no TIFF file in it.")
    counts = np.stack([io.read(path).array for path in paths])
    noise = estimate_noise(counts[len(counts) // 2])
    told = {"shape": list(counts.shape), "sha256": hashlib.sha256(counts.tobytes()).hexdigest()}
    return noise.stabilise(counts, np.float32), told | {"noise": noise.to_dict()}


def train(run: Path, arguments: argparse.Namespace) -> None:
    run.mkdir(parents=True, exist_ok=True)
    build_pool(run / "pool.npy", arguments.scenes, workers=max(1, torch.get_num_threads()))
    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    recipe = NETWORKS[arguments.model]
    config = recipe.CONFIG | {
        key: getattr(arguments, key) for key in recipe.ARGUMENTS if vars(arguments).get(key) is not None
    }
    network = recipe.build(config)
    recipe.initialise(network)
    if arguments.start:
        recipe.grow(network, load_file(arguments.start))
    network = network.to(device, memory_format=torch.channels_last)
    matrices = [p for n, p in network.named_parameters() if recipe.is_matrix(n, p)]
    others = [p for n, p in network.named_parameters() if not recipe.is_matrix(n, p)]
    if arguments.optimizer == "muon":
        optimizers = [
            Muon(matrices, lr=arguments.lr),
            torch.optim.AdamW(others, lr=0.1 * arguments.lr, weight_decay=recipe.WEIGHT_DECAY),
        ]
    else:
        optimizers = [torch.optim.AdamW(network.parameters(), lr=arguments.lr, betas=(0.9, 0.99), weight_decay=1e-4)]
    validation_scenes = max(1, arguments.scenes // 24)  # the last ones; the network never sees them
    size, count = arguments.size or recipe.SIZE, arguments.batch or recipe.BATCH
    frames, real = (None, None) if arguments.frames is None else real_frames(arguments.frames, network)
    pool, white = run / "pool.npy", recipe.WHITE
    patches = Patches(pool, size, arguments.seed, slice(-validation_scenes), white=white, frames=frames)
    held_out = Patches(pool, 192, 987654321, slice(-validation_scenes, None), white=white)
    batches = [tuple(torch.from_numpy(x).to(device) for x in held_out.batch(8)) for _ in range(4)]
    ahead = ThreadPoolExecutor(1)  # draws the next batch while the network learns from this one

    def draw() -> tuple[list[Tensor], dict]:
        return [torch.from_numpy(x) for x in patches.batch(count)], patches.state()

    described = {"model": arguments.model, "config": config, "frames": real}
    training = TrainingRun(run, network, optimizers, described, (0.995, 16), recipe.contrast_only)
    training.resume(patches)
    drawn = ahead.submit(draw)
    while training.step < arguments.steps:
        rate = learning_rate(training.step, arguments.steps, arguments.cooldown, arguments.warmup)
        batch, generator = drawn.result()
        drawn = ahead.submit(draw)
        noisy, target, weight = (x.to(device) for x in batch)
        training.learn(recipe.loss(network, noisy, target, weight), rate)
        last = training.step == arguments.steps
        if last or training.step % arguments.log == 0:
            training.log(validate(recipe.answer(training.average), batches), rate)
        if last or training.step % arguments.save == 0:
            training.save(generator)
    ahead.shutdown()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of this run: pool, checkpoint, log")
    parser.add_argument("--frames", type=Path, help="folder of noisy TIFF frames of one size to learn from as well")
    parser.add_argument("--start", type=Path, help="weights (.safetensors) to begin a new run from")
    parser.add_argument("--model", choices=[*NETWORKS], default="resnet18-unet")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--cooldown", type=int, default=3000, help="last steps, over which the rate falls to zero")
    parser.add_argument("--warmup", type=int, default=200, help="first steps, over which the rate rises")
    parser.add_argument("--scenes", type=int, default=2400, help="random scenes in the pool")
    parser.add_argument("--batch", type=int, help="patches in a step (8 of 192 pixels; lxie-net: 2 of 256)")
    parser.add_argument("--size", type=int, help="side of the patches in pixels")
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--lr", type=float, default=0.006)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=int, default=100, help="validate and log every so many steps")
    parser.add_argument("--save", type=int, default=100, help="write the checkpoint every so many steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    model = parser.parse_known_args(argv)[0].model
    for name, options in NETWORKS[model].ARGUMENTS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", **options, help=f"of {model}: {NETWORKS[model].CONFIG[name]}"
        )
    arguments = parser.parse_args(argv)
    np.seterr(all="raise", under="ignore")
    train(arguments.run, arguments)


if __name__ == "__main__":
    main()
