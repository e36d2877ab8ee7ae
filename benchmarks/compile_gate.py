"""Compiles the Triton kernels for devices that are not here, and reads from the machine code what they will need.

    python benchmarks/compile_gate.py [--arch 80 90] [--only NAME] [--listed] [--changed] [--write] [--table FILE]

Every kernel x configuration x dtype of `compile_cases.py` and of `kernels/scan/budgets.py`: it compiles, spills no
register (no LDL or STL), its shared memory is within the limit, as many warps as its floor says stay on one
multiprocessor, the machine code has the instructions that it is meant to have (vector loads, tensor cores, MUFU.EX2),
and a scan's loop stays within its budget of instructions per state update.

The figures are held against benchmarks/results/compile_<triton version>.json, where there is one: none of them may be
more than a tenth worse, and a kernel that is missing on either side is told. --write writes the rows of what it
compiled. Exits with 1 where anything is wrong, and then writes nothing.

All of them take half an hour of one core. One compiler makes the same code of the same source: --changed compiles those
cases only whose source (the kernel, all it calls, its constants and options) is not the one that the table's row was
made from, and judges the others by that row.

The tables of Triton 3.6 and 3.9 hold a part of the kernels for sm_90: --listed compiles what the table has.

Needs the triton wheel, which brings ptxas, cuobjdump and nvdisasm, and no GPU. It must run in its own process, without
TRITON_INTERPRET=1.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import compile_cases
import triton
import triton.backends.nvidia
from compile_cases import Case
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from xrk.kernels.scan import budgets

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
RESULTS = Path(__file__).parent / "results"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
TOLERATED = 1.1
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);")
LABEL = re.compile(r"^\s*(\.L_x_\d+):")
BRANCH = re.compile(r"\bBRA\b.*\((\.L_x_\d+)\)")
# Counted in each kernel's machine code, and kept in the table.
OPCODES = {
    "LDG.128": r"\bLDG\.E\.(\w+\.)*128",
    "LDG.64": r"\bLDG\.E\.(\w+\.)*64",
    "STG.128": r"\bSTG\.E\.(\w+\.)*128",
    "STG.64": r"\bSTG\.E\.(\w+\.)*64",
    "MMA": r"\bH?G?MMA\.",
    "MUFU.EX2": r"\bMUFU\.EX2",
    "BAR": r"\bBAR\.SYNC",
}
WORSE_IF_MORE = ("registers", "shared", "instructions", "per_update")
WORSE_IF_LESS = ("warps_per_sm", "LDG.128", "LDG.64", "STG.128", "STG.64", "MMA")


def cases() -> Iterator[Case]:
    yield from compile_cases.cases()
    for scan in budgets.cases():
        required = ("MUFU.EX2",) if scan.exponentials else ()
        yield Case(**vars(scan), required=required)


def source_of(case: Case) -> ASTSource:
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    aligned = [n for n in names if signature[n].startswith("*") or n in case.multiples_of_16]
    return ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )


def options_of(case: Case) -> dict[str, Any]:
    return {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}


def key_of(case: Case) -> str:
    """Says which source a row was made from. Triton's own hash: the kernel, what it calls, signature and constants."""
    return hashlib.sha256(f"{source_of(case).hash()} {options_of(case)}".encode()).hexdigest()[:16]


def compiled(case: Case, arch: int) -> dict[str, Any]:
    """What this case needs on this architecture."""
    result = triton.compile(source_of(case), target=GPUTarget("cuda", arch, 32), options=options_of(case))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = run("cuobjdump", "--dump-resource-usage", file.name)
        instructions, loop = read(run("nvdisasm", file.name))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump does not tell the registers of {case.name}: {usage[-200:]}")
    registers, stack = map(int, found.groups())
    row = {"kernel": case.name, "arch": arch, "num_warps": case.num_warps, "registers": registers, "stack": stack}
    row |= {"shared": result.metadata.shared, "instructions": len(instructions)}
    row["spills"] = count(r"\b(LDL|STL)\b", instructions)
    row["warps_per_sm"] = resident_warps(row)
    row |= {name: n for name, pattern in OPCODES.items() if (n := count(pattern, instructions))}
    if case.updates:
        # One iteration, however often the compiler unrolled the loop: its exponentials tell.
        iterations = count(OPCODES["MUFU.EX2"], loop) / case.exponentials
        row["per_update"] = round(len(loop) / case.updates / iterations, 2) if iterations else float("inf")
    return row | {"key": key_of(case)}


