"""What the scans' Triton kernels are compiled with, and what they may cost: data for the compile gate.

Imports Triton, and so must not be imported by the operators.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from xrk.kernels.scan.launch import CARRY, walk_configuration
from xrk.kernels.scan.triton_recurrence import carry
from xrk.kernels.scan.triton_selective_scan import walk_pieces
from xrk.kernels.scan.triton_selective_scan_2d import walk_lines
from xrk.kernels.scan.triton_selective_scan_backward import back_configuration, walk_back

DTYPES = {"fp16": (16, False), "bf16": (16, True), "fp32": (32, False)}
# Instructions per update by number of states, for fp16 and at least 128 channels.
BUDGETS = {1: 30.0, 16: 11.0}


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
    """Every scan kernel x configuration x dtype."""
    yield from _lines()
    yield from _pieces()
    yield from _gradients()
    types = dict.fromkeys(("sums", "states", "initial", "last", "a"), "*fp32") | {"lines": "i32"}
    for states in (1, 16):
        constants = {"D": 192, "N": states, "LOGS": True, "INITIAL": True} | CARRY
        yield ScanCase(f"carry N{states}", carry, types, constants, constants.pop("num_warps"))


def _lines() -> Iterator[ScanCase]:
    sizes = ("lines", "pixels", "steps", "first", "line_stride", "step_stride")
    fp32 = ("dt_weight", "bias", "a_logs", "skip", "sums", "states", "y")
    switches = {
        "summary": {"SUMMARY": True, "SKIP": False, "ADD": False},
        "values": {"SUMMARY": False, "SKIP": False, "ADD": True},
        "first values": {"SUMMARY": False, "SKIP": True, "ADD": False},
        "values of a band": {"SUMMARY": False, "SKIP": True, "ADD": True},
    }
    for dtype, (bits, bfloat) in DTYPES.items():
        types = dict.fromkeys(fp32, "*fp32") | {"u": f"*{dtype}", "rows": f"*{dtype}"} | dict.fromkeys(sizes, "i32")
        for channels, states in ((96, 1), (128, 1), (192, 1), (100, 4), (128, 16), (192, 16), (192, 32), (192, 64)):
            config = walk_configuration(channels, states)
            warps = config.pop("num_warps")
            lane = config["WIDTH"] * config["BLOCKS"] // 32
            rank = channels // 32
            constants = {"D": channels, "R": rank, "N": states, "BITS": bits, "BFLOAT": bfloat} | config
            constants["PITCH"] = 4 * -(-(rank + 2 * states) * bits // 64)
            if channels == 192:
                # What the launcher finds along rows: a stride of 1 becomes a constant.
                constants["step_stride"] = 1
            budget = BUDGETS.get(states) if dtype == "fp16" and channels >= 128 else None
            for name, switch in switches.items():
                yield ScanCase(
                    f"scan lines D{channels} N{states} {name} {dtype}",
                    walk_lines,
                    types,
                    constants | switch,
                    warps,
                    updates=lane * states,
                    exponentials=lane * (states + 1),
                    # A band's own skip costs two instructions a channel more; the fused operator does not have it.
                    budget=None if name == "values of a band" else budget,
                )


def _pieces() -> Iterator[ScanCase]:
    fp32 = ("a", "skip", "bias", "sums", "states")
    types = dict.fromkeys(fp32, "*fp32") | {"order": "*i64"}
    types |= dict.fromkeys(("pieces", "length", "steps", "order_stride"), "i32")
    for dtype, (bits, bfloat) in DTYPES.items():
        types |= dict.fromkeys(("u", "delta", "rows", "z", "y"), f"*{dtype}")
        for channels, states in ((128, 1), (192, 16), (256, 64)):
            config = walk_configuration(channels, states)
            warps = config.pop("num_warps")
            lane = config["WIDTH"] * config["BLOCKS"] // 32
            constants = {"D": channels, "GROUP": channels, "N": states, "BITS": bits, "BFLOAT": bfloat} | config
            for all_options in (False, True):
                switches = dict.fromkeys(("SKIP", "GATE", "BIAS", "SOFTPLUS", "ORDER"), all_options)
                for summary in (False, True):
                    if summary:
                        switches |= {"SKIP": False, "GATE": False}
                    name = f"{'summary' if summary else 'values'}{' every option' if all_options else ''}"
                    exponentials = lane * (states + all_options + (all_options and not summary))
                    yield ScanCase(
                        f"scan sequence D{channels} N{states} {name} {dtype}",
                        walk_pieces,
                        dict(types),
                        constants | switches | {"SUMMARY": summary},
                        warps,
                        updates=lane * states,
                        exponentials=exponentials,
                    )


def _gradients() -> Iterator[ScanCase]:
    fp32 = (
        "u",
        "delta",
        "b",
        "c",
        "a",
        "bias",
        "y_grad",
        "starts",
        "ends",
        "u_grad",
        "delta_grad",
        "rows_grad",
        "a_grad",
    )
    types = dict.fromkeys((*fp32, "kept"), "*fp32") | {"order": "*i64"}
    types |= dict.fromkeys(("images", "pieces", "length", "steps", "order_stride"), "i32")
    for channels, states in ((128, 1), (96, 8), (192, 16), (256, 64)):
        config = back_configuration(states)
        warps = config.pop("num_warps")
        constants = {"D": channels, "GROUP": channels, "N": states, "BIAS": True, "SOFTPLUS": True} | config
        for summary in (False, True):
            for order in (False, True):
                name = f"scan gradients D{channels} N{states}{' order' * order}{' summary' * summary}"
                own = constants | {"SUMMARY": summary, "ORDER": order}
                yield ScanCase(name, walk_back, dict(types), own, warps)
