"""The compile gate passes with its table, and fails where the machine code is worse than the table or a limit says.

In processes of its own: it compiles, and other tests' Triton may interpret.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LIMITS = """
import sys
sys.path.insert(0, sys.argv[1])
from compile_gate import Case, complaints, read

case = Case("scan", None, {}, {}, 1, resident_warps=8, required=("MUFU.EX2",), budget=11.0)
good = {"arch": 80, "spills": 0, "shared": 0, "warps_per_sm": 8, "MUFU.EX2": 17, "per_update": 11.0}
assert complaints(case, good) == []
for change, words in [
    ({"spills": 2}, "2 instructions spill registers"),
    ({"shared": 163 * 1024 + 1}, "limit 166912"),
    ({"warps_per_sm": 7}, "7 warps resident, at least 8 expected"),
    ({"MUFU.EX2": 0}, "no MUFU.EX2 in its machine code"),
    ({"per_update": 11.01}, "11.01 instructions per state update, budget 11.0"),
]:
    (said,) = complaints(case, {**good, **change})
    assert words in said, said

line = "        /*{:04x}*/                   {} ;"
code = [line.format(0, "MOV R1, c[0x0][0x28]"), ".L_x_1:", line.format(16, "MUFU.EX2 R5, R4"), ".L_x_2:"]
code += [line.format(32, "@P0 BRA `(.L_x_2)"), line.format(48, "@!P1 BRA `(.L_x_1)"), ".L_x_3:"]
code += [line.format(64, "BRA `(.L_x_3)")]
instructions, loop = read("\\n".join(code))
assert len(instructions) == 5 and [i.split()[0] for i in loop] == ["MUFU.EX2", "@P0", "@!P1"]
"""


def run(*command):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # which the gate must not heed
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


def test_limits_are_told():
    done = run("-c", LIMITS, str(BENCHMARKS))
    assert done.returncode == 0, done.stderr


def test_a_regression_is_told(tmp_path):
    table = tmp_path / "table.json"
    kernel = "group_norm merge 1 channels"
    command = (str(BENCHMARKS / "compile_gate.py"), "--only", kernel, "--arch", "80", "--table", str(table))
    done = run(*command, "--write")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 compiled, held against no table, 0 not as they should be" in done.stdout
    (row,) = json.loads(table.read_text())
    assert row["kernel"] == kernel and row["arch"] == 80 and row["registers"] > 0 and row["instructions"] > 100
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held against table.json, 0 not as they should be" in done.stdout
    done = run(*command, "--changed")
    assert done.returncode == 0 and "0 compiled, 1 unchanged, held against" in done.stdout, done.stdout + done.stderr

    # As if its source had been another, of fewer instructions: it is compiled again.
    table.write_text(json.dumps([{**row, "key": "0" * 16, "instructions": row["instructions"] // 2}]))
    done = run(*command, "--changed")
    assert done.returncode == 1 and "1 compiled, 0 unchanged" in done.stdout, done.stdout + done.stderr

    # A row whose figures break a limit is wrong even where nothing was compiled.
    table.write_text(json.dumps([{**row, "spills": 3}]))
    done = run(*command, "--changed")
    assert done.returncode == 1 and "3 instructions spill registers" in done.stdout, done.stdout + done.stderr

    # As if it had needed fewer registers before, and as if another kernel had gone.
    better, gone = {**row, "registers": row["registers"] // 2}, {**row, "kernel": f"{kernel} of old"}
    table.write_text(json.dumps([better, gone]))
    done = run(*command)
    assert done.returncode == 1
    assert f"registers {row['registers']}, {row['registers'] // 2} before" in done.stdout
    assert f"{kernel} of old" in done.stdout and "in the table, and no longer a kernel" in done.stdout
    assert "held against table.json, 2 not as they should be" in done.stdout
