"""Fusing a video: features that windows share against one window at a time, and memory over a long sequence.

    python benchmarks/bench_video.py windows [--size 1024] [--targets 8] [--memory 4GiB]
    python benchmarks/bench_video.py memory [--size 128] [--frames 200]

The network is EDVR-STF as published (20.9 million parameters, seeded; `memory` a narrow one), frames are uint16, and
--size is the side of the HR frames.

`windows` takes consecutive targets between two key frames from two generators of `xrk.fuse_video` in turn, in one
process, so that a busy machine slows both alike: one as it is, one that makes all five frames' features anew for every
window. Both run the same plans of the same kernels and must give the same bits. Counted are

    seconds, cpu   of all targets, the first one's features included; plans are made before
    steps          seconds by step: features of LR and of HR frames, alignment, image
    front end      multiplications for features, by torch's own count

`memory` sends a sequence of iterators through `xrk.fuse_video` and notes the resident size as it goes.

The results go as JSON to --output (by default benchmarks/results/video_*.json). Linux only: memory is read from /proc.
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from bench_runtime import MIB, child, machine, resident

RATIO = 20
NARROW = {"width": 16, "deformable_groups": 4, "extraction_blocks": 1, "reconstruction_blocks": 2, "tail": 8}


def network(**changes: Any) -> Any:
    """EDVR-STF with seeded weights, offsets of the alignment about a pixel."""
    import torch
    from torch import nn

    from xrk.models import EDVRSTF

    torch.manual_seed(16)
    module = EDVRSTF(**changes)
    for name, part in module.named_modules():
        if name.endswith("conv_offset"):
            nn.init.normal_(part.weight, 0, 0.01)
            nn.init.normal_(part.bias, 0, 1.0)
    return module.eval().requires_grad_(False)


def frames(count: int, side: int, seed: int) -> Iterator[Any]:
    """A disc that moves over steps, and noise; uint16."""
    import numpy as np

    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:side, :side] / side
    for i in range(count):
        scene = 20000 + 20000 * (np.hypot(row - 0.5, column - 0.3 - 0.02 * i) < 0.2) + 5000 * np.sign(np.sin(40 * row))
        yield np.clip(scene + 500 * rng.standard_normal((side, side)), 0, 65535).astype(np.uint16)


def front_end(module: Any, side: int) -> dict[str, int]:
    """Multiplications and additions for the features of one LR and one HR frame."""
    import copy

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    shapeless = copy.deepcopy(module).to("meta")
    found = {}
    for camera, scale in (("lr", 4), ("hr", 1)):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            x = torch.empty((1, 1, side // scale, side // scale), device="meta")
            (shapeless.lr_pyramid if camera == "lr" else shapeless.hr_pyramid)(x)
        found[camera] = counter.get_total_flops()
    return found


def windows(task: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import torch

    import xrk
    from xrk import video_network, video_windows

    torch.set_num_threads(task["threads"])
    side, targets = task["size"], task["targets"]
    module, steps, running = network(), {}, [""]
    plain = video_network.WindowNetwork._run

    def timed(self: Any, name: str, x: Any) -> Any:
        begun = time.perf_counter()
        y = plain(self, name, x)
        steps[running[0]][name] += time.perf_counter() - begun
        return y

    video_network.WindowNetwork._run = timed
    lr, hr = np.stack(list(frames(RATIO, side // 4, 1))), np.stack(list(frames(2, side, 2)))
    contestants, results = {}, {}
    for name in ("shared", "alone"):
        options = {"model": module, "ratio": RATIO, "start": 4, "memory": task["memory"], "report": True}
        contestants[name] = xrk.fuse_video(lr, hr, **options)
        steps[name] = defaultdict(float)
        results[name] = {"seconds": 0.0, "cpu": 0.0, "plan": contestants[name][1].plan}
    equal = True
    for _ in range(targets):
        given = {}
        for name, (generator, _) in contestants.items():
            video_windows.SHARED, running[0] = name == "shared", name
            begun, cpu = time.perf_counter(), time.process_time()
            given[name] = next(generator)
            results[name]["seconds"] += time.perf_counter() - begun
            results[name]["cpu"] += time.process_time() - cpu
        equal = equal and np.array_equal(given["shared"], given["alone"])
    work = front_end(module, side)
    for name, (_, report) in contestants.items():
        results[name] |= {"features": report.features, "steps": dict(steps[name])}
        results[name]["front_end_flops"] = sum(work[camera] * n for camera, n in report.features.items())
    shared, alone = results["shared"], results["alone"]
    return {
        "size": side, "targets": targets, "contestants": results, "same_bits": equal,
        "frames_per_second": {name: targets / r["seconds"] for name, r in results.items()},
        "ratio": alone["seconds"] / shared["seconds"], "cpu_ratio": alone["cpu"] / shared["cpu"],
        "front_end_ratio": alone["front_end_flops"] / shared["front_end_flops"],
    }  # fmt: skip


def memory(task: dict[str, Any]) -> dict[str, Any]:
    import torch

    import xrk

    torch.set_num_threads(task["threads"])
    side, count = task["size"], task["frames"]
    lr, hr = frames(count, side // 4, 1), frames((count - 1) // RATIO + 1, side, 2)
    generator, report = xrk.fuse_video(lr, hr, model=network(**NARROW), ratio=RATIO, report=True)
    levels = []
    for i, _ in enumerate(generator, start=1):
        if i % (count // 20) == 0:
            levels.append(resident() / MIB)
    later = levels[1:]
    return {
        "size": side, "frames": report.frames, "resident_mib": levels, "plan": report.plan,
        "growth_mib": later[-1] - later[0], "spread_mib": max(later) - min(later),
    }  # fmt: skip


def line(what: str, found: dict[str, Any]) -> str:
    if what == "memory":
        return (
            f"{found['frames']} frames of {found['size']}^2: resident {found['resident_mib'][1]:.1f} MiB after a tenth "
            f"of them, {found['growth_mib']:+.1f} MiB at the end, {found['spread_mib']:.1f} MiB from least to most"
        )
    rates = ", ".join(f"{name} {rate:.4f}" for name, rate in found["frames_per_second"].items())
    return (
        f"{found['targets']} targets of {found['size']}^2: {rates} frames per second, {found['ratio']:.2f}x "
        f"({found['cpu_ratio']:.2f}x in CPU time); front end {found['front_end_ratio']:.2f}x less; "
        f"{'the same' if found['same_bits'] else 'OTHER'} bits"
    )


def main() -> int:
    if sys.argv[1:2] == ["child"]:
        print(json.dumps({"windows": windows, "memory": memory}[sys.argv[2]](json.loads(sys.argv[3]))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("windows", "memory"))
    parser.add_argument("--size", type=int, help="side of the HR frames")
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--memory", help="budget of each generator")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    size = options.size or {"windows": 1024, "memory": 128}[options.what]
    task = {name: getattr(options, name) for name in ("targets", "frames", "memory", "threads")} | {"size": size}
    found = child(options.what, task, timeout=24 * 3600, file=__file__)
    if "failed" in found:
        print(f"failed: {found['failed']}")
        return 1
    print(line(options.what, found))
    document = {"benchmark": f"video {options.what}", **machine(options.threads), "results": found}
    name = f"video_{options.what}_{document['date'][:10]}.json"
    output = options.output or Path(__file__).parent / "results" / name
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
