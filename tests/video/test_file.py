"""Files in, a file out: whole or absent, and a run that goes on where another one ended."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tifffile
import torch
from videos import seeded, sequences

import xrk
from xrk import cli, video, video_file
from xrk.errors import ImageFileError, InputError, InputTypeError

COUNT = 7
LR, HR = sequences(COUNT, 2)


@pytest.fixture
def files(tmp_path):
    for name, stack in (("lr.tif", LR), ("hr.tif", HR)):
        xrk.io.write(tmp_path / name, stack)
    torch.save({"params": seeded().state_dict()}, tmp_path / "net_g_1.pth")
    return tmp_path


def run(files, **options):
    options = {"ratio": 4, "model": files / "net_g_1.pth", "runtime": "whole"} | options
    return xrk.fuse_video_file(files / "lr.tif", files / "hr.tif", files / "out.tif", **options)


def left(files):
    return sorted(path.name for path in files.iterdir() if path.name.startswith("out"))


def stopping_after(frames):
    def stop(done, count):
        if done == frames:
            raise KeyboardInterrupt

    return stop


def test_the_file_is_what_the_call_gives(files):
    report = run(files)
    expected = list(xrk.fuse_video(LR, HR, ratio=4, model=files / "net_g_1.pth", runtime="whole"))
    image = xrk.io.read(files / "out.tif")
    assert np.array_equal(image.array, expected) and image.array.dtype == np.uint16
    assert np.array_equal(tifffile.imread(files / "out.tif"), expected)
    assert left(files) == ["out.tif"]
    told = xrk.io.read_report(files / "out.tif")["fuse_video"]
    assert told["frames"] == report.frames == COUNT and told["clipped"] == report.clipped
    assert told["model"] == "net_g_1" and told["file"] == {"lr": "lr.tif", "hr": "hr.tif"}
    assert "net_g_1 on cpu, 7 frames of 32 x 48 uint16" in str(report)


def test_a_cancelled_run_leaves_whole_frames_and_is_gone_on_with(files, monkeypatch):
    run(files)
    expected = (files / "out.tif").read_bytes()
    (files / "out.tif").unlink()
    for frames in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            run(files, progress=stopping_after(frames))
        assert left(files) == ["out.tif.frames"]
    told, planned = [], []
    plain = video.Network.__init__
    monkeypatch.setattr(video.Network, "__init__", lambda *given: planned.append(plain(*given)))
    report = run(files, progress=lambda *now: told.append(now))
    assert told == [(5, COUNT), (6, COUNT), (7, COUNT)]  # what was there was not made again
    assert len(planned) == 1
    assert report.features["lr"] == 3 and report.frames == COUNT
    assert left(files) == ["out.tif"] and (files / "out.tif").read_bytes() == expected


def test_a_run_that_ended_while_the_file_was_written_makes_no_frame_again(files, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(video_file.io, "create", full)
        with pytest.raises(OSError, match="No space"):
            run(files)
    assert left(files) == ["out.tif.frames"]
    report = run(files)
    assert report.features == {"lr": 0, "hr": 0} and left(files) == ["out.tif"]
    assert np.array_equal(
        xrk.io.read(files / "out.tif").array,
        list(xrk.fuse_video(LR, HR, ratio=4, model=files / "net_g_1.pth", runtime="whole")),
    )


@pytest.mark.parametrize("damage", ["torn", "changed", "other call", "other input", "other module", "no resume"])
def test_only_whole_frames_of_the_same_call_are_taken(files, damage):
    other, before = seeded(seed=7), {}
    if damage == "other module":
        before = {"model": seeded()}  # of one kind and one size: only their values tell them apart
    with pytest.raises(KeyboardInterrupt):
        run(files, progress=stopping_after(4), **before)
    kept = files / "out.tif.frames"
    content = bytearray(kept.read_bytes())
    options, first = {}, 0
    if damage == "torn":
        kept.write_bytes(content[:-100])
        first = 3
    elif damage == "changed":
        content[-2000] ^= 1
        kept.write_bytes(content)
        first = 3
    elif damage == "other call":
        options = {"separation": 2}
    elif damage == "other module":
        options = {"model": other}
    elif damage == "other input":
        xrk.io.write(files / "hr.tif", HR[::-1])
    else:
        options = {"resume": False}
    told = []
    run(files, progress=lambda done, _: told.append(done), **options)
    assert told[0] == (first or 1)
    hr = HR[::-1] if damage == "other input" else HR
    chosen = {"separation": options.get("separation", 1), "model": options.get("model", files / "net_g_1.pth")}
    expected = list(xrk.fuse_video(LR, hr, ratio=4, runtime="whole", **chosen))
    assert np.array_equal(xrk.io.read(files / "out.tif").array, expected) and left(files) == ["out.tif"]


def test_an_older_file_stays_until_the_new_one_is_whole(files):
    (files / "out.tif").write_bytes(b"older")
    with pytest.raises(KeyboardInterrupt):
        run(files, progress=stopping_after(1))
    assert (files / "out.tif").read_bytes() == b"older"
    run(files)
    assert xrk.io.read(files / "out.tif").shape == (COUNT, 32, 48)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (("lr.tif", "hr.tif", "lr.tif"), {}, InputError, "overwrite"),
        (("lr.tif", "hr.tif", "none/out.tif"), {}, ImageFileError, "does not exist"),
        (("lr.tif", "hr.tif", "out.png"), {}, ImageFileError, "writes TIFF"),
        (("absent.tif", "hr.tif", "out.tif"), {}, ImageFileError, "absent.tif"),
        (("lr.tif", "hr.tif", "out.tif"), {"ratio": 1}, InputError, "key frames"),
        (("lr.tif", "hr.tif", "out.tif"), {"start": 3}, InputError, "start"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(files, arguments, options, error, words):
    with pytest.raises(error, match=words):
        xrk.fuse_video_file(*(files / name for name in arguments), **{"ratio": 4, "model": "linear"} | options)
    assert left(files) == []


def test_somebody_s_own_file_stays(files):
    (files / "out.tif.frames").write_text("notes")
    with pytest.raises(ImageFileError, match=r"out\.tif\.frames is in the way"):
        run(files, model="linear")
    assert (files / "out.tif.frames").read_text() == "notes" and left(files) == ["out.tif.frames"]


def test_arrays_go_elsewhere(files):
    with pytest.raises(InputTypeError, match=r"xrk\.fuse_video"):
        xrk.fuse_video_file(LR, HR, files / "out.tif", model="linear")


# --- the command ------------------------------------------------------------------------------------------------------


def command(files, *more):
    names = [str(files / name) for name in ("lr.tif", "hr.tif", "out.tif", "net_g_1.pth")]
    return ["fuse-video", names[0], names[1], "-o", names[2], "--model", names[3], "--ratio", "4", *more]


def test_the_command(files, capsys):
    assert cli.main(command(files, "--report", str(files / "told.json"), "--separation", "2")) == 0
    out = capsys.readouterr().out
    assert "out.tif\n  net_g_1 on cpu, 7 frames of 32 x 48 uint16" in out and "frames per second" in out
    expected = list(xrk.fuse_video(LR, HR, ratio=4, separation=2, model=files / "net_g_1.pth"))
    assert np.array_equal(xrk.io.read(files / "out.tif").array, expected)
    assert json.loads((files / "told.json").read_text())["separation"] == 2
    assert cli.main(command(files, "--quiet", "--compat", "xfusion")) == 0
    assert capsys.readouterr().out == "" and xrk.io.read(files / "out.tif").array.dtype == np.uint8


@pytest.mark.parametrize(
    ("more", "words"),
    [(("--ratio", "1"), "key frames"), (("--scale", "2"), "scale=2"), (("--model", "none"), "no model 'none'")],
)
def test_the_command_refuses_in_a_sentence(files, capsys, more, words):
    assert cli.main(command(files, *more)) == 2
    told = capsys.readouterr().err
    assert told.startswith("xrk: ") and words in told and told.count("\n") == 1 and left(files) == []


def test_the_command_can_be_interrupted(files, tmp_path):
    """The process itself, by a signal between two frames."""
    lr, hr = sequences(3000, 750, (8, 12))
    xrk.io.write(files / "lr.tif", lr)
    xrk.io.write(files / "hr.tif", hr)
    process = subprocess.Popen(
        [sys.executable, "-m", "xrk", *command(files)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background inherit it ignored
    )  # fmt: skip
    kept = files / "out.tif.frames"
    deadline = time.monotonic() + 60
    while not (kept.exists() and kept.stat().st_size > 10000) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip().endswith("xrk: interrupted.") and out == ""
    assert left(files) == ["out.tif.frames"]
