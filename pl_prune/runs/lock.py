"""Locks: files that a process of this machine holds, and that are free as soon as it is gone."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pl_prune.core.types import PruneError


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a file against every other process.

    Args:
        path: The file; it is made if need be.
        wait: Whether to wait until it is free.

    Yields:
        None.

    Raises:
        PruneError: If another process holds it and is not waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        if not _take(file, wait):
            file.seek(0)
            raise PruneError(
                f"Expected that nobody is at {str(path.parent)!r}; found it held by {file.read().strip() or 'another process'}. "
                "Wait for that process, or choose another folder."
            )
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def is_locked(path: Path) -> bool:
    """Say whether a process holds a file.

    Args:
        path: The file.

    Returns:
        False where there is no such file.
    """
    if not path.is_file():
        return False
    with path.open("a+") as file:
        return not _take(file, wait=False)


def _take(file: IO[str], wait: bool) -> bool:
    import fcntl  # not there on Windows

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
