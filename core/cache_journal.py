"""What a cache holds and who asked for what, shared by all processes of a machine: an append-only journal.

Every process keeps the same `CachePolicy` in memory and reads on where it stopped, under one lock. The files are the
truth: a journal that is lost, torn or foreign costs the memory of what is popular, never a file.
"""

import errno
import fcntl
import json
import logging
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.cache_policy import CachePolicy
from core.failpoints import side_effect

logger = logging.getLogger(__name__)

MARK = "lorasite-cache-1"
HEADER_BYTES = len(MARK) + 1 + 32 + 1
"""The mark, a name that no other journal has, a line end."""
COMPACT_FROM_BYTES = 1 << 20
"""Events that are kept at most beside the state that they began with; more are folded into a new state."""


class CacheJournal:
    """Use `with journal.open() as policy:`; inside, this process alone reads and writes.

    Args:
        folder: Of the cache; made when missing.
        capacity: Bytes, given to the policy.
    """

    def __init__(self, folder: Path, capacity: int) -> None:
        self._folder, self._path = folder, folder / "journal"
        self._policy = CachePolicy(capacity)
        self._hashes: dict[str, str] = {}
        self.needs_scan = True
        """The files have not been compared with the journal yet: in this process, or since it was begun anew."""
        self._header = b""
        self._read_to = self._events_from = 0
        self._thread_lock = threading.Lock()

    @contextmanager
    def open(self) -> Iterator[CachePolicy]:
        """The policy as of now. Change it only through the methods of this class."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._thread_lock:
            descriptor = os.open(self._folder / ".journal-lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                self._catch_up()
                yield self._policy
            finally:
                os.close(descriptor)

    def hash_of(self, name: str) -> str:
        """SHA-256 of an entry that was made here; empty for others."""
        return self._hashes.get(name, "")

    def asked(self, name: str) -> None:
        """Somebody asked for an entry."""
        self._append(f"? {name}")

    def admitted(self, name: str, size: int, *, ahead: bool, sha256: str = "") -> None:
        """An entry is there. Call before its file gets its name: no file is ever without its line.

        Args:
            sha256: Of an entry whose name does not say it.
        """
        self._append(f"{'>' if ahead else '+'} {name} {size} {sha256}".rstrip())

    def removed(self, name: str) -> None:
        """An entry is gone. Call after its file went."""
        self._append(f"- {name}")

    def _append(self, line: str) -> None:
        data = f"{line}\n".encode()
        header, self._header = self._header, b""  # Should this fail, everything is read anew.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            with side_effect("cache.note"):
                written = os.write(descriptor, data)
        finally:
            os.close(descriptor)
        if written == len(data):  # Otherwise the disk is full; the torn line is cut off by whoever comes next.
            self._apply(line)
            self._header, self._read_to = header, self._read_to + written
        else:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def _apply(self, line: str) -> None:
        what, name, *rest = line.split(" ")
        if what == "?":
            self._policy.touch(name)
        elif what == "-":
            self._policy.forget(name)
            self._hashes.pop(name, None)
        else:
            self._policy.admit(name, int(rest[0]), ahead=what == ">")
            if len(rest) > 1:
                self._hashes[name] = rest[1]

    def _catch_up(self) -> None:
        """Read what others wrote since; begin a new journal where there is none that can be read, or it is long."""
        try:
            with self._path.open("rb") as file:
                header = file.read(HEADER_BYTES)
                if not header.startswith(f"{MARK} ".encode()) or len(header) < HEADER_BYTES:
                    raise ValueError("it does not begin as a journal does")
                if header != self._header:
                    self._load(file.readline())
                    self._header, self._read_to = header, file.tell()
                    self._events_from = self._read_to
                file.seek(self._read_to)
                news = file.read()
            whole = news.rfind(b"\n") + 1
            for line in news[:whole].decode().splitlines():
                self._apply(line)
            self._read_to += whole
            if whole < len(news):  # A killed writer left half a line.
                with side_effect("cache.cut_journal"):
                    os.truncate(self._path, self._read_to)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            if not isinstance(error, FileNotFoundError):
                logger.warning("cache journal cannot be read and is begun anew path=%s reason=%s", self._path, error)
            self._policy = CachePolicy(self._policy.capacity)
            self._hashes, self.needs_scan = {}, True
            self._begin()
        if self._read_to - self._events_from > max(COMPACT_FROM_BYTES, 2 * self._events_from):
            try:
                self._begin()
            except OSError as error:  # A full disk, most likely; the long journal is as good.
                logger.warning("cache journal stays long path=%s reason=%s", self._path, error)

    def _load(self, line: bytes) -> None:
        state = json.loads(line)
        self._policy = CachePolicy.load(state["policy"], self._policy.capacity)
        self._hashes = {str(name): str(sha256) for name, sha256 in state["hashes"].items()}

    def _begin(self) -> None:
        """A new journal that begins with the state of now."""
        header = f"{MARK} {uuid.uuid4().hex}\n".encode()
        state = {"policy": self._policy.dump(), "hashes": self._hashes}
        data = header + json.dumps(state, separators=(",", ":")).encode() + b"\n"
        part = self._path.with_name(".part-journal")  # under the lock: nobody else writes one
        with side_effect("cache.write_journal"):
            part.write_bytes(data)
        with side_effect("cache.begin_journal"):
            part.replace(self._path)
        self._header, self._read_to = header, len(data)
        self._events_from = self._read_to
