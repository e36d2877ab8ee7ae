"""The command line: what it prints, writes and returns; wrong input is one sentence and exit code 2."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tifffile
import tqdm

import xrk
from xrk import io
from xrk.cli import main
from xrk.models import ARCHITECTURES


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint that adds one 16th of the range to every pixel."""
    module = ARCHITECTURES["dncnn"](features=4, depth=3, batch_norm=False)
    state = module.state_dict()
    for name, tensor in state.items():
        tensor.zero_()
        if tensor.shape == (1,) and "bias" in name:
            tensor.fill_(-1 / 16)  # the network predicts the noise
    path = tmp_path_factory.mktemp("model") / "lift.safetensors"
    safetensors.torch.save_file(state, path)
    return str(path)


@pytest.fixture
def frame():
    return np.random.default_rng(0).integers(500, 3000, (40, 50)).astype("u2")


@pytest.fixture
def source(tmp_path, frame):
    path = tmp_path / "in.tif"
    tifffile.imwrite(path, frame, compression="zlib", metadata=None, description="shot 7")
    return path


def names(folder):
    return sorted(os.listdir(folder))


def refusal(capsys, *argv):
    """The sentence with which the command line refuses these arguments."""
    assert main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("xrk: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


def test_enhance_a_file(tmp_path, capsys, source, frame, model):
    target, preview, document = (tmp_path / name for name in ("out.tif", "out.png", "out.json"))
    options = ["--model", model, "--levels", "0", "4096", "--noise", "off", "--device", "cpu", "--memory", "1GiB"]
    assert (
        main(["enhance", str(source), *options, "--preview", str(preview), str(target), "--report", str(document)]) == 0
    )
    out, err = capsys.readouterr()
    assert str(target) in out and "levels 0 to 4096 (given)" in out and err == ""
    image = io.read(target)
    np.testing.assert_array_equal(image.array, frame + 256)
    assert image.layout == io.read(source).layout and image.description.startswith("shot 7")
    report = json.loads(document.read_text())
    assert report["levels"] == [0, 4096] and image.report["levels"] == [0, 4096]
    assert preview.read_bytes().startswith(b"\x89PNG")
    assert names(tmp_path) == ["in.tif", "out.json", "out.png", "out.tif"]


def test_quiet_and_into_a_folder(tmp_path, capsys, source, model):
    (tmp_path / "there").mkdir()
    assert main(["enhance", str(source), str(tmp_path / "there"), "--model", model, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert names(tmp_path / "there") == ["in.tif"]


def test_noise_dark_flat_and_mask_reach_the_library(tmp_path, monkeypatch, source, model):
    seen = {}

    def enhance_file(src, dst, model, **options):
        seen.update(options)
        raise xrk.errors.InputError("seen")

    monkeypatch.setattr(xrk, "enhance_file", enhance_file)
    argv = ["enhance", str(source), str(tmp_path / "o.tif"), "--model", model, "--noise", "1.5,-99,2.25"]
    references = ["--dark", "d.tif", "--flat", "f.tif", "--mask", "m.tif", "--badpixels", "b.tif"]
    assert main([*argv, *references, "--levels", "-5", "1e3"]) == 2
    assert seen["noise"] == xrk.NoiseModel(1.5, -99, 2.25) and seen["levels"] == [-5.0, 1000.0]
    assert (seen["dark"], seen["flat"], seen["mask"], seen["badpixels"]) == ("d.tif", "f.tif", "m.tif", "b.tif")


def test_one_bar_over_all_files(tmp_path, capsys, monkeypatch, frame, model):
    """On a terminal: how much is done of the pixels of all files, how fast, and how long it will take."""
    for name in ("a.tif", "b.tif"):
        tifffile.imwrite(tmp_path / name, frame)
    (tmp_path / "c.tif").write_bytes(b"II*")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    seen = []
    update = tqdm.tqdm.update
    monkeypatch.setattr(tqdm.tqdm, "update", lambda bar, n=1: seen.append((bar.n + n, bar.total)) or update(bar, n))
    sources = [str(tmp_path / name) for name in ("a.tif", "b.tif", "c.tif")]
    assert main(["enhance", *sources, str(tmp_path / "out"), "--model", model, "--levels", "0", "4096"]) == 2
    assert [done for done, _ in seen] == [frame.size, 2 * frame.size]
    assert {total for _, total in seen} == {2 * frame.size}
    assert "pixel/s" in capsys.readouterr().err
    seen.clear()
    assert main(["enhance", sources[0], str(tmp_path / "d.tif"), "--model", model, "--quiet"]) == 0
    assert not any(total for _, total in seen)


def test_a_folder_and_one_bad_file_among_several(tmp_path, capsys, frame, model):
    raw, out = tmp_path / "raw", tmp_path / "deep" / "clean"
    raw.mkdir()
    for name in ("b.TIFF", "a.tif"):
        tifffile.imwrite(raw / name, frame)
    (raw / "bad.tif").write_bytes((raw / "a.tif").read_bytes()[:900])
    (raw / "notes.txt").write_text("not an image")
    (raw / "._a.tif").write_text("not an image either")
    extra = tmp_path / "extra.tif"
    tifffile.imwrite(extra, frame)
    options = [
        "--model",
        model,
        "--levels",
        "0",
        "4096",
        "--preview",
        str(out / "png"),
        "--report",
        str(tmp_path / "r.json"),
    ]
    assert main(["enhance", str(raw), str(extra), str(out), *options]) == 2
    said, err = capsys.readouterr()
    assert names(out) == ["a.tif", "b.TIFF", "extra.tif", "png"]
    assert names(out / "png") == ["a.tif.png", "b.TIFF.png", "extra.tif.png"]
    for name in ("a.tif", "b.TIFF", "extra.tif"):
        np.testing.assert_array_equal(tifffile.imread(out / name), frame + 256)
        assert str(out / name) in said
    first, second = err.splitlines()
    assert first.startswith(f"xrk: {raw / 'bad.tif'} is damaged") and "is cut off" in first
    assert second == "xrk: 1 of 4 files could not be enhanced."
    entries = json.loads((tmp_path / "r.json").read_text())
    assert [("error" in entry, "report" in entry) for entry in entries] == [(False, True)] * 2 + [
        (True, False),
        (False, True),
    ]


def test_errors_of_options_are_told_once(tmp_path, capsys, frame, model):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    for name in ("a.tif", "b.tif"):
        tifffile.imwrite(raw / name, frame)
    assert "absent.tif does not exist" in refusal(capsys, "enhance", raw, out, "--model", model, "--dark", "absent.tif")
    assert "cuda:77" in refusal(capsys, "enhance", raw, out, "--model", model, "--device", "cuda:77")
    assert "'nix'" in refusal(capsys, "enhance", raw, out, "--model", "nix")


def test_wrong_input(tmp_path, capsys, source, model):
    options = ["--model", model]
    out = tmp_path / "out.tif"
    (tmp_path / "text.tif").write_text("no image at all, only words")
    (tmp_path / "folder").mkdir()
    assert "does not exist" in refusal(capsys, "enhance", tmp_path / "nix.tif", out, *options)
    assert "not a TIFF" in refusal(capsys, "enhance", tmp_path / "text.tif", out, *options)
    assert "no TIFF file in it" in refusal(capsys, "enhance", tmp_path / "folder", out, *options)
    assert "does not exist" in refusal(capsys, "enhance", source, tmp_path / "no" / "out.tif", *options)
    assert "xrk writes TIFF" in refusal(capsys, "enhance", source, tmp_path / "out.png", *options)
    assert "reversed" in refusal(capsys, "enhance", source, out, *options, "--levels", "4095", "0")
    assert "gain" in refusal(capsys, "enhance", source, out, *options, "--noise", "0,0,0")
    assert "memory" in refusal(capsys, "enhance", source, out, *options, "--memory", "much")
    assert "pictures are PNG" in refusal(capsys, "enhance", source, out, *options, "--preview", tmp_path / "p.jpg")
    assert "is a file" in refusal(capsys, "enhance", source, tmp_path / "text.tif", tmp_path / "text.tif", *options)
    (tmp_path / "folder" / "in.tif").write_bytes(source.read_bytes())
    clash = refusal(capsys, "enhance", source, tmp_path / "folder" / "in.tif", tmp_path / "new", *options)
    assert "Two inputs are named in.tif" in clash
    assert not out.exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("output", "file", "words"),
    [
        (None, "in.tif", "the input"),
        *((option, "in.tif", "the input") for option in ("--preview", "--uncertainty", "--report")),
        *((None, name, words) for name, words in (("d.tif", "the dark frame"), ("hard.tif", "the dark frame"))),
        *((option, "link.tif", "the flat field") for option in ("--preview", "--uncertainty", "--report")),
        ("--report", "m.tif", "the mask"),
        ("--preview", "b.tif", "the map of bad pixels"),
        ("--report", "dncnn.safetensors", "the model"),
    ],
)
def test_no_input_is_overwritten(tmp_path, capsys, frame, source, model, output, file, words):
    for name in ("d.tif", "f.tif", "m.tif", "b.tif"):
        tifffile.imwrite(tmp_path / name, frame)
    (tmp_path / "dncnn.safetensors").write_bytes(Path(model).read_bytes())
    (tmp_path / "link.tif").symlink_to("f.tif")
    os.link(tmp_path / "d.tif", tmp_path / "hard.tif")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    out = file if output is None else "out.tif"
    options = [] if output is None else [output, tmp_path / file]
    for option, name in (("--dark", "d.tif"), ("--flat", "f.tif"), ("--mask", "m.tif"), ("--badpixels", "b.tif")):
        options += [option, tmp_path / name]
    told = refusal(capsys, "enhance", source, tmp_path / out, "--model", tmp_path / "dncnn.safetensors", *options)
    assert f"{file} would overwrite {words}" in told
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_output_is_overwritten_by_another(tmp_path, capsys, frame, model):
    (tmp_path / "raw").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("a.tif", "b.tif"):
        tifffile.imwrite(tmp_path / "raw" / name, frame)
    options = ["--model", model, "--report", tmp_path / "out" / "b.tif"]
    told = refusal(capsys, "enhance", tmp_path / "raw", tmp_path / "out", *options)
    assert "The output and the report would both be written to" in told and names(tmp_path / "out") == []
    assert "overwrite the input" in refusal(capsys, "enhance", tmp_path / "raw", tmp_path / "raw", "--model", model)


def test_wrong_usage(capsys):
    assert "choose from" in refusal(capsys, "improve")
    assert "only path given" in refusal(capsys, "enhance", "a.tif")
    assert "required" in refusal(capsys, "enhance")
    assert "--bogus means nothing here" in refusal(capsys, "enhance", "a.tif", "b.tif", "--bogus")
    assert "GAIN,OFFSET,READ, not '1,2'" in refusal(capsys, "enhance", "a", "b", "--noise", "1,2")
    assert "invalid float" in refusal(capsys, "enhance", "a", "b", "--levels", "0", "x")
    assert "expected 2" in refusal(capsys, "enhance", "a", "b", "--levels", "0")
    assert "more means nothing" in refusal(capsys, "info", "more")
    assert "invalid int" in refusal(capsys, "demo", "--size", "big")


def test_help_and_version(capsys):
    assert main([]) == main(["-h"]) == 0
    overview = capsys.readouterr().out
    for verb in ("demo", "enhance", "models", "inspect", "info"):
        assert main([verb, "--help"]) == 0
        assert f"usage: xrk {verb}" in capsys.readouterr().out and verb in overview
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"xrk {xrk.__version__}\n"


def test_models_and_info(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    for card in xrk.list_models():
        assert card.name in out and card.description.split()[0] in out and card.limits.split()[-1] in out
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert xrk.__version__ in out and "torch" in out


def test_plan(capsys):
    assert main(["plan", "resnet18-unet", "500", "640"]) == 0
    told = capsys.readouterr().out
    assert "plan for 1 x 1 x 512 x 640" in told  # padded to the network's multiple of 32
    assert re.search(r"predicted peak: [\d.]+ MiB", told)
    assert main(["plan", "resnet18-unet", "500", "640", "--memory", "2MiB"]) == 2
    assert re.fullmatch(r"xrk: memory=.* expected at least memory=\d+\.\n", capsys.readouterr().err)
    assert main(["plan", "resnet18-unet", "0", "640"]) == 2
    assert "expected" in capsys.readouterr().err


def test_inspect_images(tmp_path, capsys, source, model):
    assert main(["inspect", str(source)]) == 0
    out = capsys.readouterr().out
    for words in ("50 x 40 pixels, uint16", "little-endian", "deflate", "0 to 65535", "variance =", "shot 7"):
        assert words in out
    main(["enhance", str(source), str(tmp_path / "out.tif"), "--model", model])
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out.tif")]) == 0
    assert "by xrk" in capsys.readouterr().out
    stack = np.linspace(0, 1, 2 * 30 * 40, dtype="f4").reshape(2, 30, 40)
    stack[0, 0, :3] = [np.nan, np.inf, -np.inf]
    tifffile.imwrite(tmp_path / "x.dat", stack, imagej=True, resolution=(100, 50), resolutionunit=3)
    assert main(["inspect", str(tmp_path / "x.dat")]) == 0
    out = capsys.readouterr().out
    for words in ("float32, 2 frames", "ImageJ", "3 pixels are NaN", "--levels", "100 x 50 pixels per cm"):
        assert words in out


def test_inspect_checkpoints(tmp_path, capsys, model):
    assert main(["inspect", model]) == 0
    out = capsys.readouterr().out
    assert "checkpoint" in out and "dncnn" in out
    state = safetensors.torch.load_file(model)
    state.pop(next(iter(state)))
    safetensors.torch.save_file(state, tmp_path / "part")
    assert main(["inspect", str(tmp_path / "part")]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_inspect_neither(tmp_path, capsys):
    path = tmp_path / "words.txt"
    path.write_text("neither of them")
    assert "neither a TIFF image nor a checkpoint" in refusal(capsys, "inspect", path)
    assert "does not exist" in refusal(capsys, "inspect", tmp_path / "absent")
    assert "absent.pth" in refusal(capsys, "inspect", tmp_path / "absent.pth")
    assert "folder" in refusal(capsys, "inspect", tmp_path)


def test_an_interrupt_leaves_nothing(tmp_path, capsys, monkeypatch, source, model):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(io.Sink, "write", interrupted)
    assert main(["enhance", str(source), str(tmp_path / "out.tif"), "--model", model]) == 130
    assert capsys.readouterr().err == "xrk: interrupted.\n"
    assert names(tmp_path) == ["in.tif"]


def test_a_defect_of_xrk_is_not_hidden(monkeypatch):
    monkeypatch.setattr(xrk, "list_models", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["models"])


def test_a_real_frame(tmp_path, shared_data, capsys, model):
    source = shared_data / "radiographs" / "synchrotron" / "radiography_2BM_0020.tif"
    assert main(["enhance", str(source), str(tmp_path), "--model", model, "--preview", str(tmp_path / "p.png")]) == 0
    before, after = io.read(source), io.read(tmp_path / source.name)
    np.testing.assert_array_equal(after.array, np.minimum(before.array.astype(int) + 4096, 65535))
    assert (after.kind, after.layout, after.description) == (before.kind, before.layout, before.description)
    assert after.report["model"] == "lift"


def test_as_a_module():
    """In a process of its own: the exit code, and the sentence on stderr alone."""
    command = [sys.executable, "-m", "xrk", "enhance", "absent.tif", "out.tif", "--levels", "0", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "xrk: argument --levels: invalid float value: 'x' (see `xrk enhance -h`).\n"
