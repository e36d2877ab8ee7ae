"""group_norm: whole and in bands, every path against float64, and what torch's tracing does with it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from xrk.kernels import dispatch
from xrk.kernels.normalization.group_norm import group_norm_apply_reference, group_norm_summarise_reference

from xrk import _native, kernels

TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
# (B, C, H, W), groups
CASES = [((1, 1, 1, 1), 1), ((2, 6, 7, 1), 3), ((1, 32, 1, 19), 32), ((2, 48, 17, 31), 8), ((1, 20, 37, 23), 1)]


@pytest.fixture(params=_native.supported_simd())
def simd(request):
    before = _native.simd()
    _native.set_simd(request.param)
    yield request.param
    _native.set_simd(before)


def arguments(shape, dtype=torch.float32, mean=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64) + mean
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape[1], generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    return x, weight, bias


def exact(x, groups, weight, bias, activation, eps=1e-5):
    """The definition in float64."""
    values = x.double().reshape(x.shape[0], groups, -1)
    values = values - values.mean(-1, keepdim=True)
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    y = values.reshape(x.shape)
    y = y if weight is None else y * weight.double()[:, None, None]
    y = y if bias is None else y + bias.double()[:, None, None]
    return F.silu(y) if activation else y


def assert_close(actual, expected, dtype):
    assert actual.dtype == dtype and actual.shape == expected.shape
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert (actual.double() - expected).abs().max() <= TOLERANCE[dtype] * max(1.0, expected.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_every_path_equals_the_definition(simd, shape, groups, dtype):
    x, weight, bias = arguments(shape, dtype)
    for w, b, activation in [(weight, bias, "silu"), (None, None, None), (weight, None, "silu"), (None, bias, None)]:
        expected = exact(x, groups, w, b, activation)
        assert_close(kernels.group_norm(x, groups, w, b, 1e-5, activation), expected, dtype)
        state = group_norm_summarise_reference(x, groups)
        assert_close(group_norm_apply_reference(x, state, w, b, 1e-5, activation), expected, dtype)


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_a_large_mean_costs_no_digits(simd, groups):
    x, weight, bias = arguments((2, 16, 67, 53), mean=1e4)
    out = kernels.group_norm(x, groups, weight, bias, activation="silu")
    assert_close(out, exact(x, groups, weight, bias, "silu"), torch.float32)


def test_a_large_mean_with_channels_apart(simd):
    x, weight, bias = arguments((1, 16, 67, 53), mean=1e4)
    x += 100 * torch.arange(16.0)[:, None, None]
    x[0, 3, 11, 5] = 0.0  # a dead pixel
    assert_close(kernels.group_norm(x, 4, weight, bias), exact(x, 4, weight, bias, None), torch.float32)


def test_summaries_are_exact(simd):
    x, _, _ = arguments((2, 24, 61, 47), mean=1e4)
    state, expected = kernels.group_norm_summarise(x, 8), group_norm_summarise_reference(x, 8)
    assert torch.equal(state[..., 0], expected[..., 0])
    torch.testing.assert_close(state[..., 1], expected[..., 1], rtol=1e-9, atol=0)
    torch.testing.assert_close(state[..., 2], expected[..., 2], rtol=1e-6, atol=0)


def test_an_even_map_has_no_variance(simd):
    x = torch.full((1, 8, 33, 21), 4711.3).contiguous(memory_format=torch.channels_last)
    state = kernels.group_norm_summarise(x, 2)
    assert (state[..., 2] == 0).all()
    bias = torch.randn(8)
    out = kernels.group_norm(x, 2, None, bias)
    assert torch.equal(out, bias[:, None, None].expand_as(x))


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 30),
    groups=st.sampled_from([1, 2, 6, 12]),
    band=st.integers(1, 12),
    mean=st.sampled_from([0.0, -3.0, 1e4]),
    seed=st.integers(0, 2**20),
)
def test_bands_equal_the_whole(height, width, groups, band, mean, seed):
    x, weight, bias = arguments((2, 12, height, width), mean=mean, seed=seed)
    bands = [b.contiguous(memory_format=torch.channels_last) for b in x.split(band, dim=2)]
    state = torch.zeros(2, groups, 3, dtype=torch.float64)
    for rows in bands:
        state = kernels.group_norm_merge(state, kernels.group_norm_summarise(rows, groups))
    assert (state[..., 0] == 12 // groups * height * width).all()
    out = torch.cat([kernels.group_norm_apply(rows, state, weight, bias, 1e-5, "silu") for rows in bands], dim=2)
    torch.testing.assert_close(out, kernels.group_norm(x, groups, weight, bias, 1e-5, "silu"), rtol=1e-5, atol=1e-5)


def test_the_number_of_threads_changes_nothing(simd):
    x, weight, bias = arguments((3, 24, 71, 67))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(kernels.group_norm(x, 8, weight, bias, 1e-5, "silu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_is_not_a_number_spoils_its_group_alone(simd):
    x, _, _ = arguments((1, 8, 9, 9))
    x[0, 5, 3, 3] = torch.nan
    out = kernels.group_norm(x, 4)
    assert out[:, 4:6].isnan().all() and not out[:, :4].isnan().any() and not out[:, 6:].isnan().any()


# inductor itself uses what torch has deprecated
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_traced_as_two_operators():
    x, weight, bias = arguments((2, 12, 6, 5))
    state = kernels.group_norm_summarise(x, 3)
    torch.library.opcheck(torch.ops.xrk.group_norm_summarise.default, (x, 3))
    torch.library.opcheck(torch.ops.xrk.group_norm_apply.default, (x, state, weight, bias, 1e-5, "silu"))
    torch.library.opcheck(torch.ops.xrk.group_norm_apply.default, (x, state, None, None, 1e-5, None))

    class Block(torch.nn.Module):
        def forward(self, x):
            return kernels.group_norm(x * 2, 3, weight, bias, activation="silu") + 1

    block = Block()
    expected = block(x)
    dims = {2: torch.export.Dim("h", min=2), 3: torch.export.Dim("w", min=2)}
    program = torch.export.export(block, (x,), dynamic_shapes=(dims,))
    names = [str(n.target) for n in program.graph.nodes]
    assert names.count("xrk.group_norm_summarise.default") == names.count("xrk.group_norm_apply.default") == 1
    torch.testing.assert_close(program.module()(x), expected)
    smaller = x[:, :, :3, :4].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(program.module()(smaller), block(smaller))
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), expected)


X = torch.zeros(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": None}, TypeError, "x is a NoneType"),
        ({"x": X[0]}, ValueError, r"x has shape \(4, 5, 6\); expected \(B, C, H, W\)"),
        ({"x": X.contiguous()}, ValueError, r"memory_format=torch\.channels_last"),
        ({"num_groups": 3}, ValueError, "num_groups is 3; expected a divisor of x's channels, 4"),
        ({"num_groups": 0}, ValueError, "num_groups is 0"),
        ({"num_groups": 2.0}, TypeError, "num_groups is a float; expected an int"),
        ({"weight": torch.ones(5)}, ValueError, r"weight has shape \(5,\); expected \(4,\)"),
        ({"bias": torch.ones(4).half()}, TypeError, "bias has dtype float16"),
        ({"eps": -1.0}, ValueError, "eps is -1.0"),
        ({"activation": "relu"}, ValueError, "activation is 'relu'; expected one of 'silu', None"),
    ],
)
def test_bad_arguments(changes, error, words):
    good = {"x": X, "num_groups": 2, "weight": torch.ones(4), "bias": torch.zeros(4)}
    with pytest.raises(error, match=words):
        kernels.group_norm(**{**good, **changes})


STATE = torch.ones(2, 2, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        (STATE.float(), TypeError, "state has dtype float32; expected float64"),
        (STATE[0], ValueError, r"state has shape \(2, 3\); expected \(B, G, 3\)"),
        (STATE[:1], ValueError, r"state has shape \(1, 2, 3\); expected \(2, G, 3\) with a divisor G of 4"),
        (STATE.repeat(1, 3, 1), ValueError, r"state has shape \(2, 6, 3\)"),
        (STATE.to("meta"), ValueError, "state is on meta"),
    ],
)
def test_bad_states(state, error, words):
    with pytest.raises(error, match=words):
        kernels.group_norm_apply(X, state)


def test_states_of_two_maps_do_not_merge():
    with pytest.raises(ValueError, match=r"b has shape \(1, 2, 3\); expected a's, \(2, 2, 3\)"):
        kernels.group_norm_merge(STATE, STATE[:1])
    with pytest.raises(TypeError, match="a has dtype float32"):
        kernels.group_norm_merge(STATE.float(), STATE)


def test_the_reference_takes_over_with_a_warning(monkeypatch):
    x, weight, bias = arguments((1, 6, 5, 4))
    expected = kernels.group_norm(x, 3, weight, bias, activation="silu")
    monkeypatch.delattr(_native, "group_norm_summarise")
    monkeypatch.delattr(_native, "group_norm_apply")
    dispatch.forget()
    try:
        with pytest.warns(dispatch.FallbackWarning, match="runs as its slow reference") as said:
            out = kernels.group_norm(x, 3, weight, bias, activation="silu")
        assert len(said) == 2
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    finally:
        dispatch.forget()
