"""One level of the two-dimensional discrete wavelet transform, and back."""

from typing import Any

import torch
from xrk.kernels import dispatch
from xrk.kernels.arguments import check_choice, check_map, compute_dtype
from xrk.kernels.operators import operator

for _op in ("wavelet2d", "wavelet2d_inverse"):
    dispatch.register(
        _op,
        cpu=dispatch.Native(_op),
        cuda=dispatch.Triton("xrk.kernels.wavelet.triton_wavelet2d"),
    )

# Low-pass filters of the analysis: Haar 1910; Daubechies, "Ten Lectures on Wavelets" (1992), table 6.1, N = 4.
FILTERS = {
    "haar": (0.7071067811865476, 0.7071067811865476),
    "db4": (
        -0.010597401785069032,
        0.0328830116668852,
        0.030841381835560764,
        -0.18703481171909309,
        -0.027983769416859854,
        0.6308807679298589,
        0.7148465705529157,
        0.2303778133088965,
    ),
}


def wavelet2d(x: torch.Tensor, wavelet: str = "db4") -> torch.Tensor:
    """Splits every image into four of half the size: averages and details along the rows, the columns and both.

    Along one axis of n values, with f taps, l the filter's low-pass taps and g[j] = (-1)^(j+1) l[f-1-j]:

        a[k] = sum_j l[j] x[2k + 1 - j],   d[k] = sum_j g[j] x[2k + 1 - j],   k = 0 .. floor((n + f - 1) / 2) - 1

    where x goes on beyond both ends as its mirror image (... x1 x0 | x0 x1 ...), as often as it takes.

    x: (..., H, W) of float32 or float64 (float16 and bfloat16 are computed in float32), any H, W >= 1, contiguous.
    wavelet: "db4" (8 taps) or "haar" (2 taps).
    Returns (..., 4, h, w) of x's dtype, h = floor((H + f - 1) / 2) and w likewise: averages along both axes; details
    across rows (along H) of averages along W; details along W; details along both. These are cA, cH, cV and cD of
    PyWavelets' ``dwt2`` with its default border.
    Raises TypeError for another kind or dtype, ValueError for another shape or stride or an unknown wavelet.
    Mallat 1989, IEEE Trans. Pattern Anal. Mach. Intell. 11, 674.
    """
    _check(x, "x", wavelet, 2)
    return torch.ops.xrk.wavelet2d(x, wavelet)


def wavelet2d_inverse(bands: torch.Tensor, wavelet: str = "db4") -> torch.Tensor:
    """Puts the four parts of `wavelet2d` together again.

    Along one axis of m averages a and details d, with the reversed filters l' and g':

        y[2q + p] = sum_t l'[2t + p] a[q + f/2 - 1 - t] + g'[2t + p] d[q + f/2 - 1 - t],   2q + p = 0 .. 2m - f + 1

    bands: (..., 4, h, w) of float32 or float64 (float16 and bfloat16 are computed in float32), contiguous, h and w at
        least f / 2.
    Returns (..., 2h - f + 2, 2w - f + 2) of the same dtype: the image that was split, with one more row or column
    where its size was odd.
    Raises TypeError for another kind or dtype, ValueError for another shape or stride or an unknown wavelet.
    """
    _check(bands, "bands", wavelet, 3)
    return torch.ops.xrk.wavelet2d_inverse(bands, wavelet)


