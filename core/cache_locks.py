"""Locks on names, between threads and processes of one machine; a process that dies lets go of all of its own.

One byte of a lock file stands for each name, so nothing is left behind however many names there were. Linux only: the
locks belong to the open file (OFD), so that threads exclude each other and closing another file lets go of nothing.
"""

import fcntl
import hashlib
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FLOCK = "hhqqi0q"
"""`struct flock` of 64-bit Linux: type, whence, start, length, process."""


class NameLocks:
    """Locks of one kind.

    Args:
        path: The lock file; made when missing, with its folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Wait until nobody else holds this name, and hold it."""
        descriptor = self._open()
        try:
            _lock(descriptor, name, fcntl.F_WRLCK, fcntl.F_OFD_SETLKW)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def exclusive_now(self, name: str) -> Iterator[bool]:
        """Hold this name if nobody else does; yields whether that is so."""
        descriptor = self._open()
        try:
            try:
                _lock(descriptor, name, fcntl.F_WRLCK, fcntl.F_OFD_SETLK)
            except (BlockingIOError, PermissionError):  # POSIX allows either of them.
                yield False
                return
            yield True
        finally:
            os.close(descriptor)

    def shared(self) -> "SharedLocks":
        """An empty bag of shared locks."""
        return SharedLocks(self._open())

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)


class SharedLocks:
    """Names that nobody can lock exclusively until `close`, the end of this object or of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._closing = threading.Lock()

    def add(self, name: str) -> None:
        """Hold this name, too; waits while somebody holds it exclusively."""
        _lock(self._descriptor, name, fcntl.F_RDLCK, fcntl.F_OFD_SETLKW)

    def close(self) -> None:
        """Let go of all names; harmless when that was done."""
        with self._closing:
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> "SharedLocks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _lock(descriptor: int, name: str, kind: int, command: int) -> None:
    # 62 bits: two names that share a byte would only wait for each other.
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 2
    fcntl.fcntl(descriptor, command, struct.pack(_FLOCK, kind, os.SEEK_SET, place, 1, 0))
