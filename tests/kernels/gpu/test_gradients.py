"""Gradients on the device against those of float64 on the CPU."""

import pytest
import torch

DIFFERENTIABLE = ("selective_scan_2d", "selective_scan", "layer_norm", "depthwise_conv2d", "deform_conv2d")


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("size", [(1, 1), (29, 3), (40, 64)])
def test_of_odd_shapes(name, size, device, make_calls):
    def gradients(call, where, dtype):
        call.inputs = {key: t.detach().to(where, dtype).requires_grad_() for key, t in call.inputs.items()}
        results = call()
        generator = torch.Generator().manual_seed(3)
        for result in results:
            weights = torch.randn(result.shape, generator=generator, dtype=torch.float64)
            (result * weights.to(where, dtype)).sum().backward(retain_graph=True)
        return [t.grad for t in call.inputs.values()]

    calls = [make_calls(torch.device("cpu"), torch.float64, *size, channels=45)[name] for _ in range(2)]
    expected = gradients(calls[0], torch.device("cpu"), torch.float64)
    found = gradients(calls[1], torch.device(device), torch.float32)
    for actual, exact in zip(found, expected, strict=True):
        assert actual.dtype == torch.float32
        assert float((actual.double().cpu() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)) < 5e-5
