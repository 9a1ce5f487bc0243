"""Files of one machine, named by their SHA-256 or made here: fetched once, verified, kept within a number of bytes.

Shared by all processes; knows nothing of where the files come from, `download` and `make` are given by the caller.
Which file goes first says `core/cache_policy.py`; who holds what stands in `core/cache_journal.py`.
"""

import errno
import hashlib
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from core.cache_journal import CacheJournal
from core.cache_locks import NameLocks, SharedLocks
from core.cache_policy import CachePolicy
from core.cache_rooms import cache_scan, linked_folders_drop
from core.errors import CoreError
from core.failpoints import side_effect
from core.file_hash import hash_file

logger = logging.getLogger(__name__)

Write = Callable[[Path], str | None]
"""Writes the bytes of one file; returns their SHA-256 where it counted them on the way, or they are read again."""

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
PIN_SECONDS = 60.0
"""What was handed out stays at least so long, where the caller names no pins: time enough to open it."""
FREE_AT_LEAST_BYTES = 64 << 20
"""What goes at once when the disk is full."""
SPARE_BYTES, SPARE_SHARE = 1 << 30, 0.02
"""The smaller of both is left free on the disk: databases and checkpoints live there, too."""


class CachedFileDamaged(CoreError):
    """A downloaded file does not have the hash that was asked for."""

    code = "artifact_damaged"


