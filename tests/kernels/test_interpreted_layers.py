"""Runs the checks of interpreted_layers.py in a process in which Triton interprets its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_triton_kernels_equal_float64_under_the_interpreter():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpreted_layers.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-2] == "all equal"
