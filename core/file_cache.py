"""Files of one machine named by their SHA-256: downloaded once, verified, shared by all processes.

Knows nothing of where the files come from: `download` is given by the caller.
"""

import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import CoreError
from core.failpoints import side_effect
from core.file_hash import hash_file

logger = logging.getLogger(__name__)


class CachedFileDamaged(CoreError):
    """A downloaded file does not have the hash that was asked for."""

    code = "artifact_damaged"


class FileCache:
    """`get(sha256)` returns a local file that has this hash.

    A file is hashed when it is admitted, when a process serves it for the first time, and when its size, times or inode
    changed since (about 1 s per GB); a damaged one is downloaded again. So whatever was cut, overwritten or swapped is
    found at once, and what rotted on the disk at the next start; bits that rot under a running process are not found.

    Args:
        folder: Where the files live; made when missing.
        download: `download(sha256, destination)` writes the bytes; called at most once per hash and machine at a time.
    """

    def __init__(self, folder: Path, *, download: Callable[[str, Path], None]) -> None:
        self._folder, self._download = folder, download
        self._verified: dict[str, tuple[int, ...]] = {}

    def get(self, sha256: str) -> Path:
        """Local path of the bytes. Never write to it.

        Raises:
            CachedFileDamaged: The download has another hash; nothing is kept.
        """
        path = self._folder / sha256[:2] / sha256
        if self._is_right(path, sha256):
            return path
        with side_effect("cache.make_folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(path):
            if self._is_right(path, sha256):
                return path  # Another process was faster.
            if path.exists():
                logger.error("cached file is damaged and downloaded again path=%s", path)
            part = path.with_name(f".part-{uuid.uuid4().hex}")
            try:
                with side_effect("cache.download"):
                    self._download(sha256, part)
                found = hash_file(part)
                if found != sha256:
                    raise CachedFileDamaged(f"the file {sha256} came with other bytes ({found}); it is not used")
                # Before the rename, or a power cut can leave an empty file under the final name.
                with part.open("rb") as file, side_effect("cache.fsync"):
                    os.fsync(file.fileno())
                with side_effect("cache.admit"):
                    part.replace(path)
                self._verified[sha256] = _identity(path)
            finally:
                with side_effect("cache.part_remove"):
                    part.unlink(missing_ok=True)
        return path

    def _is_right(self, path: Path, sha256: str) -> bool:
        """Whether the file is there with the right bytes, as far as the class promises."""
        try:
            now = _identity(path)
            if self._verified.get(sha256) == now:
                return True
            right = hash_file(path) == sha256
        except FileNotFoundError:
            return False
        if right:
            self._verified[sha256] = now
        return right

    def copy_to(self, sha256: str, destination: Path) -> None:
        """A private copy of the bytes at `destination`, for callers that write or delete there."""
        with side_effect("cache.copy"):
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.get(sha256), destination)

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        with side_effect("cache.make_lock"):
            descriptor = os.open(path.with_name(f".lock-{path.name}"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _identity(path: Path) -> tuple[int, ...]:
    """What changes when somebody writes to a file or puts another in its place; ctime cannot be set back."""
    stat = path.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
