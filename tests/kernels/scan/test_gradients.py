"""Gradients of the scans: those of finite differences, and the C++ against torch's autograd of the reference."""

import pytest
import torch
from xrk.kernels import dispatch
from xrk.kernels.scan import backward, reference

from xrk import _native, kernels


@pytest.fixture(params=_native.supported_simd())
def path(request):
    before = _native.simd()
    _native.set_simd(request.param)
    yield request.param
    _native.set_simd(before)


def image_inputs(batch, height, width, channels, states, rank=2, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return [
        normal(batch, height, width, channels),
        normal(4, rank + 2 * states, channels) / channels**0.5,
        normal(4, channels, rank),
        normal(4, channels) - 1,
        0.7 * normal(4 * channels, states),
        normal(4 * channels),
    ]


def sequence_inputs(batch, channels, length, states, groups=0, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows = (batch, groups, states, length) if groups else (batch, states, length)
    return {
        "u": normal(batch, channels, length),
        "delta": normal(batch, channels, length),
        "A": -torch.exp(normal(channels, states)),
        "B": normal(*rows),
        "C": normal(*rows),
        "D": normal(channels),
        "z": normal(batch, channels, length),
        "delta_bias": normal(channels) - 1,
        "initial_state": normal(batch, channels, states),
    }


def gradients(function, inputs, seed=7):
    """Of a weighted sum of all that `function` returns."""
    own = [t.detach().clone().requires_grad_() for t in inputs]
    results = function(*own)
    results = results if isinstance(results, tuple) else (results,)
    g = torch.Generator().manual_seed(seed)
    total = sum((r * torch.randn(r.shape, generator=g, dtype=torch.float64).to(r.dtype)).sum() for r in results)
    total.backward()
    return [t.grad for t in own]


def close(actual, expected, bound):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert float((a.double() - e).abs().max() / e.abs().max().clamp(min=1e-30)) < bound


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (2, 3, 5, 7, 1), (1, 9, 8, 5, 16), (1, 5, 14, 34, 16), (1, 3, 4, 3, 64)]
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_of_an_image_they_are_the_reference_s(path, shape, dtype, bound):
    inputs = image_inputs(*shape)
    expected = gradients(reference.selective_scan_2d_reference, inputs)
    close(gradients(kernels.selective_scan_2d, [t.to(dtype) for t in inputs]), expected, bound)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 37, 3), (1, 34, 65, 16), (2, 12, 9, 2, 3)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_of_a_sequence_they_are_the_reference_s(path, shape, dtype, bound):
    inputs = sequence_inputs(*shape)
    length = shape[2]
    order = torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(i)) for i in range(shape[0])])

    def run(function, **more):
        def call(*tensors):
            return function(**dict(zip(inputs, tensors, strict=True)), delta_softplus=True, order=order, **more)

        return call

    expected = gradients(run(reference.selective_scan_reference), inputs.values())
    found = gradients(run(kernels.selective_scan, return_last_state=True), [t.to(dtype) for t in inputs.values()])
    close(found, expected, bound)


@pytest.mark.parametrize("without", ["D", "z", "delta_bias", "initial_state", "delta_softplus"])
def test_what_is_left_out_has_none(without):
    inputs = sequence_inputs(2, 5, 6, 3)
    options = {"delta_softplus": without != "delta_softplus"}
    inputs.pop(without, None)

    def run(function):
        return gradients(lambda *t: function(**dict(zip(inputs, t, strict=True)), **options), inputs.values())

    close(run(kernels.selective_scan), run(lambda **i: reference.selective_scan_reference(**i)[0]), 1e-12)


def test_they_are_those_of_finite_differences():
    inputs = [t.requires_grad_() for t in image_inputs(1, 2, 3, 2, 2, rank=1)]
    assert torch.autograd.gradcheck(kernels.selective_scan_2d, inputs)
    sequence = {name: t.requires_grad_() for name, t in sequence_inputs(1, 2, 5, 2).items()}

    def scan(*tensors):
        tensors = dict(zip(sequence, tensors, strict=True))
        return kernels.selective_scan(**tensors, delta_softplus=True, return_last_state=True)

    assert torch.autograd.gradcheck(scan, tuple(sequence.values()))


