"""This machine's cache of stored files, shared by all its processes; the one way in which a worker reads artifacts."""

from functools import lru_cache
from pathlib import Path

from django.conf import settings

from core.file_cache import FileCache
from jobs.artifacts import artifact_download


@lru_cache(maxsize=1)
def node_cache() -> FileCache:
    """The cache under `<data>/cache/files`, filled from the artifact store."""
    return FileCache(Path(settings.LORASITE["DATA"]) / "cache" / "files", download=artifact_download)
