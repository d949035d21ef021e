"""Writes files completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str], *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `path` for writing its new content.

    When the block ends, the new file replaces `path`. If the block fails, the new file is removed and `path`
    is unchanged. shared: several processes may write at once; the last one to finish wins.
    """
    partial = partial_name(Path(path), f".{os.getpid()}" if shared else "")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_name(path: Path, owner: str = "") -> Path:
    """The temporary path that `whole_file` yields for `path`."""
    return path.with_name(f"{path.name}{owner}.partial")
