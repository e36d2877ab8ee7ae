"""lxie-net in bands against the same network in plain torch: memory, seconds and exactness of whole frames.

    python benchmarks/bench_lxie.py memory [--sizes 2048] [--budgets 1GiB] [--without loop]
    python benchmarks/bench_lxie.py time [--sizes 512]
    python benchmarks/bench_lxie.py growth [--sizes 1024 2048 4096] [--budgets 4GiB]
    python benchmarks/bench_lxie.py exact [--sizes 4096] [--budgets 4GiB] [--bands 2048 512]

Contestants, each in a process of its own for each figure, one after the other in every round:

    xrk:4GiB ...   `xrk.plan` with this budget
    band:512 ...   the plan of 512 rows at a time, without a budget (`exact` alone)
    whole          the module, its SS2D the kernel of xrk on whole maps
    loop, cumsum   the module in plain torch: SS2D as the public implementations without their CUDA kernel have it, with
                   pixels, steps, B and C of the four directions materialised, and the scan a loop over pixels, or
                   cumulative sums over 16 of them at a time (fewer where the decays' inverses would overflow)

The network is the one that xrk ships, or where there are no weights for it yet its architecture with seeded ones; the
results name which.

    peak     the process's highest resident size from the making of the plan to the end of the first run, above its
             level before; module and input lie there already
    seconds  of a run, the least of all rounds; plans are made before
    error    largest difference from the output of the first contestant of that size

The results go as JSON to --output (by default benchmarks/results/lxie_*.json). Linux only: peaks are read from /proc.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from bench_runtime import MIB, Peak, child, frame, machine

SIZES = {"memory": [2048], "time": [512], "growth": [1024, 2048, 4096], "exact": [4096]}
BUDGETS = {"memory": ["512MiB", "1GiB"], "time": ["1GiB"], "growth": ["4GiB"], "exact": ["4GiB"]}
PLAIN = ("loop", "cumsum")
CHUNK, STEEPEST = 16, 80.0  # the most steps of a cumulative sum; the decays' inverses overflow beyond exp(STEEPEST)


# --- in the measuring process ---------------------------------------------------------------------------------------


def build(weights: str) -> tuple[Any, str]:
    """lxie-net in eval mode and what its weights are; ``weights``: "shipped", or "random" for the default sizes."""
    import torch

    import xrk
    from xrk.models.lxie import LXIENet

    if weights == "shipped":
        return xrk.load("lxie-net").module, "shipped"
    torch.manual_seed(13)
    return LXIENet().eval().requires_grad_(False), "random"


def plain(module: Any, scan: Callable[..., Any]) -> Any:
    """The module with every SS2D in plain torch."""
    from torch import nn

    from xrk.models.ss2d import SS2D

    class Plain(nn.Module):
        def __init__(self, of: SS2D) -> None:
            super().__init__()
            self.of = of

        def forward(self, x: Any) -> Any:
            return _plain_ss2d(self.of, x, scan)

    for name, part in list(module.named_modules()):
        if isinstance(part, SS2D):
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, Plain(part))
    return module


def _plain_ss2d(p: Any, x: Any, scan: Callable[..., Any]) -> Any:
    import torch
    import torch.nn.functional as F

    _, height, width, _ = x.shape
    rank, states = p.dt_projs_weight.shape[-1], p.A_logs.shape[1]
    u, z = p.in_proj(x).chunk(2, -1)
    u = F.silu(p.conv2d(u.permute(0, 3, 1, 2)))[0]
    # (L, 4, D): by rows, by columns, and both reversed.
    rows, columns = u.permute(1, 2, 0).flatten(0, 1), u.permute(2, 1, 0).flatten(0, 1)
    xs = torch.stack([rows, columns, rows.flip(0), columns.flip(0)], 1)
    low, b, c = torch.einsum("lkd,kcd->lkc", xs, p.x_proj_weight).split([rank, states, states], -1)
    dt = F.softplus(torch.einsum("lkr,kdr->lkd", low, p.dt_projs_weight) + p.dt_projs_bias)
    A = -torch.exp(p.A_logs).view(4, -1, states)
    ys = scan(xs, dt, A, b, c) + xs * p.Ds.view(4, -1)
    del xs, dt
    rows = ys[:, 0] + ys[:, 2].flip(0)
    columns = (ys[:, 1] + ys[:, 3].flip(0)).view(width, height, -1).transpose(0, 1)
    y = (rows.view(height, width, -1) + columns)[None]
    return p.out_proj(p.out_norm(y) * F.silu(z))


def loop(x: Any, dt: Any, A: Any, b: Any, c: Any) -> Any:
    """y (L, 4, D), one pixel of all four directions after the other."""
    import torch

    y, h = torch.empty_like(x), x.new_zeros(A.shape)
    dtx = dt * x
    for t in range(x.shape[0]):
        h = torch.exp(dt[t, ..., None] * A).mul_(h).addcmul_(dtx[t, ..., None], b[t, :, None])
        torch.matmul(h, c[t, ..., None], out=y[t, ..., None])
    return y


def cumsum(x: Any, dt: Any, A: Any, b: Any, c: Any) -> Any:
    """y (L, 4, D): h_t = exp(A s_t) (h_0 + sum of exp(-A s_i) dt_i B_i x_i), s the running sum of dt."""
    import torch

    y, h = torch.empty_like(x), x.new_zeros(A.shape)
    chunk = max(1, min(CHUNK, int(STEEPEST / (dt.amax(0)[..., None] * A).abs().max())))
    for i in range(0, x.shape[0], chunk):
        here = slice(i, i + chunk)
        decay = dt[here].cumsum(0)[..., None] * A
        added = torch.exp(-decay).mul_((dt[here] * x[here])[..., None] * b[here, :, None])
        hs = (added.cumsum(0) + h).mul_(decay.exp_())
        y[here] = (hs @ c[here, ..., None])[..., 0]
        h = hs[-1]
    return y


def prepare(task: dict[str, Any], module: Any, notes: dict[str, Any]) -> Callable[[], Callable[[Any], Any]]:
    """A function that makes what the contestant runs."""
    from xrk.runtime.planner import make_plan

    kind, _, given = task["contestant"].partition(":")
    size = task["size"]

    def start() -> Callable[[Any], Any]:
        if kind == "whole":
            return module
        if kind in PLAIN:
            return plain(module, {"loop": loop, "cumsum": cumsum}[kind])
        options = {"memory": given} if kind == "xrk" else {"band": int(given)}
        plan = make_plan(module, (1, 1, size, size), **options)
        notes.update(predicted_mib=plan.peak_bytes / MIB, arithmetic=plan.arithmetic, band=plan.band, plan=str(plan))
        return plan.run

    return start


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """The figures of one contestant on one frame; its output is compared with the file ``reference``, or becomes it."""
    import numpy as np
    import torch

    torch.set_num_threads(task["threads"])
    module, notes = build(task["weights"])[0], {}
    x = frame(task["size"], task["size"])
    with torch.inference_mode():
        start = prepare(task, module, notes)
        with Peak() as peak:
            begun = time.perf_counter()
            run = start()
            made = time.perf_counter()
            y = run(x)
            seconds = [time.perf_counter() - made]
        for _ in range(task["repeats"]):
            begun_again = time.perf_counter()
            y = run(x)
            seconds.append(time.perf_counter() - begun_again)
    result = {"peak_mib": peak.mib, "prepare_seconds": made - begun, "seconds": min(seconds), **notes}
    path = Path(task["reference"])
    if not path.exists():
        np.save(path, y.numpy())
    expected = np.load(path, mmap_mode="r")
    pairs = [(expected[:, :, i : i + 256], y.numpy()[:, :, i : i + 256]) for i in range(0, task["size"], 256)]
    result["error"] = max(float(np.abs(a - b).max()) for a, b in pairs)
    result["largest"] = max(float(np.abs(a).max()) for a, _ in pairs)
    # As counts of a 16-bit frame whose white is 1.
    counts = [tuple(np.rint(t * 65535.0) for t in pair) for pair in pairs]
    result["counts"] = max(float(np.abs(a - b).max()) for a, b in counts)
    return result


# --- in the parent ----------------------------------------------------------------------------------------------------


def contestants(what: str, options: argparse.Namespace) -> list[str]:
    plans = [f"xrk:{budget}" for budget in options.budgets]
    found = {
        "memory": [*plans, "whole", *PLAIN],
        "time": [*plans, "whole", *PLAIN],
        "growth": plans,
        "exact": [*plans, *(f"band:{band}" for band in options.bands)],
    }[what]
    return [c for c in found if c not in options.without]


def rounds(what: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One result for each contestant and size: the least seconds and the highest peak of all rounds."""
    results: dict[tuple[int, str], dict[str, Any]] = {}
    repeats = options.repeats if what in ("time", "growth") else 0
    for _ in range(options.rounds):
        for size in options.sizes:
            for contestant in contestants(what, options):
                task = {"contestant": contestant, "size": size, "threads": options.threads, "weights": options.weights}
                # The loop takes minutes; once is enough, and generous to it.
                task |= {"repeats": 0 if contestant in PLAIN else repeats, "reference": str(folder / f"{size}.npy")}
                found = child("measure", task, timeout=24 * 3600, file=__file__)
                before = results.setdefault((size, contestant), {"size": size, "contestant": contestant, **found})
                if "failed" not in found and "failed" not in before:
                    before["seconds"] = min(before["seconds"], found["seconds"])
                    before["peak_mib"] = max(before["peak_mib"], found["peak_mib"])
                print(line(before), flush=True)
    return list(results.values())


