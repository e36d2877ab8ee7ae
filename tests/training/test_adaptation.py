"""Adaptation to noisy frames: it learns without a clean image, goes on after a kill, and says what it found."""

import hashlib
import json

import numpy as np
import pytest
import torch

import xrk
from xrk.errors import ImageFileError, InputError, InputTypeError
from xrk.metrics import psnr
from xrk.noise import NoiseModel
from xrk.simulate import Detector, blur
from xrk.training import adaptation
from xrk.training.adaptation import adapt, lagged

GAIN = 8.0


def frames(count=3, size=96, spread=0.0):
    """Noisy frames of a few smooth discs, and what they are without noise."""
    rows, columns = np.mgrid[:size, :size] / size
    signal = 0.9 - 0.4 * ((rows - 0.4) ** 2 + (columns - 0.5) ** 2 < 0.08) - 0.25 * (np.abs(rows - columns) < 0.1)
    signal = blur(signal.astype(np.float32), 1.0)
    detector = Detector(GAIN, 0, 0, light_spread=spread)
    noisy = [detector.expose(signal, 60, seed) for seed in range(count)]
    return np.clip(np.rint(np.stack(noisy)), 0, 65535).astype(np.uint16), GAIN * 60 * signal


OPTIONS = {"features": 4, "patch": 64, "batch": 2, "noise": NoiseModel(GAIN), "rate": 3e-3}


def test_it_learns_without_a_clean_image(tmp_path):
    noisy, clean = frames()
    told = []
    model = adapt(noisy, steps=120, out=tmp_path / "mine.safetensors", progress=lambda *a: told.append(a), **OPTIONS)
    assert told[-1] == (120, 120)
    y = xrk.enhance(noisy[0], model, noise=OPTIONS["noise"])
    assert psnr(y, clean, 480) > psnr(noisy[0], clean, 480) + 3
    training = model.card.training
    assert training["data_sha256"] == hashlib.sha256(noisy.tobytes()).hexdigest()
    assert training["spot"] == 1
    loaded = xrk.load(tmp_path / "mine.safetensors")
    assert np.array_equal(loaded.enhance(noisy[0], noise=OPTIONS["noise"]), y)
    assert loaded.card.training == json.loads(json.dumps(training))
    assert loaded.card.sha256 == model.card.sha256
    again = adapt(noisy, steps=120, **OPTIONS)
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], tensor)
    further = adapt(noisy, model, steps=2, **OPTIONS | {"features": None})
    assert further.card.config == model.card.config


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(adaptation, "_VALIDATE_EVERY", 2)
    noisy, _ = frames(2, 64)
    whole = adapt(noisy, steps=6, **OPTIONS)

    def killed(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(noisy, steps=6, run=tmp_path, progress=killed, **OPTIONS)
    split = adapt(noisy, steps=6, run=tmp_path, **OPTIONS)
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(split.module.state_dict()[name], tensor)
    with pytest.raises(InputError, match="other frames or settings"):
        adapt(noisy[::-1], steps=6, run=tmp_path, **OPTIONS)


def test_correlation_is_measured_and_hides_more():
    white, _ = frames(4, 128)
    spread, _ = frames(4, 128, spread=0.5)
    model = NoiseModel(GAIN)
    seen = [np.stack([model.stabilise(f, np.float32) for f in stack]) for stack in (white, spread)]
    assert np.abs(lagged(seen[0])).max() < 0.03
    assert min(lagged(seen[1])) > 0.2
    adapted = adapt(spread, steps=1, **OPTIONS)
    assert adapted.card.config["spot"] == 2
    assert adapted.card.training["lag_one_correlation"]["rows"] > 0.2


@pytest.mark.parametrize(
    ("change", "options", "error", "problem"),
    [
        (lambda f: f[:1], {}, InputError, "two or more"),
        (lambda f: f[0], {}, InputError, r"shape \(64, 64\)"),
        (lambda f: [f[0], f[1, :40]], {}, InputError, "one size"),
        (lambda f: [f[0], f[1].astype(np.int32)], {}, InputTypeError, "different dtypes"),
        (lambda f: np.full_like(f, 7), {"noise": None}, InputError, "constant"),
        (lambda f: f.astype(complex), {}, InputTypeError, "complex"),
        (lambda f: f * np.nan, {}, InputError, "not finite"),
        (lambda f: f, {"model": "resnet18-unet", "features": None}, InputError, "expected a blind-spot network"),
        (lambda f: f, {"spot": 0}, InputError, "spot is 0"),
        (lambda f: f, {"steps": 0}, InputError, "steps is 0"),
        (lambda f: f, {"out": "/nowhere/at/all.safetensors"}, ImageFileError, "nowhere"),
    ],
)
def test_bad_input(change, options, error, problem):
    with pytest.raises(error, match=problem):
        adapt(change(frames(2, 64)[0]), **{"steps": 1} | OPTIONS | options)
