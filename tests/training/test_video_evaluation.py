"""The table of two cameras on the smallest of examples, with a network that is only at its start."""

import json
import zipfile

import numpy as np
import pytest
import tifffile
import torch

from xrk.models import EDVRSTF
from xrk.training import evaluate_video, stf


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    network = EDVRSTF(**stf.CONFIG)
    stf.initialise(network)
    path = tmp_path_factory.mktemp("weights") / "begun.pth"
    torch.save({"params": network.state_dict()}, path)
    return path


def test_recordings_are_two_cameras_of_one_process():
    seen = evaluate_video.simulated(3, 32, 4, 1000.0, 1000.0)
    assert seen.lr.shape == (5, 8, 8) and seen.hr.shape == (2, 32, 32) and seen.truth.shape == (5, 32, 32)
    assert seen.judged() == [1, 2, 3]
    low = seen.truth.reshape(5, 8, 4, 8, 4).mean((2, 4))
    assert np.abs(low - seen.lr).mean() < 0.1 * seen.peak


def test_the_real_stack_is_shrunk_and_thinned_out(tmp_path):
    stack = np.random.default_rng(0).integers(0, 4000, (8, 40, 50), np.uint16)
    tifffile.imwrite(tmp_path / evaluate_video.STACK, stack)
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.write(tmp_path / evaluate_video.STACK, f"package/data/{evaluate_video.STACK}")
    seen = evaluate_video.melt_pool(tmp_path / "a.whl", 3)
    assert np.array_equal(seen.truth, stack[:7, :32, :48]) and np.array_equal(seen.hr, stack[:7:3, :32, :48])
    assert seen.lr.shape == (7, 8, 12) and seen.lr.dtype == np.uint16
    assert seen.lr[2, 1, 1] == round(stack[2, 4:8, 4:8].mean())
    assert seen.levels == (0, seen.peak) and seen.peak == stack[:7, :32, :48].max()
    assert seen.judged() == [1, 2, 4, 5]


def test_the_table_and_the_strip(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate_video, "CASES", ((3, 1, 4000.0, 1000.0),))
    monkeypatch.setattr(evaluate_video, "SINGLE", "resnet18-unet")
    given = ["--model", str(weights), "--size", "64"]
    evaluate_video.main([*given, "--scenes", "1", "--out", str(tmp_path / "table.json")])
    rows = json.loads((tmp_path / "table.json").read_text())["simulated"]
    found = {row["method"]: row for row in rows}
    assert list(found) == ["bicubic", "resnet18-unet, then bicubic", "linear in time", "xrk begun"]
    for row in rows:
        assert 10 < row["psnr"] < 60 and 0 < row["ssim"] <= 1 and 0 < row["aad"] < 200
    assert "| 1 : 3, separation 1, 4000 and 1000 quanta | " in capsys.readouterr().out
    evaluate_video.main([*given, "--picture", str(tmp_path / "strip.png")])
    assert (tmp_path / "strip.png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_those_of_the_frames_between_key_frames():
    truth = np.full((5, 16, 16), 100.0)
    seen = evaluate_video.Recording(truth[:, ::4, ::4], truth[::4], truth, 4, 1000.0)
    frames = truth + np.array([500.0, 10, 10, 10, 500])[:, None, None]
    value, _, deviation = evaluate_video.figures(seen, iter(frames))
    assert value == pytest.approx(40.0) and deviation == pytest.approx(10.0)
