"""Image files, TIFF: `open` reads window by window, `create` writes row by row; `read` and `write` do all at once."""

from xrk.errors import ImageFileError
from xrk.io.atomic import atomic_file, check_apart, check_target
from xrk.io.image import Image, Metadata, Page
from xrk.io.sink import Sink
from xrk.io.source import Source, open, read
from xrk.io.tiff_reader import read_report
from xrk.io.tiff_writer import check_writable, create, write

__all__ = [
    "Image",
    "ImageFileError",
    "Metadata",
    "Page",
    "Sink",
    "Source",
    "atomic_file",
    "check_apart",
    "check_target",
    "check_writable",
    "create",
    "open",
    "read",
    "read_report",
    "write",
]
