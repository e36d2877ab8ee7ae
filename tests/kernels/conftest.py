"""One call of every operator, with its float64 reference: for tests that hold for all of them alike.

And Triton's interpreter, for the kernels where there is no GPU.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from xrk.kernels.arguments import compute_dtype
from xrk.kernels.convolution.conv2d import conv2d_reference
from xrk.kernels.convolution.conv2d_pair import conv2d_pair_reference
from xrk.kernels.convolution.depthwise_conv2d import depthwise_conv2d_reference
from xrk.kernels.deformable.deform_conv2d import deform_conv2d_reference
from xrk.kernels.normalization.group_norm import group_norm_apply_reference, group_norm_summarise_reference
from xrk.kernels.normalization.layer_norm import layer_norm_reference
from xrk.kernels.scan import reference
from xrk.kernels.wavelet.wavelet2d import wavelet2d_inverse_reference, wavelet2d_reference

from xrk import kernels


@dataclass
class Call:
    function: Callable
    reference: Callable
    inputs: dict[str, torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> tuple[torch.Tensor, ...]:
        return _tuple(self.function(**self.inputs, **self.options))

    def expected(self) -> tuple[torch.Tensor, ...]:
        """In float64, on the CPU."""
        return _tuple(self.reference(**{name: t.double().cpu() for name, t in self.inputs.items()}, **self.options))


def _tuple(result):
    return result if isinstance(result, tuple) else (result,)


def _group_norm_reference(x, num_groups, weight, bias, activation):
    return group_norm_apply_reference(x, group_norm_summarise_reference(x, num_groups), weight, bias, 1e-5, activation)


def _scan_lines(function, x, **others):
    """Phase 3 adds to a map that it is given: here to ones."""
    out = torch.ones(x.shape, dtype=compute_dtype(x.dtype), device=x.device)
    state = function(x, **others, out=out)
    return out, state


def _make(device="cpu", dtype=torch.float32, height=6, width=7, channels=20, seed=0) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(seed)
    # Parameters may stay in float32 beside maps of half precision; the scans' do, the layers' do not here.
    single = dtype if dtype == torch.float64 else torch.float32

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    def image(c=channels):
        return normal(2, c, height, width).contiguous(memory_format=torch.channels_last)

    states, rank, length = 16, 2, height * width
    weights = {
        "x_proj_weight": normal(4, rank + 2 * states, channels, dtype=single) / channels**0.5,
        "dt_projs_weight": normal(4, channels, rank, dtype=single),
        "dt_projs_bias": normal(4, channels, dtype=single) - 2,
        "A_logs": 0.7 * normal(4 * channels, states, dtype=single),
    }
    skip = {"Ds": normal(4 * channels, dtype=single)}
    x = normal(2, height, width, channels)
    vectors = {"weight": normal(channels), "bias": normal(channels)}
    sequences = {name: normal(2, length, channels).transpose(1, 2) for name in ("u", "delta", "z")}
    return {
        "selective_scan_2d": Call(
            kernels.selective_scan_2d, reference.selective_scan_2d_reference, {"x": x, **weights, **skip}
        ),
        "selective_scan": Call(
            lambda **inputs: kernels.selective_scan(**inputs, return_last_state=True),
            reference.selective_scan_reference,
            {
                **sequences,
                "A": -torch.exp(0.7 * normal(channels, states, dtype=single)),
                "B": normal(2, states, length),
                "C": normal(2, states, length),
                "D": normal(channels, dtype=single),
                "delta_bias": normal(channels, dtype=single) - 2,
            },
            {"delta_softplus": True},
        ),
        "summarise_lines": Call(
            kernels.summarise_lines, reference.summarise_lines_reference, {"x": x, **weights}, {"direction": 3}
        ),
        "scan_lines": Call(
            partial(_scan_lines, kernels.scan_lines),
            partial(_scan_lines, reference.scan_lines_reference),
            {"x": x, **weights, **skip, "starts": normal(2, height, channels, states, dtype=single)},
            {"direction": 2},
        ),
        "layer_norm": Call(
            kernels.layer_norm,
            layer_norm_reference,
            {"x": x, **vectors, "gate": normal(2, height, width, channels)},
        ),
        "group_norm": Call(
            kernels.group_norm,
            _group_norm_reference,
            {"x": image() + 3, **vectors},
            {"num_groups": 5, "activation": "silu"},
        ),
        "depthwise_conv2d": Call(
            kernels.depthwise_conv2d,
            depthwise_conv2d_reference,
            {"x": image(), "weight": normal(channels, 1, 3, 3), "bias": normal(channels)},
            {"activation": "silu"},
        ),
        "deform_conv2d": Call(
            kernels.deform_conv2d,
            deform_conv2d_reference,
            {
                "x": image(),
                "offset": 2 * image(4 * 18),
                "weight": normal(8, channels, 3, 3) / 9,
                "bias": normal(8),
                "mask": image(4 * 9),
            },
            {"padding": 1},
        ),
        "wavelet2d": Call(kernels.wavelet2d, wavelet2d_reference, {"x": normal(2, height, width)}, {"wavelet": "db4"}),
        "wavelet2d_inverse": Call(
            kernels.wavelet2d_inverse,
            wavelet2d_inverse_reference,
            {"bands": normal(2, 4, height, width)},
            {"wavelet": "db4"},
        ),
        "conv2d": Call(
            kernels.conv2d,
            conv2d_reference,
            {"x": image(), "weight": normal(8, channels, 3, 3) / 9, "bias": normal(8), "residual": image(8)},
            {"padding": 1, "activation": "silu"},
        ),
        "conv2d_pair": Call(
            kernels.conv2d_pair,
            conv2d_pair_reference,
            {
                "x": image(),
                "weight1": normal(8, channels, 3, 3) / 9,
                "bias1": normal(8),
                "weight2": normal(channels, 8, 3, 3) / 9,
                "bias2": normal(channels),
                "residual": image(),
            },
        ),
    }


OPERATORS = list(_make())
# Called by the runtime band by band, outside of graphs.
PHASES = ("summarise_lines", "scan_lines")


def pytest_generate_tests(metafunc):
    if "operator" in metafunc.fixturenames:
        metafunc.parametrize("operator", OPERATORS)
    if "graph_operator" in metafunc.fixturenames:
        metafunc.parametrize("graph_operator", [name for name in OPERATORS if name not in PHASES])


@pytest.fixture(scope="session")
def make_calls():
    return _make


@pytest.fixture(scope="session")
def interpreted():
    """Runs one of these tests' scripts in a process of its own: Triton reads when it is imported that it interprets."""
    triton = pytest.importorskip("triton")
    if _version(triton) < (3, 7) and _version(np) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs numpy below 2.4")

    def run(script, *arguments):
        command = [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split("\n")[-2] == "all equal"

    return run


def _version(module):
    return tuple(map(int, module.__version__.split(".")[:2]))
