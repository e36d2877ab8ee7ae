"""xrk enhances X-ray radiographs with pretrained restoration networks, in 16 bits from end to end.

    import xrk
    clean = xrk.enhance(frame)          # the same kind of array, shape and dtype
    xrk.enhance_file("in.tif", "out.tif")

`enhance` and `enhance_file` are the front door; `load` and `list_models` give the networks, `plan` runs any network
within a memory budget, `estimate_noise` and `NoiseModel` tell the noise of a detector, `calibrate` its dark frame, flat
field and bad pixels, `info` what runs here. `io` reads and writes files, `metrics` compares images, `kernels` holds the
operators. Everything raised on purpose is in `errors`.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def _require_installation() -> None:
    """Raises ImportError where this folder is a checkout's, but its `kernels/` is not mapped in beside it.

    Another checkout may be the one installed: its kernels and compiled module would be mixed with this one's sources.
    """
    package = Path(__file__).resolve().parent
    found = importlib.util.find_spec("xrk.kernels")
    folders = (package / "kernels", package.parent / "kernels")
    if found is None or found.origin is None or Path(found.origin).resolve().parent not in folders:
        raise ImportError(
            f"the checkout {package.parent} must be installed before xrk is imported from it: "
            "run `pip install -e .` there, in the environment of this Python",
            name="xrk.kernels",
        )


_require_installation()

# name -> the module it comes from, imported when first asked for: `xrk --help` and `xrk.io` do not wait for torch.
_HOME = {
    "Calibration": "calibration",
    "Model": "loading",
    "NoiseModel": "noise",
    "adapt": "training.adaptation",
    "calibrate": "calibration",
    "compare": "comparison",
    "enhance": "enhancement",
    "enhance_file": "enhancement",
    "estimate_noise": "noise",
    "fuse": "fusion",
    "fuse_file": "fusion",
    "fuse_video": "video",
    "fuse_video_file": "video_file",
    "info": "environment",
    "list_models": "loading",
    "load": "loading",
    "plan": "planning",
}
_MODULES = ("errors", "io", "kernels", "metrics")

__all__ = [
    "Calibration",
    "Model",
    "NoiseModel",
    "__version__",
    "adapt",
    "calibrate",
    "compare",
    "enhance",
    "enhance_file",
    "errors",
    "estimate_noise",
    "fuse",
    "fuse_file",
    "fuse_video",
    "fuse_video_file",
    "info",
    "io",
    "kernels",
    "list_models",
    "load",
    "metrics",
    "plan",
]

if TYPE_CHECKING:
    from xrk import errors, io, kernels, metrics
    from xrk.calibration import Calibration, calibrate
    from xrk.comparison import compare
    from xrk.enhancement import enhance, enhance_file
    from xrk.environment import info
    from xrk.fusion import fuse, fuse_file
    from xrk.loading import Model, list_models, load
    from xrk.noise import NoiseModel, estimate_noise
    from xrk.planning import plan
    from xrk.training.adaptation import adapt
    from xrk.video import fuse_video
    from xrk.video_file import fuse_video_file


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"xrk.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'xrk' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"xrk.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
