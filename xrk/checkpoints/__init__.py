"""Checkpoints from elsewhere: read the file, recognise the network by its tensors, refuse with a list of what does
not fit.

To add an upstream format: write a file with a `Format` (title, architecture, how its configuration is read from the
shapes, how the network is to be run, and how its names map to the network's own) and add it to the table `FORMATS` in
``recognition.py``. Loading is strict: the names and shapes must be exactly those of the network so configured.
"""

from xrk.checkpoints.description import CheckpointDescription, describe_checkpoint
from xrk.checkpoints.files import CheckpointFile, read_state
from xrk.checkpoints.fitting import Format
from xrk.checkpoints.recognition import FORMATS, assemble, recognise

__all__ = [
    "FORMATS",
    "CheckpointDescription",
    "CheckpointFile",
    "Format",
    "assemble",
    "describe_checkpoint",
    "read_state",
    "recognise",
]
