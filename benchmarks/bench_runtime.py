"""The streaming runtime against its peers: peak memory, seconds and error of whole frames, each in its own process.

    python benchmarks/bench_runtime.py table [--sizes 2048x2048 8192x2048] [--budgets ...] [--rounds 2] [--quick]
    python benchmarks/bench_runtime.py predictions [--quick]

`table` runs the smp-form resnet18-unet (14.3 M parameters, random weights and statistics) on a CPU in fp32:

    xrk:none, xrk:smallest, xrk:256MiB ...   plans of xrk without a budget, of the smallest, and of those of --budgets
    eager                the module, channels-last
    compile              torch.compile, its weights frozen
    onnxruntime, openvino    from one ONNX file
    monai-halo           MONAI's sliding window, 1152 tiles, overlap 0.5, each pixel from a tile's middle: exact
    monai-512            MONAI's sliding window as commonly used: 512 tiles, overlap 0.25, plain mean: not exact

Rounds are interleaved: every contestant once, then every contestant again; seconds are the least of all runs.
`predictions` compares the peak that a plan predicts with the measured one for 20 plans.

    peak     the process's highest resident size from the making of the plan (or of the session, or of the compiled
             module) to the end of the first run, above its level before; the module or file and the input lie there
             already. For onnxruntime and openvino this includes their copy of the weights, as it does for xrk.
    run      the same for a later run alone, above its level before that run
    error    largest difference from the eager module's output, relative to its largest value

The results go as JSON to --output (by default benchmarks/results/runtime_*.json). A peer that is not installed is left
out and named. Linux only: peaks are read from /proc.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 2.0**20
ROOT = Path(__file__).resolve().parents[1]
TILE, HALO_OVERLAP, COMMON_TILE, COMMON_OVERLAP = 1152, 0.5, 512, 0.25
NEEDS = {"monai-halo": "monai", "monai-512": "monai", "onnxruntime": "onnxruntime", "openvino": "openvino"}
PEERS = ("eager", "compile", "onnxruntime", "openvino", "monai-halo", "monai-512")
PACKAGES = ("torch", "numpy", "monai", "onnx", "onnxruntime", "openvino")

# Networks of `predictions`; each is built in the measuring process.
NETWORKS = ("resnet18-unet", "resnet18-unet residual", "resnet18-unet original", "dncnn", "resnet18-unet narrow")


# --- in the measuring process ---------------------------------------------------------------------------------------


def build(network: str) -> Any:
    """One of NETWORKS with seeded weights and statistics, in eval mode."""
    import torch

    from xrk.models.dncnn import DnCNN
    from xrk.models.resnet18_unet import OriginalResNet18UNet, ResNet18UNet

    torch.manual_seed(12)
    narrow = {"width": 16, "decoder_channels": (64, 48, 32, 16, 8)}
    make: dict[str, Callable[[], Any]] = {
        "resnet18-unet": ResNet18UNet,
        "resnet18-unet residual": lambda: ResNet18UNet(full_resolution_skip=16),
        "resnet18-unet original": OriginalResNet18UNet,
        "resnet18-unet narrow": lambda: ResNet18UNet(**narrow),
        "dncnn": DnCNN,
    }
    module = make[network]()
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.7, 1.4)
    return module.eval().requires_grad_(False)


def frame(height: int, width: int) -> Any:
    """(1, 1, height, width), float32: an object with edges, and noise."""
    import torch

    generator = torch.Generator().manual_seed(7)
    row, column = torch.arange(height)[:, None], torch.arange(width)[None]
    steps = ((row // 97 + column // 61) % 5).float() * 0.2
    return (steps + 0.05 * torch.randn(height, width, generator=generator))[None, None]


def resident() -> int:
    """Bytes of this process that are in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """``with Peak() as peak: ...``: how far the process rose above its level at the start, in MiB, as ``peak.mib``."""

    def __enter__(self) -> "Peak":
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the high-water mark to the present level
        self._before = resident()
        return self

    def __exit__(self, *_exception: object) -> None:
        text = Path("/proc/self/status").read_text()
        highest = int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) * 1024
        self.mib = (highest - self._before) / MIB


