"""What a checkpoint file is, in words: which network it fits, or what keeps it from fitting."""

import os
from dataclasses import asdict, dataclass
from typing import Any

from xrk.checkpoints.files import CheckpointFile, read_state
from xrk.checkpoints.fitting import shown
from xrk.checkpoints.recognition import assemble
from xrk.errors import CheckpointError
from xrk.models import Card

__all__ = ["CheckpointDescription", "describe_checkpoint"]


@dataclass(frozen=True)
class CheckpointDescription:
    """What was found in a checkpoint file; ``str()`` of it is for people, `to_dict` for programs.

    Attributes:
        file: container, size, sha256, wrappers, entries left alone.
        tensors: number of tensors in the state dict.
        numbers: number of elements in them.
        dtypes: their dtypes.
        card: of the network that they fit; None if there is none.
        problem: what does not fit; None if all does.
    """

    file: CheckpointFile
    tensors: int
    numbers: int
    dtypes: tuple[str, ...]
    card: Card | None
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """The same as a dict that ``json`` can write."""
        return asdict(self)

    def __str__(self) -> str:
        file = self.file
        lines = [
            f"{file.path}: a checkpoint ({file.container}, {file.size} bytes)",
            f"  sha256      {file.sha256}",
            f"  tensors     {self.tensors}, {self.numbers} numbers, {', '.join(self.dtypes)}",
        ]
        if file.wrapper:
            lines.append(f"  found under {' / '.join(file.wrapper)}")
        if file.ignored:
            more = f" and {len(file.ignored) - 8} more" if len(file.ignored) > 8 else ""
            lines.append(f"  left alone  {', '.join(map(shown, file.ignored[:8]))}{more}")
        if self.card is not None:
            config = ", ".join(f"{name} {value}" for name, value in self.card.config.items())
            lines += [
                f"  fits        {self.card.architecture} ({config})",
                f"  sees        {self.card.domain} values; noise model: {self.card.noise}; "
                f"output scale {self.card.output_scale:g}",
            ]
        if self.problem is not None:
            lines.append(f"  does not fit: {self.problem}")
        return "\n".join(lines)


def describe_checkpoint(path: str | os.PathLike[str]) -> CheckpointDescription:
    """Read a checkpoint and say what it is, which network it fits, or what does not fit.

    Raises:
        CheckpointFileError: the file cannot be read as a checkpoint at all.
        CheckpointError: the file was read and holds no state dict.
    """
    state, file = read_state(path)
    card, problem = None, None
    try:
        card, _ = assemble(state, file)
    except CheckpointError as error:
        problem = str(error)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    numbers = sum(tensor.numel() for tensor in state.values())
    return CheckpointDescription(file, len(state), numbers, tuple(dtypes), card, problem)
