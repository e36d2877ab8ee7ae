"""Launch configurations of the layers' Triton kernels as data, for the launchers, the compile gate and the benchmarks.

The scans' are in `xrk.kernels.scan.launch`.
"""

import math

# values: how many one program holds at most, a power of 2; the channels of a pixel are never split.
LAYER_NORM = {"values": 2048, "num_warps": 4}

# One program's block of one output row: pixels and channels, powers of 2.
DEPTHWISE = {"pixels": 32, "channels": 32, "num_warps": 4}

# values: of one block; programs: how many the summaries of a large map are split into, several for each multiprocessor
# of the largest device; blocks: that one program of the application normalises; merged: chunks' summaries at a time.
GROUP_NORM = {"values": 2048, "channels": 128, "programs": 2048, "blocks": 4, "merged": 256, "num_warps": 4}

# Sums that one program of conv2d holds, from one input channel, to one output channel and by the tensor cores; at most
# so many pixels, in tiles of BLOCK_H rows.
CONV2D = {"from_one": 4096, "to_one": 2048, "values": 8192, "pixels": 256, "BLOCK_H": 8, "num_warps": 8}

# Of two 3x3 in a row: a program's tile of the output, taken PIXELS at a time; programs: with a place for a tile of the
# map between the two each, 20 KiB for 32 channels of float16, which together must stay in the second-level cache;
# values: sums of one warp, at least. With fewer, the addresses cost more than the products, and ptxas, which then aims
# at more resident warps, may spill.
CONV2D_PAIR = {"BLOCK_H": 16, "BLOCK_W": 16, "PIXELS": 128, "programs": 528, "values": 512, "warps": 8}

# Values of one output map that a program makes along one axis; each thread makes several.
WAVELET = {"block": 512, "num_warps": 4}

# Pixels of one program of deform_conv2d, outputs at most, and channels at a time, powers of 2. With more channels at a
# time the four pixels around each position take the registers that the sums need.
DEFORM = {"pixels": 64, "outputs": 128, "channels": 16, "num_warps": 8}

# Where Triton convolves on CUDA (1x1 and 3x3 of stride 1 that keep the map's size), and cuDNN through torch elsewhere:
# from and to how many channels, and where that is known from. By the bandwidth model, 3x3 of C to C channels in float16
# has 4.5 C operations a byte, so that below about 41 the map's traffic decides and each pass that is saved counts; in
# float32, without tensor cores, arithmetic decides from 6 channels on.
_MODEL = "from the bandwidth model, not yet measured"
_HALF, _ALL = ("float16", "bfloat16"), ("float16", "bfloat16", "float32")
CONV2D_IN_TRITON = (
    {"inputs": (1, 1), "outputs": (1, 64), "dtypes": _ALL, "evidence": _MODEL},
    {"inputs": (2, 64), "outputs": (1, 1), "dtypes": _ALL, "evidence": _MODEL},
    {"inputs": (2, 48), "outputs": (2, 48), "dtypes": _HALF, "evidence": _MODEL},
)
# Two 3x3 in one pass: how many channels before, between and after them.
CONV2D_PAIR_IN_TRITON = {"channels": (2, 48), "dtypes": _HALF, "evidence": _MODEL}


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is not below n."""
    return 1 << (n - 1).bit_length()


def layer_norm_blocks(channels: int) -> tuple[int, int]:
    """Channels (all of them, rounded up) and pixels of one program's block."""
    block = power_of_2(channels)
    return block, max(1, LAYER_NORM["values"] // block)


def depthwise_blocks(channels: int) -> tuple[int, int]:
    """Channels and pixels of one program's block; few channels leave room for more pixels."""
    values = DEPTHWISE["pixels"] * DEPTHWISE["channels"]
    block = min(power_of_2(channels), DEPTHWISE["channels"])
    return block, values // block


def group_norm_blocks(channels: int) -> tuple[int, int]:
    """Channels and pixels of one block; many channels are split, evenly where they are multiples of 64."""
    block = 64 if channels % 64 == 0 else min(power_of_2(channels), GROUP_NORM["channels"])
    return block, GROUP_NORM["values"] // block


def group_norm_chunk(images: int, pixels: int, channels: int) -> int:
    """Pixels that one program summarises: whole blocks, by the map's shape alone: the same sums on any device."""
    block_c, block_p = group_norm_blocks(channels)
    values = images * pixels * -(-channels // block_c) * block_c
    blocks = -(-values // (GROUP_NORM["programs"] * GROUP_NORM["values"]))
    return blocks * block_p


def conv2d_in_triton(
    inputs: int, outputs: int, kernel: tuple[int, int], numbers: tuple[int, int, int, int], dtype: str
) -> bool:
    """Whether Triton's kernel is meant to run this convolution on CUDA, by the table.

    numbers: stride, padding, dilation and groups.
    """
    if kernel not in ((1, 1), (3, 3)) or numbers != (1, kernel[0] // 2, 1, 1):
        return False
    return any(
        dtype in row["dtypes"]
        and row["inputs"][0] <= inputs <= row["inputs"][1]
        and row["outputs"][0] <= outputs <= row["outputs"][1]
        for row in CONV2D_IN_TRITON
    )


def conv2d_pair_in_triton(channels: tuple[int, int, int], dtype: str) -> bool:
    """Whether Triton's kernel is meant to run two 3x3 of these channels, before, between and after, on CUDA."""
    least, most = CONV2D_PAIR_IN_TRITON["channels"]
    return dtype in CONV2D_PAIR_IN_TRITON["dtypes"] and all(least <= c <= most for c in channels)


def conv2d_pair_warps(between: int, outputs: int) -> int:
    """Warps of one program, for the wider of its two products."""
    most = max(conv2d_blocks(between, n)["BLOCK_O"] for n in (between, outputs))
    return min(CONV2D_PAIR["warps"], CONV2D_PAIR["PIXELS"] * most // CONV2D_PAIR["values"])


def deform_blocks(inputs: int, moved: int, outputs: int) -> dict[str, int]:
    """Of one program of deform_conv2d: pixels, outputs, and channels, of RUN that one offset and one group of weights
    share.

    inputs and outputs: channels of a group; moved: channels of a deformable group.
    """
    block_c = DEFORM["channels"]
    shared = math.gcd(inputs, moved)
    return {
        "RUN": block_c if shared % block_c == 0 else shared,
        "BLOCK_P": DEFORM["pixels"],
        "BLOCK_O": min(DEFORM["outputs"], max(16, power_of_2(outputs))),
        "BLOCK_C": block_c,
    }


def conv2d_blocks(inputs: int, outputs: int) -> dict[str, int]:
    """A tile's rows and columns, and the channels taken at a time: 16 at least where the tensor cores multiply."""
    # As many input channels at a time as fill whole multiples of 16: 48 go as three times 16, not as 64.
    padded = -(-inputs // 16) * 16
    block_c, block_o, values = padded & -padded, max(16, power_of_2(outputs)), CONV2D["values"]
    if inputs == 1:
        block_c, block_o, values = 1, power_of_2(outputs), CONV2D["from_one"]
    elif outputs == 1:
        block_c, block_o, values = min(16, power_of_2(inputs)), 1, CONV2D["to_one"]
    pixels = min(CONV2D["pixels"], values // max(block_c, block_o))
    return {
        "BLOCK_H": CONV2D["BLOCK_H"],
        "BLOCK_W": pixels // CONV2D["BLOCK_H"],
        "BLOCK_C": block_c,
        "BLOCK_O": block_o,
    }
