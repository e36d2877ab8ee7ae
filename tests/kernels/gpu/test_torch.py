"""The operators inside torch on the device: its checks of operators, its compiler, and Triton missing."""

import sys
import warnings

import pytest
import torch
from xrk.kernels import dispatch


@pytest.fixture
def decided_anew():
    dispatch.forget()
    yield
    dispatch.forget()


def test_without_triton_it_is_the_reference(operator, device, make_calls, decided_anew, monkeypatch):
    if device == "cpu":
        pytest.skip("Triton runs nothing on a CPU")
    call = make_calls(device, torch.float32, 3, 4)[operator]
    monkeypatch.setitem(sys.modules, "triton", None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        results = call()
    messages = [str(w.message) for w in said if w.category is dispatch.FallbackWarning]
    # Where cuDNN is meant to convolve, nothing is missing.
    assert (messages or operator.startswith("conv2d")) and all("Triton cannot be imported" in m for m in messages)
    for actual, expected in zip(results, call.expected(), strict=True):
        assert float((actual.double().cpu() - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_torch_compiles_it_into_one_graph(graph_operator, device, make_calls):
    call = make_calls(device, torch.float16)[graph_operator]
    first = next(iter(call.inputs))

    def block(inputs):
        results = call.function(**{**inputs, first: inputs[first] * 2}, **call.options)
        return tuple(result + 1 for result in (results if isinstance(results, tuple) else (results,)))

    torch._dynamo.reset()
    for actual, expected in zip(torch.compile(block, fullgraph=True)(call.inputs), block(call.inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)


def test_it_is_an_operator_of_torch(operator, device, make_calls):
    call = make_calls(device, torch.float32, 3, 4)
    x, weight, bias = (call["depthwise_conv2d"].inputs[name] for name in ("x", "weight", "bias"))
    arguments = {
        "layer_norm": (*call["layer_norm"].inputs.values(), 1e-5),
        "depthwise_conv2d": (x, weight, bias, 1, "silu"),
        "selective_scan_2d": tuple(call["selective_scan_2d"].inputs.values()),
    }
    if operator not in arguments:
        pytest.skip("its arguments are opchecked on the CPU")
    op = getattr(torch.ops.xrk, operator).default
    torch.library.opcheck(op, arguments[operator], test_utils=("test_schema", "test_faketensor"))
