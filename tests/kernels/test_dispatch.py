"""Which path an operator takes, what is said about it, and the one warning."""

import subprocess
import sys
import warnings

import pytest
import torch
from xrk.kernels import dispatch


@pytest.fixture
def op():
    """Registers an operator of these tests alone, and forgets it and every decision afterwards."""
    dispatch.forget()
    yield lambda **meant: dispatch.register("test_op", **meant)
    dispatch._OPS.pop("test_op", None)
    dispatch.forget()


def take(device="cpu"):
    return dispatch.take("test_op", torch.device(device))


def test_a_native_function_is_taken(op):
    op(cpu=dispatch.Native("normalise"), cuda=None)
    path, code = take()
    assert path == "native" and code is dispatch.native().normalise
    simd = dispatch.native().simd()
    assert dispatch.path_of("test_op", "cpu") == (f"native ({simd})", "the compiled module xrk._native is there")
    assert "test_op" in dispatch.ops()


def test_torch_on_purpose_is_no_fallback(op):
    op(cpu=dispatch.Torch("oneDNN's convolution"), cuda=None)
    assert take() == ("torch", None)
    assert dispatch.path_of("test_op", "cpu") == ("torch", "oneDNN's convolution")


def test_a_missing_function_falls_back_with_one_warning(op):
    op(cpu=dispatch.Native("not_there"), cuda=None)
    with pytest.warns(
        dispatch.FallbackWarning, match=r"xrk\.kernels\.test_op runs as its slow reference on cpu: .*older"
    ):
        assert take() == ("reference", None)
    assert take() == ("reference", None)  # a second warning would be an error here


def test_a_missing_extension_falls_back(op, monkeypatch):
    op(cpu=dispatch.Native("normalise"), cuda=None)
    monkeypatch.setitem(sys.modules, "xrk._native", None)
    with pytest.warns(dispatch.FallbackWarning, match=r"xrk\._native cannot be imported"):
        assert take() == ("reference", None)
    assert dispatch.path_of("test_op", "cpu").path == "reference"


def test_missing_triton_falls_back_on_cuda_only(op, monkeypatch):
    op(cpu=dispatch.Native("normalise"), cuda=dispatch.Triton("xrk.kernels.dispatch"))
    monkeypatch.setitem(sys.modules, "triton", None)
    assert take()[0] == "native"
    with pytest.warns(dispatch.FallbackWarning, match=r"on cuda: Triton cannot be imported .*; pip install triton"):
        assert take("cuda") == ("reference", None)


def test_triton_is_taken_where_it_is(op):
    triton = pytest.importorskip("triton")
    op(cpu=None, cuda=dispatch.Triton("xrk.kernels.dispatch"))
    assert take("cuda") == ("triton", dispatch)
    assert dispatch.path_of("test_op", "cuda") == ("triton", f"Triton {triton.__version__} is there")


def test_float64_takes_the_reference_where_triton_computes_in_float32(op):
    pytest.importorskip("triton")
    op(cpu=dispatch.Native("normalise"), cuda=dispatch.Triton("xrk.kernels.dispatch"))
    cuda = torch.device("cuda")
    assert dispatch.take("test_op", cuda, torch.float32)[0] == "triton"
    with pytest.warns(dispatch.FallbackWarning, match="slow reference on cuda: Triton's kernels compute in float32"):
        assert dispatch.take("test_op", cuda, torch.float64) == ("reference", None)
    assert dispatch.take("test_op", cuda, torch.float64) == ("reference", None)  # a second warning would be an error
    assert dispatch.take("test_op", torch.device("cpu"), torch.float64)[0] == "native"


def test_another_device_takes_the_reference(op):
    op(cpu=dispatch.Native("normalise"), cuda=None)
    with pytest.warns(dispatch.FallbackWarning, match="no kernel is written for meta"):
        assert take("meta") == ("reference", None)
    with pytest.warns(dispatch.FallbackWarning, match="no kernel is written for cuda"):
        assert take("cuda") == ("reference", None)


def test_asking_does_not_warn(op):
    op(cpu=dispatch.Native("not_there"), cuda=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.path_of("test_op", "cpu").path == "reference"


def test_an_op_has_one_registration(op):
    op(cpu=dispatch.Native("normalise"), cuda=None)
    op(cpu=dispatch.Native("normalise"), cuda=None)
    with pytest.raises(ValueError, match="op is 'test_op', which is registered already"):
        op(cpu=None, cuda=None)
    with pytest.raises(ValueError, match="op is 'no_such_op'; expected one of"):
        dispatch.path_of("no_such_op")


def test_triton_is_not_imported_before_it_is_needed():
    code = "import sys, xrk.kernels; from xrk.kernels import dispatch; print('triton' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False"]
