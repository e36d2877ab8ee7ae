"""Blind-spot networks through the front door: the posterior of every pixel, streamed, against numpy on whole maps."""

import numpy as np
import pytest
import tifffile
import torch

import xrk
from xrk.loading import Model
from xrk.models import BlindSpot, Card
from xrk.posterior import combine, fit_noise, without_noise


def model(noise_handling, domain, **options):
    """A network that is not trained, but says something near the frame: its last layer is scaled down."""
    torch.manual_seed(2)
    network = BlindSpot(features=4, **options).eval().requires_grad_(False)
    network.loc.weight *= 2.0
    network.loc.bias.fill_(0.48)
    if network.std is not None:
        network.std.weight *= 0.01
        network.std.bias.fill_(0.02)
    card = Card("blind", "blindspot", domain=domain, noise=noise_handling)
    return Model(card, network)


def frame(shape=(160, 224)):
    rng = np.random.default_rng(0)
    clean = np.linspace(21000, 25000, shape[0] * shape[1]).reshape(shape)
    return np.clip(np.rint(12.0 * rng.poisson(clean / 12)), 0, 65535).astype(np.uint16)


def answer(network, seen):
    with torch.inference_mode():
        y = network(torch.from_numpy(seen.astype(np.float32))[None, None])[0].double().numpy()
    return y[0], (y[1] if len(y) > 1 else None)


FLOOR = (1 / 65535) ** 2 / 12


@pytest.mark.parametrize("memory", [None, "64MiB"])
def test_given_noise(memory):
    blind, z = model("fit", "unit"), frame()
    noise = xrk.NoiseModel(12.0, 100.0, 30.0)
    y, report = xrk.enhance(z, blind, noise=noise, memory=memory, report=True)
    n = z / 65535
    mean, std = answer(blind.module, n)
    variance = np.maximum((12.0 * (65535 * mean - 100) + 900) / 65535**2, FLOOR)
    expected, _ = combine(n, mean, without_noise(std, variance, FLOOR), variance)
    assert np.abs(y - 65535 * expected).max() <= 1
    assert np.abs(y.astype(float) - z).mean() > 50
    assert report.frames[0].noise["gain"] == 12.0
    assert "bands" in report.plan


def test_given_noise_takes_the_place_of_a_learnt_one():
    """The deviation of a network with a noise of its own is without noise; what it sees stays the plain counts."""
    blind, z = model("fit", "unit", noise="poisson-gaussian"), frame((64, 96))
    y, report = xrk.enhance(z, blind, noise=xrk.NoiseModel(12.0, 100.0, 30.0), report=True, uncertainty=True)
    mean, std = answer(blind.module, z / 65535)
    variance = np.maximum((12.0 * (65535 * mean - 100) + 900) / 65535**2, FLOOR)
    expected, deviation = combine(z / 65535, mean, std**2, variance)
    assert np.abs(y - 65535 * expected).max() <= 1
    np.testing.assert_allclose(report.uncertainty, 65535 * deviation, rtol=1e-3)
    learnt, _ = combine(z / 65535, mean, std**2, blind.module.noise(torch.from_numpy(mean)).numpy())
    assert np.abs(xrk.enhance(z, blind) - 65535 * learnt).max() <= 1


def test_fitted_noise():
    blind, z = model("fit", "unit"), frame()
    y, report = xrk.enhance(z, blind, report=True)
    n = z / 65535
    mean, std = answer(blind.module, n)
    fit = fit_noise(n.astype(np.float32), mean.astype(np.float32), floor=FLOOR)
    variance = fit.variance(mean)
    expected, _ = combine(n, mean, without_noise(std, variance, FLOOR), variance)
    # In float32, where a network that was never trained leaves differences of nearly equal variances.
    assert np.percentile(np.abs(y - 65535 * expected), 95) <= 2
    if fit.slope > 0:
        assert report.frames[0].noise["gain"] == pytest.approx(65535 * fit.slope, rel=1e-3)
    whole = xrk.enhance(z, blind, runtime="whole")
    # An untrained network's mean has nothing to do with the pixel, and some variances lie just where the line meets its
    # floor: there the last digit of the mean counts.
    assert np.mean(np.abs(whole.astype(int) - y) > 1) < 0.05


def test_a_mean_that_is_nearly_constant_does_not_turn_rounding_into_noise():
    blind, z = model("fit", "unit"), frame((160, 64))
    blind.module.loc.weight *= 1e-4
    y, report = xrk.enhance(z, blind, report=True)
    assert report.frames[0].noise is None  # a constant, of which nothing rises with the counts
    for options in ({"runtime": "whole"}, {"memory": "64MiB"}):
        assert np.abs(xrk.enhance(z, blind, **options).astype(int) - y).max() <= 1


