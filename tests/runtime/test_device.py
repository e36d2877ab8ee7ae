import pytest
import torch
from torch import nn

from xrk.errors import DeviceError, InputTypeError
from xrk.runtime.device import describe_device, module_on, resolve_device


@pytest.mark.parametrize("given", [None, "cpu", "cpu:0", torch.device("cpu")])
def test_the_cpu(given):
    assert resolve_device(given) == torch.device("cpu")
    assert describe_device(resolve_device(given)) == "cpu"


def test_the_default_is_where_the_pixels_are():
    assert resolve_device(None, torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert resolve_device("cpu", torch.device("cuda", 1)) == torch.device("cpu")


@pytest.mark.parametrize("given", ["cuda:99", "gpu", "mps:3", "meta", "", "cuda:x", torch.device("meta")])
def test_a_device_that_is_not_here_is_refused_with_what_is(given):
    with pytest.raises(DeviceError, match="usable here: cpu") as caught:
        resolve_device(given)
    assert repr(str(given)) in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu():
    with pytest.raises(DeviceError, match="'cuda' is not here; usable here: cpu"):
        resolve_device("cuda")


@pytest.mark.parametrize("given", [0, 1.5, ["cpu"]])
def test_what_is_no_device(given):
    with pytest.raises(InputTypeError, match=f"{type(given).__name__}; expected"):
        resolve_device(given)


def test_a_module_is_never_moved():
    module = nn.Conv2d(1, 1, 3)
    assert module_on(module, torch.device("cpu")) is module
    elsewhere = module_on(module, torch.device("meta"))
    assert elsewhere.weight.device.type == "meta"
    assert module.weight.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_with_a_gpu():
    device = resolve_device("cuda")
    assert device.index == torch.cuda.current_device()
    assert torch.cuda.get_device_name(device) in describe_device(device)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