def half_of_the_disk(folder: Path) -> int:
    """A sensible size of a cache in `folder`, which may not exist yet; bytes."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).total // 2


class FileCache:
    """`get(sha256)` returns a local file that has this hash; `get_or_make(key, make)` one that `make` wrote.

    A file is hashed when it is admitted, when a process serves it for the first time, and when its size, times or inode
    changed since (about 1 s per GB); a damaged one is fetched again. So whatever was cut, overwritten or swapped is
    found at once, and what rotted on the disk at the next start; bits that rot under a running process are not found.

    What was handed out is never removed while its pins are held; a file that is open already can be read to its end
    whatever happens. Files being written come on top of the capacity.

    Args:
        folder: Where the files live; made when missing.
        download: `download(sha256, destination)` writes the bytes; called at most once per hash and machine at a time.
            Returns what `Write` returns.
        capacity: Bytes of all files, > 0; half of the disk when None. One that is larger is kept alone.
        linked: Folder whose subfolders are full of hard links into this cache (prepared bases): one that nobody pins
            by `folder_pin` goes as a whole when one of its files must go.
    """

    def __init__(
        self,
        folder: Path,
        *,
        download: Callable[[str, Path], str | None],
        capacity: int | None = None,
        linked: Path | None = None,
    ) -> None:
        self._folder, self._download, self._linked = folder, download, linked
        self._journal = CacheJournal(folder, half_of_the_disk(folder) if capacity is None else capacity)
        self._making, self._pins = NameLocks(folder / ".making"), NameLocks(folder / ".pins")
        self._verified: dict[str, tuple[int, ...]] = {}
        self._recent: list[tuple[float, SharedLocks]] = []
        self._recent_lock = threading.Lock()

    def get(self, sha256: str, *, pins: SharedLocks | None = None, ahead: bool = False) -> Path:
        """Local path of the bytes. Never write to it.

        Args:
            pins: Keep the file here until they are closed; without, for `PIN_SECONDS` at least.
            ahead: Nobody has asked for it yet.

        Raises:
            CachedFileDamaged: The download has another hash; nothing is kept.
            OSError: ENOSPC: the disk is full, and everything in the cache is in use.
        """
        return self._get(sha256, partial(self._download, sha256), pins, ahead, sha256)

    def get_or_make(
        self, key: str, make: Callable[[Path], None], *, pins: SharedLocks | None = None, ahead: bool = False
    ) -> Path:
        """Local path of what `make(path)` writes for this key, made when it is not there. As `get` in all else.

        Args:
            key: Names everything that the bytes depend on. Any text.
        """
        return self._get(f"{hashlib.sha256(key.encode()).hexdigest()}.made", make, pins, ahead, None)

    def has(self, sha256: str) -> bool:
        """Whether it is here now; says nothing about its bytes."""
        return self._path_of(sha256).exists()

    def copy_to(self, sha256: str, destination: Path) -> None:
        """A private copy of the bytes at `destination`, for callers that write or delete there."""
        with self.pins() as pins, side_effect("cache.copy"):
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.get(sha256, pins=pins), destination)

    def pins(self) -> SharedLocks:
        """An empty bag of pins; what they hold goes free with `close`, this object or this process."""
        return self._pins.shared()

    def used_bytes(self) -> int:
        """Of all files in the cache."""
        with self._open() as policy:
            return policy.used

    def _get(self, name: str, write: Write, pins: SharedLocks | None, ahead: bool, sha256: str | None) -> Path:
        began, path = time.monotonic(), self._path_of(name)
        (pins or self._recent_pins()).add(name)
        if not self._is_right(name, sha256):
            with self._making.exclusive(name):
                if not self._is_right(name, sha256):  # Otherwise another process was faster.
                    size = self._fetch(name, write, ahead, sha256)
                    _say("miss", name, size, began)
                    return path
        if not ahead:
            self._note(name)
        _say("hit", name, path.stat().st_size, began)
        return path

    def _fetch(self, name: str, write: Write, ahead: bool, sha256: str | None) -> int:
        """Bring a file to its name. Returns its bytes."""
        path = self._path_of(name)
        if path.exists():
            logger.error("cached file is damaged and fetched again path=%s", path)
        with side_effect("cache.make_folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".part-{name}-{uuid.uuid4().hex}")
        try:
            found = self._write(part, write)
            if sha256 is not None and found != sha256:
                raise CachedFileDamaged(f"the file {sha256} came with other bytes ({found}); it is not used")
            with self._open() as policy:
                size = part.stat().st_size
                self._make_room(policy, size)
                self._journal.admitted(name, size, ahead=ahead, sha256="" if sha256 else found)
                with side_effect("cache.admit"):
                    part.replace(path)
            self._verified[name] = _identity(path)
        finally:
            with side_effect("cache.part_remove"):
                part.unlink(missing_ok=True)
        return size

    def _write(self, part: Path, write: Write) -> str:
        """Durable bytes under a temporary name; returns their hash. A full disk is made room on, as far as we can."""
        while True:
            try:
                with side_effect("cache.download"):
                    found = write(part) or hash_file(part)
                # Before the rename, or a power cut can leave an empty file under the final name.
                with part.open("rb") as file, side_effect("cache.fsync"):
                    os.fsync(file.fileno())
                return found
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                came = part.stat().st_size if part.exists() else 0
                with side_effect("cache.drop_part"):
                    part.unlink(missing_ok=True)
                with self._open() as policy:
                    if not self._evict(policy, max(FREE_AT_LEAST_BYTES, 2 * came)):
                        text = f"the disk of {self._folder} is full and no file of the cache can go; free some space"
                        raise OSError(errno.ENOSPC, text) from error

    def _make_room(self, policy: CachePolicy, size: int) -> None:
        disk = shutil.disk_usage(self._folder)
        spare = min(SPARE_BYTES, int(SPARE_SHARE * disk.total))
        excess = max(policy.used + size - policy.capacity, spare - disk.free)
        if excess > 0 and self._evict(policy, excess) < excess:
            logger.warning("cache holds more than it should, the rest is in use used=%d bytes=%d", policy.used, size)

    def _evict(self, policy: CachePolicy, wanted: int) -> int:
        """Remove files that nobody uses until `wanted` bytes have gone. Returns how many went."""
        gone = count = 0
        for name in policy.victims():
            if gone >= wanted:
                break
            size = policy.size_of(name)
            if self._remove(name):
                gone, count = gone + size, count + 1
        if count:
            logger.info("cache evicted files=%d bytes=%d used=%d", count, gone, policy.used)
        return gone

    def _remove(self, name: str) -> bool:
        """Whether the file is gone now; one that somebody pins stays."""
        path = self._path_of(name)
        with self._pins.exclusive_now(name) as is_free:
            if not is_free:
                return False
            with suppress(FileNotFoundError):
                stat = path.stat()
                if stat.st_nlink > 1 and self._linked and not linked_folders_drop(self._linked, stat, self._pins):
                    return False
            with side_effect("cache.evict"):
                path.unlink(missing_ok=True)
            self._journal.removed(name)
        return True

    def _note(self, name: str) -> None:
        try:
            with self._open():
                self._journal.asked(name)
        except OSError as error:  # The file is here all the same.
            logger.warning("cache could not note a request reason=%s", error)

    @contextmanager
    def _open(self) -> Iterator[CachePolicy]:
        with self._journal.open() as policy:
            if self._journal.needs_scan:
                cache_scan(self._folder, policy, self._journal, self._making, self._pins, self._linked)
                self._journal.needs_scan = False
            yield policy

    def _is_right(self, name: str, sha256: str | None) -> bool:
        """Whether the file is there with the right bytes, as far as the class promises."""
        path = self._path_of(name)
        try:
            now = _identity(path)
            if self._verified.get(name) == now:
                return True
            if sha256 is None:
                with self._open():
                    sha256 = self._journal.hash_of(name)
            right = hash_file(path) == sha256
        except FileNotFoundError:
            return False
        if right:
            self._verified[name] = now
        return right

    def _recent_pins(self) -> SharedLocks:
        """Where pins go that nobody keeps: two bags in turns, each open for one to two times `PIN_SECONDS`."""
        with self._recent_lock:
            now = time.monotonic()
            if not self._recent or now - self._recent[-1][0] > PIN_SECONDS:
                self._recent = [*self._recent[-1:], (now, self.pins())]
            return self._recent[-1][1]

    def _path_of(self, name: str) -> Path:
        return self._folder / name[:2] / name


def _say(what: str, name: str, size: int, began: float) -> None:
    logger.info("cache %s file=%s bytes=%d ms=%.1f", what, name[:12], size, 1000 * (time.monotonic() - began))


def _identity(path: Path) -> tuple[int, ...]:
    """What changes when somebody writes to a file or puts another in its place; ctime cannot be set back."""
    stat = path.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
