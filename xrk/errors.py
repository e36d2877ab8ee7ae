"""The one error tree of xrk.

    XrkError
    ├── InputError            ValueError   an array, a size or an option has a value xrk cannot use
    ├── InputTypeError        TypeError    an array or an option is of a kind or dtype xrk cannot use
    ├── ModelNotFoundError    ValueError   no shipped model has this name and no file lies there
    ├── CheckpointError       ValueError   a checkpoint was read but does not fit any network xrk knows
    ├── CheckpointFileError   OSError      a checkpoint is absent, unreadable, or refused unread
    ├── ImageFileError        OSError      an image file is absent, damaged, unsupported or unwritable
    ├── MemoryBudgetError     ValueError   no plan fits the memory asked for
    └── DeviceError           ValueError   the device asked for is not usable here

Every error is also a built-in exception, so a caller who knows nothing of xrk can catch ``ValueError``,
``TypeError`` or ``OSError``. Each message is one sentence or two: what was given, what was expected, what to do.

`xrk.kernels` stands below this file and raises plain ``ValueError`` and ``TypeError``.
"""

__all__ = [
    "CheckpointError",
    "CheckpointFileError",
    "DeviceError",
    "ImageFileError",
    "InputError",
    "InputTypeError",
    "MemoryBudgetError",
    "ModelNotFoundError",
    "XrkError",
]


class XrkError(Exception):
    """Everything xrk raises on purpose derives from this."""


class InputError(XrkError, ValueError):
    """An array, a size or an option has a value that xrk cannot use."""


class InputTypeError(XrkError, TypeError):
    """An array or an option is of a kind or dtype that xrk cannot use."""


class ModelNotFoundError(XrkError, ValueError):
    """No shipped model has this name, and no checkpoint file lies under it."""


class CheckpointError(XrkError, ValueError):
    """A checkpoint was read, but its keys or shapes fit no network that xrk knows."""


class CheckpointFileError(XrkError, OSError):
    """A checkpoint file is absent, unreadable, or refused unread because loading it would run code."""


class ImageFileError(XrkError, OSError):
    """An image file is absent, damaged, of an unsupported kind, or cannot be written."""


class MemoryBudgetError(XrkError, ValueError):
    """No plan fits the memory budget; the message names the smallest that works."""

    def __init__(self, message: str, smallest: int | None = None) -> None:
        """``smallest``: the least budget in bytes that would do, where it is known."""
        super().__init__(message)
        self.smallest = smallest


class DeviceError(XrkError, ValueError):
    """The device asked for does not exist or cannot be used here."""