def smallest_budget(module: Any, size: tuple[int, int]) -> int:
    """Bytes of the smallest budget that works, as the refusal of one MiB names it."""
    import xrk
    from xrk.errors import MemoryBudgetError

    try:
        xrk.plan(module, size, memory="1MiB")
    except MemoryBudgetError as error:
        return error.smallest
    return 1 << 20


def prepare(contestant: str, network: str, x: Any, work: Path, threads: int, notes: dict[str, Any]) -> Any:
    """A function of no arguments that loads what a contestant runs, and returns a function of the input."""
    import torch

    if contestant in ("onnxruntime", "openvino"):
        path = str(work / f"{network}_{x.shape[2]}x{x.shape[3]}.onnx")
        return (_onnxruntime if contestant == "onnxruntime" else _openvino)(path, threads)
    module = build(network)
    if contestant.startswith("xrk:"):
        return _xrk(contestant.removeprefix("xrk:"), module, x, notes)
    if contestant == "eager":
        module = module.to(memory_format=torch.channels_last)
        return lambda: module
    if contestant == "compile":
        import torch._inductor.config

        torch._inductor.config.freezing = True
        return lambda: torch.compile(module.to(memory_format=torch.channels_last))
    return _monai(contestant, module, x)


def _xrk(budget: str, module: Any, x: Any, notes: dict[str, Any]) -> Any:
    import xrk

    size = tuple(x.shape[-2:])
    memory: Any = None if budget == "none" else budget
    if budget.startswith("smallest"):  # "smallest", or "smallest*1.5"
        # In a process of its own: what a refusal leaves in the allocator would lower this one's peak.
        memory = int(float(budget.partition("*")[2] or 1) * notes.pop("smallest"))

    def start() -> Any:
        plan = xrk.plan(module, size, memory=memory)
        notes["predicted_mib"] = plan.peak_bytes / MIB
        notes["plan"] = str(plan)
        return plan.run

    return start


def _onnxruntime(path: str, threads: int) -> Any:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads

    def start() -> Any:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])

    return start


def _openvino(path: str, threads: int) -> Any:
    import openvino
    import torch

    def start() -> Any:
        core = openvino.Core()
        # fp32, as everyone here: without this a processor with bfloat16 would use that.
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()
        return lambda x: torch.from_numpy(request.infer([x.numpy()])[0].copy())

    return start


