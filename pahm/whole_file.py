"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str], *, shared: bool = False) -> Iterator[Path]:
    """Give the name beside `path` under which to write its new content.

    When the block ends the new file takes the place of `path`; where the block fails it is removed and `path`
    stays as it was. shared: several processes may do so at once; the last one's content stays.
    """
    partial = partial_name(Path(path), f".{os.getpid()}" if shared else "")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_name(path: Path, owner: str = "") -> Path:
    """Where `whole_file` has `path` written."""
    return path.with_name(f"{path.name}{owner}.partial")
