"""The scans' Triton kernels without a GPU: their numbers in Triton's interpreter. The compile gate has their code."""

import pytest
from xrk.kernels.scan import launch


@pytest.mark.parametrize("what", ["image", "sequence", "gradients", "bands"])
def test_the_interpreted_kernels_are_the_definition(interpreted, what):
    interpreted("scan/interpreted_scans.py", what)


@pytest.mark.parametrize(("channels", "states", "width"), [(192, 1, 64), (192, 16, 32), (128, 16, 128), (1, 64, 32)])
def test_blocks_of_channels_are_padded_little(channels, states, width):
    config = launch.walk_configuration(channels, states)
    assert config["WIDTH"] == width
    block = config["WIDTH"] * config["BLOCKS"]
    assert -(-channels // block) * block < channels + 32


@pytest.mark.parametrize("length", [1, 31, 33, 1000, 65536])
@pytest.mark.parametrize("others", [1, 7, 10**6])
def test_a_sequence_is_cut_where_programs_are_few(length, others):
    piece = launch.piece_length(length, others)
    pieces = -(-length // piece)
    assert 1 <= piece <= length and (pieces == 1 or (piece >= launch.SHORTEST_PIECE and pieces * others <= 2048))


@pytest.mark.parametrize(
    ("shape", "bands", "segments"),
    [
        ((1, 1, 1, 1), 1, 1),
        ((1, 300, 1, 96), 1, 1),
        ((8, 64, 64, 96), 1, 2),  # 2 lines of each of 512 rows: a line has 32 steps at least
        ((1, 1024, 1024, 96), 4, 8),
        ((1, 4096, 4096, 192), 4, 1),  # two programs a line
        ((1, 2047, 4093, 96), 4, 1),  # a prime width is not cut
    ],
)
def test_large_maps_are_taken_in_bands_and_rows_are_cut_where_they_are_few(shape, bands, segments):
    rows, cut = launch.bands_of(shape, 16)
    assert (-(-shape[1] // rows), cut) == (bands, segments)