def test_strides_do_not_matter():
    inputs = image_inputs(1, 5, 4, 6, 3)
    expected = gradients(lambda *t: kernels.selective_scan_2d(*t).permute(0, 3, 1, 2).contiguous(), inputs)
    permuted = gradients(lambda *t: kernels.selective_scan_2d(*t).permute(0, 3, 1, 2), inputs)
    close(permuted, expected, 1e-12)
    inputs[0] = inputs[0].transpose(1, 2).contiguous()
    strided = gradients(lambda x, *t: kernels.selective_scan_2d(x.transpose(1, 2), *t).permute(0, 3, 1, 2), inputs)
    close([strided[0].transpose(1, 2), *strided[1:]], expected, 1e-12)


def test_autocast_leaves_them_in_the_dtype_of_their_inputs():
    inputs = [t.float() for t in image_inputs(1, 5, 4, 6, 3)]
    expected = gradients(kernels.selective_scan_2d, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(kernels.selective_scan_2d, inputs)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_the_slow_path_gives_the_same(monkeypatch):
    inputs = image_inputs(2, 3, 5, 4, 3)
    expected = gradients(kernels.selective_scan_2d, inputs)
    monkeypatch.setattr(dispatch, "take", lambda op, device, dtype: ("reference", None))
    close(gradients(kernels.selective_scan_2d, inputs), expected, 1e-12)


def test_the_same_bytes_for_every_number_of_threads():
    """Long enough for several blocks of steps, and for threads to be worth their start."""
    inputs = [t.float() for t in image_inputs(2, 70, 75, 40, 4)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            values = inputs[0].reshape(2, -1, 40)
            rows = values[..., :4].reshape(2, 1, -1, 4)
            A, bias = -torch.exp(inputs[4][:40]), inputs[3][0]
            u_grad = torch.zeros_like(values)
            rest = backward.scan_gradients(
                values.flip(1), None, values, values * 2, A, rows, rows + 1, bias, True, None, None, u_grad
            )
            found.append((u_grad, *rest))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_small_steps_keep_the_digits_of_their_slope():
    """dt's slope by delta is 1 - exp(-dt): so written it would be wrong by a thousandth for small steps in float32."""
    inputs = sequence_inputs(1, 8, 4, 1)
    for name in ("z", "D", "initial_state", "delta_bias"):
        del inputs[name]
    inputs["delta"] = torch.linspace(-16, -6, 32, dtype=torch.float64).reshape(1, 8, 4)
    inputs = {name: t.float().double() for name, t in inputs.items()}

    def run(function, dtype):
        def call(*tensors):
            return function(**dict(zip(inputs, tensors, strict=True)), delta_softplus=True)

        return gradients(call, [t.to(dtype) for t in inputs.values()])[1]

    expected = run(lambda **i: reference.selective_scan_reference(**i)[0], torch.float64)
    found = run(kernels.selective_scan, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=3e-5, atol=0)


def test_what_has_overflowed_its_range_has_decayed():
    inputs = image_inputs(1, 5, 7, 9, 4)
    inputs[3] = inputs[3] + 40.0  # dt of about 40: exp(dt A) below float32's range for the steeper A
    expected = gradients(reference.selective_scan_2d_reference, inputs)
    close(gradients(kernels.selective_scan_2d, [t.float() for t in inputs]), expected, 2e-5)


def test_half_precision_has_gradients_of_its_own_dtype():
    inputs = [t.float() for t in image_inputs(1, 4, 5, 8, 4)]
    inputs[0] = inputs[0].half()
    found = gradients(kernels.selective_scan_2d, inputs)
    assert [t.dtype for t in found] == [torch.float16] + [torch.float32] * 5
    close(found, gradients(reference.selective_scan_2d_reference, [t.double() for t in inputs]), 2e-3)


def test_they_are_operators_of_torch():
    inputs = [t.float().requires_grad_() for t in image_inputs(1, 3, 4, 5, 2)]
    torch.library.opcheck(torch.ops.xrk.selective_scan_2d.default, inputs)
    constants = [t.detach() for t in inputs]
    torch.library.opcheck(torch.ops.xrk.selective_scan_2d_backward.default, (constants[0] + 1, *constants))
    sequence = {name: t.float().requires_grad_() for name, t in sequence_inputs(1, 5, 6, 2).items()}
    *first, start = sequence.values()
    order = torch.arange(5, -1, -1)
    torch.library.opcheck(torch.ops.xrk.selective_scan.default, (*first, True, order, start))
    torch.library.opcheck(torch.ops.xrk.selective_scan.default, (*first[:5], None, None, None, False, None, None))
