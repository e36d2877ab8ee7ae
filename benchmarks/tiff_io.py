"""TIFF files beside their peers: haloed windows of a frame, and whole files.

    python benchmarks/tiff_io.py [--side 4096] [--threads N] [--rounds 5] [--layouts LAYOUT ...] [--results FOLDER]

windows   64 windows (8 x 8) of a (side, side) uint16 frame of noise-limited counts, each with a halo of 64 pixels,
          reflected at the frame's rim, as float32 of the range 0 to 1. Contestants:
            xrk, xrk (zlib alone)         Source.read of each window, into one array that is used again
            rasterio, rasterio (counts)   a windowed read of each; GDAL's threads are named; "counts": neither
                                          padded nor made floats, which is less work than the others do
            tifffile whole                imread with so many workers, then slices of it
            tifffile zarr                 slices of its zarr view
whole     all rows of an uncompressed file in strips into memory that was touched before, once with xrk and once as a
          plain copy from the mapped file (page cache to memory).

Every run is a process of its own: it opens the file, reads and closes; imports and the check of the pixels are outside
the clock. The file is in the page cache. Rounds are interleaved: every contestant once, then every one again. Every
contestant's pixels are compared with the frame that was written.

The records have the schema of records.py and are printed by report.py: python benchmarks/report.py
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

GRID, HALO = 8, 64
LAYOUTS: dict[str, dict[str, Any]] = {
    "none-tiles": {"tile": (256, 256)},
    "deflate-tiles": {"tile": (256, 256), "compression": "zlib", "compressionargs": {"level": 6}},
    "zstd-tiles": {"tile": (256, 256), "compression": "zstd", "compressionargs": {"level": 1}},
    "lzw-tiles": {"tile": (256, 256), "compression": "lzw"},
    "none-strips": {},
    "deflate-strips": {"compression": "zlib", "compressionargs": {"level": 6}},
    "deflate-predictor-tiles": {"tile": (256, 256), "compression": "zlib", "predictor": True},
    "lzw-predictor-tiles": {"tile": (256, 256), "compression": "lzw", "predictor": True},
    "zstd-predictor-tiles": {"tile": (256, 256), "compression": "zstd", "predictor": True},
}
PACKAGES = ("tifffile", "imagecodecs", "rasterio", "zarr")


def frame(side: int) -> np.ndarray:
    """(side, side) uint16: steps and a ramp, with quantum noise."""
    rng = np.random.default_rng(14)
    row, column = np.arange(side)[:, None], np.arange(side)[None]
    mean = 2000.0 + 3000.0 * ((row // 97 + column // 61) % 5) + column * (8000.0 / side)
    return np.rint(mean + rng.standard_normal((side, side)) * np.sqrt(mean)).clip(0, 65535).astype("u2")


def windows(side: int) -> list[tuple[slice, slice]]:
    step = side // GRID
    parts = [slice(first, first + step) for first in range(0, step * GRID, step)]
    return [(rows, cols) for rows in parts for cols in parts]


# --- in the measuring process ---------------------------------------------------------------------------------------


def _clipped(part: slice, side: int) -> slice:
    return slice(max(0, part.start - HALO), min(side, part.stop + HALO))


def _finished(counts: np.ndarray, rows: slice, cols: slice, side: int) -> np.ndarray:
    """A window's counts, clipped at the frame's rim, as the padded float32 window."""
    rim = [(max(0, HALO - part.start), max(0, part.stop + HALO - side)) for part in (rows, cols)]
    return np.pad(counts, rim, mode="reflect").astype(np.float32) * np.float32(1 / 65535)


class Xrk:
    def __init__(self, path: str, side: int, threads: int, zlib_alone: bool = False) -> None:
        from xrk import _native, io

        if zlib_alone:
            _native.allow_tiff_library("libdeflate", False)
        self.open = lambda: io.open(path, threads=threads)
        step = side // GRID
        self.out = np.empty((step + 2 * HALO, step + 2 * HALO), np.float32)

    def start(self) -> None:
        self.source = self.open()

    def window(self, rows: slice, cols: slice) -> np.ndarray:
        return self.source.read(rows, cols, halo=HALO, dtype=np.float32, out=self.out)

    def stop(self) -> None:
        self.source.close()


class Rasterio:
    def __init__(self, path: str, side: int, threads: int, counts: bool = False) -> None:
        import rasterio
        from rasterio.windows import Window

        warnings.simplefilter("ignore")  # that the file is not placed on the earth
        self.path, self.side, self.counts, self.rasterio, self.kind = path, side, counts, rasterio, Window
        self.options = {"NUM_THREADS": str(threads)} if threads > 1 else {}

    def start(self) -> None:
        self.source = self.rasterio.open(self.path, **self.options)

    def window(self, rows: slice, cols: slice) -> np.ndarray:
        r, c = _clipped(rows, self.side), _clipped(cols, self.side)
        counts = self.source.read(1, window=self.kind(c.start, r.start, c.stop - c.start, r.stop - r.start))
        return counts if self.counts else _finished(counts, rows, cols, self.side)

    def stop(self) -> None:
        self.source.close()


class TifffileWhole:
    def __init__(self, path: str, side: int, threads: int) -> None:
        import tifffile

        self.path, self.side, self.threads, self.read = path, side, threads, tifffile.imread

    def start(self) -> None:
        self.whole = self.read(self.path, maxworkers=self.threads)

    def window(self, rows: slice, cols: slice) -> np.ndarray:
        return _finished(self.whole[_clipped(rows, self.side), _clipped(cols, self.side)], rows, cols, self.side)

    def stop(self) -> None:
        pass


class TifffileZarr(TifffileWhole):
    def __init__(self, path: str, side: int, threads: int) -> None:
        super().__init__(path, side, threads)
        import zarr

        self.zarr = zarr

    def start(self) -> None:
        self.store = self.read(self.path, aszarr=True)
        self.whole = self.zarr.open(self.store, mode="r")

    def stop(self) -> None:
        self.store.close()


CONTESTANTS = {
    "xrk": Xrk,
    "xrk (zlib alone)": lambda *a: Xrk(*a, zlib_alone=True),
    "rasterio": Rasterio,
    "rasterio (counts)": lambda *a: Rasterio(*a, counts=True),
    "tifffile whole": TifffileWhole,
    "tifffile zarr": TifffileZarr,
}


def time_windows(contestant: str, path: str, side: int, threads: int) -> tuple[float, int]:
    """Seconds for all windows, and a checksum of their counts."""
    reader = CONTESTANTS[contestant](path, side, threads)
    Path(path).read_bytes()
    seconds, checksum = 0.0, 0
    started = time.perf_counter()
    reader.start()
    seconds += time.perf_counter() - started
    for rows, cols in windows(side):
        started = time.perf_counter()
        window = reader.window(rows, cols)
        seconds += time.perf_counter() - started
        checksum = zlib.crc32(_counts_inside(window, rows, cols, side), checksum)
    started = time.perf_counter()
    reader.stop()
    return seconds + time.perf_counter() - started, checksum


def _counts_inside(window: np.ndarray, rows: slice, cols: slice, side: int) -> bytes:
    """The counts of a window's part inside the frame, halo included; floats must be padded by reflection."""
    if window.dtype == np.float32:
        window = np.rint(window * np.float64(65535)).astype("u2")
        rim = [(max(0, HALO - part.start), max(0, part.stop + HALO - side)) for part in (rows, cols)]
        inside = window[rim[0][0] : window.shape[0] - rim[0][1], rim[1][0] : window.shape[1] - rim[1][1]]
        if not np.array_equal(window, np.pad(inside, rim, mode="reflect")):
            raise SystemExit("the halo is not the reflection of the frame")
        window = inside
    return np.ascontiguousarray(window).tobytes()


