"""This machine's cache of stored files, shared by all its processes; the one way in which a worker reads artifacts."""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

from django.conf import settings

from core.cache_locks import SharedLocks
from core.file_cache import FileCache
from jobs.artifacts import artifact_download
from jobs.backoff import Backoff, retrying

Result = TypeVar("Result")


class NodeCache:
    """A file cache that waits for a store in trouble.

    Args:
        files: The cache itself.
        check: Called between tries; what it raises (a lost lease, a shutdown) ends the wait.
        backoff: Makes the waits of one file.
        pins: Keep what was got; without, it stays for a minute at least (`core.file_cache.PIN_SECONDS`).
    """

    def __init__(
        self,
        files: FileCache,
        *,
        check: Callable[[], None] | None = None,
        backoff: Callable[[], Backoff] = Backoff,
        pins: SharedLocks | None = None,
    ) -> None:
        self.files = files
        self._check, self._backoff, self._pins = check, backoff, pins

    def checking(self, check: Callable[[], None]) -> "NodeCache":
        """The same cache, for an attempt that may have to stop; what it gets stays as long as this object is used."""
        return NodeCache(self.files, check=check, backoff=self._backoff, pins=self.files.pins())

    def get(self, sha256: str) -> Path:
        """Local path of the verified bytes. Never write to it.

        Raises:
            ArtifactDamaged: The store has lost or damaged them.
            OSError: ENOSPC: the disk is full of files in use.
            Exception: The last transient error, when the store stayed away for the whole budget.
        """
        return self._retrying(partial(self.files.get, sha256, pins=self._pins), sha256)

    def get_or_make(self, key: str, make: Callable[[Path], None]) -> Path:
        """Local path of what `make(path)` writes for this key, made where this machine does not have it.

        Args:
            key: Names everything that the bytes depend on.
            make: May call `get`; what it raises comes through, and transient errors are tried again.
        """
        return self._retrying(partial(self.files.get_or_make, key, make, pins=self._pins), key)

    def copy_to(self, sha256: str, destination: Path) -> None:
        """A private copy of the verified bytes. Raises as `get`."""
        self._retrying(partial(self.files.copy_to, sha256, destination), sha256)

    def _retrying(self, call: Callable[[], Result], name: str) -> Result:
        # Outside of the cache's lock: others who want the same file take turns trying.
        return retrying(call, check=self._check, backoff=self._backoff(), what=f"download {name[:12]}")


@lru_cache(maxsize=1)
def node_cache() -> NodeCache:
    """The cache under `<data>/cache/files`, filled from the artifact store."""
    folder = Path(settings.LORASITE["DATA"]) / "cache"
    capacity = settings.LORASITE["CACHE_BYTES"] or None
    return NodeCache(
        FileCache(folder / "files", download=artifact_download, capacity=capacity, linked=folder / "bases")
    )
