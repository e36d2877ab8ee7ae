"""A wheel, built from the source distribution's files, works in an empty environment away from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]

ENHANCE = """
import json, sys
import numpy as np
import xrk, xrk.kernels
x = np.random.default_rng(0).integers(0, 65535, (513, 771)).astype(">u2")
y = xrk.enhance(x)
print(json.dumps({
    "file": xrk.__file__, "kernels": xrk.kernels.__file__, "native": xrk.info()["native"], "version": xrk.__version__,
    "dtype": y.dtype.str, "shape": y.shape, "changed": bool((x != y).any()), "models": xrk.info()["models"],
}))
"""


def run(command, **options):
    answer = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert answer.returncode == 0, f"{command}\n{answer.stdout}\n{answer.stderr}"
    return answer.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a source distribution of this checkout, built with what is installed here, CUDA left out."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("xrk", "kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
    name = run([sys.executable, "-c", code, folder], cwd=source).split()[-1]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    environment = {**os.environ, "XRK_CUDA": "0"}
    run([sys.executable, "-m", "pip", "wheel", *offline, "-w", folder, folder / name], cwd=folder, env=environment)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An empty virtual environment with the wheel; what xrk depends on is lent by the one of these tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", wheel]
    run([sys.executable, "-m", "pip", "--python", python, *install], cwd=folder)
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=folder).strip())
    # A line of a .pth file adds a folder, but does not run the .pth files in it: an editable xrk there stays hidden.
    lent = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "lent.pth").write_text("".join(f"{path}\n" for path in sorted(lent)))
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert sum(name.startswith("xrk/_native.") for name in names) == 1
    weights = {path.name for path in (ROOT / "xrk" / "weights").glob("*.*") if path.suffix in {".safetensors", ".json"}}
    assert "resnet18-unet.safetensors" in weights
    assert {Path(name).name for name in names if name.startswith("xrk/weights/")} == weights
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "xrk").rglob("*.py")}
    sources |= {f"xrk/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert {name.split("/")[0] for name in names} == {"xrk", f"xrk-{metadata.version('xrk')}.dist-info"}


def test_the_wheel_enhances_a_frame_in_an_empty_environment(environment, tmp_path):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    answer = run([environment / "bin" / "python", "-W", "error", "-c", ENHANCE], cwd=tmp_path, env=variables)
    found = json.loads(answer)
    for file in (found["file"], found["kernels"], found["native"]["file"]):
        assert Path(file).is_relative_to(environment)
    assert found["native"]["present"] and not found["native"]["cuda"]
    assert (found["dtype"], found["shape"]) == (">u2", [513, 771])
    assert found["changed"]
    assert "resnet18-unet" in found["models"]


def test_the_command_is_installed(environment, tmp_path):
    text = run([environment / "bin" / "xrk", "models"], cwd=tmp_path)
    assert "resnet18-unet" in text


def test_the_direct_dependencies_are_five():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [line.split(">")[0] for line in project["dependencies"]]
    assert names == ["torch", "numpy", "safetensors", "tifffile", "tqdm"]


def test_every_dependency_is_pinned():
    """constraints.txt names whatever pip brings here for xrk and its tests, CUDA's own packages aside."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines if "==" in line}
    needed, ahead = set(), [Requirement("xrk[test]")]
    while ahead:
        requirement = ahead.pop()
        name = canonicalize_name(requirement.name)
        if name in needed or name.startswith(("nvidia-", "cuda-")):
            continue
        needed.add(name)
        for line in metadata.requires(name) or []:
            further = Requirement(line)
            extra = next(iter(requirement.extras), "")
            if further.marker is None or further.marker.evaluate({"extra": extra}):
                ahead.append(further)
    assert {"torch", "numpy", "pytest", "mpmath"} <= needed
    assert needed - {"xrk"} - pinned == set()
