"""How often a server's caches were flushed: one number, which all of its tokenizer processes read and raise."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cached_property
from io import FileIO

__all__ = ["FlushCount", "make_flush_count"]


def make_flush_count() -> str:
    """Returns the path of a new number, 0, for the processes of this machine; it ends with this process."""
    # A file in memory, which is in no folder and so left behind in none. It is never closed.
    return f"/proc/{os.getpid()}/fd/{os.memfd_create('mmtok-flushes')}"


class FlushCount:
    """The number at a path: the size of a file, to which each flush adds a byte, whichever process it reaches.

    Args:
        path: What `make_flush_count` returned.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    @cached_property
    def _file(self) -> FileIO:
        # When it is first asked for: a scheduler process may be on another machine, and asks for nothing.
        return FileIO(self._path, "a")

    def __int__(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def add(self) -> None:
        """Counts a flush; of a server that has ended, none."""
        with suppress(FileNotFoundError):
            self._file.write(b".")
