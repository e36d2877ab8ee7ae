"""The script for a GPU: its parts follow each other whatever becomes of one, inside the time given."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "run_on_gpu.sh"

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "timeout"))), reason="bash and coreutils' timeout are not here"
)


def run(folder, python, *arguments):
    """With another program in Python's place, which is given what Python would be."""
    stand_in = folder / "python"
    stand_in.write_text(f"#!/bin/sh\n{python}\n")
    stand_in.chmod(0o755)
    command = ["bash", str(SCRIPT), "--cpu", *arguments]
    variables = {**os.environ, "PYTHON": str(stand_in)}
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60)


def test_a_part_that_fails_keeps_none_from_running(tmp_path):
    results = tmp_path / "results"
    done = run(tmp_path, 'echo "ran $*"; case "$*" in *pip*) exit 3;; esac', "60", str(results))
    assert done.returncode == 1, done.stderr
    first, *parts = (results / "gpu_summary.txt").read_text().splitlines()
    assert first.endswith("UTC, device cpu, 60 s")
    statuses = {line.split(":")[0]: line.split(" after ")[0].split()[-1] for line in parts}
    assert statuses == {"build": "3", "numerics": "0", "layers": "0", "networks": "0", "video": "0", "large": "0"}
    for name in statuses:
        assert "ran " in (results / f"gpu_{name}.log").read_text()


def test_without_pytest_benchmark_nothing_is_timed(tmp_path):
    done = run(tmp_path, 'case "$*" in *import*benchmark*|*--benchmark-disable*) exit 1;; esac', "60", str(tmp_path))
    assert done.returncode == 1
    parts = (tmp_path / "gpu_summary.txt").read_text().splitlines()[1:]
    assert [line.split(" after ")[0] for line in parts] == [
        "build: exit status 0",
        "numerics: exit status 0",
        "layers: not run, pytest-benchmark is not here",
        "networks: exit status 0",
        "video: exit status 0",
        "large: exit status 0",
    ]


def test_it_ends_in_time(tmp_path):
    done = run(tmp_path, 'case "$*" in *pip*) sleep 40;; esac', "13", str(tmp_path / "results"))
    assert done.returncode == 1
    summary = (tmp_path / "results" / "gpu_summary.txt").read_text().splitlines()
    assert summary[1].startswith("build: exit status 124 after 1")
    assert summary[2:] == [
        f"{name}: not run, the time is over" for name in ("numerics", "layers", "networks", "video", "large")
    ]


def test_all_is_well(tmp_path):
    assert run(tmp_path, "exit 0", "60", str(tmp_path / "results")).returncode == 0


def test_parts_can_be_chosen(tmp_path):
    assert run(tmp_path, "exit 0", "--parts", "large,numerics", "60", str(tmp_path)).returncode == 0
    parts = [line.split(":")[0] for line in (tmp_path / "gpu_summary.txt").read_text().splitlines()[1:]]
    assert parts == ["build", "numerics", "large"]
    assert run(tmp_path, "exit 0", "--parts", "numeric", "60", str(tmp_path)).returncode == 1  # adds to the summary
    assert "numeric: there is no such part" in (tmp_path / "gpu_summary.txt").read_text()


def test_a_wrong_limit_is_named(tmp_path):
    done = run(tmp_path, "exit 0", "ten")
    assert done.returncode == 2
    assert "SECONDS is 'ten'; expected a whole number of seconds" in done.stderr
