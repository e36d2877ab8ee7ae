"""selective_scan of one sequence, channels contiguous as feature maps have them."""

import torch
import torch.nn.functional as F
from contest import Contest, item_size, normal
from scan_peers import Scan, compiled_loop, loop, mamba_ssm, mambapy

from xrk import kernels

OP = "selective_scan"


def _case(length, channels, states, dtype):
    return {"B": 1, "L": length, "D": channels, "N": states, "dtype": dtype}


CASES = {
    ("cpu", "tiny"): [_case(64, 16, 4, "float32")],
    ("cpu", "quick"): [_case(16384, 96, 16, "float32")],
    ("cpu", "full"): [_case(65536, 192, 16, "float32"), _case(262144, 96, 16, "float32")],
    ("cuda", "tiny"): [_case(64, 16, 4, "float16")],
    ("cuda", "quick"): [_case(65536, 192, 16, "float16"), _case(2**20, 96, 16, "float16")],
    ("cuda", "full"): [
        _case(65536, 192, 16, "float16"),
        _case(2**20, 96, 16, "float16"),
        _case(2**22, 192, 16, "float16"),
        _case(8192, 96, 16, "float32"),
    ],
}


def contest(case, device):
    b, length, d, n = (case[letter] for letter in "BLDN")
    single = {**case, "dtype": "float32"}
    u = normal((b, length, d), case, device).transpose(1, 2)
    delta = normal((b, length, d), case, device, 1).transpose(1, 2)
    A = -torch.exp(torch.log(torch.arange(1, n + 1, device=device)) + normal((d, n), single, device, 2) / 10)
    B, C = (normal((b, n, length), case, device, seed) for seed in (3, 4))
    skip, bias = normal((d,), single, device, 5), normal((d,), single, device, 6) / 2 - 3
    inputs = (u, delta, A, B, C, skip)
    slow = f"a step at a time, {length} steps of several launches each"
    parallel, public = mambapy(), mamba_ssm()
    peers = {
        "torch loop": _with(loop(), *inputs, bias),
        "torch.compile of a step": _with(compiled_loop(), *inputs, bias),
        "mambapy pscan": parallel if isinstance(parallel, str) else _with(parallel, *inputs, bias),
    }
    if device == "cuda":
        if length > 2**15:
            peers["torch loop"] = peers["torch.compile of a step"] = slow
        # Each is given the layout that it asks for: this one wants L contiguous.
        rows = [t.contiguous() for t in (u, delta)]
        peers["mamba-ssm"] = (
            public
            if isinstance(public, str)
            else lambda: public(*rows, A, B, C, skip, delta_bias=bias, delta_softplus=True)
        )
    updates = b * length * d * n
    return Contest(
        ops=(OP,),
        ours=lambda: kernels.selective_scan(*inputs, delta_bias=bias, delta_softplus=True),
        peers=peers,
        bytes=b * length * (3 * d + 2 * n) * item_size(case),
        flops=7 * updates + 8 * b * length * d,
    )


def _with(scan: Scan, u, delta, A, B, C, skip, bias):
    def run() -> torch.Tensor:
        values = u.transpose(1, 2).float()
        dt = F.softplus(delta.transpose(1, 2).float() + bias)
        y = scan(values, dt, A, B.transpose(1, 2), C.transpose(1, 2)) + skip * values
        return y.to(u.dtype).transpose(1, 2)

    return run


def test_selective_scan(compete):
    compete()
