"""One level of the wavelet transform of a frame, db4 with its mirrored border."""

import torch
from contest import Contest, imported, item_size, normal
from xrk.kernels.wavelet.wavelet2d import wavelet2d_reference

from xrk import kernels

OP = "wavelet2d"


def _case(size, dtype):
    return {"H": size, "W": size, "dtype": dtype}


CASES = {
    ("cpu", "tiny"): [_case(16, "float32")],
    ("cpu", "quick"): [_case(2048, "float32"), _case(2048, "float64")],
    ("cpu", "full"): [_case(4096, "float32"), _case(4096, "float64")],
    ("cuda", "tiny"): [_case(16, "float32")],
    ("cuda", "quick"): [_case(4096, "float32")],
    ("cuda", "full"): [_case(4096, "float32"), _case(8192, "float32")],
}


def contest(case, device):
    x = normal((case["H"], case["W"]), case, device)
    out = kernels.wavelet2d(x)
    peers = {"torch eager": lambda: wavelet2d_reference(x, "db4")}
    if device == "cpu":
        peers["PyWavelets"] = _pywavelets(x)
    taps = 8
    return Contest(
        ops=(OP,),
        ours=lambda: kernels.wavelet2d(x),
        peers=peers,
        bytes=(x.numel() + out.numel()) * item_size(case),
        # Along the columns for each row of averages and of details, then along the rows for all four.
        flops=2 * taps * (2 * out.shape[-2] * x.shape[-1] + out.numel()),
        flops_dtype=case["dtype"],
    )


def _pywavelets(x):
    pywt = imported("pywt")
    if isinstance(pywt, str):
        return pywt
    image = x.numpy()

    def run() -> torch.Tensor:
        averages, details = pywt.dwt2(image, "db4")
        return torch.stack([torch.from_numpy(part) for part in (averages, *details)])

    return run


def test_wavelet2d(compete):
    compete()