def run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def read(machine_code: str) -> tuple[list[str], list[str]]:
    """All instructions, and those of the longest loop: from the target of a backward branch to that branch."""
    instructions, labels, loop = [], {}, []
    for line in machine_code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            instructions.append(instruction[1])
            branch = BRANCH.search(instruction[1])
            if branch and branch[1] in labels and len(instructions) - labels[branch[1]] > len(loop):
                loop = instructions[labels[branch[1]] :]
    return instructions, loop


def count(pattern: str, instructions: list[str]) -> int:
    return sum(bool(re.search(pattern, instruction)) for instruction in instructions)


def resident_warps(row: dict[str, Any]) -> int:
    """How many warps stay on one multiprocessor at a time: registers come in blocks of 256 for each warp."""
    registers = -(-max(row["registers"], 24) * 32 // 256) * 256
    programs = min(65536 // (registers * row["num_warps"]), 64 // row["num_warps"], 32)
    if row["shared"]:
        programs = min(programs, SHARED_LIMIT[row["arch"]] // (row["shared"] + 1024))
    return programs * row["num_warps"]


def complaints(case: Case, row: dict[str, Any]) -> list[str]:
    """What is wrong with this row by itself."""
    said = []
    if row["spills"]:
        said.append(f"{row['spills']} instructions spill registers")
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        said.append(f"{row['shared']} bytes of shared memory, limit {SHARED_LIMIT[row['arch']]}")
    if row["warps_per_sm"] < case.resident_warps:
        said.append(f"{row['warps_per_sm']} warps resident, at least {case.resident_warps} expected")
    for opcode in case.required:
        if not row.get(opcode):
            said.append(f"no {opcode} in its machine code")
    if case.budget is not None and row["per_update"] > case.budget:
        said.append(f"{row['per_update']} instructions per state update, budget {case.budget}")
    return said


def regressions(row: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """What is worse in this row than in the one of the committed table."""
    if before is None:
        return ["not in the table: --write"]
    said = []
    for key in WORSE_IF_MORE:
        if row.get(key, 0) > TOLERATED * before.get(key, 0):
            said.append(f"{key} {row[key]}, {before.get(key, 0)} before")
    for key in WORSE_IF_LESS:
        if row.get(key, 0) < before.get(key, 0) / TOLERATED:
            said.append(f"{key} {row.get(key, 0)}, {before[key]} before")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description="Compiles every Triton kernel without a GPU and checks its needs.")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=sorted(SHARED_LIMIT))
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--listed", action="store_true", help="compile only what the table has")
    parser.add_argument("--changed", action="store_true", help="compile only what is not as the table had it")
    parser.add_argument("--write", action="store_true", help="write these rows instead of comparing")
    table = RESULTS / f"compile_{triton.__version__}.json"
    parser.add_argument("--table", type=Path, default=table, help="the table to compare with, or to write")
    chosen = parser.parse_args()
    before = {}
    if chosen.table.exists():
        before = {(row["kernel"], row["arch"]): row for row in json.loads(chosen.table.read_text())}
    compare = bool(before) and not chosen.write
    rows, wrong, unchanged = {}, 0, 0
    for case in cases():
        if chosen.only not in case.name:
            continue
        for arch in chosen.arch:
            row = before.get((case.name, arch))
            if chosen.listed and row is None:
                continue
            if chosen.changed and row and row.get("key") == key_of(case):
                unchanged += 1
            else:
                row = compiled(case, arch)
            said = complaints(case, row)
            if compare:
                said += regressions(row, before.get((case.name, arch)))
            wrong += bool(said)
            rows[case.name, arch] = row
            keys = ("registers", "shared", "instructions", "warps_per_sm", "per_update")
            figures = [f"{key} {row[key]:5}" for key in keys if key in row]
            print(f"{case.name:44} sm_{arch}", *figures, *said, flush=True)
    others = {key: row for key, row in before.items() if chosen.only not in key[0] or key[1] not in chosen.arch}
    for name, arch in before.keys() - rows.keys() - others.keys() if compare else ():
        print(f"{name:44} sm_{arch} in the table, and no longer a kernel: --write")
        wrong += 1
    if chosen.write and not wrong:
        chosen.table.parent.mkdir(exist_ok=True)
        table = sorted((others | rows).items())
        chosen.table.write_text("[\n" + ",\n".join(json.dumps(row) for _, row in table) + "\n]\n")
    against = f"held against {chosen.table.name}" if compare else "held against no table"
    counts = f"{len(rows) - unchanged} compiled, " + (f"{unchanged} unchanged, " if chosen.changed else "")
    print(f"triton {triton.__version__}: {counts}{against}, {wrong} not as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    # Compiled anew each time: what is checked is this compiler's code, not a cache's.
    with tempfile.TemporaryDirectory(prefix="xrk-compile-gate-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        sys.exit(main())
