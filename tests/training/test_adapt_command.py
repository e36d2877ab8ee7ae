"""`xrk adapt`: what it says, writes, and how it goes on after it was killed."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tifffile

import xrk
from tests.training.test_adaptation import frames
from xrk.cli import main

OPTIONS = ["--features", "4", "--noise", "8,0,0"]


@pytest.fixture
def folder(tmp_path):
    noisy, _ = frames(3, 64)
    (tmp_path / "frames").mkdir()
    tifffile.imwrite(tmp_path / "frames" / "a.tif", noisy[:2])
    tifffile.imwrite(tmp_path / "frames" / "b.tif", noisy[2])
    return tmp_path


def test_a_killed_command_goes_on(folder, capsys):
    whole, split = folder / "whole.safetensors", folder / "split.safetensors"
    command = ["adapt", str(folder / "frames"), *OPTIONS, "--steps", "30", "-o"]
    assert main([*command, str(whole)]) == 0
    out, _ = capsys.readouterr()
    assert "3 frames of 64 x 64" in out and "white" in out and "30 steps" in out
    process = subprocess.Popen([sys.executable, "-m", "xrk", *command, str(split)], stdout=subprocess.DEVNULL)
    checkpoint = folder / "split.safetensors.run" / "checkpoint.pt"
    until = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and checkpoint.exists() and not split.exists()
    begun = checkpoint.stat().st_mtime_ns
    assert main([*command, str(split)]) == 0
    assert begun and "30 steps" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["frames", "split.safetensors", "whole.safetensors"]
    once, again = xrk.load(whole), xrk.load(split)
    for name, tensor in once.module.state_dict().items():
        np.testing.assert_array_equal(again.module.state_dict()[name], tensor)
    first, last = (tifffile.imread(folder / "frames" / name) for name in ("a.tif", "b.tif"))
    stack = np.concatenate([first, last[None]])
    assert once.card.training["data_sha256"] == hashlib.sha256(stack.tobytes()).hexdigest()
    files = [str(folder / "frames" / "b.tif"), str(folder / "o.tif")]
    assert main(["enhance", *files, "--model", str(split), "--quiet"]) == 0


def test_correlated_noise_is_said_first(folder, capsys):
    noisy, _ = frames(4, 128, spread=0.5)
    tifffile.imwrite(folder / "c.tif", noisy, photometric="minisblack")
    command = ["adapt", str(folder / "c.tif"), *OPTIONS, "--steps", "1", "-o", str(folder / "m.safetensors")]
    assert main(command) == 0
    assert "blind for the 3 x 3 pixels around each (spot=2)" in capsys.readouterr().out
    assert main([*command, "--spot", "1"]) == 0
    assert "spot=1 was asked for, less than the 2 needed" in capsys.readouterr().out


def test_what_a_run_left_is_named(folder, capsys):
    run = folder / "m.safetensors.run"
    run.mkdir()
    (run / "checkpoint.pt").write_bytes(b"PK junk")
    command = ["adapt", str(folder / "frames"), *OPTIONS, "--steps", "1", "-o", str(folder / "m.safetensors")]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"delete {run} to begin anew" in err
    (run / "checkpoint.pt").unlink()
    assert main([*command, "--loss", "uncalibrated", "--levels", "0", "4095"]) == 0
    model = xrk.load(folder / "m.safetensors")
    assert model.card.domain == "unit" and model.card.training["levels"] == [0.0, 4095.0]


@pytest.mark.parametrize(
    ("names", "options", "problem"),
    [
        (["b.tif"], [], "two or more"),
        (["a.tif", "small.tif"], [], "sizes"),
        (["flat.tif"], [], "constant"),
        (["a.tif", "missing.tif"], [], "missing.tif"),
        (["a.tif"], ["--noise=-1,0,0"], "not negative"),
        (["a.tif"], ["--noise", "-1,0,0"], "not negative"),
        (["a.tif", "b.safetensors"], ["-o", "b.safetensors"], "would overwrite the frame"),
        (["a.tif"], ["--model", "b.safetensors", "-o", "b.safetensors"], "would overwrite the model"),
        (["a.tif"], ["--noise", "off"], "GAIN,OFFSET,READ"),
        (["a.tif"], ["--spot", "0"], "spot=0"),
        (["a.tif"], ["--steps", "0"], "steps=0"),
        (["a.tif"], ["--features", "0"], "features=0"),
        (["a.tif"], ["--seed=-1"], "seed=-1"),
        (["a.tif"], ["--spot", "50"], "1 to 16"),
        (["a.tif"], ["--device", "cuda:99"], "is not here"),
        (["a.tif"], ["--device", "foo"], "no device that xrk can use"),
        (["a.tif"], ["--loss", "uncalibrated"], "made for the calibrated loss"),
        (["a.tif"], ["--model", "resnet18-unet"], "expected a blind-spot network"),
        (["a.tif"], ["-o", "mine.tif"], "ends in .safetensors"),
        (["a.tif"], ["-o", "/nowhere/mine.safetensors"], "/nowhere"),
    ],
)
def test_refusals(folder, capsys, monkeypatch, names, options, problem):
    monkeypatch.chdir(folder / "frames")
    tifffile.imwrite("flat.tif", np.full((2, 64, 64), 7, np.uint16))
    tifffile.imwrite("small.tif", np.ones((32, 64), np.uint16))
    (folder / "frames" / "b.safetensors").write_bytes((folder / "frames" / "b.tif").read_bytes())
    before = sorted(folder.rglob("*"))
    assert main(["adapt", *names, "-o", str(folder / "mine.safetensors"), *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("xrk: ") and err.count("\n") == 1 and problem in err
    assert sorted(folder.rglob("*")) == before
