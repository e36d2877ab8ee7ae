"""Inputs of the scans from a seed, and the public module that they are from."""

import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F


def _make(batch, height, width, channels, states, rank, dtype=torch.float64, seed=0):
    """x (B, H, W, D) and the five parameters of SS2D, with decays from slow to fast."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    made = [
        normal(batch, height, width, channels),
        normal(4, rank + 2 * states, channels) / channels**0.5,
        normal(4, channels, rank) / rank**0.5,
        normal(4, channels) - 2,
        0.7 * normal(4 * channels, states),
        normal(4 * channels),
    ]
    return [tensor.to(dtype) for tensor in made]


@pytest.fixture(scope="session")
def make_ss2d():
    return _make


def _formula(key, shape):
    """Appendix B of the networks' description."""
    size = int(np.prod(shape))
    wave = np.sin(0.6180339887498949 * np.arange(1, size + 1) + zlib.crc32(key.encode()) % 9973).reshape(shape)
    match key.rsplit(".", 1)[-1]:
        case "A_logs":
            return np.log(1 + np.arange(size).reshape(shape) % shape[-1]) + 0.1 * wave
        case "Ds":
            return 1 + 0.1 * wave
        case "dt_projs_bias":
            return -3 + 0.5 * wave
        case "x_proj_weight" | "dt_projs_weight":
            return wave / np.sqrt(shape[-1])
        case _ if len(shape) >= 2:
            return 1.2 * wave / np.sqrt(size / shape[0])
        case "weight":
            return 1 + 0.1 * wave
        case _:
            return 0.1 * wave


def _public_module_error(fixture, scan, images=2):
    """How far the public SS2D module with this scan inside is from its stored output, of the largest value."""
    file = {name: torch.from_numpy(array[:images]) for name, array in np.load(fixture).items()}
    c, d, r, n = 48, 72, 3, 16
    shapes = {
        "in_proj.weight": (2 * d, c),
        "conv2d.weight": (d, 1, 3, 3),
        "conv2d.bias": (d,),
        "x_proj_weight": (4, r + 2 * n, d),
        "dt_projs_weight": (4, d, r),
        "dt_projs_bias": (4, d),
        "A_logs": (4 * d, n),
        "Ds": (4 * d,),
        "out_norm.weight": (d,),
        "out_norm.bias": (d,),
        "out_proj.weight": (c, d),
    }
    w = {key: torch.from_numpy(_formula(key, shape).astype(np.float32)) for key, shape in shapes.items()}
    x, z = F.linear(file["x"], w["in_proj.weight"]).split(d, -1)
    x = F.conv2d(x.permute(0, 3, 1, 2), w["conv2d.weight"], w["conv2d.bias"], padding=1, groups=d)
    x = F.silu(x).permute(0, 2, 3, 1).contiguous()
    y = scan(x, *(w[key] for key in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")))
    y = F.layer_norm(y, (d,), w["out_norm.weight"], w["out_norm.bias"], 1e-5) * F.silu(z)
    y = F.linear(y, w["out_proj.weight"])
    expected = file["y"].double()
    assert y.shape == expected.shape and len(y) == images
    return float((y - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="session")
def public_module_error(shared_data):
    fixture = shared_data / "fixtures" / "ss2d_48.npz"
    return lambda scan: _public_module_error(fixture, scan)
