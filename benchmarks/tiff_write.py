"""Writing TIFF files from float rows beside tifffile, and a file larger than memory should hold, through a network.

    python benchmarks/tiff_write.py tiles --size 8192           # compressed tiles; needs imagecodecs
    python benchmarks/tiff_write.py stream --height 65536       # file to file, and the network alone

Each contestant runs in turn in one process, best of the rounds; pixels are read back and compared. Files lie in
``--folder``, by default in memory (/dev/shm), for neither side is to be measured by the disk. The stream runs in a
process of its own, whose largest resident memory the system tells.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CODECS = {"zstd": ("zstd", 1), "deflate": ("zlib", 1), "lzw": ("lzw", None)}
TILE = 512
BAND = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tiles", "stream", "child"))
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--height", type=int, default=65536)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--codecs", nargs="+", default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", default="/dev/shm" if os.path.isdir("/dev/shm") else None)
    parser.add_argument("--memory", default="300MiB", help="the budget of a stream")
    parser.add_argument("--json", help="of a child: its task")
    arguments = parser.parse_args()
    if arguments.what == "child":
        print(json.dumps(child(json.loads(arguments.json))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        (tiles if arguments.what == "tiles" else stream)(arguments, Path(folder))


def radiograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise of 16 bits, as a detector gives it: of 12000 counts some hundred are noise."""
    rng = np.random.default_rng(seed)
    smooth = 12000 + 4000 * np.sin(np.arange(width, dtype=np.float32) / 300)
    return (smooth + 110 * rng.standard_normal((height, width), dtype=np.float32)).astype(np.uint16)


# --- compressed tiles


def tiles(arguments: argparse.Namespace, folder: Path) -> None:
    import tifffile

    from xrk import io

    counts = radiograph(arguments.size, arguments.size)
    values = counts.astype(np.float32) + np.float32(0.25)
    path = folder / "out.tif"

    def ours(codec: str) -> None:
        with io.create(path, shape=counts.shape, dtype="u2", tile=(TILE, TILE), compression=codec, level=1,
                       threads=arguments.threads) as sink:  # fmt: skip
            for start in range(0, len(values), BAND):
                sink.write(slice(start, start + BAND), values[start : start + BAND])

    def peer(codec: str, workers: int | None) -> None:
        name, level = CODECS[codec]
        rounded = np.rint(values).clip(0, 65535).astype(np.uint16)
        tifffile.imwrite(
            path, rounded, tile=(TILE, TILE), compression=name, predictor=True, maxworkers=workers, metadata=None,
            compressionargs=None if level is None else {"level": level},
        )  # fmt: skip

    print(f"{arguments.size} x {arguments.size} float32 to uint16 in tiles of {TILE} x {TILE}, predictor 2")
    print(f"xrk: {arguments.threads} threads; MB/s of uint16, the best of {arguments.rounds} rounds")
    for codec in arguments.codecs or CODECS:
        contestants = {"xrk": lambda codec=codec: ours(codec)}
        for workers in (None, 1, arguments.threads, 2 * arguments.threads):
            label = f"tifffile, {'default' if workers is None else workers} workers"
            contestants[label] = lambda codec=codec, workers=workers: peer(codec, workers)
        seconds, sizes = dict.fromkeys(contestants, float("inf")), {}
        for _ in range(arguments.rounds):
            for name, run in contestants.items():
                started = time.perf_counter()
                run()
                seconds[name] = min(seconds[name], time.perf_counter() - started)
                sizes[name] = path.stat().st_size
                np.testing.assert_array_equal(tifffile.imread(path), counts)
        for name, least in seconds.items():
            speed, ratio = counts.nbytes / least / 1e6, counts.nbytes / sizes[name]
            times = least / seconds["xrk"]
            print(f"{codec:8} {name:28} {speed:7.0f}  {ratio:.2f}x smaller  {times:.2f}x of xrk's time", flush=True)


# --- a file through a network


def stream(arguments: argparse.Namespace, folder: Path) -> None:
    from xrk import io

    shape = (arguments.height, arguments.width)
    for codec in arguments.codecs or ("none", "zstd", "deflate"):
        source, target = folder / "in.tif", folder / "out.tif"
        layout = {} if codec == "none" else {"tile": (TILE, TILE)}
        with io.create(source, shape=shape, dtype="u2", compression=codec, **layout) as sink:
            for start in range(0, shape[0], BAND):
                rows = slice(start, min(start + BAND, shape[0]))
                sink.write(rows, radiograph(rows.stop - start, shape[1], start))
        figures = {}
        for task in ("network", "file to file", "codec"):
            asked = {"task": task, "source": str(source), "target": str(target), "memory": arguments.memory}
            asked["threads"] = arguments.threads
            command = [sys.executable, __file__, "child", "--json", json.dumps(asked)]
            figures[task] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        alone, whole = figures["network"], figures["file to file"]
        size = source.stat().st_size / 2**20
        print(f"{codec}: {shape[0]} x {shape[1]} uint16 ({size:.0f} MiB) through three convolutions of 8 channels")
        print(f"  network and pixel arithmetic alone {alone['seconds']:.1f} s")
        print(f"  file to file {whole['seconds']:.1f} s, {whole['seconds'] / alone['seconds']:.3f}x; {whole['plan']}")
        print(f"  resident at most {whole['resident']:.0f} MiB, of it {whole['before']:.0f} before the call")
        codec = figures["codec"]["processor"]
        least = alone["seconds"] + codec / arguments.threads
        print(
            f"  reading and writing alone take {codec:.1f} s of processor time: file to file is "
            f"{whole['seconds'] / least:.3f}x of the network and that over {arguments.threads} threads",
            flush=True,
        )
        source.unlink()
        target.unlink(missing_ok=True)


def child(asked: dict) -> dict:
    import torch
    from torch import nn

    from xrk import io
    from xrk.enhancement import enhance_file
    from xrk.job import pixels_of, prepare
    from xrk.loading import Model
    from xrk.models import Card

    torch.set_num_threads(asked["threads"])
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Conv2d(8, 1, 3, padding=1)).eval()
    model = Model(Card(name="three", architecture="dncnn", domain="unit", noise="none"), network)
    before = resident()
    started, processor = time.perf_counter(), time.process_time()
    plan = ""
    if asked["task"] == "file to file":
        plan = enhance_file(asked["source"], asked["target"], model, memory=asked["memory"], report=False).plan
    elif asked["task"] == "network":
        with io.open(asked["source"]) as source:
            rows = source.read(slice(0, 4096))
            pixels = pixels_of(source)
        # The same rows again and again, from memory and to nowhere.
        pixels = type(pixels)(pixels.shape, pixels.dtype, lambda frame, a, b: rows[: b - a])
        job = prepare(pixels, model, levels=None, noise=None, mask=None, memory=None, device=torch.device("cpu"),
                      runtime="bands")  # fmt: skip
        job.run(lambda *_: None, lambda *_: None, 0, statistics=True)
    else:
        with io.open(asked["source"]) as source, io.create(asked["target"], like=source) as sink:
            for start in range(0, source.shape[0], BAND):
                part = slice(start, min(start + BAND, source.shape[0]))
                sink.write(part, source.read(part))
    return {
        "seconds": time.perf_counter() - started, "processor": time.process_time() - processor, "plan": plan,
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "before": before,
    }  # fmt: skip


def resident() -> float:
    """MiB of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
