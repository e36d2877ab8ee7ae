"""Launch configurations of the layers' Triton kernels as data, for the launchers, the compile gate and the benchmarks.

The scans' are in `xrk.kernels.scan.launch`.
"""

# values: how many one program holds at most, a power of 2; the channels of a pixel are never split.
LAYER_NORM = {"values": 2048, "num_warps": 4}

# One program's block of one output row: pixels and channels, powers of 2.
DEPTHWISE = {"pixels": 32, "channels": 32, "num_warps": 4}

# values: of one block; programs: how many the summaries of a large map are split into, several for each multiprocessor
# of the largest device; blocks: that one program of the application normalises; merged: chunks' summaries at a time.
GROUP_NORM = {"values": 2048, "channels": 128, "programs": 2048, "blocks": 4, "merged": 256, "num_warps": 4}


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
