"""`xrk.info` and what `import xrk` says where it is not installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from xrk.kernels import dispatch

import xrk
from xrk import _native, environment, radiograph


def test_info_is_plain_data_and_true():
    d = environment.info()
    assert json.loads(json.dumps(d)) == d
    assert d["xrk"] == xrk.__version__
    assert d["packages"]["torch"] == torch.__version__
    assert d["packages"]["numpy"] == np.__version__
    assert d["packages"]["tifffile"] == tifffile.__version__
    assert d["native"]["present"] is True
    assert d["native"]["problem"] is None
    assert d["native"]["cuda"] == _native.HAVE_CUDA
    assert d["native"]["simd"] == _native.simd()
    assert Path(d["native"]["file"]).is_file()
    assert d["kernels"]["cpu"]["pixels"]["path"] == radiograph.kernel_path()
    assert set(d["kernels"]) == ({"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"})
    assert d["devices"][0]["device"] == "cpu"
    assert d["devices"][0]["memory"] is None or d["devices"][0]["memory"] > 2**28
    assert len(d["devices"]) == 1 + (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert d["models"] == [card.name for card in xrk.list_models()]


def test_the_path_taken_is_explained():
    before = _native.simd()
    try:
        _native.set_simd("baseline")
        pixels = environment.info()["kernels"]["cpu"]["pixels"]
        assert "baseline" in pixels["path"]
        chosen = len(_native.supported_simd()) > 1
        assert pixels["why"].startswith("chosen by set_simd" if chosen else "the widest")
    finally:
        _native.set_simd(before)
    assert environment.info()["kernels"]["cpu"]["pixels"]["why"].startswith("the widest")


@pytest.fixture
def decided_anew():
    """Paths are decided once a process: tests that take something away have them decided again."""
    dispatch.forget()
    yield
    dispatch.forget()


def test_every_operator_names_its_path_and_why(decided_anew, monkeypatch):
    paths = environment.info()["kernels"]["cpu"]
    assert list(paths) == ["pixels", *dispatch.ops()]
    assert paths["selective_scan_2d"]["path"] == f"native ({_native.simd()})"
    assert all(taken["path"] != "reference" and taken["why"] for taken in paths.values())
    # A CUDA device without Triton: asked for, since the machine of these tests may have neither or both.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment, "_devices", lambda: [])
    monkeypatch.setitem(sys.modules, "triton", None)
    d = environment.info()
    taken = d["kernels"]["cuda"]["layer_norm"]
    assert taken["path"] == "reference" and "pip install triton" in taken["why"]
    d["kernels"] = {"cuda": {"layer_norm": taken}}
    assert "kernels on cuda  reference: layer_norm; Triton cannot be imported" in environment.format_info(d)


def test_an_absent_native_module_is_explained(decided_anew, monkeypatch):
    monkeypatch.setattr(radiograph, "_native", None)
    monkeypatch.setitem(sys.modules, "xrk._native", None)
    monkeypatch.delattr(xrk, "_native", raising=False)
    d = environment.info()
    assert d["native"]["present"] is False
    assert "_native" in d["native"]["problem"]
    assert d["kernels"]["cpu"]["pixels"]["path"] == "numpy"
    assert "numpy does its work" in d["kernels"]["cpu"]["pixels"]["why"]
    layer_norm = d["kernels"]["cpu"]["layer_norm"]
    assert layer_norm["path"] == "reference" and "xrk._native cannot be imported" in layer_norm["why"]
    assert "absent" in environment.format_info(d)


def test_a_package_that_is_not_installed_is_none():
    assert environment._version("xrk-has-no-such-package") is None


@pytest.mark.parametrize("version", [None, "2026.1.1"])
def test_the_codecs_name_the_extra_that_brings_them(version):
    assert ("xrk[codecs]" in environment._codecs(version)["note"]) == (version is None)


def test_the_codecs_name_their_libraries():
    codecs = xrk.info()["codecs"]
    from xrk import _native

    for name in ("zlib", "libdeflate", "libzstd"):
        assert codecs[name] == (_native.tiff_library(name) or None)
    deflate = codecs["libdeflate"] or codecs["zlib"]
    assert f"deflate by {'libdeflate' if codecs['libdeflate'] else 'zlib'} ({deflate})" in codecs["note"]
    assert (f"zstd by libzstd ({codecs['libzstd']})" in codecs["note"]) == (codecs["libzstd"] is not None)


def test_format_info_says_it_all_in_lines():
    d = environment.info()
    d["devices"].append({"device": "cuda:0", "description": "a device", "memory": 3 * 2**30})
    text = environment.format_info(d)
    assert f"torch {torch.__version__}" in text
    assert "cuda:0: a device, 3.0 GiB" in text
    assert d["kernels"]["cpu"]["pixels"]["why"] in text
    assert all(f" {op}" in text for op in dispatch.ops())
    assert all(name in text for name in d["models"])
    assert environment.format_info().splitlines()[0] == text.splitlines()[0]


def import_xrk(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, *flags, "-c", "import xrk"]
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=folder)


@pytest.fixture
def plain_checkout(tmp_path):
    """Another checkout's xrk/, as it is before `pip install -e .`: no kernels, no compiled module inside."""
    root = Path(xrk.__file__).parent
    absent = shutil.ignore_patterns("*.so", "kernels", "__pycache__", "*.safetensors")
    shutil.copytree(root, tmp_path / "xrk", ignore=absent)
    return tmp_path


@pytest.mark.parametrize("flags", [["-S"], []], ids=["nothing installed", "another checkout installed"])
def test_a_plain_checkout_says_that_it_must_be_installed(plain_checkout, flags):
    # -S leaves site-packages out, as an empty environment does. Without it the xrk of these tests lends its kernels.
    answer = import_xrk(plain_checkout, *flags)
    assert answer.returncode == 1
    message = answer.stderr[answer.stderr.rindex("ImportError: ") :].splitlines()
    assert "must be installed" in message[0]
    assert "pip install -e ." in message[0]
    assert str(plain_checkout) in message[0]
    assert "another exception" not in answer.stderr


def test_an_installed_xrk_is_imported_from_anywhere(tmp_path):
    checkout = Path(xrk.__file__).parents[1]
    for folder in (tmp_path, checkout):
        code = "import xrk, xrk.kernels, xrk._native; print(xrk.__version__)"
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
        assert (answer.returncode, answer.stdout.strip()) == (0, xrk.__version__), answer.stderr


def test_the_public_face_is_whole_and_waits_for_nothing():
    """Every public name is there; help, wrong usage and file I/O come without torch, which takes seconds to import."""
    code = (
        "import sys, xrk, xrk.cli, xrk.io, xrk.metrics; xrk.cli.main(['-h']); xrk.cli.main(['no-such-verb'])\n"
        "assert 'torch' not in sys.modules\n"
        "assert all(hasattr(xrk, name) for name in xrk.__all__) and set(xrk.__all__) <= set(dir(xrk))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    with pytest.raises(AttributeError, match="no attribute 'enchance'"):
        _ = xrk.enchance