def line(row: dict[str, Any]) -> str:
    start = f"{row['size']:5}^2 {row['contestant']:12}"
    if "failed" in row:
        return f"{start} failed: {row['failed']}"
    text = f"{start} peak {row['peak_mib']:8.1f} MiB  {row['seconds']:9.3f} s"
    text += f"  error {row['error'] / row['largest']:.1e} of the largest, {row['counts']:.0f} counts of 65535"
    if "predicted_mib" in row:
        text += f"  predicted {row['predicted_mib']:.1f} MiB, bands of {row['band']}, {row['arithmetic']:.2f}x"
    return text


def summary(what: str, results: list[dict[str, Any]]) -> list[str]:
    """What the issue asks for, from the results."""
    good = {(row["size"], row["contestant"]): row for row in results if "failed" not in row}
    lines = []
    for (size, name), row in good.items():
        if not name.startswith("xrk:"):
            continue
        peers = [(peer, good[size, peer]) for peer in ("whole", *PLAIN) if (size, peer) in good]
        if what == "memory":
            lines += [
                f"{size}^2 {name}: 1/{p['peak_mib'] / row['peak_mib']:.1f} of the memory of {n}" for n, p in peers
            ]
        if what == "time":
            lines += [f"{size}^2 {name}: {p['seconds'] / row['seconds']:.2f}x as fast as {n}" for n, p in peers]
        if what == "growth":
            first = good[min(s for s, n in good if n == name), name]
            ratio = row["seconds"] / first["seconds"] / (size / first["size"]) ** 2
            lines.append(f"{size}^2 {name}: {row['seconds'] / size**2 * 1e9:.1f} ns a pixel, {ratio:.3f} of the first")
    return lines


