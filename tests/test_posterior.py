"""The noise fit against scipy's simplex and against the truth; the posterior against Bayes' rule written out."""

import numpy as np
import pytest

from xrk.posterior import combine, fit_noise, without_noise


def frame(slope, intercept, seed=0, size=400):
    rng = np.random.default_rng(seed)
    mean = np.repeat(rng.uniform(0.05, 0.9, 50), size * size // 50)[: size * size].reshape(-1)
    return mean + rng.standard_normal(mean.size) * np.sqrt(slope * mean + intercept), mean


@pytest.mark.parametrize(("slope", "intercept"), [(2e-4, 1e-6), (2e-3, 1e-4), (1e-5, 5e-5)])
def test_the_fit_finds_the_line(slope, intercept):
    y, mean = frame(slope, intercept)
    fit = fit_noise(y, mean, floor=1e-12)
    truth = slope * mean + intercept
    assert np.abs(fit.variance(mean) / truth - 1).max() < 0.05


def test_the_published_fit_is_scipys():
    optimize = pytest.importorskip("scipy.optimize")
    y, mean = frame(1e-3, 1e-4, seed=3, size=100)
    low, high = np.quantile(y, (0.02, 0.97))
    inside = (y >= low) & (y <= high)
    m, squared = mean[inside], (y[inside] - mean[inside]) ** 2

    def cost(line):
        v = np.maximum(line[0] * m + line[1], 1e-4)
        return np.mean(squared / v + np.log(v))

    expected = optimize.minimize(cost, [0.01, 0.0], method="Nelder-Mead").x
    fit = fit_noise(y, mean, floor=1e-4, compat=True)
    np.testing.assert_allclose([fit.slope, fit.intercept], expected, rtol=1e-6, atol=1e-12)


def test_of_a_mean_that_is_constant_but_for_rounding_no_line_is_made():
    rng = np.random.default_rng(0)
    y = 0.3 + 0.02 * rng.standard_normal((200, 200))
    fits = [fit_noise(y, 0.3 + 1e-7 * np.random.default_rng(s).standard_normal(y.shape), floor=1e-12) for s in (1, 2)]
    for fit in fits:
        assert fit.slope == 0 and fit.intercept == pytest.approx(4e-4, rel=0.03)
        np.testing.assert_allclose(fit.variance(np.array([0.1, 0.9])), fit.intercept)
    assert fits[0].intercept == pytest.approx(fits[1].intercept, rel=1e-6)
    y, mean = frame(1e-3, 1e-5, size=100)
    assert fit_noise(y, 0.3 + 0.02 * (mean - 0.3), floor=1e-12).slope != 0  # a fiftieth of the noise is enough


def test_a_large_frame_is_sampled_evenly():
    y, mean = frame(1e-3, 1e-5, size=1000)
    truth = 1e-3 * mean + 1e-5
    assert np.abs(fit_noise(y, mean, floor=1e-12).variance(mean) / truth - 1).max() < 0.05


def test_the_posterior_is_bayes_rule():
    rng = np.random.default_rng(1)
    x = np.linspace(-1, 2, 4001)
    for y, m, u, v in rng.uniform(0.05, 0.9, (5, 4)):
        density = np.exp(-((x - y) ** 2) / (2 * v * 1e-2) - (x - m) ** 2 / (2 * u * 1e-2))
        density /= density.sum()
        mean = (x * density).sum()
        deviation = np.sqrt(((x - mean) ** 2 * density).sum())
        rest = without_noise(np.array(np.sqrt((u + v) * 1e-2)), np.array(v * 1e-2), 1e-9)
        found = combine(np.array(y), np.array(m), rest, np.array(v * 1e-2))
        np.testing.assert_allclose(found, (mean, deviation), rtol=1e-6)


def test_without_doubt_about_the_surroundings_the_mean_stands():
    y, m = np.array([0.2, 0.7]), np.array([0.5, 0.5])
    variance = np.array([0.01, 0.01])
    x, deviation = combine(y, m, without_noise(np.array([0.1, 0.1]), variance, 1e-10), variance)
    np.testing.assert_allclose(x, m, atol=1e-6)
    np.testing.assert_allclose(deviation, 1e-5, rtol=1e-3)
