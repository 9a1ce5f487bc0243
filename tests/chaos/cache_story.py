"""A story of a machine's file cache: too small, the disk full, the journal torn, a killed process's leftovers in it."""

import errno
import hashlib
import os
import uuid
from contextlib import suppress
from pathlib import Path

from tests.chaos.scenarios import generate, picture_is_right

CAPACITY = 2500
"""Bytes: two of the four files."""
CONTENTS = [bytes([65 + number]) * 1000 for number in range(4)]
NAMES = [hashlib.sha256(content).hexdigest() for content in CONTENTS]


def crowded_cache() -> None:
    """Tell it."""
    from core.file_cache import FileCache
    from jobs.errors import ArtifactDamaged
    from jobs.node_cache import node_cache

    folder = _folder()
    was_full: list[str] = []

    def download(sha256: str, destination: Path) -> None:
        destination.write_bytes(CONTENTS[NAMES.index(sha256)])
        if sha256 == NAMES[1] and not was_full:
            was_full.append(sha256)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def cache() -> FileCache:
        return FileCache(folder / "files", download=download, capacity=CAPACITY, linked=folder / "bases")

    with cache().pins() as pins:
        linked = cache().get(NAMES[0], pins=pins)
        base = folder / "bases" / "one"
        base.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.link(linked, base / "weights")
    with (folder / "files" / "journal").open("ab") as journal:
        journal.write(b"? torn")
    leftover = folder / "files" / NAMES[2][:2] / f".part-{NAMES[2]}-{uuid.uuid4().hex}"
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"half")
    another_process = cache()
    for name in (*NAMES, NAMES[3]):
        with another_process.pins() as pins:
            try:
                another_process.get(name, pins=pins)
            except OSError:  # Full of what somebody holds who tells the same story just now.
                another_process.get(name, pins=pins)
    with suppress(ArtifactDamaged):
        node_cache().files.get("0" * 64)
    generate("one")


def crowded_cache_check() -> list[str]:
    """What is there is right, and not too much."""
    from core.file_cache import FileCache

    files = _folder() / "files"
    cache = FileCache(files, download=lambda *_: None, capacity=CAPACITY)
    used = cache.used_bytes()
    left = {path.name: path for path in files.glob("??/*")}
    found = [f"{name} is a leftover" for name in left if name not in NAMES]
    if any(left[name].read_bytes() != CONTENTS[NAMES.index(name)] for name in left if name in NAMES):
        found.append("a cached file holds other bytes")
    if not used == sum(path.stat().st_size for path in left.values()) <= CAPACITY:
        found.append(f"the cache counts {used} bytes and holds {len(left)} files")
    return found + picture_is_right("one")


def _folder() -> Path:
    from django.conf import settings

    return Path(settings.LORASITE["DATA"]) / "crowded"
