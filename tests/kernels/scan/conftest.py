"""Inputs of the scans, from a seed."""

import pytest
import torch


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
