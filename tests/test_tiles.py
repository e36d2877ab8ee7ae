"""The published way to run a blind-spot network, against a reference that was written from its description alone."""

import numpy as np
import pytest
import tifffile
import torch

import xrk
from tests.test_blindspot_enhancement import model
from xrk.errors import InputError, InputTypeError

optimize = pytest.importorskip("scipy.optimize")


def reference(raw, network):
    """raw uint16 (H, W): pad by reflection with the edge, quadrants, fit, posterior, truncate, seam, crop."""
    height, width = raw.shape
    rows = np.concatenate([np.arange(height), np.arange(height)[::-1]] * 3)[: 512 * ((height + 511) // 512)]
    columns = np.concatenate([np.arange(width), np.arange(width)[::-1]] * 3)[: 512 * ((width + 511) // 512)]
    whole = raw[rows][:, columns]
    merged = np.zeros(whole.shape, np.uint16)
    for i in range(len(rows) // 512):
        for j in range(len(columns) // 512):
            y = whole[512 * i : 512 * i + 512, 512 * j : 512 * j + 512] / 65535
            with torch.inference_mode():
                mu, s = network(torch.tensor(y, dtype=torch.float32)[None, None])[0].numpy().astype(float)
            keep = (y >= np.quantile(y, 0.02)) & (y <= np.quantile(y, 0.97))

            def cost(ab, y=y, mu=mu, keep=keep):
                v = np.maximum(1e-4, ab[0] * mu[keep] + ab[1])
                return np.mean((y[keep] - mu[keep]) ** 2 / v + np.log(v))

            a, b = optimize.minimize(cost, [0.01, 0.0], method="Nelder-Mead").x
            noise = np.maximum(1e-3, a * mu + 10 * b)
            clean = np.maximum(1e-4, s**2 - noise)
            denoised = 65535 * (mu * noise + y * clean) / (noise + clean)
            merged[512 * i : 512 * i + 512, 512 * j : 512 * j + 512] = np.clip(denoised, 0, 65535).astype(np.uint16)
    if width > 512:
        merged[:, 512] = (merged[:, 511].astype(int) + merged[:, 513]) // 2
    return merged[:height, :width]


def noisy(shape):
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[: shape[0], : shape[1]] / 400
    clean = 30000 + 20000 * np.sin(5 * rows) * np.cos(4 * columns)
    return np.clip(clean + rng.standard_normal(shape) * np.sqrt(400 * clean), 0, 65535).astype(np.uint16)


@pytest.mark.parametrize("shape", [(100, 700), (300, 200)])
def test_tiles_are_the_published_result(tmp_path, shape):
    blind, raw = model("fit", "unit"), noisy(shape)
    with torch.no_grad():
        blind.module.std.bias.fill_(0.06)
    expected = reference(raw, blind.module)
    y, report = xrk.enhance(raw, blind, compat="tiles", report=True)
    assert np.abs(y.astype(int) - expected).max() <= 1  # truncation turns the last bit of a sum into a count
    assert np.mean(y != expected) < 1e-3
    assert "tiles" in report.plan
    tifffile.imwrite(tmp_path / "in.tif", raw)
    xrk.enhance_file(tmp_path / "in.tif", tmp_path / "out.tif", blind, compat="tiles")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), y)


def test_invalid_pixels_come_back():
    blind, raw = model("fit", "unit"), noisy((64, 64))
    mask = np.zeros(raw.shape, bool)
    mask[10:12, 20] = True
    y, report = xrk.enhance(raw, blind, compat="tiles", mask=mask, report=True)
    np.testing.assert_array_equal(y[mask], raw[mask])
    assert report.invalid == 2


@pytest.mark.parametrize(
    ("network", "dtype", "options", "error", "problem"),
    [
        (lambda: model("fit", "unit"), "u2", {"compat": "quadrants"}, InputError, "expected None or"),
        (lambda: "resnet18-unet", "u2", {}, InputError, "resnet18-unet is none"),
        (lambda: model("fit", "unit", std=False), "u2", {}, InputError, "is none"),
        (lambda: model("fit", "unit"), "f4", {}, InputTypeError, "expected integers"),
        (lambda: model("fit", "unit"), "u2", {"noise": "off"}, InputError, "leave out noise="),
        (lambda: model("fit", "unit"), "u2", {"memory": "1GiB"}, InputError, "leave out memory="),
        (lambda: model("fit", "unit"), "u2", {"uncertainty": True, "report": True}, InputError, "out uncertainty="),
    ],
)
def test_what_it_is_not_for(network, dtype, options, error, problem):
    with pytest.raises(error, match=problem):
        xrk.enhance(np.zeros((40, 40), dtype), network(), **{"compat": "tiles"} | options)
