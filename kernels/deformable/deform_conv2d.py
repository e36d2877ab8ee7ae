"""Modulated deformable convolution (DCNv2), channels-last."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from xrk.kernels import dispatch
from xrk.kernels.arguments import (
    check_channels_last,
    check_device,
    check_map,
    check_parameter,
    check_tensor,
    compute_dtype,
)
from xrk.kernels.operators import operator

dispatch.register(
    "deform_conv2d",
    cpu=dispatch.Native("deform_conv2d"),
    cuda=dispatch.Triton("xrk.kernels.deformable.triton_deform_conv2d"),
)

# Positions are counted from the tap's own place, in whole pixels and a rest, so that they are as exact at the far end
# of a map as at its beginning, and a band of rows gives the whole map's bits. Further than this is outside any map.
_FAR = 2.0**30


def deform_conv2d(
    x: torch.Tensor,
    offset: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> torch.Tensor:
    """Convolves with taps that are moved and weighted anew at every output pixel.

        y[b, o, i, j] = bias[o] + sum_{c, k} weight[o, c, k] * mask[b, g, k, i, j] * x[b, c, p(b, g, k, i, j)]
        p(b, g, k, i, j) = (i s - P + u d + offset[b, g, k, 0, i, j],  j s - P + v d + offset[b, g, k, 1, i, j])

    with tap k = u * Kw + v, stride s, padding P, dilation d, and g the deformable group that channel c belongs to. x is
    taken between pixels by bilinear interpolation, each pixel outside the map as zero; a position that is not a number
    gives no number. Computed in float32 (float64 for float64), offsets included.

    x: (B, C, H, W) of float16, bfloat16, float32 or float64, in channels_last memory format.
    offset: (B, 2 G Kh Kw, Ho, Wo), of x's dtype or float32, in pixels: channel g * 2 Kh Kw + 2 k is tap k's way down,
        the next one its way to the right, for each of the G groups of C / G consecutive channels.
        Ho = floor((H + 2 P - d (Kh - 1) - 1) / s) + 1, and Wo likewise.
    weight: (O, C / groups, Kh, Kw), of x's dtype or float32; that many consecutive channels of x go to each group of
        O / groups outputs.  bias: (O), likewise, or None.
    mask: (B, G Kh Kw, Ho, Wo), of x's dtype or float32, channel g * Kh Kw + k for tap k; None: ones.
    stride, dilation: 1 or more; padding: 0 or more; both axes alike.
    offset and mask may have any strides; where their channels do not lie together they are copied.
    Returns (B, O, Ho, Wo) of x's dtype, in channels_last memory format.
    Raises TypeError for another kind or dtype, ValueError for another shape, layout, device, stride, padding, dilation.
    Zhu et al. 2019, "Deformable ConvNets v2", arXiv 1811.11168, section 3.2.
    """
    _check(x, offset, mask, weight, bias, stride, padding, dilation)
    return torch.ops.xrk.deform_conv2d(x, offset, mask, weight, bias, stride, padding, dilation)


class _Corner(NamedTuple):
    """One of the four pixels around every position of a tap: (B, G, 1, Ho * Wo) each."""

    index: torch.Tensor  # of the pixel, inside the map
    share: torch.Tensor  # of its value, 0 where it is outside
    inside: torch.Tensor
    down: torch.Tensor  # derivatives of the share
    right: torch.Tensor


def _corners(
    offset: torch.Tensor, tap: int, where: tuple[int, int], size: tuple[int, int], stride: int
) -> Iterator[_Corner]:
    """The four corners of one tap at all outputs. offset: (B, G, K, 2, Ho, Wo); where: the tap at output (0, 0)."""
    firsts, rests = [], []
    for axis in range(2):
        moved = offset[:, :, tap, axis]
        whole = torch.floor(moved).clamp(-_FAR, _FAR)
        rests.append(moved - whole)
        steps = torch.arange(moved.shape[2 + axis], device=moved.device) * stride + where[axis]
        firsts.append(whole.nan_to_num(0.0).long() + steps.view((-1, 1) if axis == 0 else (1, -1)))
    for a in range(2):
        for b in range(2):
            row, column = firsts[0] + a, firsts[1] + b
            inside = (row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])
            index = row.clamp(0, size[0] - 1) * size[1] + column.clamp(0, size[1] - 1)
            y, x = (rest if step else 1 - rest for rest, step in zip(rests, (a, b), strict=True))
            # A rest that is not a number must not be hidden by a pixel outside; an infinite one is just outside.
            unknown = torch.isnan(rests[0]) | torch.isnan(rests[1])
            nothing = torch.where(unknown, torch.nan, torch.zeros_like(y))
            parts = (torch.where(inside & ~unknown, part, nothing) for part in (y * x, x if a else -x, y if b else -y))
            share, down, right = (part.flatten(2).unsqueeze(2) for part in parts)
            yield _Corner(index.flatten(2).unsqueeze(2), share, inside.flatten(2).unsqueeze(2), down, right)


def _taps(
    x: torch.Tensor,
    offset: torch.Tensor,
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    dilation: int,
    first: int = 0,
) -> Iterator[tuple[int, list[tuple[_Corner, torch.Tensor]]]]:
    """Every tap's number, and its corners with their pixels' values (B, G, C / G, Ho * Wo)."""
    batch, _, height, width = x.shape
    kh, kw = kernel
    offset = offset.unflatten(1, (-1, kh * kw, 2))
    maps = x.reshape(batch, offset.shape[1], -1, height * width)
    for tap in range(kh * kw):
        where = (tap // kw * dilation - padding + first, tap % kw * dilation - padding)
        corners = []
        for corner in _corners(offset, tap, where, (height, width), stride):
            index = corner.index.expand(-1, -1, maps.shape[2], -1)
            corners.append((corner, torch.where(corner.inside, maps.gather(3, index), 0.0)))
        yield tap, corners


def deform_conv2d_reference(
    x: torch.Tensor,
    offset: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    first: int = 0,
) -> torch.Tensor:
    """`deform_conv2d` in plain torch: four gathers and a product of matrices for each tap; first: see `deform_rows`."""
    dtype = compute_dtype(x.dtype)
    out = _empty(x, offset, weight)
    groups = x.shape[1] // weight.shape[1]
    taps = weight.to(dtype).flatten(2).unflatten(0, (groups, -1))
    mask = None if mask is None else mask.to(dtype).unflatten(1, (-1, taps.shape[3])).flatten(3)
    y = torch.zeros((), dtype=dtype, device=x.device)
    for tap, corners in _taps(x.to(dtype), offset.to(dtype), weight.shape[2:], stride, padding, dilation, first):
        sample = sum(corner.share * values for corner, values in corners)
        sample = sample if mask is None else sample * mask[:, :, None, tap]
        y = y + taps[..., tap] @ sample.reshape(x.shape[0], groups, -1, sample.shape[-1])
    y = y.reshape(out.shape)
    return out.copy_(y if bias is None else y + bias.to(dtype)[:, None, None])


def _empty(x: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The output, with the strides of channels_last also where a size of 1 leaves them open."""
    shape = (x.shape[0], weight.shape[0], offset.shape[2], offset.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _check(
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
) -> None:
    check_map(x, "x", "B C H W")
    check_channels_last(x, "x")
    check_tensor(weight, "weight")
    batch, channels, height, width = x.shape
    inputs = weight.shape[1] if weight.ndim == 4 else 0
    if weight.numel() == 0 or inputs == 0 or channels % inputs or weight.shape[0] % (channels // inputs):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected (O, {channels} / groups, Kh, Kw), O a multiple of groups"
        )
    check_parameter(weight, "weight", weight.shape, x)
    check_parameter(bias, "bias", weight.shape[:1], x)
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} is a {type(value).__name__}; expected an int")
        if value < least:
            raise ValueError(f"{name} is {value}; expected {least} or more")
    size = [
        (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        for n, k in zip((height, width), weight.shape[2:], strict=True)
    ]
    if min(size) < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected it no smaller than a kernel of {tuple(weight.shape)}")
    check_tensor(offset, "offset")
    taps = weight.shape[2] * weight.shape[3]
    groups = offset.shape[1] // (2 * taps) if offset.ndim == 4 else 0
    if groups == 0 or channels % groups or tuple(offset.shape) != (batch, groups * 2 * taps, *size):
        expected = f"({batch}, G * {2 * taps}, {size[0]}, {size[1]}), G a divisor of {channels}"
        raise ValueError(f"offset has shape {tuple(offset.shape)}; expected {expected}")
    check_parameter(offset, "offset", offset.shape, x)
    check_parameter(mask, "mask", (batch, groups * taps, *size), x)
    check_device(offset, "offset", x)


@operator("xrk::deform_conv2d")
def _deform_conv2d(
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
) -> torch.Tensor:
    _check(x, offset, mask, weight, bias, stride, padding, dilation)
    return deform_rows(x, offset, mask, weight, bias, stride, padding, dilation, 0)


def deform_rows(
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    first: int,
) -> torch.Tensor:
    """Some rows of what `deform_conv2d` gives, with the same bits: those of which these are offset and mask.

    x: all rows of the map, or a window of them that holds every row that is looked at. first: the row of x, before
    padding, at which the taps of the first output row begin: its number times the stride, less the window's first row.
    Arguments are not checked.
    """
    path, code = dispatch.take("deform_conv2d", x.device, x.dtype)
    if path == "reference":
        return deform_conv2d_reference(x, offset, weight, bias, mask, stride, padding, dilation, first)
    out = _empty(x, offset, weight)
    dtype = compute_dtype(x.dtype)
    if path == "triton":
        offset, mask = (None if t is None else _together(t) for t in (offset, mask))
        code.deform_conv2d(x, offset, mask, weight, bias, stride, padding, dilation, first, out)
        return out
    offset, mask = (None if t is None else _together(t.to(dtype)) for t in (offset, mask))
    weight = weight.to(dtype).contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    batch, channels, height, width = x.shape
    taps = weight.shape[2] * weight.shape[3]
    code(
        x=x.data_ptr(),
        offset=offset.data_ptr(),
        mask=0 if mask is None else mask.data_ptr(),
        weight=weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        images=batch,
        height=height,
        width=width,
        channels=channels,
        out_height=out.shape[2],
        out_width=out.shape[3],
        outputs=out.shape[1],
        kernel=tuple(weight.shape[2:]),
        groups=channels // weight.shape[1],
        deformable_groups=offset.shape[1] // (2 * taps),
        offset_strides=_strides(offset),
        mask_strides=(0, 0, 0) if mask is None else _strides(mask),
        stride=stride,
        padding=padding,
        dilation=dilation,
        first=first,
        dtype=str(x.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )
    return out


def _together(t: torch.Tensor) -> torch.Tensor:
    """The same map with a pixel's channels next to each other; a part of the channels of a larger map has that."""
    return t if t.shape[1] == 1 or t.stride(1) == 1 else t.contiguous(memory_format=torch.channels_last)


def _strides(t: torch.Tensor) -> tuple[int, int, int]:
    return t.stride(0), t.stride(2), t.stride(3)


@_deform_conv2d.register_fake
def _(x, offset, mask, weight, bias, stride, padding, dilation):
    return _empty(x, offset, weight)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.stride, ctx.padding, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _back(ctx, out_grad):
    x, offset, mask, weight, bias = ctx.saved_tensors
    numbers = (ctx.stride, ctx.padding, ctx.dilation)
    x_grad, offset_grad, mask_grad, weight_grad = torch.ops.xrk.deform_conv2d_backward(
        out_grad, x, offset, mask, weight, *numbers
    )
    bias_grad = None if bias is None else out_grad.to(compute_dtype(x.dtype)).sum((0, 2, 3)).to(bias.dtype)
    mask_grad = None if mask is None else mask_grad
    return x_grad, offset_grad, mask_grad, weight_grad, bias_grad, None, None, None


_deform_conv2d.register_autograd(_back, setup_context=_keep)


@operator("xrk::deform_conv2d_backward", forward_only=True)
def _deform_conv2d_backward(
    out_grad: torch.Tensor,
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    stride: int,
    padding: int,
    dilation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, offset, mask (empty without one) and weight, in plain torch, tap by tap as the reference goes.

    A column of one tap is all that is held beside the gradients.
    """
    dtype = compute_dtype(x.dtype)
    groups = x.shape[1] // weight.shape[1]
    taps = weight.to(dtype).flatten(2).unflatten(0, (groups, -1))
    y_grad = out_grad.to(dtype).reshape(x.shape[0], groups, taps.shape[1], -1)
    given = None if mask is None else mask.to(dtype).unflatten(1, (-1, taps.shape[3])).flatten(3)
    x_grad = torch.zeros(x.shape, dtype=dtype, device=x.device)
    offset_grads, mask_grads, tap_grads = [], [], []
    for tap, corners in _taps(x.to(dtype), offset.to(dtype), weight.shape[2:], stride, padding, dilation):
        sample = sum(corner.share * values for corner, values in corners)
        modulated = sample if given is None else sample * given[:, :, None, tap]
        column = modulated.reshape(x.shape[0], groups, -1, sample.shape[-1])
        tap_grads.append((y_grad @ column.transpose(2, 3)).sum(0))
        grad = (taps[..., tap].transpose(1, 2) @ y_grad).reshape(sample.shape)
        if given is not None:
            mask_grads.append((grad * sample).sum(2))
            grad = grad * given[:, :, None, tap]
        for corner, _ in corners:
            pixels = x_grad.view(*grad.shape[:3], -1)
            pixels.scatter_add_(3, corner.index.expand_as(grad), grad * corner.share)
        for way in ("down", "right"):
            offset_grads.append(sum((grad * getattr(c, way) * values).sum(2) for c, values in corners))
    weight_grad = torch.stack(tap_grads, -1).reshape(weight.shape)
    offset_grad = torch.stack(offset_grads, 2).reshape(offset.shape)
    mask_grad = x_grad.new_empty(0) if mask is None else torch.stack(mask_grads, 2).reshape(mask.shape).to(mask.dtype)
    return x_grad.to(x.dtype), offset_grad.to(offset.dtype), mask_grad, weight_grad.to(weight.dtype)


@_deform_conv2d_backward.register_fake
def _(out_grad, x, offset, mask, weight, stride, padding, dilation):
    none = torch.empty(0, dtype=compute_dtype(x.dtype), device=x.device)
    made = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, offset, weight))
    x_grad, offset_grad, weight_grad = made
    mask_grad = none if mask is None else torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)
    return x_grad, offset_grad, mask_grad, weight_grad