def expected_checksum(array: np.ndarray) -> int:
    checksum = 0
    for rows, cols in windows(len(array)):
        part = array[_clipped(rows, len(array)), _clipped(cols, len(array))]
        checksum = zlib.crc32(np.ascontiguousarray(part).tobytes(), checksum)
    return checksum


def time_whole(contestant: str, path: str, side: int, threads: int) -> tuple[float, int]:
    out = np.zeros((side, side), "u2")
    Path(path).read_bytes()
    if contestant == "xrk":
        from xrk import io

        started = time.perf_counter()
        with io.open(path, threads=threads) as source:
            source.read(slice(None), slice(None), out=out)
        return time.perf_counter() - started, zlib.crc32(out)
    import tifffile

    mapped = tifffile.memmap(path, mode="r")
    mapped.max()  # every page of the mapping is there before the clock starts
    started = time.perf_counter()
    np.copyto(out, mapped)
    return time.perf_counter() - started, zlib.crc32(out)


# --- around it ------------------------------------------------------------------------------------------------------


def write_file(path: Path, array: np.ndarray, options: dict[str, Any]) -> None:
    import tifffile

    tifffile.imwrite(path, array, photometric="minisblack", metadata=None, **options)


def run(measure: str, contestant: str, path: Path, side: int, threads: int) -> tuple[float, int]:
    command = [sys.executable, __file__, "--child", measure, contestant, str(path), str(side), str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    if answer.returncode != 0:
        raise RuntimeError((answer.stderr.strip().splitlines() or ["it failed"])[-1])
    seconds, checksum = json.loads(answer.stdout)
    return seconds, checksum


def contest(measure: str, contestants: dict[str, tuple[str, int]], path: Path, side: int, rounds: int, expected: int):
    """Seconds of each run by name; a sentence for those that failed. contestants: {name: (contestant, threads)}."""
    seconds: dict[str, list[float] | str] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, (contestant, threads) in contestants.items():
            if isinstance(seconds[name], str):
                continue
            try:
                taken, checksum = run(measure, contestant, path, side, threads)
            except RuntimeError as error:
                seconds[name] = str(error)[:160]
                continue
            if checksum != expected:
                seconds[name] = "its pixels differ from those that were written"
                continue
            seconds[name].append(taken)
    return seconds


def records_of(op: str, side: int, threads: int, seconds: dict[str, list[float] | str], moved: int) -> list[dict]:
    import ceilings
    import records
    from contest import quantile

    common = records.circumstances("cpu")
    for package in PACKAGES:
        try:
            common["versions"] = {**common["versions"], package: importlib.metadata.version(package)}
        except importlib.metadata.PackageNotFoundError:
            continue
    bandwidth = ceilings.copy_bandwidth("cpu")
    rows = []
    for name, runs in seconds.items():
        absent = runs if isinstance(runs, str) else None
        quantiles = [None if absent else quantile(runs, share) for share in (0.2, 0.5, 0.8)]
        ours = name == "xrk"
        row = {
            **{"op": op, "shape": {"H": side, "W": side}, "dtype": "uint16"},
            **{"path": "xrk" if ours else None, "peer": None if ours else name, "absent": absent},
            **dict(zip(("p20", "p50", "p80"), quantiles, strict=True)),
            **{"rounds": 0 if absent else len(runs), "peak_bytes": None, "bytes": moved, "flops": 0},
            **{"copy_bandwidth": bandwidth, "arithmetic_peak": None},
            **{"fraction": None if absent else moved / bandwidth / quantiles[1], "bound": "memory"},
            **{"device": common["device"], "threads": threads, "size": "full" if side >= 4096 else "quick"},
            **{"versions": common["versions"], "commit": common["commit"], "date": records.now()},
        }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Times windows and whole files beside their peers.")
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--measures", nargs="+", choices=("windows", "whole"), default=["windows", "whole"])
    parser.add_argument("--results", type=Path, help="folder of the JSON files; by default nothing is stored")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    import records
    import report

    side, threads = options.side, options.threads
    array = frame(side)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for layout in options.layouts if "windows" in options.measures else ():
            path = Path(folder, f"{layout}.tif")
            try:
                write_file(path, array, LAYOUTS[layout])
            except Exception as error:  # a codec that is not installed
                print(f"{layout} cannot be written here: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            contestants = {"xrk": ("xrk", threads)}
            if "deflate" in layout:
                contestants["xrk (zlib alone)"] = ("xrk (zlib alone)", threads)
            for count in sorted({1, threads}):
                contestants[f"rasterio, threads={count}"] = ("rasterio", count)
                contestants[f"rasterio (counts), threads={count}"] = ("rasterio (counts)", count)
            contestants[f"tifffile whole, maxworkers={threads}"] = ("tifffile whole", threads)
            contestants["tifffile zarr"] = ("tifffile zarr", threads)
            seconds = contest("windows", contestants, path, side, options.rounds, expected_checksum(array))
            moved = path.stat().st_size + GRID * GRID * (side // GRID + 2 * HALO) ** 2 * 4
            found += records_of(f"tiff windows {layout}", side, threads, seconds, moved)
            path.unlink()
        if "whole" in options.measures:
            path = Path(folder, "whole.tif")
            write_file(path, array, LAYOUTS["none-strips"])
            contestants = {"xrk": ("xrk", threads), "copy of the mapped file": ("copy", 1)}
            seconds = contest("whole", contestants, path, side, options.rounds, zlib.crc32(array))
            found += records_of("tiff whole none-strips", side, threads, seconds, 2 * array.nbytes)
    print("\n".join(report.table(found)))
    if options.results:
        for op in dict.fromkeys(row["op"] for row in found):
            print(records.store([row for row in found if row["op"] == op], options.results), file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        measure, contestant, path, side, threads = sys.argv[2:]
        call = time_windows if measure == "windows" else time_whole
        print(json.dumps(call(contestant, path, int(side), int(threads))))
    else:
        main()
