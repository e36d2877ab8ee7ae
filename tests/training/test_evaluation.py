"""The quality table and the export of a run, on the smallest of examples."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import xrk
from xrk.models import ARCHITECTURES
from xrk.training import blindspot_net, evaluate, export, lxie_net, resnet18_unet


def test_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "DOSES", (400.0,))
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)  # BM3D takes too long for a test
    evaluate.main(["--scenes", "1", "--size", "96", "--out", str(tmp_path / "table.json")])
    table = json.loads((tmp_path / "table.json").read_text())
    white = {row["method"]: row["psnr"] for row in table["scenes"] if row["noise"] == "white"}
    assert set(white) == {"noisy", "median 3x3", "wavelet BayesShrink", "NLM (fast mode)", "xrk resnet18-unet"}
    assert white["xrk resnet18-unet"] > white["NLM (fast mode)"] > white["noisy"]
    assert {row["noise"] for row in table["residual"]} == {"white", "scintillator"}
    for row in table["residual"]:
        assert row["sd"] == pytest.approx(row["sd_put_in"], rel=0.2)
    assert all(row["sd"] < 0.5 for row in table["flat"])
    assert {row["scene"] for row in table["long_range"]} == {"uniform steps", "wires", "stripes"}
    for scene in ("uniform steps", "wires"):
        gained = {row["method"]: row["psnr"] for row in table["long_range"] if row["scene"] == scene}
        assert gained["xrk resnet18-unet"] > gained["noisy"] + 6
    out = capsys.readouterr().out
    assert "| method | uniform steps, 15 | wires, 15 | stripes, 15 | uniform steps, 50 |" in out
    assert f"| xrk resnet18-unet | {white['xrk resnet18-unet']:.2f} / " in out


@pytest.mark.parametrize(
    ("name", "recipe"), [("resnet18-unet", resnet18_unet), ("lxie-net", lxie_net), ("blindspot", blindspot_net)]
)
def test_an_exported_run_loads_and_is_the_average(tmp_path, name, recipe):
    torch.manual_seed(0)
    network = recipe.build(recipe.CONFIG).eval()
    recipe.initialise(network)
    run = tmp_path / "run"
    run.mkdir()
    saved = {"model": name, "config": recipe.CONFIG, "average": network.state_dict(), "step": 7, "seconds": 3600.0}
    torch.save(saved, run / "checkpoint.pt")
    (run / "log.csv").write_text("3,1,0.5,1.0,1.0\n7,2,0.25,2.5,0.0\n")
    card = export.export(run, "mine", tmp_path, {"psnr_db": []}, "a machine", "A short run.")
    assert card.limits.startswith("A short run. ")
    assert card.training["hours"] == 1.0
    assert card.training["validation_gain_db"] == 2.5
    assert card.architecture == name and card.domain == "stabilised"
    assert json.loads((tmp_path / "mine.json").read_text()) == card.to_dict()
    module = ARCHITECTURES[name](**card.config).eval()
    module.load_state_dict(load_file(tmp_path / "mine.safetensors"))
    x = 3 * torch.randn(1, 1, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), network(x), rtol=0, atol=0.05)
        # fp16 did not touch the filters that see the image, so they still sum to zero.
        torch.testing.assert_close(module(x + 300)[:, :1] - 300, module(x)[:, :1], rtol=0, atol=2e-3)
    loaded = xrk.load(tmp_path / "mine.safetensors")
    assert loaded.card.config | card.config == loaded.card.config and loaded.card.domain == "stabilised"


def test_the_card_of_a_network_that_sees_every_pixel_says_so(tmp_path):
    config = {**blindspot_net.CONFIG, "features": 4, "spot": 0}
    network = blindspot_net.build(config).eval()
    saved = {"model": "blindspot", "config": config, "average": network.state_dict(), "step": 7, "seconds": 1.0}
    torch.save(saved, tmp_path / "checkpoint.pt")
    (tmp_path / "log.csv").write_text("7,2,0.25,2.5,0.0\n")
    card = export.export(tmp_path, "mine", tmp_path, {}, "a machine", note="Stopped early.")
    assert "nothing is blind" in card.description and "noisy frames alone" not in card.description
    assert card.training["recipe"].endswith("--spot 0") and card.training["note"] == "Stopped early."
    frame = np.random.default_rng(0).poisson(400, (50, 70)).astype(np.uint16)
    assert xrk.enhance(frame, tmp_path / "mine.safetensors").shape == frame.shape


def test_one_table_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    evaluate.main(["--size", "64", "--tables", "flat", "--out", str(tmp_path / "table.json")])
    table = json.loads((tmp_path / "table.json").read_text())
    assert "flat" in table and not {"scenes", "residual", "long_range"} & set(table)
    assert table["command"] == "python -m xrk.training.evaluate --models resnet18-unet --scenes 8"
    assert export.summary(table) == {"command": table["command"], "psnr_db": []}


@pytest.mark.parametrize("name", ["resnet18-unet", "lxie-net"])
def test_shipped_weights_ignore_the_level(name):
    module = xrk.load(name).module
    x = torch.randn(1, 1, 96, 64)
    with torch.inference_mode():
        torch.testing.assert_close(module(x + 200) - 200, module(x), rtol=0, atol=2e-3)


@pytest.mark.parametrize("spread", [0.0, 0.55])
def test_the_peers_noise_is_the_detectors(spread):
    detector = evaluate.Detector(evaluate.GAIN, evaluate.OFFSET, 0.0, spread)
    counts = detector.expose(np.ones((300, 300), np.float32), 400.0, seed=0)
    assert counts.var() == pytest.approx(float(evaluate.pixel_noise(spread).variance(counts.mean())), rel=0.03)
