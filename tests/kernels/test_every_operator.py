"""What holds for every operator alike: its reference with one warning where code is missing, and torch.compile."""

import sys
import warnings

import pytest
import torch
from xrk.kernels import dispatch

import xrk


@pytest.fixture
def decided_anew():
    """Paths are decided once a process: here they are decided again, before and after."""
    dispatch.forget()
    yield
    dispatch.forget()


def close(actual, expected, bound=1e-5):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert float((a.double().cpu() - e).abs().max() / e.abs().max()) < bound


def test_without_the_extension_it_is_the_reference_and_says_so_once(operator, make_calls, decided_anew, monkeypatch):
    call = make_calls()[operator]
    monkeypatch.setitem(sys.modules, "xrk._native", None)
    monkeypatch.delattr(xrk, "_native", raising=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        close(call(), call.expected())
        first = [str(w.message) for w in said if w.category is dispatch.FallbackWarning]
        call()
    everything = [str(w.message) for w in said if w.category is dispatch.FallbackWarning]
    assert everything == first
    if operator.startswith("conv2d"):  # torch's own convolution needs no extension
        assert not first
        return
    # group_norm is two operators; each has its warning.
    assert len(first) == (2 if operator == "group_norm" else 1)
    assert all("runs as its slow reference on cpu: the compiled module xrk._native" in message for message in first)
    assert first[0].startswith(f"xrk.kernels.{operator}")


@pytest.mark.parametrize("op", [op for op in dispatch.ops() if isinstance(dispatch._OPS[op]["cuda"], dispatch.Triton)])
def test_a_cuda_tensor_without_triton_takes_the_reference_and_says_so_once(op, decided_anew, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    cuda = torch.device("cuda")
    with pytest.warns(dispatch.FallbackWarning, match=rf"xrk\.kernels\.{op} .* on cuda: Triton cannot be imported"):
        assert dispatch.take(op, cuda) == ("reference", None)
    assert dispatch.take(op, cuda) == ("reference", None)  # a second warning would be an error here


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its compiler is imported
def test_torch_compiles_it_into_one_graph(graph_operator, make_calls):
    """With torch's default compiler, which builds C++ here: the operator between two pointwise operations."""
    call = make_calls()[graph_operator]
    first = next(iter(call.inputs))

    def block(inputs):
        results = call.function(**{**inputs, first: inputs[first] * 2}, **call.options)
        return tuple(result + 1 for result in (results if isinstance(results, tuple) else (results,)))

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    close(compiled(call.inputs), [result.double() for result in block(call.inputs)])
