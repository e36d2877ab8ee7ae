"""How the caller is told of progress: a bar, or a function of the caller's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from xrk.errors import InputTypeError

__all__ = ["Progress", "check_progress", "told"]

Progress = bool | Callable[[int, int], Any] | None


def check_progress(progress: Any) -> None:
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise InputTypeError(f"progress={progress!r}; expected None, True, or a function of (done, all).")


@contextmanager
def told(progress: Progress, total: int | None, unit: str) -> Iterator[Callable[[int, int | None], Any]]:
    """Gives the function to call with (done, all); ``total`` is None where nobody knows yet."""
    check_progress(progress)
    if progress is None or progress is False:
        yield lambda done, total: None
    elif progress is True:
        with tqdm(total=total, unit=unit) as bar:
            yield lambda done, total: bar.update(done - bar.n)
    else:
        yield progress
