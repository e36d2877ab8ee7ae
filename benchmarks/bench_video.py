"""Fusing a video: features that windows share against one window at a time, memory over a long sequence and of files.

    python benchmarks/bench_video.py windows [--size 1024] [--targets 8] [--memory 4GiB] [--device cuda]
    python benchmarks/bench_video.py memory [--size 128] [--frames 200] [--device cuda]
    python benchmarks/bench_video.py files [--size 512] [--frames 10] [--memory 1GiB]

The network is EDVR-STF as published (20.9 million parameters, seeded; `memory` has a narrow one, `files` one of the
size that xrk.training.stf trains), frames are uint16, and --size is the side of the HR frames.

`windows` takes consecutive targets between two key frames from two generators of `xrk.fuse_video` in turn, in one
process, so that a busy machine slows both alike: one as it is, one that makes all five frames' features anew for every
window. Both run the same plans of the same kernels and must give the same bits. Counted are

    seconds, cpu   of all targets, the first one's features included; plans are made before
    each           seconds of each target: the first one shares nothing yet, so fewer targets than 8 show less than 8 do
    steps          seconds by step: features of LR and of HR frames, alignment, image
    front end      multiplications for features, by torch's own count

`memory` sends a sequence of iterators through `xrk.fuse_video` and notes the resident size as it goes; on a GPU what
torch has allocated there, too.

`files` runs `xrk.fuse_video_file`, which is `xrk fuse-video`, without a budget, with the smallest one and with twice
that (or with --memory alone), on a CPU, each in a process of its own: how far the resident size rises from the call to
its end, beside what the plan promises. The weights are loaded before, and the modules too: a video of a few small
frames is fused without a network.

The results go as JSON to --output (by default benchmarks/results/video_*.json). Linux only: memory is read from /proc.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from bench_runtime import MIB, Peak, child, machine, resident

RATIO, FILES_RATIO = 20, 4
SIZES = {"windows": 1024, "memory": 128, "files": 512}
FRAMES = {"memory": 200, "files": 10}
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
    module, steps, running = network().to(task["device"]), {}, [""]
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
        results[name] = {"each": [], "cpu": 0.0, "plan": contestants[name][1].plan}
    equal = True
    for _ in range(targets):
        given = {}
        for name, (generator, _) in contestants.items():
            video_windows.SHARED, running[0] = name == "shared", name
            begun, cpu = time.perf_counter(), time.process_time()
            given[name] = next(generator)
            results[name]["each"].append(time.perf_counter() - begun)
            results[name]["cpu"] += time.process_time() - cpu
        equal = equal and np.array_equal(given["shared"], given["alone"])
    work = front_end(module, side)
    for name, (_, report) in contestants.items():
        results[name] |= {
            "seconds": sum(results[name]["each"]),
            "features": report.features,
            "steps": dict(steps[name]),
        }
        results[name]["front_end_flops"] = sum(work[camera] * n for camera, n in report.features.items())
    shared, alone = results["shared"], results["alone"]
    return {
        "size": side, "targets": targets, "contestants": results, "same_bits": equal,
        "frames_per_second": {name: targets / r["seconds"] for name, r in results.items()},
        "ratio": alone["seconds"] / shared["seconds"], "later_ratio": sum(alone["each"][1:]) / sum(shared["each"][1:]),
        "cpu_ratio": alone["cpu"] / shared["cpu"],
        "front_end_ratio": alone["front_end_flops"] / shared["front_end_flops"],
    }  # fmt: skip


def memory(task: dict[str, Any]) -> dict[str, Any]:
    import torch

    import xrk

    torch.set_num_threads(task["threads"])
    side, count = task["size"], task["frames"]
    lr, hr = frames(count, side // 4, 1), frames((count - 1) // RATIO + 1, side, 2)
    module = network(**NARROW).to(task["device"])
    generator, report = xrk.fuse_video(lr, hr, model=module, ratio=RATIO, memory=task["memory"], report=True)
    levels, on_device = [], []
    for i, _ in enumerate(generator, start=1):
        if i % (count // 20) == 0:
            levels.append(resident() / MIB)
            if task["device"] != "cpu":
                on_device.append(torch.cuda.memory_allocated() / MIB)
    later = levels[1:]
    return {
        "size": side, "frames": report.frames, "resident_mib": levels, "device_mib": on_device, "plan": report.plan,
        "growth_mib": later[-1] - later[0], "spread_mib": max(later) - min(later),
    }  # fmt: skip


def prepare_files(task: dict[str, Any]) -> dict[str, Any]:
    """Writes what the runs of `files` read; the smallest budget in bytes."""
    import numpy as np
    import torch

    import xrk
    from xrk.errors import MemoryBudgetError
    from xrk.training.stf import CONFIG

    work, side, count = Path(task["work"]), task["size"], task["frames"]
    for name, size, length in (("", side, count), ("small_", 64, 5)):
        xrk.io.write(work / f"{name}lr.tif", np.stack(list(frames(length, size // 4, 1))))
        xrk.io.write(work / f"{name}hr.tif", np.stack(list(frames((length - 1) // FILES_RATIO + 1, size, 2))))
    torch.save({"params": network(**CONFIG).state_dict()}, work / "network.pth")
    try:
        options = {"model": work / "network.pth", "ratio": FILES_RATIO, "memory": "1MiB"}
        xrk.fuse_video_file(work / "lr.tif", work / "hr.tif", work / "none.tif", **options)
    except MemoryBudgetError as error:
        return {"smallest": error.smallest}
    return {"smallest": 1 << 20}


def one_file(task: dict[str, Any]) -> dict[str, Any]:
    import torch

    import xrk

    torch.set_num_threads(task["threads"])
    work = Path(task["work"])
    model = xrk.load(work / "network.pth")
    xrk.fuse_video_file(
        work / "small_lr.tif", work / "small_hr.tif", work / "small.tif", ratio=FILES_RATIO, model="linear"
    )
    options = {"model": model, "ratio": FILES_RATIO, "memory": task["memory"]}
    with Peak() as peak:
        report = xrk.fuse_video_file(work / "lr.tif", work / "hr.tif", work / "fused.tif", **options)
    predicted = float(re.search(r"at most ([0-9.]+) MiB", report.plan)[1])
    return {
        "budget_mib": None if report.memory is None else report.memory / MIB, "predicted_mib": predicted,
        "peak_mib": peak.mib, "ratio": peak.mib / predicted, "frames": report.frames, "seconds": report.seconds,
        "plan": report.plan,
    }  # fmt: skip


def files(task: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        task = task | {"work": work}
        found = child("prepare_files", task, file=__file__)
        if "failed" in found:
            return found
        budgets = [task["memory"]] if task["memory"] else [None, found["smallest"], 2 * found["smallest"]]
        runs = [child("one_file", task | {"memory": budget}, timeout=24 * 3600, file=__file__) for budget in budgets]
    failed = [run for run in runs if "failed" in run]
    return failed[0] if failed else {"size": task["size"], "runs": runs}


def line(what: str, found: dict[str, Any]) -> str:
    if what == "files":
        rows = []
        for run in found["runs"]:
            budget = "no budget" if run["budget_mib"] is None else f"memory={run['budget_mib']:.1f} MiB"
            rows.append(
                f"{run['frames']} frames of {found['size']}^2, {budget}: {run['predicted_mib']:.1f} MiB promised, "
                f"{run['peak_mib']:.1f} MiB measured ({run['ratio']:.2f})"
            )
        return "\n".join(rows)
    if what == "memory":
        return (
            f"{found['frames']} frames of {found['size']}^2: resident {found['resident_mib'][1]:.1f} MiB after a tenth "
            f"of them, {found['growth_mib']:+.1f} MiB at the end, {found['spread_mib']:.1f} MiB from least to most"
        )
    rates = ", ".join(f"{name} {rate:.4f}" for name, rate in found["frames_per_second"].items())
    return (
        f"{found['targets']} targets of {found['size']}^2: {rates} frames per second, {found['ratio']:.2f}x "
        f"({found['cpu_ratio']:.2f}x in CPU time, {found['later_ratio']:.2f}x after the first); "
        f"front end {found['front_end_ratio']:.2f}x less; "
        f"{'the same' if found['same_bits'] else 'OTHER'} bits"
    )


def main() -> int:
    if sys.argv[1:2] == ["child"]:
        actions = {action.__name__: action for action in (windows, memory, prepare_files, one_file)}
        print(json.dumps(actions[sys.argv[2]](json.loads(sys.argv[3]))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=tuple(SIZES))
    parser.add_argument("--size", type=int, help="side of the HR frames")
    parser.add_argument("--targets", type=int, default=8, help="at least 2")
    parser.add_argument("--frames", type=int, help="200; of files 10")
    parser.add_argument("--memory", help="budget of each generator, or of the file")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; files are fused on a CPU")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    what = options.what
    if options.targets < 2:
        parser.error("--targets: the first target shares nothing yet; expected at least 2")
    if what == "files" and options.device != "cpu":
        parser.error("files are measured on a CPU alone: leave out --device")
    task = {name: getattr(options, name) for name in ("targets", "memory", "threads", "device")}
    task |= {"size": options.size or SIZES[what], "frames": options.frames or FRAMES.get(what)}
    found = files(task) if what == "files" else child(what, task, timeout=24 * 3600, file=__file__)
    if "failed" in found:
        print(f"failed: {found['failed']}")
        return 1
    print(line(what, found))
    document = {"benchmark": f"video {what}", **machine(options.threads), "results": found}
    if options.device != "cpu":
        import torch

        document["device"] = torch.cuda.get_device_name(options.device)
    name = f"video_{what}_{options.device}_{document['date'][:10]}.json".replace("_cpu_", "_").replace(":", "")
    output = options.output or Path(__file__).parent / "results" / name
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
