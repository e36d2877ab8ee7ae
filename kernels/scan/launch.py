"""Launch configurations of the scans as data, for the launchers, the compile gate and the benchmarks alike."""

# Channels of one lane, at most, by the largest number of states that it is for. The loads and conversions of B and C
# serve them all, and as many states as that are kept in registers, beside their decay rates.
CHANNELS_A_LANE = {2: 8, 4: 6, 16: 4, 32: 2, 64: 1}

# What a step costs beside its channels, in channels: from the compiled kernels, N = 1 and N = 16.
STEP_OVERHEAD = 1.2

# The carry over lines: values of one program, and lines that are loaded ahead of their products.
CARRY = {"VALUES": 32, "LINES": 16, "num_warps": 1}

# The gradients: steps of a piece, whose states all lie in memory at a time; programs, each with such a piece, at most;
# values (states of channels) and channels of a program, at most.
BACK = {"steps": 64, "programs": 1056, "values": 512, "channels": 64, "num_warps": 1}

# A sequence is cut in pieces, so that there are about this many programs (8 warps on 132 multiprocessors, twice), but
# none is shorter than this many steps: its state is loaded and stored, and summarised.
PROGRAMS = 2048
SHORTEST_PIECE = 32

# Bands of rows that SS2D goes through where a map has more values than that: more bands save little memory, and each is
# some forty launches.
BANDS = 4
BANDED_VALUES = 2**24


def walk_configuration(channels: int, states: int) -> dict[str, int]:
    """The walk along lines for this many channels and states (1 to 64): BLOCKS of WIDTH channels a program, one warp.

    A power of 2 seldom divides the channels: three blocks of 64 do for 192. Few padded channels, then many a lane.
    """
    most = next(lane for n, lane in CHANNELS_A_LANE.items() if states <= n)

    def cost(lane: int) -> float:
        return -(-channels // (32 * lane)) * (STEP_OVERHEAD + lane)

    lane = min(range(1, most + 1), key=cost)
    wide = next(w for w in (4, 2, 1) if lane % w == 0)
    return {"WIDTH": 32 * wide, "BLOCKS": lane // wide, "num_warps": 1}


def piece_length(length: int, others: int) -> int:
    """How many steps of a sequence one program walks, where `others` programs walk beside each other anyway."""
    pieces = max(1, min(PROGRAMS // others, length // SHORTEST_PIECE))
    return -(-length // pieces)


def bands_of(shape: tuple[int, ...], states: int) -> tuple[int, int]:
    """Rows of a band of maps (B, H, W, D), and lines that each of its rows is cut into, so that there are PROGRAMS."""
    batch, height, width, channels = shape
    rows = height if batch * height * width * channels <= BANDED_VALUES else -(-height // BANDS)
    config = walk_configuration(channels, states)
    programs = batch * rows * -(-channels // (config["WIDTH"] * config["BLOCKS"]))
    cuts = [n for n in range(1, max(1, width // SHORTEST_PIECE) + 1) if width % n == 0]
    return rows, next((n for n in cuts if n * programs >= PROGRAMS), cuts[-1])
