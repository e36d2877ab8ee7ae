"""SS2D's Triton kernels without a GPU: their numbers in Triton's interpreter, their machine code from its compiler.

Each needs a process of its own: what TRITON_INTERPRET says is read when Triton is imported.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

NUMBERS = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from conftest import _make
from xrk.kernels.scan import reference, triton_selective_scan_2d

for shape in [(1, 1, 1, 1, 1, 1), (2, 3, 2, 5, 2, 1), (1, 1, 5, 3, 1, 2), (1, 4, 1, 3, 1, 2)]:
    inputs = _make(*shape)
    expected = reference.selective_scan_2d_reference(*inputs)
    for dtype, bound in ((torch.float32, 3e-6), (torch.float16, 8e-3)):
        x, *weights = (tensor.float() for tensor in inputs)
        actual = triton_selective_scan_2d.selective_scan_2d(x.to(dtype), *weights)
        assert actual.dtype == dtype and actual.shape == expected.shape
        error = float((actual.double() - expected).abs().max() / expected.abs().max())
        assert error < bound, (shape, dtype, error)
"""

MACHINE_CODE = r"""
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xrk.kernels.scan import triton_selective_scan_2d
from xrk.kernels.scan.launch import walk_lines_configuration

kernel = triton_selective_scan_2d.walk_lines
tools = Path(triton.backends.nvidia.__file__).parent / "bin"
pointers = {"u": "*fp16", "rows": "*fp16"}
states, summary = int(sys.argv[1]), sys.argv[2] == "summary"
config = dict(walk_lines_configuration(states))
warps = config.pop("num_warps")
constants = {"D": 192, "R": 6, "N": states, "SUMMARY": summary, **config}
types = {}
for name in kernel.arg_names:
    integer = name in ("lines", "steps", "first", "line_stride", "step_stride")
    types[name] = "constexpr" if name in constants else "i32" if integer else pointers.get(name, "*fp32")
attributes = {
    (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if types[name].startswith("*")
}
for arch in (80, 90):
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=attributes)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([tools / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    instructions, labels, loop = [], {}, 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            back = re.search(r"BRA.*\((\.L_x_\d+)\)", instruction[1])
            if back and back[1] in labels:
                loop = max(loop, len(instructions) + 1 - labels[back[1]])
            instructions.append(instruction[1])
    spills = sum(bool(re.search("LDL|STL", instruction)) for instruction in instructions)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    updates = config["LINES"] * config["CHANNELS"] * states / (32 * warps)
    resident = 65536 // (-(-registers * 32 // 256) * 256)
    print(arch, spills, compiled.metadata.shared, resident, loop / updates)
"""


def run(code, tmp_path, *arguments, interpret=False):
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_interpreted_kernels_are_the_definition(tmp_path):
    run(NUMBERS, tmp_path, str(Path(__file__).parent), interpret=True)


# Instructions for one update of one state; a summary needs no y. For N = 1 what is measured is held, not yet the aim.
@pytest.mark.parametrize(("states", "budget"), [(16, 11), (1, 80)])
def test_the_walk_stays_in_registers_and_within_its_budget(tmp_path, states, budget):
    lines = run(MACHINE_CODE, tmp_path, str(states), "values").splitlines()
    assert [line.split()[0] for line in lines] == ["80", "90"]
    for line in lines:
        _, spills, shared, resident, per_update = map(float, re.split(" ", line))
        assert spills == 0 and shared == 0 and resident >= 8
        assert per_update <= budget
