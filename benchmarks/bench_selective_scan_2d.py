"""selective_scan_2d against scans of the four flattened sequences; projections are everyone's own work."""

import torch
import torch.nn.functional as F
from contest import Contest, imported, item_size, normal
from scan_peers import Scan, compiled_loop, loop, mamba_ssm, mambapy
from xrk.kernels.scan.reference import image_of, lines_of, projected

from xrk import kernels

OP = "selective_scan_2d"


def _case(height, width, channels, states, dtype):
    return {"B": 1, "H": height, "W": width, "D": channels, "N": states, "R": channels // 16, "dtype": dtype}


CASES = {
    ("cpu", "tiny"): [_case(8, 8, 16, 4, "float32")],
    ("cpu", "quick"): [_case(128, 128, 96, 16, "float32")],
    ("cpu", "full"): [_case(512, 512, 96, 16, "float32"), _case(512, 512, 96, 1, "float32")],
    ("cuda", "tiny"): [_case(8, 8, 16, 4, "float16")],
    ("cuda", "quick"): [
        _case(1024, 1024, 96, 16, "float16"),
        _case(2048, 2048, 192, 16, "float16"),
        _case(128, 128, 96, 16, "float32"),
    ],
    ("cuda", "full"): [
        _case(1024, 1024, 192, 16, "float16"),
        _case(2048, 2048, 192, 16, "float16"),
        _case(2048, 2048, 192, 1, "float16"),
        _case(4096, 4096, 96, 16, "float16"),
        _case(4096, 4096, 192, 16, "float16"),
        _case(128, 128, 96, 16, "float32"),
    ],
}


def contest(case, device):
    b, h, w, d, n, r = (case[letter] for letter in "BHWDNR")
    x = F.silu(normal((b, h, w, d), case, device))
    # Parameters as training leaves them: decays about -1 to -N, time steps of some hundredths.
    single = {**case, "dtype": "float32"}
    weights = (
        normal((4, r + 2 * n, d), single, device, 1) / d**0.5,
        normal((4, d, r), single, device, 2) / r**0.5,
        normal((4, d), single, device, 3) / 2 - 3,
        torch.log(torch.arange(1, n + 1, device=device)) + normal((4 * d, n), single, device, 4) / 10,
        1 + normal((4 * d,), single, device, 5) / 10,
    )
    pixels = b * h * w
    if device == "cuda" and pixels > 2**15:
        slow = f"a step at a time, {4 * pixels} steps of several launches each"
        step_by_step = {"torch loop": slow, "torch.compile of a step": slow}
    else:
        step_by_step = {
            "torch loop": _flattened(x, weights, loop()),
            "torch.compile of a step": _flattened(x, weights, compiled_loop()),
        }
    parallel = mambapy()
    peers = {
        **step_by_step,
        "mambapy pscan": parallel if isinstance(parallel, str) else _flattened(x, weights, parallel),
    }
    if device == "cuda":
        peers["mamba-ssm scan, torch cross-scan"] = _public(x, weights, _stacked, _merged)
        crossing = imported("csm_triton")  # VMamba's file of that name, in a folder on PYTHONPATH
        name = "mamba-ssm scan, VMamba cross-scan"
        if isinstance(crossing, str):
            peers[name] = crossing
        else:
            peers[name] = _public(x, weights, crossing.cross_scan_fn, crossing.cross_merge_fn)
    updates = 4 * pixels * d * n
    return Contest(
        ops=(OP,),
        ours=lambda: kernels.selective_scan_2d(x, *weights),
        peers=peers,
        bytes=2 * pixels * d * item_size(case) + sum(weight.nbytes for weight in weights),
        # An update: dt A, exp, times h, dt u B added, C h added. A pixel and channel: dt's projection and softplus,
        # dt u, D u added. A pixel: the projection to R + 2N values.
        flops=7 * updates + 4 * pixels * d * (2 * r + 8) + 8 * pixels * d * (r + 2 * n),
    )


def _flattened(x: torch.Tensor, weights: tuple[torch.Tensor, ...], scan: Scan):
    """SS2D from a scan of sequences, one direction after the other."""
    x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds = weights
    batch, _, _, channels = x.shape

    def run() -> torch.Tensor:
        values = x.float()
        out = torch.zeros_like(values)
        for k in range(4):
            lines = lines_of(values, k)
            sequence = lines.reshape(batch, -1, channels)
            dt, b, c = projected(sequence, x_proj_weight, dt_projs_weight, dt_projs_bias, k)
            part = slice(k * channels, (k + 1) * channels)
            y = scan(sequence, dt, -torch.exp(A_logs[part]), b, c) + Ds[part] * sequence
            out += image_of(y.reshape(lines.shape), k)
        return out.to(x.dtype)

    return run


def _public(x: torch.Tensor, weights: tuple[torch.Tensor, ...], cross_scan, cross_merge):
    """SS2D as the public models compute it: four copies of the image, their projections, one scan of 4 D channels."""
    scan = mamba_ssm()
    if isinstance(scan, str):
        return scan
    x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds = weights
    batch, height, width, channels = x.shape
    rank, states = dt_projs_weight.shape[2], A_logs.shape[1]
    x_proj_weight, dt_projs_weight = x_proj_weight.to(x.dtype), dt_projs_weight.to(x.dtype)
    A, bias = -torch.exp(A_logs), dt_projs_bias.reshape(-1)

    def run() -> torch.Tensor:
        copies = cross_scan(x.permute(0, 3, 1, 2).contiguous()).reshape(batch, 4, channels, -1)
        rows = torch.einsum("bkdl,kcd->bkcl", copies, x_proj_weight)
        low, b, c = rows.split([rank, states, states], 2)
        dt = torch.einsum("bkrl,kdr->bkdl", low, dt_projs_weight)
        y = scan(
            copies.reshape(batch, 4 * channels, -1),
            dt.reshape(batch, 4 * channels, -1),
            A,
            b.contiguous(),
            c.contiguous(),
            Ds,
            delta_bias=bias,
            delta_softplus=True,
        )
        merged = cross_merge(y.reshape(batch, 4, channels, height, width))
        return merged.reshape(batch, channels, height, width).permute(0, 2, 3, 1).contiguous()

    return run


def _stacked(x: torch.Tensor) -> torch.Tensor:
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    return torch.stack([rows, columns, rows.flip(2), columns.flip(2)], 1)


def _merged(y: torch.Tensor) -> torch.Tensor:
    batch, _, channels, height, width = y.shape
    y = y.flatten(3)
    rows = y[:, 0] + y[:, 2].flip(2)
    columns = y[:, 1] + y[:, 3].flip(2)
    return rows + columns.reshape(batch, channels, width, height).transpose(2, 3).flatten(2)


def test_selective_scan_2d(compete):
    compete()
