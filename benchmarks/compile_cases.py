"""What the layers' Triton kernels are compiled with, and what their machine code must have: data for the compile gate.

The scans' are in `kernels/scan/budgets.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import triton.language as tl
from xrk.kernels import launch
from xrk.kernels.convolution import triton_conv2d
from xrk.kernels.convolution.triton_depthwise_conv2d import depthwise_conv2d_kernel
from xrk.kernels.deformable.triton_deform_conv2d import deform_conv2d_kernel
from xrk.kernels.normalization import triton_group_norm
from xrk.kernels.normalization.triton_layer_norm import layer_norm_kernel
from xrk.kernels.wavelet import triton_wavelet2d

DTYPES = ("fp16", "bf16", "fp32")


@dataclass
class Case:
    """A kernel with one configuration: `types` of its run-time arguments, `constants` of the others.

    resident_warps: the fewest that must fit on one multiprocessor. required: opcodes, as the gate names them.
    updates, exponentials and budget: of a scan's loop, see `xrk.kernels.scan.budgets`.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    # Sizes that are multiples of 16 in the shapes that this configuration is for; pointers always are.
    multiples_of_16: tuple[str, ...] = field(default=())
    num_stages: int = 3
    resident_warps: int = 16
    required: tuple[str, ...] = ()
    updates: float = 0
    exponentials: float = 0
    budget: float | None = None


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        yield from layer_norm(dtype)
        yield from depthwise_conv2d(dtype)
        yield from group_norm(dtype)
        yield from conv2d(dtype)
        yield from conv2d_pair(dtype)
        yield from deform_conv2d(dtype)
    types = {"parts": "*fp32", "state": "*fp64", "chunks": "i32", "groups": "i32"}
    for per_group in (1, 6):
        constants = {"PER_GROUP": per_group, "BLOCK": launch.GROUP_NORM["merged"]}
        name = f"group_norm merge {per_group} channels"
        yield Case(name, triton_group_norm.group_norm_merge_kernel, types, constants, launch.GROUP_NORM["num_warps"])
    yield from wavelet2d()


def layer_norm(dtype: str) -> Iterator[Case]:
    for channels in (48, 96, 512):
        block_c, block_p = launch.layer_norm_blocks(channels)
        types = {name: f"*{dtype}" for name in ("x", "weight", "bias", "gate", "out")}
        types |= {"pixels": "i32", "x_stride": "i32", "gate_stride": "i32", "eps": "fp32"}
        for gated in (False, True):
            constants = {"C": channels, "BLOCK_C": block_c, "BLOCK_P": block_p}
            constants |= {"HAS_WEIGHT": True, "HAS_BIAS": True, "HAS_GATE": gated}
            name = f"layer_norm C{channels}{' gate' if gated else ''} {dtype}"
            strides = ("x_stride", "gate_stride")
            warps = launch.LAYER_NORM["num_warps"]
            yield Case(name, layer_norm_kernel, types, constants, warps, strides, required=("LDG.128", "STG.128"))


def depthwise_conv2d(dtype: str) -> Iterator[Case]:
    for channels, kernel, dilation in ((16, 3, 1), (96, 3, 1), (96, 3, 2), (96, 5, 1), (96, 5, 2)):
        block_c, block_w = launch.depthwise_blocks(channels)
        types = {"x": f"*{dtype}", "taps": "*fp32", "out": f"*{dtype}", "H": "i32", "W": "i32", "C": "i32"}
        constants = {"K": kernel, "DILATION": dilation, "BLOCK_W": block_w, "BLOCK_C": block_c, "SILU": True}
        name = f"depthwise_conv2d C{channels} {kernel}x{kernel} dilation {dilation} {dtype}"
        required = ("LDG.128", "STG.128", "MUFU.EX2")
        warps = launch.DEPTHWISE["num_warps"]
        yield Case(name, depthwise_conv2d_kernel, types, constants, warps, ("C",), required=required)


