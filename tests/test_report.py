import dataclasses
import json
import math

import numpy as np
import pytest

from xrk.report import FrameReport, Report, residual_statistics


@dataclasses.dataclass(frozen=True)
class Line:
    """var = slope * mean + intercept."""

    slope: float = 2.0
    intercept: float = 9.0

    def variance(self, mean):
        return self.slope * mean + self.intercept


def _report(**changes):
    residual = {"mean": math.nan, "sd": np.float32(2.5), "standardised_mean": None, "standardised_sd": None}
    frames = [
        FrameReport({"gain": 1.5, "offset": 100.0, "read_noise": np.float64(2)}, 3, 4, residual),
        FrameReport(None, 5, np.int64(6), None),
    ]
    entries = dict(
        model="m", architecture="a", domain="unit", weights_sha256=None, shape=(2, 30, 40), dtype=">u2",
        levels=(0.0, 4095.0), levels_source="given", frames=frames, device="cpu", kernels="numpy", plan="whole image",
        memory=None, versions={"xrk": "0"}, seconds=1.25, warnings=["Frame 1: every pixel is invalid."],
    )  # fmt: skip
    return Report(**{**entries, **changes})


def test_the_dict_is_plain_json():
    entries = _report().to_dict()
    text = json.dumps(entries, allow_nan=False)
    assert json.loads(text) == entries
    assert json.loads(_report().to_json()) == entries
    assert entries["shape"] == [2, 30, 40]
    assert entries["frames"][0]["residual"] == {
        "mean": None,
        "sd": 2.5,
        "standardised_mean": None,
        "standardised_sd": None,
    }
    assert (entries["clipped"], entries["invalid"]) == (8, 10)
    assert type(entries["frames"][1]["invalid"]) is int
    assert entries["seconds"] == 1.25


def test_without_timing_nothing_tells_two_runs_apart():
    assert "seconds" not in _report().to_dict(timing=False)
    assert _report(seconds=1.0).to_json(timing=False) == _report(seconds=2.0).to_json(timing=False)


def test_the_text_is_short_and_says_what_matters():
    text = str(
        _report(frames=[FrameReport({"gain": 1.5, "offset": 1, "read_noise": 2}, 3, 4, {"mean": 0.1, "sd": 2.5})])
    )
    for part in ("m on cpu", "2 x 30 x 40 uint16", "0 to 4095", "3 pixels clipped, 4 invalid", "gain 1.5", "sd 2.5"):
        assert part in text
    assert "warning: Frame 1" in text
    assert len(text.splitlines()) <= 5


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (300, 401)])
@pytest.mark.parametrize("dtype", ["u2", "f8"])
def test_statistics_against_the_plain_formulas(shape, dtype):
    rng = np.random.default_rng(6)
    y = rng.uniform(0, 3000, shape).astype(dtype)
    x = (y + rng.normal(5, 50, shape)).clip(0).astype(dtype)
    invalid = rng.random(shape) < 0.1
    invalid.flat[0] = False
    noise = Line(2.0, -1000.0)  # not positive on a third of the image
    found = residual_statistics(x, y, noise, invalid)
    r = x.astype(float) - y
    known = ~invalid & (noise.variance(y.astype(float)) > 0)
    assert found["mean"] == pytest.approx(r[~invalid].mean())
    assert found["sd"] == pytest.approx(r[~invalid].std())
    z = r / np.sqrt(np.where(known, noise.variance(y.astype(float)), np.inf))
    if not known.any():
        assert found["standardised_mean"] is found["standardised_sd"] is None
        return
    assert found["standardised_mean"] == pytest.approx(z[known].mean())
    assert found["standardised_sd"] == pytest.approx(z[known].std())
    for name, a, b in (("horizontal", np.s_[:, :-1], np.s_[:, 1:]), ("vertical", np.s_[:-1], np.s_[1:])):
        both = known[a] & known[b]
        value = found[f"standardised_lag1_{name}"]
        if not both.any() or z[known].std() == 0:
            assert value is None
        else:
            expected = ((z[a] * z[b])[both].mean() - z[known].mean() ** 2) / z[known].var()
            assert value == pytest.approx(expected, abs=1e-9)


def test_white_noise_is_white_and_blurred_noise_is_not():
    rng = np.random.default_rng(7)
    y = np.full((256, 256), 1000.0)
    white = rng.normal(0, np.sqrt(Line().variance(y)))
    found = residual_statistics(y + white, y, Line())
    assert found["standardised_mean"] == pytest.approx(0, abs=0.02)
    assert found["standardised_sd"] == pytest.approx(1, abs=0.02)
    assert found["standardised_lag1_horizontal"] == pytest.approx(0, abs=0.02)
    along = (white + np.roll(white, 1, axis=1)) / np.sqrt(2)
    found = residual_statistics(y + along, y, Line())
    assert found["standardised_lag1_horizontal"] == pytest.approx(0.5, abs=0.02)
    assert found["standardised_lag1_vertical"] == pytest.approx(0, abs=0.02)


def test_no_change_has_no_correlation():
    x = np.full((40, 50), 7, np.uint8)
    found = residual_statistics(x, x, Line())
    assert (found["mean"], found["sd"], found["standardised_sd"]) == (0.0, 0.0, 0.0)
    assert found["standardised_lag1_horizontal"] is found["standardised_lag1_vertical"] is None
    assert residual_statistics(x, x)["standardised_sd"] is None
    shifted = residual_statistics(x.astype(float) + 0.1, x, Line())
    assert shifted["sd"] == 0.0
    assert shifted["standardised_lag1_vertical"] is None
