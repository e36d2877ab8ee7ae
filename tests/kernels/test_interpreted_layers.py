"""Runs the checks of interpreted_layers.py in a process in which Triton interprets its kernels."""


def test_triton_kernels_equal_float64_under_the_interpreter(interpreted):
    interpreted("interpreted_layers.py")
