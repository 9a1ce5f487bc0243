"""This machine's cache of stored files, shared by all its processes; the one way in which a worker reads artifacts."""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

from django.conf import settings

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
    """

    def __init__(
        self,
        files: FileCache,
        *,
        check: Callable[[], None] | None = None,
        backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        self._files, self._check, self._backoff = files, check, backoff

    def checking(self, check: Callable[[], None]) -> "NodeCache":
        """The same cache, for an attempt that may have to stop."""
        return NodeCache(self._files, check=check, backoff=self._backoff)

    def get(self, sha256: str) -> Path:
        """Local path of the verified bytes. Never write to it.

        Raises:
            ArtifactDamaged: The store has lost or damaged them.
            Exception: The last transient error, when the store stayed away for the whole budget.
        """
        return self._retrying(partial(self._files.get, sha256), sha256)

    def copy_to(self, sha256: str, destination: Path) -> None:
        """A private copy of the verified bytes. Raises as `get`."""
        self._retrying(partial(self._files.copy_to, sha256, destination), sha256)

    def _retrying(self, call: Callable[[], Result], sha256: str) -> Result:
        # Outside of the cache's lock: others who want the same file take turns trying.
        return retrying(call, check=self._check, backoff=self._backoff(), what=f"download {sha256[:12]}")


@lru_cache(maxsize=1)
def node_cache() -> NodeCache:
    """The cache under `<data>/cache/files`, filled from the artifact store."""
    return NodeCache(FileCache(Path(settings.LORASITE["DATA"]) / "cache" / "files", download=artifact_download))
