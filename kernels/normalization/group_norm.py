"""Group normalisation with SiLU, its summaries apart from its application, so that a map can be taken in bands."""

import torch
import torch.nn.functional as F
from xrk.kernels import dispatch
from xrk.kernels.arguments import (
    check_channels_last,
    check_choice,
    check_device,
    check_map,
    check_parameter,
    check_positive,
    check_tensor,
    compute_dtype,
)
from xrk.kernels.operators import operator

_TRITON = dispatch.Triton("xrk.kernels.normalization.triton_group_norm")
dispatch.register("group_norm_summarise", cpu=dispatch.Native("group_norm_summarise"), cuda=_TRITON)
dispatch.register("group_norm_apply", cpu=dispatch.Native("group_norm_apply"), cuda=_TRITON)


def group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> torch.Tensor:
    """Normalises each group of C / G consecutive channels over the whole map, then SiLU where asked for.

        y = act((x - mean_g) / sqrt(var_g + eps) * weight[c] + bias[c])

    `group_norm_apply` of `group_norm_summarise`, which see; mean and var (biased) are over a group's channels and all
    pixels. With num_groups = C this is instance normalisation.

    x: (B, C, H, W) of float16, bfloat16, float32 or float64, in channels_last memory format.
    num_groups: G, a divisor of C.  weight, bias: (C) of x's dtype or float32, or None.  activation: "silu" or None.
    Returns (B, C, H, W) of x's dtype, in channels_last memory format.
    Raises TypeError for another kind or dtype, ValueError for another shape, layout, device, number or activation.
    Wu, He 2018, arXiv 1803.08494.
    """
    check_map(x, "x", "B C H W")
    check_channels_last(x, "x")
    _check_groups(x, num_groups)
    _check_affine(x, weight, bias, eps, activation)
    state = torch.ops.xrk.group_norm_summarise(x, num_groups)
    return torch.ops.xrk.group_norm_apply(x, state, weight, bias, eps, activation)


