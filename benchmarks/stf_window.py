"""One window through EDVR-STF: the whole frame at once against bands of rows, each in a process of its own.

    python benchmarks/stf_window.py [--size 512] [--width 64] [--blocks 10] [--threads 2] [--rounds 1]
                                    [--budgets 1/5 none] [--output FILE]

SIZE: rows and columns of the LR frames; the HR frames and the result have four times as many. The published network is
--width 128 --blocks 40. "whole" is the module on whole frames, channels-last; the others are plans of `xrk.plan` within
a budget, a fraction being one of the peak of "whole". Rounds are interleaved; seconds are the least, without making the
plan. Peaks and errors are those of bench_runtime.py: from the making of the plan to the end of the run, the network and
the frames lying there already. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import bench_runtime

ROOT = Path(__file__).resolve().parents[1]


def build(width: int, blocks: int) -> Any:
    """The network with seeded weights that keep its maps from growing, and offsets of a pixel or so."""
    import torch

    from xrk.models import EDVRSTF

    torch.manual_seed(12)
    module = EDVRSTF(width=width, reconstruction_blocks=blocks).eval().requires_grad_(False)
    for name, tensor in module.state_dict().items():
        if name.startswith(("feature_extraction.", "reconstruction.")):
            tensor *= 0.1
        elif "conv_offset" in name:
            tensor.normal_(0, 1.0 if name.endswith("bias") else 0.01)
    return module


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One contestant: peak in MiB, seconds of the run, error against what "whole" has left."""
    import torch

    import xrk
    from xrk.models.stf_window import pack

    torch.set_num_threads(task["threads"])
    size = task["size"]
    video = bench_runtime.frame(4 * size, 4 * size)[:, None]
    hq = torch.cat([video, video.roll(3, -1)], 1)
    lq = torch.stack([torch.nn.functional.avg_pool2d(video[0].roll(2 * i, -2), 4) for i in range(3)], 1)
    del video
    module = build(task["width"], task["blocks"])
    result: dict[str, Any] = {}
    with torch.inference_mode():
        if task["contestant"] == "whole":
            module = module.to(memory_format=torch.channels_last)
            with bench_runtime.Peak() as peak:
                begun = time.perf_counter()
                y = module(lq, hq)
                result["seconds"] = time.perf_counter() - begun
        else:
            image = pack(lq, hq)
            del lq, hq
            with bench_runtime.Peak() as peak:
                begun = time.perf_counter()
                plan = xrk.plan(module, (size, size), memory=task["memory"])
                made = time.perf_counter()
                y = plan.run(image)
                result |= {"seconds": time.perf_counter() - made, "plan_seconds": made - begun, "band": plan.band}
            result["predicted_mib"] = plan.peak_bytes / bench_runtime.MIB
    return result | {"peak_mib": peak.mib} | bench_runtime.compare(y, Path(task["reference"]))


def run(task: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{task['contestant']} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("size", 512), ("width", 64), ("blocks", 10), ("threads", 2), ("rounds", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--budgets", nargs="+", default=["1/5", "none"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        print(json.dumps(measure(json.loads(given.task))))
        return
    common = {name: getattr(given, name) for name in ("size", "width", "blocks", "threads")}
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        common["reference"] = str(Path(folder) / "whole.npy")
        for _ in range(given.rounds):
            for name in ("whole", *given.budgets):
                memory: Any = None if name in ("whole", "none") else name
                if "/" in name:
                    memory = int(Fraction(name) * int(rows["whole"]["peak_mib"] * bench_runtime.MIB))
                row = run({**common, "contestant": name, "memory": memory})
                print(f"{name}: {json.dumps(row)}", file=sys.stderr, flush=True)
                best = min(row["seconds"], rows.get(name, row)["seconds"])
                rows[name] = {**row, "seconds": best}
    whole = rows["whole"]
    print(f"EDVR-STF, {given.width} channels, {given.blocks} blocks, HR {4 * given.size} x {4 * given.size}")
    print("| | seconds | of whole | peak, MiB | predicted | of whole | rows at a time | error |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        ratios = [row[key] / whole[key] for key in ("seconds", "peak_mib")]
        print(
            f"| {name} | {row['seconds']:.1f} | {ratios[0]:.2f} | {row['peak_mib']:.0f} | "
            f"{row.get('predicted_mib', 0):.0f} | {ratios[1]:.2f} | {row.get('band', '')} | "
            f"{row['error'] / whole['largest']:.1e} |"
        )
    if given.output:
        document = {**common, **bench_runtime.machine(given.threads), "rows": rows}
        given.output.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