def main() -> int:
    if sys.argv[1:2] == ["child"]:
        print(json.dumps(measure(json.loads(sys.argv[3]))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=tuple(SIZES))
    parser.add_argument("--sizes", nargs="+", type=int, help="sides of the frames")
    parser.add_argument("--budgets", nargs="+", help="of the plans, as xrk.plan takes them")
    parser.add_argument("--bands", nargs="+", type=int, default=[2048, 512], help="rows of the plans of `exact`")
    parser.add_argument("--without", nargs="+", default=[], help="contestants to leave out: loop cumsum whole")
    parser.add_argument("--weights", choices=("shipped", "random"), help="by default the shipped, if there are any")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="runs in each process after the first")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.sizes = options.sizes or SIZES[options.what]
    options.budgets = options.budgets or BUDGETS[options.what]
    if options.weights is None:
        import xrk

        options.weights = "shipped" if "lxie-net" in {model.name for model in xrk.list_models()} else "random"
    with tempfile.TemporaryDirectory(prefix="xrk-bench-lxie-") as folder:
        results = rounds(options.what, options, Path(folder))
    lines = summary(options.what, results)
    print("", *lines, sep="\n")
    document = {"benchmark": f"lxie {options.what}", "weights": options.weights, **machine(options.threads)}
    document |= {"results": results, "summary": lines}
    output = options.output or Path(__file__).parent / "results" / f"lxie_{options.what}_{document['date'][:10]}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{output}")
    return 1 if any("failed" in row for row in results) else 0


if __name__ == "__main__":
    sys.exit(main())