def test_every_frame_of_a_stack_has_its_own_fit():
    blind, z = model("fit", "unit"), frame()
    stack = np.stack([z, (z // 2).astype(np.uint16)])
    y = xrk.enhance(stack, blind)
    for i in range(2):
        assert np.array_equal(y[i], xrk.enhance(stack[i], blind))


def test_stabilised():
    blind, z = model("estimate", "stabilised", noise="unit", centre=70.0, unit=30.0), frame()
    noise = xrk.NoiseModel(12.0)
    y = xrk.enhance(z, blind, noise=noise)
    v = noise.stabilise(z, np.float32)
    mean, std = answer(blind.module, v)
    expected, _ = combine(v.astype(float), mean, std**2, np.ones_like(mean))
    assert np.abs(y - noise.unstabilise(expected)).max() <= 1


def test_off_is_the_mean_alone():
    blind, z = model("fit", "unit"), frame()
    y = xrk.enhance(z, blind, noise="off")
    mean, _ = answer(blind.module, z / 65535)
    assert np.abs(y - 65535 * mean).max() <= 1
    blind = model("fit", "unit", std=False)
    mean, _ = answer(blind.module, z / 65535)
    assert np.abs(xrk.enhance(z, blind) - 65535 * mean).max() <= 1


@pytest.mark.parametrize("options", [{}, {"memory": "48MiB"}, {"runtime": "whole"}])
def test_the_mean_is_blind_up_to_the_last_pixel_of_any_size(options):
    blind, z = model("fit", "unit", residual=True), frame((75, 90)).astype(np.float32)
    options |= {"noise": "off", "levels": (0, 65535)}
    y = xrk.enhance(z, blind, **options)
    for row, column in ((73, 40), (70, 88), (74, 89), (60, 61)):
        changed = z.copy()
        changed[row, column] += 5000
        difference = np.abs(xrk.enhance(changed, blind, **options) - y)
        assert difference[row, column] <= 0.05 and difference.max() > 50


@pytest.mark.parametrize("memory", [None, "64MiB"])
def test_uncertainty_is_the_posterior_deviation(memory):
    blind, z = model("fit", "unit"), frame()
    noise = xrk.NoiseModel(12.0, 100.0, 30.0)
    y, report = xrk.enhance(z, blind, noise=noise, memory=memory, report=True, uncertainty=True)
    mean, std = answer(blind.module, z / 65535)
    variance = np.maximum((12.0 * (65535 * mean - 100) + 900) / 65535**2, FLOOR)
    _, deviation = combine(z / 65535, mean, without_noise(std, variance, FLOOR), variance)
    assert report.uncertainty.dtype == np.float32 and report.uncertainty.shape == z.shape
    np.testing.assert_allclose(report.uncertainty, 65535 * deviation, rtol=1e-3)
    assert "uncertainty" not in report.to_dict()
    assert np.array_equal(y, xrk.enhance(z, blind, noise=noise, memory=memory))


def test_uncertainty_of_stabilised_counts_is_in_counts():
    blind, z = model("estimate", "stabilised", noise="unit", centre=70.0, unit=30.0), frame()
    stack, mask = np.stack([z, z // 2]), np.zeros(z.shape, bool)
    mask[5, 6:9] = True
    noise = xrk.NoiseModel(12.0)
    _, report = xrk.enhance(stack, blind, noise=noise, mask=mask, report=True, uncertainty=True)
    assert np.isnan(report.uncertainty[:, mask]).all() and np.isfinite(report.uncertainty[:, ~mask]).all()
    mean, std = answer(blind.module, noise.stabilise(stack[1], np.float32))
    far = np.hypot(*np.mgrid[-5 : z.shape[0] - 5, -7 : z.shape[1] - 7]) > 150  # of what the mask's filling reaches
    v, deviation = combine(noise.stabilise(stack[1]), mean, std**2, np.ones_like(mean))
    across = (noise.unstabilise(v + deviation) - noise.unstabilise(v - deviation)) / 2
    np.testing.assert_allclose(report.uncertainty[1][far], across[far], rtol=2e-3)


def test_uncertainty_of_a_file_streams(tmp_path):
    blind, z = model("estimate", "stabilised", noise="unit", centre=70.0, unit=30.0), frame((700, 96))
    tifffile.imwrite(tmp_path / "in.tif", z)
    noise = xrk.NoiseModel(12.0)
    xrk.enhance_file(
        tmp_path / "in.tif", tmp_path / "out.tif", blind, noise=noise, uncertainty=tmp_path / "sd.tif", memory="80MiB"
    )
    y, report = xrk.enhance(z, blind, noise=noise, report=True, uncertainty=True)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), y)
    np.testing.assert_allclose(tifffile.imread(tmp_path / "sd.tif"), report.uncertainty, rtol=1e-4)
    before = sorted(tmp_path.iterdir())
    for options, problem in (
        ({"uncertainty": tmp_path / "new.tif"}, "would both be written to"),
        ({"uncertainty": tmp_path / "sd.png"}, "ends in .tif"),
        ({"uncertainty": tmp_path / "x.tif", "model": "resnet18-unet"}, "does not tell how sure"),
        ({"uncertainty": tmp_path / "x.tif", "model": model("fit", "unit"), "noise": "off"}, "no posterior"),
    ):
        with pytest.raises(xrk.errors.XrkError, match=problem):
            xrk.enhance_file(tmp_path / "in.tif", tmp_path / "new.tif", **{"model": blind} | options)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(xrk.errors.InputError, match="report=True"):
        xrk.enhance(z, blind, uncertainty=True)
