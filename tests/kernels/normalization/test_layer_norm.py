"""layer_norm: the C++ path and the reference against float64, and what torch's tracing does with it."""

import pytest
import torch
import torch.nn.functional as F
from xrk.kernels import dispatch
from xrk.kernels.normalization.layer_norm import layer_norm_reference

from xrk import _native, kernels

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
SHAPES = [(1,), (7,), (16,), (1, 33), (5, 96), (2, 3, 5, 48), (1, 1, 1, 1), (3, 11, 192), (70, 517)]


@pytest.fixture(params=_native.supported_simd())
def simd(request):
    before = _native.simd()
    _native.set_simd(request.param)
    yield request.param
    _native.set_simd(before)


def arguments(shape, dtype, mean=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=g, dtype=torch.float64) + mean).to(dtype)
    weight, bias = (torch.randn(shape[-1], generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    gate = (3 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)
    return x, weight, bias, gate


def exact(x, weight, bias, gate, eps=1e-5):
    """The definition, through torch's own operators, in float64."""
    x, weight, bias, gate = (None if t is None else t.double() for t in (x, weight, bias, gate))
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return y if gate is None else y * F.silu(gate)


def assert_close(actual, expected, dtype, scale=1.0):
    assert actual.dtype == dtype and actual.shape == expected.shape and actual.is_contiguous()
    error = (actual.double() - expected).abs().max()
    assert error <= TOLERANCE[dtype] * scale * max(1.0, expected.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_equals_the_definition(simd, shape, dtype):
    x, weight, bias, gate = arguments(shape, dtype)
    for given in [(x, weight, bias, gate), (x, None, None, None), (x, weight, None, gate), (x, None, bias, None)]:
        expected = exact(*given)
        assert_close(kernels.layer_norm(*given), expected, dtype)
        assert_close(layer_norm_reference(*given), expected, dtype)


def test_a_large_mean_costs_no_digits(simd):
    x, weight, bias, gate = arguments((64, 96), torch.float32, mean=1e4)
    expected = exact(x, weight, bias, gate)
    assert_close(kernels.layer_norm(x, weight, bias, gate), expected, torch.float32)
    assert_close(layer_norm_reference(x, weight, bias, gate), expected, torch.float32)


def test_equal_channels_give_the_bias(simd):
    bias = torch.randn(24)
    out = kernels.layer_norm(torch.full((3, 24), 4711.3), None, bias)
    assert torch.equal(out, bias.expand(3, 24))


def test_float32_parameters_beside_half_maps():
    x, weight, bias, gate = arguments((5, 96), torch.float16)
    weight, bias = weight.float() + 1e-4, bias.float()
    assert_close(kernels.layer_norm(x, weight, bias, gate), exact(x, weight, bias, gate), torch.float16)


def test_halves_of_a_projection_are_taken_as_they_lie(simd):
    both = torch.randn(2, 5, 7, 2 * 40)
    x, gate = both[..., :40], both[..., 40:]
    assert torch.equal(kernels.layer_norm(x, gate=gate), kernels.layer_norm(x.contiguous(), gate=gate.contiguous()))
    x, gate = both[:, :, ::2, :40], both.transpose(1, 2)[:, ::2, :, 40:].transpose(1, 2)
    assert torch.equal(kernels.layer_norm(x, gate=gate), kernels.layer_norm(x.contiguous(), gate=gate.contiguous()))
    x = torch.randn(1, 1, 40).expand(2, 3, 40)
    assert torch.equal(kernels.layer_norm(x), kernels.layer_norm(x.contiguous()))


def test_the_number_of_threads_changes_nothing(simd):
    x, weight, bias, gate = arguments((1031, 96), torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(kernels.layer_norm(x, weight, bias, gate))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_stored_halves_are_rounded_as_torch_does(simd, dtype):
    # Every number there is, as the gate of a pixel whose normalised values are 1 and -1: SiLU(gate), rounded once.
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    gate = bits[bits.isfinite()][:, None].expand(-1, 2).contiguous()
    x = torch.tensor([1.0, -1.0], dtype=dtype).expand_as(gate).contiguous()
    out = kernels.layer_norm(x, gate=gate, eps=1e-30)
    expected = F.silu(gate.double()) * torch.tensor([1.0, -1.0])
    ulp = torch.finfo(dtype).eps
    error = (out.double() - expected).abs()
    smallest = torch.finfo(dtype).smallest_normal * ulp
    # Below exp(-88) SiLU is taken for 0.
    assert (error <= 0.51 * ulp * expected.abs() + 0.51 * smallest + 1e-36).all()


def test_what_is_not_a_number_stays_in_its_pixel(simd):
    x = torch.randn(5, 40)
    expected = kernels.layer_norm(x)
    x[2, 3], x[3, 39] = torch.nan, torch.inf
    out = kernels.layer_norm(x)
    assert out[2:4].isnan().all()
    keep = [0, 1, 4]
    assert torch.equal(out[keep], expected[keep])


def test_extreme_gates(simd):
    gate = torch.tensor([[-torch.inf, -1e30, -200.0, -88.5, -87.0, 0.0, 88.5, 200.0, 1e30, torch.inf]])
    x = torch.tensor([[1.0, -1.0] * 5])
    out = kernels.layer_norm(x, gate=gate)[0]
    assert out[0].isnan() or out[0] == 0  # -Inf / Inf, as in torch's silu
    assert (out[1:6].abs() < 2e-36).all()
    torch.testing.assert_close(out[6:], (F.silu(gate[0]) * x[0])[6:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("without", [(), ("gate",), ("weight", "bias"), ("bias", "gate")])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_its_gradients_are_those_of_the_definition(without, dtype, bound):
    given = dict(zip(("x", "weight", "bias", "gate"), arguments((2, 3, 5, 12), torch.float64, mean=3.0), strict=True))
    given = {name: t for name, t in given.items() if name not in without}

    def gradients(function, dtype):
        own = {name: t.to(dtype).requires_grad_() for name, t in given.items()}
        y = function(**{name: own.get(name) for name in ("x", "weight", "bias", "gate")})
        (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).reshape(y.shape)).sum().backward()
        return [t.grad for t in own.values()]

    for actual, expected in zip(gradients(kernels.layer_norm, dtype), gradients(exact, torch.float64), strict=True):
        assert actual.dtype == dtype and (actual - expected).abs().max() < bound * expected.abs().max()


# inductor itself uses what torch has deprecated
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_traced_as_one_operator():
    x, weight, bias, gate = arguments((2, 6, 5, 24), torch.float32)
    torch.library.opcheck(torch.ops.xrk.layer_norm.default, (x, weight, bias, gate, 1e-5))
    torch.library.opcheck(torch.ops.xrk.layer_norm.default, (x, None, None, None, 1e-5))
    learning = (t.clone().requires_grad_() for t in (x, weight, bias, gate))
    torch.library.opcheck(torch.ops.xrk.layer_norm.default, (*learning, 1e-5))

    class Block(torch.nn.Module):
        def forward(self, x, gate):
            return kernels.layer_norm(x * 2, weight, bias, gate) + 1

    block, expected = Block(), kernels.layer_norm(x * 2, weight, bias, gate) + 1
    h, w = torch.export.Dim("h", min=2), torch.export.Dim("w", min=2)
    program = torch.export.export(block, (x, gate), dynamic_shapes=({1: h, 2: w}, {1: h, 2: w}))
    assert [str(n.target) for n in program.graph.nodes].count("xrk.layer_norm.default") == 1
    torch.testing.assert_close(program.module()(x, gate), expected)
    torch.testing.assert_close(program.module()(x[:, :3, :4], gate[:, :3, :4]), expected[:, :3, :4])
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(x, gate), expected)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": [1.0]}, TypeError, "x is a list; expected a torch tensor"),
        ({"x": torch.zeros(4, 6, dtype=torch.int32)}, TypeError, "x has dtype int32; expected float16, bfloat16"),
        ({"x": torch.zeros(())}, ValueError, r"x has shape \(\); expected"),
        ({"x": torch.zeros(4, 0)}, ValueError, r"x has shape \(4, 0\); expected at least 1"),
        ({"x": torch.zeros(0, 6)}, ValueError, r"x has shape \(0, 6\)"),
        ({"x": torch.zeros(6, 4).T, "gate": None}, ValueError, r"x has strides \(1, 4\); expected the last dimension"),
        ({"gate": torch.zeros(6, 4).T}, ValueError, r"gate has strides \(1, 4\)"),
        ({"gate": torch.zeros(4, 5)}, ValueError, r"gate has shape \(4, 5\); expected x's, \(4, 6\)"),
        ({"gate": torch.zeros(4, 6).half()}, TypeError, "gate has dtype float16; expected x's, float32"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight has shape \(5,\); expected \(6,\)"),
        ({"weight": torch.zeros(6).double()}, TypeError, "weight has dtype float64; expected float32"),
        ({"bias": torch.zeros(6, 1)}, ValueError, "bias has shape"),
        ({"bias": torch.zeros(6, device="meta")}, ValueError, "bias is on meta; expected x's device, cpu"),
        ({"eps": 0.0}, ValueError, "eps is 0.0; expected a positive finite number"),
        ({"eps": float("nan")}, ValueError, "eps is nan"),
    ],
)
def test_bad_arguments(changes, error, words):
    x = torch.zeros(4, 6)
    good = {"x": x, "weight": torch.ones(6), "bias": torch.zeros(6), "gate": x, "eps": 1e-5}
    with pytest.raises(error, match=words):
        kernels.layer_norm(**{**good, **changes})


def test_the_reference_takes_over_with_a_warning(monkeypatch):
    x, weight, bias, gate = arguments((5, 12), torch.float32)
    monkeypatch.delattr(_native, "layer_norm")
    dispatch.forget()
    try:
        with pytest.warns(dispatch.FallbackWarning, match=r"xrk\.kernels\.layer_norm runs as its slow reference"):
            out = kernels.layer_norm(x, weight, bias, gate)
        assert torch.equal(out, layer_norm_reference(x, weight, bias, gate))
    finally:
        dispatch.forget()


def test_the_path_can_be_asked_for():
    assert dispatch.path_of("layer_norm", "cpu").path == f"native ({_native.simd()})"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_result_of_large_pages(dtype):
    """Of more than 32 MiB, where large pages are asked for, from its first value to its last."""
    pixels = 2**19 + 1
    x = torch.arange(pixels, dtype=torch.float32)[:, None].remainder(251).mul(torch.linspace(-1, 1, 40)).to(dtype)
    y = kernels.layer_norm(x)
    assert y.nbytes > 2**25
    # What a pixel becomes does not depend on where it lies.
    period = kernels.layer_norm(x[:251].clone())
    assert torch.equal(y[: pixels // 251 * 251].view(-1, 251, 40), period.expand(pixels // 251, -1, -1))
    assert torch.equal(y[pixels // 251 * 251 :], period[: pixels % 251])
