"""What the scans' Triton kernels are compiled with, and what they may cost: data for the compile gate.

Imports Triton, and so must not be imported by the operators.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from xrk.kernels.scan import triton_selective_scan_2d as ss2d
from xrk.kernels.scan.launch import walk_lines_configuration

DTYPES = ("fp16", "bf16", "fp32")


@dataclass(frozen=True)
class ScanCase:
    """A kernel with one configuration, as the launcher would call it, and its budget.

    name: what it is called in tables. kernel: the `triton.jit` function. types: the signature of the arguments known at
    run time only ("*fp16", "i32"); pointers are multiples of 16 bytes, and so are the integers in `multiples_of_16`.
    constants: all other arguments. num_warps: as launched.

    updates: state updates h = exp(dt A) h + dt B u that one lane does in one iteration of the kernel's loop, 0 where
    nothing is counted. exponentials: MUFU.EX2 that one iteration takes. Instructions per update are counted so: of
    the machine code between the target of a backward branch and that branch, the longest such stretch is the loop;
    its instructions / updates, divided by (its MUFU.EX2 / exponentials), which is 1 unless the loop was unrolled.
    budget: the most instructions per update, None where a figure is recorded and only held against regression.
    resident_warps: the fewest warps that must fit on one multiprocessor.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    updates: float = 0
    exponentials: float = 0
    budget: float | None = None
    resident_warps: int = 8
    multiples_of_16: tuple[str, ...] = field(default=())


def cases() -> Iterator[ScanCase]:
    """Every scan kernel x configuration x dtype. The budget is that of fp16 at C >= 128: N = 16 <= 11, N = 1 <= 30."""
    sizes = ("lines", "steps", "first", "line_stride", "step_stride")
    for dtype in DTYPES:
        types = {name: "*fp32" for name in ("dt_weight", "bias", "a2", "skip", "sums", "states", "y")}
        types |= {"u": f"*{dtype}", "rows": f"*{dtype}"} | dict.fromkeys(sizes, "i32")
        for states in (1, 16, 32, 64):
            config = dict(walk_lines_configuration(states))
            warps = config.pop("num_warps")
            lanes = config["LINES"] * config["CHANNELS"] / (32 * warps)
            for summary in (True, False):
                yield ScanCase(
                    f"walk_lines N{states} {'summary' if summary else 'values'} {dtype}",
                    ss2d.walk_lines,
                    types,
                    {"D": 192, "R": 6, "N": states, "SUMMARY": summary, **config},
                    warps,
                    updates=lanes * states,
                    exponentials=lanes * (states + 1),
                    budget={16: 11.0}.get(states) if dtype == "fp16" else None,
                )
