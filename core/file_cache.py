"""Files of one machine named by their SHA-256: downloaded once, verified on admission, shared by all processes.

Knows nothing of where the files come from: `download` is given by the caller.
"""

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import CoreError
from core.file_hash import hash_file


class CachedFileDamaged(CoreError):
    """A downloaded file does not have the hash that was asked for."""

    code = "artifact_damaged"


class FileCache:
    """`get(sha256)` returns a local file that has this hash.

    Args:
        folder: Where the files live; made when missing.
        download: `download(sha256, destination)` writes the bytes; called at most once per hash and machine at a time.
    """

    def __init__(self, folder: Path, *, download: Callable[[str, Path], None]) -> None:
        self._folder, self._download = folder, download

    def get(self, sha256: str) -> Path:
        """Local path of the bytes. Never write to it.

        Raises:
            CachedFileDamaged: The download has another hash; nothing is kept.
        """
        path = self._folder / sha256[:2] / sha256
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(path):
            if path.is_file():
                return path  # Another process was faster.
            part = path.with_name(f".part-{uuid.uuid4().hex}")
            try:
                self._download(sha256, part)
                found = hash_file(part)
                if found != sha256:
                    raise CachedFileDamaged(f"the file {sha256} came with other bytes ({found}); it is not used")
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        return path

    def copy_to(self, sha256: str, destination: Path) -> None:
        """A private copy of the bytes at `destination`, for callers that write or delete there."""
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.get(sha256), destination)

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        descriptor = os.open(path.with_name(f".lock-{path.name}"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
