"""Image files: `read` gives an `Image`, `write` makes one like it, whole or not at all. TIFF is the format."""

from xrk.errors import ImageFileError
from xrk.io.atomic import atomic_file, check_target
from xrk.io.image import Image, Page
from xrk.io.sink import Sink
from xrk.io.tiff_reader import read, read_report
from xrk.io.tiff_writer import check_writable, create, write

__all__ = [
    "Image",
    "ImageFileError",
    "Page",
    "Sink",
    "atomic_file",
    "check_target",
    "check_writable",
    "create",
    "read",
    "read_report",
    "write",
]