def taps(wavelet: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The low-pass and high-pass filters of the analysis, float64; those of the synthesis are the same reversed."""
    low = torch.tensor(FILTERS[wavelet], dtype=torch.float64)
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(len(low) // 2)
    return low, signs * low.flip(0)


def wavelet2d_reference(x: torch.Tensor, wavelet: str) -> torch.Tensor:
    """`wavelet2d` in plain torch: a gather of mirrored values for each tap, along the rows, then along the columns."""
    y = x.to(compute_dtype(x.dtype))
    across = _analyse(y, wavelet, -2)
    bands = [part for half in across for part in _analyse(half, wavelet, -1)]
    aa, ad, da, dd = bands
    return torch.stack([aa, da, ad, dd], dim=-3).to(x.dtype)


def wavelet2d_inverse_reference(bands: torch.Tensor, wavelet: str) -> torch.Tensor:
    """`wavelet2d_inverse` in plain torch."""
    aa, da, ad, dd = bands.to(compute_dtype(bands.dtype)).unbind(-3)
    low, high = (_synthesise(a, d, wavelet, -2) for a, d in ((aa, da), (ad, dd)))
    return _synthesise(low, high, wavelet, -1).to(bands.dtype).contiguous()


def _analyse(x: torch.Tensor, wavelet: str, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = taps(wavelet)
    n, f = x.shape[axis], len(low)
    k = torch.arange((n + f - 1) // 2, device=x.device)
    a = d = torch.zeros((), dtype=x.dtype, device=x.device)
    for j in range(f):
        at = (2 * k + 1 - j) % (2 * n)
        values = x.index_select(axis, torch.minimum(at, 2 * n - 1 - at))
        a, d = a + float(low[j]) * values, d + float(high[j]) * values
    return a, d


def _synthesise(a: torch.Tensor, d: torch.Tensor, wavelet: str, axis: int) -> torch.Tensor:
    low, high = (filter.flip(0) for filter in taps(wavelet))
    half = len(low) // 2
    pairs = a.shape[axis] - half + 1
    phases = []
    for p in range(2):
        y = torch.zeros((), dtype=a.dtype, device=a.device)
        for t in range(half):
            first = half - 1 - t
            y = y + float(low[2 * t + p]) * a.narrow(axis, first, pairs)
            y = y + float(high[2 * t + p]) * d.narrow(axis, first, pairs)
        phases.append(y)
    after = axis % a.ndim + 1
    return torch.stack(phases, dim=after).flatten(after - 1, after)


def _check(x: Any, name: str, wavelet: Any, dims: int) -> None:
    check_map(x, name, "... H W" if dims == 2 else "... 4 h w")
    check_choice(wavelet, "wavelet", tuple(FILTERS))
    if not x.is_contiguous():
        raise ValueError(f"{name} has strides {tuple(x.stride())}; expected it contiguous")
    if dims == 3:
        least = len(FILTERS[wavelet]) // 2
        if x.shape[-3] != 4 or min(x.shape[-2:]) < least:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected (..., 4, h, w), h and w at least {least} for {wavelet}"
            )


def _analysis_shape(x: torch.Tensor, wavelet: str) -> tuple[int, ...]:
    f = len(FILTERS[wavelet])
    return (*x.shape[:-2], 4, *((n + f - 1) // 2 for n in x.shape[-2:]))


def _synthesis_shape(bands: torch.Tensor, wavelet: str) -> tuple[int, ...]:
    f = len(FILTERS[wavelet])
    return (*bands.shape[:-3], *(2 * n - f + 2 for n in bands.shape[-2:]))


@operator("xrk::wavelet2d", forward_only=True)
def _wavelet2d(x: torch.Tensor, wavelet: str) -> torch.Tensor:
    _check(x, "x", wavelet, 2)
    return _run("wavelet2d", x, wavelet, _analysis_shape(x, wavelet), x.shape[-2:], wavelet2d_reference)


@_wavelet2d.register_fake
def _(x, wavelet):
    return x.new_empty(_analysis_shape(x, wavelet))


@operator("xrk::wavelet2d_inverse", forward_only=True)
def _wavelet2d_inverse(bands: torch.Tensor, wavelet: str) -> torch.Tensor:
    _check(bands, "bands", wavelet, 3)
    shape = _synthesis_shape(bands, wavelet)
    return _run("wavelet2d_inverse", bands, wavelet, shape, bands.shape[-2:], wavelet2d_inverse_reference)


@_wavelet2d_inverse.register_fake
def _(bands, wavelet):
    return bands.new_empty(_synthesis_shape(bands, wavelet))


def _run(
    op: str, x: torch.Tensor, wavelet: str, shape: tuple[int, ...], size: tuple[int, int], reference: Any
) -> torch.Tensor:
    path, code = dispatch.take(op, x.device, x.dtype)
    if path == "reference":
        return reference(x, wavelet)
    values = x.to(compute_dtype(x.dtype))
    out = torch.empty(shape, dtype=values.dtype, device=x.device)
    images = out.numel() // (out.shape[-1] * out.shape[-2] * (4 if op == "wavelet2d" else 1))
    if path == "triton":
        getattr(code, op)(values, wavelet, images, out)
    else:
        low, high = (filter.contiguous() for filter in taps(wavelet))
        code(
            x=values.data_ptr(),
            out=out.data_ptr(),
            low=low.data_ptr(),
            high=high.data_ptr(),
            taps=len(low),
            images=images,
            height=size[0],
            width=size[1],
            dtype=str(values.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
        )
    return out.to(x.dtype)
