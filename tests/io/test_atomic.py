"""A file appears whole or not at all."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from xrk import io
from xrk.errors import ImageFileError, InputError


def names(folder):
    return sorted(os.listdir(folder))


def test_the_name_appears_at_the_end(tmp_path):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    with io.atomic_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        assert [name for name in names(tmp_path) if name.startswith("out.bin.") and name.endswith(".partial")]
    assert path.read_bytes() == b"new" and names(tmp_path) == ["out.bin"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_after_an_error_nothing_is_left(tmp_path, error):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), io.atomic_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["out.bin"]


def test_an_interrupt_while_an_image_is_written(tmp_path, monkeypatch):
    stack = np.zeros((3, 8, 8), "u2")
    write, calls = io.Sink.write, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(self, *arguments, **options)

    monkeypatch.setattr(io.Sink, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        io.write(tmp_path / "out.tif", stack)
    assert names(tmp_path) == []


def test_a_full_disk_is_told_in_a_sentence(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ImageFileError, match=r"out\.tif cannot be written: No space left on device\."):
        io.write(tmp_path / "out.tif", np.zeros((8, 8), "u2"))
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_process_leaves_the_old_file(tmp_path):
    script = """
        import sys, time
        from importlib import import_module
        with import_module("xrk.io.atomic").atomic_file(sys.argv[1]) as file:
            file.write(b"half")
            file.flush()
            print("here", flush=True)
            time.sleep(60)
    """
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGKILL)
    left = names(tmp_path)
    assert path.read_bytes() == b"old" and len(left) == 2 and left[1].endswith(".partial")


def test_links_are_followed(tmp_path):
    (tmp_path / "real.bin").write_bytes(b"old")
    try:
        (tmp_path / "link.bin").symlink_to("real.bin")
    except OSError:
        pytest.skip("no symbolic links here")
    with io.atomic_file(tmp_path / "link.bin") as file:
        file.write(b"new")
    assert (tmp_path / "link.bin").is_symlink() and (tmp_path / "real.bin").read_bytes() == b"new"


def test_places_where_nothing_can_be_written(tmp_path):
    array = np.zeros((8, 8), "u2")
    for path, words in [
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "out.tif", "the folder .* does not exist"),
        (tmp_path / "out.png", "xrk writes TIFF"),
        (tmp_path / "file" / "out.tif", "does not exist"),
    ]:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(ImageFileError, match=words):
            io.check_writable(path)
        with pytest.raises(ImageFileError, match=words):
            io.write(path, array)
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="needs /dev/null")
def test_a_device_is_no_target():
    with pytest.raises(ImageFileError, match="not a regular file"):
        io.check_writable("/dev/null")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ImageFileError, match="no permission"):
        io.check_writable(tmp_path / "out.tif")
    tmp_path.chmod(0o700)


def test_files_are_told_apart_however_they_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tif").write_bytes(b"a")
    (tmp_path / "folder").mkdir()
    (tmp_path / "there").symlink_to("folder")
    (tmp_path / "link.tif").symlink_to("a.tif")
    os.link("a.tif", "hard.tif")
    for name in ("a.tif", "folder/../a.tif", tmp_path / "a.tif", "link.tif", "hard.tif"):
        with pytest.raises(InputError, match=r"The result .* would overwrite the frame; choose another name\."):
            io.check_apart({"picture": None, "result": name}, {"frame": ["absent.tif", "a.tif"]})
    with pytest.raises(InputError, match="The result and the picture would both be written to"):
        io.check_apart({"result": "folder/b.tif", "picture": "there/b.tif"}, {})
    several = {"result": ["b.tif", "B.tif", "absent.tif"], "picture": "b.png"}
    io.check_apart(several, {"frame": "absent.tif", "mask": np.zeros((2, 2)), "flat": "a.tif"})
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InputError, match="would both be written to"):
        io.check_apart(several, {})
