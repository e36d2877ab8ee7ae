"""Compiles the Triton kernels for devices that are not here, and reads from the machine code what they will need.

    python benchmarks/compile_gate.py [--arch 80 90] [--only NAME] [--write]

Every kernel x configuration x dtype: it compiles, spills no register (no LDL or STL), and its shared memory is within
the limit. With --write the table goes to benchmarks/results/compile_<triton version>.json; without it, registers and
instructions may not exceed those of that table by more than a tenth. Exits with 1 where anything is wrong.

Needs the triton wheel, which brings ptxas, cuobjdump and nvdisasm, and no GPU. It must run in its own process, without
TRITON_INTERPRET=1.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="xrk-compile-gate-"))

import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from xrk.kernels import launch
from xrk.kernels.convolution.triton_depthwise_conv2d import depthwise_conv2d_kernel
from xrk.kernels.normalization.triton_layer_norm import layer_norm_kernel

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
RESULTS = Path(__file__).parent / "results"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
TOLERATED = 1.1
DTYPES = ("fp16", "bf16", "fp32")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/", re.M)


@dataclass
class Case:
    """A kernel with one configuration: `types` of its run-time arguments, `constants` of the others."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    # Sizes that are multiples of 16 in the shapes that this configuration is for; pointers always are.
    multiples_of_16: tuple[str, ...] = field(default=())


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        data = f"*{dtype}"
        for channels in (48, 96, 192, 512):
            block_c, block_p = launch.layer_norm_blocks(channels)
            types = {name: data for name in ("x", "weight", "bias", "gate", "out")}
            types |= {"pixels": "i32", "x_stride": "i32", "gate_stride": "i32", "eps": "fp32"}
            for gated in (False, True):
                constants = {"C": channels, "BLOCK_C": block_c, "BLOCK_P": block_p, "COMPUTE": tl.float32}
                constants |= {"HAS_WEIGHT": True, "HAS_BIAS": True, "HAS_GATE": gated}
                name = f"layer_norm C{channels}{' gate' if gated else ''} {dtype}"
                strides = ("x_stride", "gate_stride")
                yield Case(name, layer_norm_kernel, types, constants, launch.LAYER_NORM["num_warps"], strides)
        for channels, kernel, dilation in ((16, 3, 1), (96, 3, 1), (96, 3, 2), (96, 5, 1), (96, 5, 2)):
            block_c, block_w = launch.depthwise_blocks(channels)
            types = {"x": data, "taps": "*fp32", "out": data, "H": "i32", "W": "i32", "C": "i32"}
            constants = {"K": kernel, "DILATION": dilation, "BLOCK_W": block_w, "BLOCK_C": block_c}
            constants |= {"SILU": True, "COMPUTE": tl.float32}
            name = f"depthwise_conv2d C{channels} {kernel}x{kernel} dilation {dilation} {dtype}"
            yield Case(name, depthwise_conv2d_kernel, types, constants, launch.DEPTHWISE["num_warps"], ("C",))


def compiled(case: Case, arch: int) -> dict[str, Any]:
    """What this case needs on this architecture."""
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    aligned = [n for n in names if signature[n].startswith("*") or n in case.multiples_of_16]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": case.num_warps, "enable_fp_fusion": True}
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = run("cuobjdump", "--dump-resource-usage", file.name)
        machine_code = run("nvdisasm", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump does not tell the registers of {case.name}: {usage[-200:]}")
    registers, stack = map(int, found.groups())
    row = {"kernel": case.name, "arch": arch, "num_warps": case.num_warps, "registers": registers, "stack": stack}
    row |= {"shared": result.metadata.shared, "instructions": len(INSTRUCTION.findall(machine_code))}
    row["spills"] = len(re.findall(r"\b(?:LDL|STL)\b", machine_code))
    row["warps_per_sm"] = resident_warps(row)
    return row


def run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def resident_warps(row: dict[str, Any]) -> int:
    """How many warps stay on one multiprocessor at a time: registers come in blocks of 256 for each warp."""
    registers = -(-max(row["registers"], 24) * 32 // 256) * 256
    programs = min(65536 // (registers * row["num_warps"]), 64 // row["num_warps"], 32)
    if row["shared"]:
        programs = min(programs, SHARED_LIMIT[row["arch"]] // (row["shared"] + 1024))
    return programs * row["num_warps"]


def complaints(row: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """What is wrong with this row, given the one of the committed table."""
    said = []
    if row["spills"]:
        said.append(f"{row['spills']} instructions spill registers")
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        said.append(f"{row['shared']} bytes of shared memory, limit {SHARED_LIMIT[row['arch']]}")
    if row["warps_per_sm"] < 16:
        said.append(f"{row['warps_per_sm']} warps resident, at least 16 expected")
    for key in ("registers", "instructions"):
        if before is not None and row[key] > TOLERATED * before[key]:
            said.append(f"{key} {row[key]}, {before[key]} before")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description="Compiles every Triton kernel without a GPU and checks its needs.")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=sorted(SHARED_LIMIT))
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--write", action="store_true", help="write the table instead of comparing with it")
    chosen = parser.parse_args()
    table = RESULTS / f"compile_{triton.__version__}.json"
    known = {}
    if table.exists() and not chosen.write:
        known = {(row["kernel"], row["arch"]): row for row in json.loads(table.read_text())}
    rows, wrong = [], 0
    for case in cases():
        if chosen.only not in case.name:
            continue
        for arch in chosen.arch:
            row = compiled(case, arch)
            said = complaints(row, known.get((row["kernel"], row["arch"])))
            wrong += bool(said)
            rows.append(row)
            keys = ("registers", "shared", "instructions", "warps_per_sm")
            print(f"{case.name:44} sm_{arch}", *(f"{key} {row[key]:5}" for key in keys), *said, flush=True)
    if chosen.write and not wrong:
        table.parent.mkdir(exist_ok=True)
        table.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(f"triton {triton.__version__}: {len(rows)} compiled, {wrong} not as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