def group_norm_summarise(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """What `group_norm_apply` must know of a map or of a band of its rows: count, mean and squared deviations.

    x: (B, C, h, W) as for `group_norm`; h may be any band of the map's rows.
    Returns (B, G, 3) of float64: how many values were seen, their mean, and the sum of their squared deviations from
    it. `group_norm_merge` makes one of two bands'. Values are summed as deviations from a pixel nearby, and the sums
    merged in float64: a large mean costs no digits.
    Raises as `group_norm`.
    Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    check_map(x, "x", "B C H W")
    check_channels_last(x, "x")
    _check_groups(x, num_groups)
    return torch.ops.xrk.group_norm_summarise(x, num_groups)


def group_norm_merge(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The summaries of two bands together: (B, G, 3) as from `group_norm_summarise`, in either order.

    A summary of zeros is that of no rows at all. Raises TypeError or ValueError where a and b are no such pair.
    """
    _check_state(a, "a", None)
    _check_state(b, "b", None)
    if a.shape != b.shape:
        raise ValueError(f"b has shape {tuple(b.shape)}; expected a's, {tuple(a.shape)}")
    check_device(b, "b", a)
    count = a[..., 0] + b[..., 0]
    share = b[..., 0] / count.clamp(min=1)
    gap = b[..., 1] - a[..., 1]
    squares = a[..., 2] + b[..., 2] + gap.square() * a[..., 0] * share
    return torch.stack([count, a[..., 1] + gap * share, squares], dim=-1)


def group_norm_apply(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> torch.Tensor:
    """`group_norm` of a map, or of a band of its rows, whose summary over all rows is known.

    x: (B, C, h, W) as for `group_norm`.  state: (B, G, 3) of float64, from `group_norm_summarise` and
    `group_norm_merge`; G is its second size. The mean is subtracted as a pair of numbers, so that its rounding is not
    seen in the result.
    Returns (B, C, h, W) of x's dtype, in channels_last memory format. Raises as `group_norm`.
    """
    check_map(x, "x", "B C H W")
    check_channels_last(x, "x")
    _check_state(state, "state", x)
    _check_affine(x, weight, bias, eps, activation)
    return torch.ops.xrk.group_norm_apply(x, state, weight, bias, eps, activation)


def group_norm_summarise_reference(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """`group_norm_summarise` in plain torch, in float64 throughout."""
    values = x.double().reshape(x.shape[0], num_groups, -1)
    mean = values.mean(-1)
    squares = (values - mean[..., None]).square().sum(-1)
    return torch.stack([torch.full_like(mean, values.shape[-1]), mean, squares], dim=-1)


def group_norm_apply_reference(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> torch.Tensor:
    """`group_norm_apply` in plain torch."""
    mean, rest, scale, shift = (t[:, :, None, None] for t in _per_channel(x, state, weight, bias, eps))
    y = ((x.to(scale.dtype) - mean) - rest) * scale + shift
    y = F.silu(y) if activation == "silu" else y
    return _channels_last(x).copy_(y)


def _per_channel(
    x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, ...]:
    """Mean, what its rounding left, scale and shift for each image and channel: (B, C) of the compute dtype."""
    dtype = compute_dtype(x.dtype)
    batch, channels = x.shape[:2]
    state = state.repeat_interleave(channels // state.shape[1], dim=1)
    mean = state[..., 1].to(dtype)
    rest = (state[..., 1] - mean.double()).to(dtype)
    scale = torch.rsqrt(state[..., 2] / state[..., 0] + eps)
    if weight is not None:
        scale = scale * weight.double()
    shift = torch.zeros(channels, dtype=dtype, device=x.device) if bias is None else bias.to(dtype)
    return mean.contiguous(), rest.contiguous(), scale.to(dtype).contiguous(), shift.repeat(batch, 1)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    """An empty map like x, with the strides of channels_last also where a size of 1 leaves them open."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _check_groups(x: torch.Tensor, num_groups: int) -> None:
    if not isinstance(num_groups, int) or isinstance(num_groups, bool):
        raise TypeError(f"num_groups is a {type(num_groups).__name__}; expected an int")
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"num_groups is {num_groups}; expected a divisor of x's channels, {x.shape[1]}")


def _check_state(state: torch.Tensor, name: str, x: torch.Tensor | None) -> None:
    check_tensor(state, name)
    if state.dtype != torch.float64:
        raise TypeError(f"{name} has dtype {str(state.dtype).removeprefix('torch.')}; expected float64")
    if state.ndim != 3 or state.shape[2] != 3 or state.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(state.shape)}; expected (B, G, 3)")
    if x is None:
        return
    if state.shape[0] != x.shape[0] or x.shape[1] % state.shape[1]:
        b, c = x.shape[:2]
        raise ValueError(f"{name} has shape {tuple(state.shape)}; expected ({b}, G, 3) with a divisor G of {c}")
    check_device(state, name, x)


def _check_affine(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, activation: str | None
) -> None:
    check_parameter(weight, "weight", (x.shape[1],), x)
    check_parameter(bias, "bias", (x.shape[1],), x)
    check_positive(eps, "eps")
    check_choice(activation, "activation", ("silu", None))


@operator("xrk::group_norm_summarise", forward_only=True)
def _group_norm_summarise(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    check_map(x, "x", "B C H W")
    check_channels_last(x, "x")
    _check_groups(x, num_groups)
    path, code = dispatch.take("group_norm_summarise", x.device, x.dtype)
    if path == "reference":
        return group_norm_summarise_reference(x, num_groups)
    if path == "triton":
        return code.summarise(x, num_groups)
    batch, channels, height, width = x.shape
    state = torch.empty(batch, num_groups, 3, dtype=torch.float64)
    code(
        x=x.data_ptr(),
        state=state.data_ptr(),
        images=batch,
        pixels=height * width,
        channels=channels,
        groups=num_groups,
        dtype=str(x.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )
    return state


@_group_norm_summarise.register_fake
def _(x, num_groups):
    return torch.empty(x.shape[0], num_groups, 3, dtype=torch.float64, device=x.device)


@operator("xrk::group_norm_apply", forward_only=True)
def _group_norm_apply(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: str | None,
) -> torch.Tensor:
    check_map(x, "x", "B C H W")
    check_channels_last(x, "x")
    _check_state(state, "state", x)
    _check_affine(x, weight, bias, eps, activation)
    path, code = dispatch.take("group_norm_apply", x.device, x.dtype)
    if path == "reference":
        return group_norm_apply_reference(x, state, weight, bias, eps, activation)
    out = _channels_last(x)
    if path == "triton":
        code.apply(x, state, weight, bias, eps, activation == "silu", out)
        return out
    batch, channels, height, width = x.shape
    mean, rest, scale, shift = _per_channel(x, state, weight, bias, eps)
    code(
        x=x.data_ptr(),
        scale=scale.data_ptr(),
        mean=mean.data_ptr(),
        mean_rest=rest.data_ptr(),
        shift=shift.data_ptr(),
        out=out.data_ptr(),
        images=batch,
        pixels=height * width,
        channels=channels,
        silu=activation == "silu",
        dtype=str(x.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )
    return out


@_group_norm_apply.register_fake
def _(x, state, weight, bias, eps, activation):
    return _channels_last(x)
