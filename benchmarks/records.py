"""The one schema of results, and the files they are kept in: one for each device, one line for each record.

op, shape, dtype           what was computed; shape is {letter: size}
path, peer                 which code of xrk ran (peer is null), or the peer that ran instead (path is null)
absent                     why that peer was not measured; everything measured is null then
p20, p50, p80, rounds      seconds of a run, and how many runs that is from
peak_bytes                 memory needed above what was in use before, the result counted (see peak_memory.py)
bytes, flops               the fewest that the operator must move and compute
copy_bandwidth, arithmetic_peak   bytes and operations a second, measured in the same run (see ceilings.py)
fraction, bound            the time that these two ceilings allow, as a share of p50, and which of them it is
device, threads, size      name of the device, torch's threads, the size of the run that the case belongs to
versions, commit, date     of python, torch and what else took part; of the sources ("-dirty" with changes); UTC
"""

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
FIELDS = (
    *("op", "shape", "dtype", "path", "peer", "absent", "p20", "p50", "p80", "rounds", "peak_bytes", "bytes", "flops"),
    *("copy_bandwidth", "arithmetic_peak", "fraction", "bound", "device", "threads", "size", "versions", "commit"),
    "date",
)
PACKAGES = ("torch", "triton", "numpy", "xrk", "mambapy", "mamba-ssm", "liger-kernel")


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


@functools.cache
def circumstances(device: str) -> dict[str, Any]:
    """What all records of a run have in common."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        versions["cuda"] = torch.version.cuda
    return {"device": device_name(device), "versions": versions, "commit": commit()}


def commit() -> str | None:
    """The sources' commit; XRK_COMMIT names it where they lie outside a repository."""
    if "XRK_COMMIT" in os.environ:
        return os.environ["XRK_COMMIT"]
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{name}-dirty" if changed else name


def _git(*words: str) -> str:
    command = ["git", "-C", str(RESULTS.parent), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def key(record: dict[str, Any]) -> tuple:
    """What makes two records those of one case; a later run of it takes the place of an earlier one."""
    return (record["op"], *sorted(record["shape"].items()), record["dtype"], record["device"], record["threads"])


def store(records: list[dict[str, Any]], folder: Path) -> Path:
    """Puts one case's records into the device's file, in place of those that it had of this case."""
    for record in records:
        if tuple(record) != FIELDS:
            raise ValueError(f"a record has the fields {tuple(record)}; expected {FIELDS}")
    slug = re.sub(r"[^a-z0-9]+", "-", records[0]["device"].lower()).strip("-")
    file = folder / f"ops_{slug}.json"
    kept = [record for record in load(file) if key(record) != key(records[0])] if file.exists() else []
    lines = ",\n".join(json.dumps(record) for record in sorted([*kept, *records], key=lambda r: str(key(r))))
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(f"[\n{lines}\n]\n")
    partial.replace(file)
    return file


def load(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())
