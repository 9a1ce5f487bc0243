"""Artifacts in a folder of this machine: a file appears whole and durable under its name, or not at all."""

import os
import tempfile
from pathlib import Path
from typing import Any

from django.core.files.base import File
from django.core.files.storage import FileSystemStorage


class LocalArtifactStorage(FileSystemStorage):
    """Django's folder storage with atomic, synced writes.

    Names are content hashes (`jobs/artifacts.py`), so writing a name twice writes the same bytes: the last rename wins.
    """

    def get_available_name(self, name: str, max_length: int | None = None) -> str:
        """The name itself; the base class would store a second copy under an invented one."""
        return name

    def _save(self, name: str, content: "File[Any]") -> str:
        path = Path(self.path(name))
        path.parent.mkdir(parents=True, exist_ok=True, mode=self.directory_permissions_mode or 0o700)
        handle, part = tempfile.mkstemp(prefix=".part-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as out:
                for chunk in content.chunks():
                    out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
            Path(part).replace(path)
        finally:
            Path(part).unlink(missing_ok=True)
        _sync_folder(path.parent)
        return name


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
