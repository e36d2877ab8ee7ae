"""Launch configurations of the scans as data, for the launchers, the compile gate and the benchmarks alike."""

# By the largest number of states that each is for. One line and 32 lanes a program: with four channels a lane the loads
# of B and C serve four updates, and as many states as fit stay in registers beside their decay rates.
WALK_LINES = {
    16: {"LINES": 1, "CHANNELS": 128, "num_warps": 1},
    32: {"LINES": 1, "CHANNELS": 64, "num_warps": 1},
    64: {"LINES": 1, "CHANNELS": 32, "num_warps": 1},
}


def walk_lines_configuration(states: int) -> dict[str, int]:
    """The configuration of the walk along lines for this many states, 1 to 64."""
    return WALK_LINES[next(most for most in WALK_LINES if states <= most)]