def _monai(contestant: str, module: Any, x: Any) -> Any:
    import torch
    from monai.inferers import sliding_window_inference

    common = contestant == "monai-512"
    tile = [min(COMMON_TILE if common else TILE, side) for side in x.shape[-2:]]
    overlap, weights = COMMON_OVERLAP, None
    if not common:
        overlap = HALO_OVERLAP
        # A pixel comes from a tile in whose middle it lies; rims count only at the image's border, where no other tile
        # has been, in rows and columns by themselves. MONAI raises weights below 1e-3 to that: so these are large.
        down, right = (torch.ones(side) for side in tile)
        for weight in (down, right):
            weight[len(weight) // 4 : len(weight) - len(weight) // 4] = 1e12
        weights = down[:, None] * right

    def start() -> Any:
        network = module.to(memory_format=torch.channels_last)
        return lambda x: sliding_window_inference(x, tile, 1, network, overlap=overlap, roi_weight_map=weights)

    return start


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One contestant on one frame: the figures of the table, and the output's error where a reference lies there."""
    import torch

    torch.set_num_threads(task["threads"])
    work = Path(task["work"])
    notes = {"smallest": task.get("smallest")}
    x = frame(*task["size"])
    with torch.inference_mode():
        start = prepare(task["contestant"], task["network"], x, work, task["threads"], notes)
        with Peak() as peak:
            begun = time.perf_counter()
            run = start()
            made = time.perf_counter()
            y = run(x)
            first = time.perf_counter() - made
        result = {"peak_mib": peak.mib, "prepare_seconds": made - begun, "first_seconds": first, "seconds": first}
        if task["repeats"]:
            del y
        for _ in range(task["repeats"]):
            with Peak() as again:
                begun = time.perf_counter()
                y = run(x)
                seconds = time.perf_counter() - begun
            result["seconds"] = min(result["seconds"], seconds)
            result["run_mib"] = max(result.get("run_mib", 0.0), again.mib)
    result |= {name: value for name, value in notes.items() if value is not None}
    if task.get("reference"):
        result |= compare(y, Path(task["reference"]))
    return result


def compare(y: Any, path: Path) -> dict[str, float]:
    """Writes the reference where it is absent, else the distance from it, in slabs."""
    import numpy as np

    array = y.numpy()
    if not path.exists():
        np.save(path, array)
        return {"error": 0.0, "largest": float(np.abs(array).max()), "deviation": float(array.std())}
    expected = np.load(path, mmap_mode="r")
    if expected.shape != array.shape:
        raise SystemExit(f"the output has shape {array.shape}; expected {expected.shape}")
    worst = max(float(np.abs(expected[:, :, i : i + 256] - array[:, :, i : i + 256]).max()) for i in rows(array))
    largest = max(float(np.abs(expected[:, :, i : i + 256]).max()) for i in rows(array))
    return {"error": worst, "largest": largest, "deviation": float(expected.std())}


def rows(array: Any) -> range:
    return range(0, array.shape[2], 256)


def export(task: dict[str, Any]) -> dict[str, Any]:
    """The network as an ONNX file, for one size."""
    import torch

    height, width = task["size"]
    path = Path(task["work"]) / f"{task['network']}_{height}x{width}.onnx"
    torch.onnx.export(build(task["network"]), (torch.zeros(1, 1, height, width),), path, dynamo=True, verbose=False)
    return {"file": str(path)}


def find_smallest(task: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(task["threads"])
    return {"smallest": smallest_budget(build(task["network"]), tuple(task["size"]))}


# --- in the parent ----------------------------------------------------------------------------------------------------


def child(action: str, task: dict[str, Any], timeout: float = 3600, file: str = __file__) -> dict[str, Any]:
    """What ``action`` of a benchmark's ``file`` returns in a new process, or {"failed": why}."""
    threads = str(task["threads"])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, file, "child", action, json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return json.loads(lines[-1])


def absent(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


def machine(threads: int) -> dict[str, Any]:
    """What the figures were taken on and with."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = bool(subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip())
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit + ("+changes" if dirty else ""),
        "device": cpu[1] if cpu else platform.machine(),
        "threads": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {p: None if absent(p) else importlib.metadata.version(p) for p in PACKAGES},
    }


def parse_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def table(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Rows of the table; each is printed once the last round is over."""
    contestants = options.only or [*(f"xrk:{budget}" for budget in options.budgets), *PEERS]
    for missing in [c for c in contestants if c in NEEDS and absent(NEEDS[c])]:
        print(f"{missing} is left out: {NEEDS[missing]} is not installed")
        contestants.remove(missing)
    results = []
    for size in map(parse_size, options.sizes):
        base = {"network": options.network, "size": size, "threads": options.threads, "work": str(work)}
        reference = str(work / f"reference_{size[0]}x{size[1]}.npy")
        found = child("measure", {**base, "contestant": "eager", "repeats": 0, "reference": reference})
        if "failed" in found:
            raise SystemExit(f"the module itself does not run: {found['failed']}")
        if {"onnxruntime", "openvino"} & set(contestants):
            exported = child("export", base)
            if "failed" in exported:
                print(f"no ONNX file: {exported['failed']}")
        if any(c.startswith("xrk:smallest") for c in contestants):
            base |= child("find_smallest", base)
        runs: dict[str, list[dict[str, Any]]] = {c: [] for c in contestants}
        for _ in range(options.rounds):
            for c in contestants:
                task = {**base, "contestant": c, "repeats": options.repeats, "reference": reference}
                runs[c].append(child("measure", task))
        results += [summary(c, size, each) for c, each in runs.items()]
    return results


def summary(contestant: str, size: tuple[int, int], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Least seconds and largest peaks over the rounds."""
    row: dict[str, Any] = {"contestant": contestant, "size": size, "rounds": len(runs)}
    good = [run for run in runs if "failed" not in run]
    if len(good) < len(runs):
        return row | {"failed": next(run["failed"] for run in runs if "failed" in run)}
    for name in good[0]:
        values = [run[name] for run in good]
        row[name] = values[0] if isinstance(values[0], str) else min(values) if "seconds" in name else max(values)
    return row


def show_table(results: list[dict[str, Any]]) -> None:
    for size in dict.fromkeys(tuple(row["size"]) for row in results):
        mine = [row for row in results if tuple(row["size"]) == size]
        fastest = min((r["seconds"] for r in mine if r["contestant"] in PEERS[:4] and "seconds" in r), default=None)
        print(f"\n{size[0]} x {size[1]}")
        print(f"{'':16} {'peak MiB':>9} {'predicted':>9} {'run MiB':>9} {'seconds':>8} {'of best':>8} {'error':>9}")
        for row in mine:
            if "failed" in row:
                print(f"{row['contestant']:16} failed: {row['failed']}")
                continue
            predicted = f"{row['predicted_mib']:9.1f}" if "predicted_mib" in row else " " * 9
            again = f"{row['run_mib']:9.1f}" if "run_mib" in row else " " * 9
            ratio = f"{row['seconds'] / fastest:7.2f}x" if fastest else " " * 8
            error = row["error"] / row["largest"]
            line = f"{row['contestant']:16} {row['peak_mib']:9.1f} {predicted} {again} {row['seconds']:8.3f} {ratio}"
            print(f"{line} {error:9.1e}")
    print("\nof best: seconds relative to the fastest of the peers that run the whole frame at once")


def predictions(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Measured and predicted peak of 20 plans: networks, sizes and budgets."""
    sizes = ((192, 256), (256, 192)) if options.quick else ((1024, 1024), (2048, 512))
    results = []
    for network in NETWORKS:
        for size in sizes:
            base = {"network": network, "size": size, "threads": options.threads, "work": str(work)}
            base |= child("find_smallest", base)
            for budget in ("smallest", "smallest*1.5"):
                result = child("measure", {**base, "contestant": f"xrk:{budget}", "repeats": 0})
                row = {"network": network, "size": size, "budget": budget, "smallest": base.get("smallest"), **result}
                results.append(row)
                if "failed" in row:
                    print(f"{network:24} {size[0]:5}x{size[1]:<5} {budget:13} failed: {row['failed']}")
                    continue
                row["ratio"] = row["peak_mib"] / row["predicted_mib"]
                figures = f"{row['peak_mib']:8.1f} of {row['predicted_mib']:8.1f} MiB = {row['ratio']:.3f}"
                wrong = "" if 0.8 <= row["ratio"] <= 1.0 else "   outside 0.8 - 1.0"
                print(f"{network:24} {size[0]:5}x{size[1]:<5} {budget:13} {figures}{wrong}", flush=True)
    return results


def main() -> int:
    if sys.argv[1:2] == ["child"]:
        actions = {"measure": measure, "export": export, "find_smallest": find_smallest}
        result = actions[sys.argv[2]](json.loads(sys.argv[3]))
        print(json.dumps(result))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("table", "predictions"))
    parser.add_argument("--sizes", nargs="+", default=None, help="HxW; 2048x2048 and 8192x2048")
    parser.add_argument("--budgets", nargs="+", default=["none", "smallest", "180MiB", "256MiB", "512MiB"])
    parser.add_argument("--only", nargs="+", help="these contestants alone")
    parser.add_argument("--network", default="resnet18-unet", choices=NETWORKS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="runs in each process after the first")
    parser.add_argument("--quick", action="store_true", help="small frames, one round: whether everything runs")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.repeats = 1, 1
    options.sizes = options.sizes or (["256x320"] if options.quick else ["2048x2048", "8192x2048"])
    with tempfile.TemporaryDirectory(prefix="xrk-bench-runtime-") as folder:
        if options.what == "table":
            results = table(options, Path(folder))
            show_table(results)
        else:
            results = predictions(options, Path(folder))
    document = {"benchmark": f"runtime {options.what}", **machine(options.threads), "results": results}
    output = options.output or ROOT / "benchmarks" / "results" / f"runtime_{options.what}_{document['date'][:10]}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{output}")
    return 1 if any("failed" in row for row in results) else 0


if __name__ == "__main__":
    sys.exit(main())