def group_norm(dtype: str) -> Iterator[Case]:
    sizes = {"pixels": "i32", "chunks": "i32", "chunk": "i32", "eps": "fp32"}
    warps = launch.GROUP_NORM["num_warps"]
    for channels in (48, 192):
        block_c, block_p = launch.group_norm_blocks(channels)
        blocks = {"C": channels, "BLOCK_C": block_c, "BLOCK_P": block_p}
        types = {"x": f"*{dtype}", "parts": "*fp32"} | sizes
        name = f"group_norm partial C{channels} {dtype}"
        kernel = triton_group_norm.group_norm_partial_kernel
        yield Case(name, kernel, types, blocks, warps, ("chunk",), required=("LDG.128",))
        types = {name: f"*{dtype}" for name in ("x", "weight", "bias", "out")} | {"state": "*fp64"} | sizes
        constants = {**blocks, "PER_GROUP": channels // 8, "BLOCKS": launch.GROUP_NORM["blocks"]}
        constants |= {"HAS_WEIGHT": True, "HAS_BIAS": True, "SILU": True}
        name = f"group_norm apply C{channels} {dtype}"
        required = ("LDG.128", "STG.128", "MUFU.EX2")
        yield Case(name, triton_group_norm.group_norm_apply_kernel, types, constants, warps, required=required)


OPERANDS = {"fp16": tl.float16, "bf16": tl.bfloat16}
LONG_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def conv2d(dtype: str) -> Iterator[Case]:
    """What the table gives to Triton: SiLU and a residual in the epilogue, which also makes summaries, or plain."""
    shapes = ((1, 32, 3), (1, 64, 3), (48, 1, 3), (16, 16, 3), (32, 32, 3), (48, 48, 3), (48, 48, 1))
    for inputs, outputs, kernel in shapes:
        if not launch.conv2d_in_triton(inputs, outputs, (kernel, kernel), (1, kernel // 2, 1, 1), LONG_DTYPES[dtype]):
            continue
        types = {name: f"*{dtype}" for name in ("x", "weight", "bias", "residual", "out")} | {"parts": "*fp32"}
        types |= dict.fromkeys(("H", "W", "tiles_h", "tiles_w"), "i32") | {"negative_slope": "fp32"}
        product = inputs > 1 and outputs > 1
        required = ("LDG.128",) * (inputs > 1) + ("STG.128",) * (outputs > 1) + ("MMA",) * product
        for full in (True, False):
            constants = {"C": inputs, "OUT": outputs, "K": kernel, "HAS_BIAS": True, "HAS_RESIDUAL": full}
            constants |= {"ADD_FIRST": False, "ACTIVATION": "silu" if full else None, "SUMMARISE": full}
            constants |= {"OPERAND": OPERANDS.get(dtype, tl.float32), **launch.conv2d_blocks(inputs, outputs)}
            name = f"conv2d {inputs} to {outputs} {kernel}x{kernel}{' SiLU residual summaries' if full else ''} {dtype}"
            case = Case(name, triton_conv2d.conv2d_kernel, types, constants, launch.CONV2D["num_warps"])
            case.num_stages, case.required, case.resident_warps = 1, required, 12
            yield case


def conv2d_pair(dtype: str) -> Iterator[Case]:
    for channels in (16, 32, 48):
        if not launch.conv2d_pair_in_triton((channels,) * 3, LONG_DTYPES[dtype]):
            continue
        maps = ("x", "weight1", "bias1", "weight2", "bias2", "residual", "out", "scratch")
        types = {name: f"*{dtype}" for name in maps}
        types |= dict.fromkeys(("H", "W", "tiles", "tiles_h", "tiles_w"), "i32") | {"negative_slope": "fp32"}
        blocks = launch.conv2d_blocks(channels, channels)
        constants = {key: launch.CONV2D_PAIR[key] for key in ("BLOCK_H", "BLOCK_W", "PIXELS")}
        constants |= {"C": channels, "M": channels, "OUT": channels, "BLOCK_C": blocks["BLOCK_C"]}
        constants |= {"BLOCK_K": blocks["BLOCK_C"], "BLOCK_M": blocks["BLOCK_O"], "BLOCK_O": blocks["BLOCK_O"]}
        constants |= {"HAS_BIAS1": True, "HAS_BIAS2": True, "HAS_RESIDUAL": True, "ADD_FIRST": True}
        constants |= {"ACTIVATION1": "relu", "ACTIVATION2": "relu", "OPERAND": OPERANDS[dtype]}
        name = f"conv2d_pair C{channels} ReLU residual {dtype}"
        warps = launch.conv2d_pair_warps(channels, channels)
        case = Case(name, triton_conv2d.conv2d_pair_kernel, types, constants, warps)
        case.num_stages, case.required, case.resident_warps = 1, ("LDG.128", "STG.128", "MMA", "BAR"), 12
        yield case


def deform_conv2d(dtype: str) -> Iterator[Case]:
    """EDVR-STF's, whose eight groups of 16 channels have offsets of their own; and with one offset for all."""
    for channels, moved in ((128, 16), (64, 64)):
        types = {name: f"*{dtype}" for name in ("x", "offset", "mask", "weight", "bias", "out")}
        types |= dict.fromkeys(("pixels", "H", "W", "C", "HO", "WO", "first_row"), "i32")
        strides = [f"{name}_{axis}" for name in ("offset", "mask") for axis in ("image", "row", "pixel")]
        types |= dict.fromkeys(strides, "i32")
        constants = {"STRIDE": 1, "PADDING": 1, "DILATION": 1, "KW": 3, "TAPS": 9, "OUT": channels}
        constants |= {"INPUTS": channels, "MOVED": moved, "GROUPS": 1}
        constants |= {"HAS_MASK": True, "HAS_BIAS": True, "OPERAND": OPERANDS.get(dtype, tl.float32)}
        constants |= launch.deform_blocks(channels, moved, channels)
        name = f"deform_conv2d C{channels} in {channels // moved} groups {dtype}"
        case = Case(name, deform_conv2d_kernel, types, constants, launch.DEFORM["num_warps"], ("C",))
        # A thread gathers four values: in half precision only the weights of many outputs come 128 bits wide.
        wide = ("LDG.128",) * (channels == 128 or dtype == "fp32")
        case.num_stages, case.required = 1, wide + ("STG.128",) + ("MMA",) * (dtype in OPERANDS)
        yield case


def wavelet2d() -> Iterator[Case]:
    numbers = ("inner", "rows", "stride")
    constants, warps = {"BLOCK": launch.WAVELET["block"]}, launch.WAVELET["num_warps"]
    for wavelet, length in (("db4", 8), ("haar", 2)):
        maps = {name: "*fp32" for name in ("x", "filters", "low", "high")}
        types = maps | dict.fromkeys(("n", *numbers, "lift"), "i32")
        kernel = triton_wavelet2d.wavelet_analysis_kernel
        yield Case(f"wavelet2d {wavelet}", kernel, types, constants | {"TAPS": length}, warps)
        maps = {name: "*fp32" for name in ("low", "high", "filters", "out")}
        types = maps | dict.fromkeys(("m", *numbers), "i32")
        kernel = triton_wavelet2d.wavelet_synthesis_kernel
        yield Case(f"wavelet2d_inverse {wavelet}", kernel, types, constants | {"TAPS": length}, warps)
