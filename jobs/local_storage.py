"""Artifacts in a folder of this machine: a file appears whole and durable under its name, or not at all.

`jobs/artifacts.py` and `jobs/garbage.py` are the only callers; what they need of a store is `jobs.artifacts.BlobStore`.
"""

import errno
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from django.core.files.base import File
from django.core.files.storage import FileSystemStorage

from core.durable_folder import sync_folder
from core.failpoints import side_effect

PART_PREFIX = ".part-"
NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


class LocalArtifactStorage(FileSystemStorage):
    """Django's folder storage with atomic, synced writes that never overwrite."""

    def get_available_name(self, name: str, max_length: int | None = None) -> str:
        """The name itself; the base class would store a second copy under an invented one."""
        return name

    def _save(self, name: str, content: "File[Any]") -> str:
        """Write the bytes, unless the name is taken: then they stay as they are."""
        path = Path(self.path(name))
        part = self._write_part(path, content)
        try:
            _link(part, path)
        except FileExistsError:
            pass  # Somebody was faster; the names are hashes, so the bytes are the same.
        finally:
            with side_effect("blob.part_remove"):
                part.unlink(missing_ok=True)
        sync_folder(path.parent)
        return name

    def replace(self, name: str, content: "File[Any]") -> None:
        """Put the right bytes in the place of wrong ones, in one step."""
        path = Path(self.path(name))
        part = self._write_part(path, content)
        try:
            with side_effect("blob.replace"):
                part.replace(path)
        except OSError:
            _discard(part)
            raise
        sync_folder(path.parent)

    def delete(self, name: str) -> None:
        """Remove a blob; not an error when it is gone."""
        with side_effect("blob.delete"):
            Path(self.path(name)).unlink(missing_ok=True)

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of each name that is there."""
        found = {}
        for name in names:
            try:
                found[name] = Path(self.path(name)).stat().st_size
            except FileNotFoundError:
                continue
        return found

    def names_after(self, after: str, limit: int) -> list[tuple[str, int]]:
        """At most `limit` (name, bytes) of `sha256/...`, in order, from the first one behind `after`."""
        found: list[tuple[str, int]] = []
        root = Path(self.path("sha256"))
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            if not folder.is_dir() or f"sha256/{folder.name}/~" <= after:
                continue
            for path in sorted(folder.iterdir()):
                name = f"sha256/{folder.name}/{path.name}"
                if name > after and not path.name.startswith(PART_PREFIX):
                    found += [(name, size) for size in self.sizes([name]).values()]
                if len(found) >= limit:
                    return found
        return found

    def leftovers_remove(self, older_than_seconds: float, limit: int) -> int:
        """Remove at most `limit` half-written files that nobody touched for so long. Returns how many."""
        removed, oldest = 0, time.time() - older_than_seconds
        for part in Path(self.path("")).glob(f"sha256/*/{PART_PREFIX}*"):
            if removed >= limit:
                break
            try:
                is_old = part.stat().st_mtime < oldest
            except FileNotFoundError:
                continue
            if is_old:
                with side_effect("blob.leftover_remove"):
                    part.unlink(missing_ok=True)
                removed += 1
        return removed

    def _write_part(self, path: Path, content: "File[Any]") -> Path:
        """The bytes, synced, under a temporary name beside `path`."""
        if not path.parent.is_dir():
            with side_effect("blob.make_folder"):
                path.parent.mkdir(parents=True, exist_ok=True, mode=self.directory_permissions_mode or 0o700)
            sync_folder(path.parent.parent)  # else a power cut may take the folder with all that it holds by then
        handle, name = tempfile.mkstemp(prefix=PART_PREFIX, dir=path.parent)
        part = Path(name)
        try:
            with side_effect("blob.write"), os.fdopen(handle, "wb") as out:
                for chunk in content.chunks():
                    out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
        except BaseException:
            _discard(part)
            raise
        return part


def _discard(part: Path) -> None:
    with side_effect("blob.part_discard"):
        part.unlink(missing_ok=True)


def _link(part: Path, path: Path) -> None:
    """Give `part` the name `path`, unless it is taken (FileExistsError)."""
    try:
        with side_effect("blob.link"):
            os.link(part, path)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        # A file system without hard links: replacing is atomic as well, and the bytes are the same.
        with side_effect("blob.rename"):
            part.replace(path)
