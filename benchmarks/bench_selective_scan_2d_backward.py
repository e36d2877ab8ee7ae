"""selective_scan_2d and its gradients, as a step of training takes them, against torch's autograd through scans."""

import torch
import torch.nn.functional as F
from bench_selective_scan_2d import _flattened
from contest import Contest, normal
from scan_peers import mambapy
from xrk.kernels.scan.reference import selective_scan_2d_reference

from xrk import kernels

OP = "selective_scan_2d_backward"


def _case(height, width, channels, states):
    return {"B": 1, "H": height, "W": width, "D": channels, "N": states, "R": channels // 16, "dtype": "float32"}


CASES = {
    ("cpu", "tiny"): [_case(8, 8, 16, 4)],
    ("cpu", "quick"): [_case(64, 64, 96, 16)],
    ("cpu", "full"): [_case(128, 128, 96, 16), _case(256, 256, 96, 8)],
    ("cuda", "tiny"): [_case(8, 8, 16, 4)],
    ("cuda", "quick"): [_case(64, 64, 96, 16)],
    ("cuda", "full"): [_case(256, 256, 96, 16), _case(512, 512, 192, 16)],
}


def contest(case, device):
    b, h, w, d, n, r = (case[letter] for letter in "BHWDNR")
    x = F.silu(normal((b, h, w, d), case, device))
    weights = (
        normal((4, r + 2 * n, d), case, device, 1) / d**0.5,
        normal((4, d, r), case, device, 2) / r**0.5,
        normal((4, d), case, device, 3) / 2 - 3,
        torch.log(torch.arange(1, n + 1, device=device)) + normal((4 * d, n), case, device, 4) / 10,
        1 + normal((4 * d,), case, device, 5) / 10,
    )
    inputs = [t.requires_grad_() for t in (x, *weights)]
    asked = normal(x.shape, case, device, 6)

    def step(scan):
        def run():
            with torch.enable_grad():
                return torch.autograd.grad(scan(*inputs), inputs, asked)[0]

        return run

    pixels = b * h * w
    parallel = mambapy()
    peers = {
        "torch loop": step(selective_scan_2d_reference)
        if pixels <= 2**12
        else f"a step at a time, {4 * pixels} steps of several operators each, all of whose results are kept",
        "mambapy pscan": parallel
        if isinstance(parallel, str)
        else step(lambda x, *weights: _flattened(x, weights, parallel)()),
    }
    updates = 4 * pixels * d * n
    return Contest(
        ops=("selective_scan_2d", "projected_scan_backward"),
        ours=step(kernels.selective_scan_2d),
        peers=peers,
        bytes=5 * pixels * d * 4 + 2 * sum(weight.nbytes for weight in weights),
        # An update forwards, once more in its chunk, and its gradients: of h, B, C, dt u, A and dt. The products of the
        # projections, and the two of their gradients.
        flops=(7 + 5 + 12) * updates + 4 * pixels * d * (4 * r + 30) + 24 * pixels * d * (r + 2 * n),
    )


def test_selective_scan_2d_backward(compete):
    compete()
