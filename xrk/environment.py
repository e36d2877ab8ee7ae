"""What xrk runs on here: versions, devices, the compiled module, and which path the kernels take and why."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

import xrk
import xrk.kernels
from xrk import radiograph
from xrk.kernels import dispatch
from xrk.loading import list_models

_PACKAGES = ("torch", "numpy", "safetensors", "tifffile", "tqdm", "triton", "imagecodecs")


def info() -> dict[str, Any]:
    """A description of this installation and machine, of plain types that `json.dumps` takes.

    Keys
        xrk, python, platform: str
        packages: dict of name -> version, None where a package is not installed
        threads: {"processors": those this process may use, "torch": those torch's operators use}
        devices: list of {"device": name for ``device=``, "description", "memory": bytes or None where unknown}
        native: {"present": bool, "file", "problem": why not, "simd": the path taken, "simd_supported": widest first,
            "cuda": whether CUDA kernels are compiled in}
        kernels: dict of kind of device ("cpu", and "cuda" where there is one) -> dict of operator -> {"path", "why"};
            "pixels" are the conversions of counts, the others are those of `xrk.kernels`
        codecs: {"zlib", "libdeflate", "libzstd": version and how each was found, or None, "imagecodecs": version or
            None, "note": what that means for TIFF files}
        models: names of the shipped models
    """
    packages = {name: _version(name) for name in _PACKAGES}
    native = _native()
    return {
        "xrk": xrk.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "threads": {"processors": _processors(), "torch": torch.get_num_threads()},
        "devices": _devices(),
        "native": native,
        "kernels": _kernels(native),
        "codecs": _codecs(packages["imagecodecs"]),
        "models": [card.name for card in list_models()],
    }


def format_info(description: dict[str, Any] | None = None) -> str:
    """`info` (or what it returned) as lines for a person to read."""
    d = info() if description is None else description
    versions = ", ".join(f"{name} {version or '(not installed)'}" for name, version in d["packages"].items())
    native = d["native"]
    if native["present"]:
        cuda = "compiled in" if native["cuda"] else "not compiled in"
        compiled = f"{native['file']}, CUDA kernels {cuda}"
    else:
        compiled = f"absent: {native['problem']}"
    rows = [
        ("xrk", f"{d['xrk']} on Python {d['python']}, {d['platform']}"),
        ("packages", versions),
        ("threads", f"{d['threads']['torch']} of torch on {d['threads']['processors']} processors"),
        *(("device", _device_line(device)) for device in d["devices"]),
        ("native", compiled),
        *((f"kernels on {kind}", line) for kind, paths in d["kernels"].items() for line in _path_lines(paths)),
        ("codecs", d["codecs"]["note"]),
        ("models", ", ".join(d["models"]) or "none"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def _device_line(device: dict[str, Any]) -> str:
    memory = "" if device["memory"] is None else f", {device['memory'] / 2**30:.1f} GiB"
    return f"{device['device']}: {device['description']}{memory}"


def _path_lines(paths: dict[str, dict[str, str]]) -> list[str]:
    """One line for each path and reason, with the operators that share it."""
    operators: dict[tuple[str, str], list[str]] = {}
    for operator, taken in paths.items():
        operators.setdefault((taken["path"], taken["why"]), []).append(operator)
    return [f"{path}: {', '.join(names)}; {why}" for (path, why), names in operators.items()]


def _version(package: str) -> str | None:
    # From the metadata: importing triton or imagecodecs only to ask its version takes long.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processors() -> int:
    """The processors that this process may run on, where the system tells, else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _devices() -> list[dict[str, Any]]:
    devices = [{"device": "cpu", "description": platform.machine(), "memory": _memory()}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"compute capability {properties.major}.{properties.minor}"
            description = f"{properties.name}, {capability}"
            devices.append({"device": f"cuda:{index}", "description": description, "memory": properties.total_memory})
    return devices


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system has sysconf, or these names
        return None


def _native() -> dict[str, Any]:
    try:
        from xrk import _native as module
    except ImportError as error:
        nothing = {"file": None, "simd": None, "simd_supported": [], "cuda": False}
        return {"present": False, "problem": str(error), **nothing}
    return {
        "present": True,
        "problem": None,
        "file": module.__file__,
        "simd": module.simd(),
        "simd_supported": module.supported_simd(),
        "cuda": module.HAVE_CUDA,
    }


def _kernels(native: dict[str, Any]) -> dict[str, dict[str, dict[str, str]]]:
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    paths = {kind: {op: dispatch.path_of(op, kind)._asdict() for op in dispatch.ops()} for kind in kinds}
    paths["cpu"] = {"pixels": {"path": radiograph.kernel_path(), "why": _why(native)}, **paths["cpu"]}
    return paths


def _why(native: dict[str, Any]) -> str:
    if not native["present"]:
        return f"the compiled module xrk._native cannot be imported ({native['problem']}): numpy does its work"
    runs = ", ".join(native["simd_supported"])
    if native["simd"] == native["simd_supported"][0]:
        return f"the widest of those that this processor runs: {runs}"
    return f"chosen by set_simd; this processor runs: {runs}"


def _codecs(imagecodecs: str | None) -> dict[str, str | None]:
    """The libraries that TIFF files are compressed with, and in words who does what."""
    try:
        from xrk import _native as module
    except ImportError:
        module = None
    names = ("zlib", "libdeflate", "libzstd")
    found = {name: (module.tiff_library(name) or None) if module is not None else None for name in names}
    own = ["LZW and PackBits by xrk"] if module is not None else []
    deflate = next((name for name in ("libdeflate", "zlib") if found[name]), None)
    own += [f"{codec} by {name} ({found[name]})" for codec, name in (("deflate", deflate), ("zstd", "libzstd"))
            if name is not None and found[name]]  # fmt: skip
    rest = "the rest" if own else "all"
    if imagecodecs is None:
        rest += " by tifffile alone; what needs imagecodecs comes with pip install 'xrk[codecs]'"
    else:
        rest += f" by tifffile with imagecodecs {imagecodecs}: every compression that it knows"
    return {**found, "imagecodecs": imagecodecs, "note": ", ".join([*own, rest])}
