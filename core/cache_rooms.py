"""What else lies in the folders of a cache: what killed processes left, and folders of hard links into it.

Called by `core/file_cache.py` alone, with the journal open.
"""

import logging
import os
import shutil
import time
import uuid
from pathlib import Path

from core.cache_journal import CacheJournal
from core.cache_locks import NameLocks
from core.cache_policy import CachePolicy
from core.failpoints import side_effect
from core.file_hash import hash_file

logger = logging.getLogger(__name__)

PART = ".part-"
STALE_SECONDS = 86_400.0
"""What nobody has added to for so long will not be finished."""


def folder_pin(folder: Path) -> str:
    """The name to pin so that a folder of links stays."""
    return f"folder {folder.name}"


def cache_scan(
    folder: Path, policy: CachePolicy, journal: CacheJournal, making: NameLocks, pins: NameLocks, linked: Path | None
) -> None:
    """Make journal and files agree, and remove what a killed process did not finish."""
    found: dict[str, os.stat_result] = {}
    hashes: dict[str, str] = {}
    for path in folder.glob("??/*"):
        if path.name.startswith(".lock-"):  # Of an older version.
            _drop(path)
        elif path.name.startswith(PART):
            maker = path.name.removeprefix(PART).rpartition("-")[0]
            with making.exclusive_now(maker) as is_left:
                # One without a name is an older version's, which may be at it just now.
                if is_left and (maker or time.time() - path.stat().st_mtime > STALE_SECONDS):
                    _drop(path)
        elif path.name.endswith(".made") and not journal.hash_of(path.name):
            with pins.exclusive_now(path.name) as is_free:
                if is_free:
                    _drop(path)  # Nobody can say any more what it should hold; it can be made again.
                else:  # Whoever uses it knows.
                    found[path.name], hashes[path.name] = path.stat(), hash_file(path)
        else:
            found[path.name] = path.stat()
    for name in policy.names():
        if name not in found:
            journal.removed(name)
    for name, stat in sorted(found.items(), key=lambda item: item[1].st_mtime):
        if policy.size_of(name) != stat.st_size or name not in policy:
            sha256 = hashes.get(name, journal.hash_of(name))
            journal.admitted(name, stat.st_size, ahead=False, sha256=sha256)
    for part in linked.glob(f"{PART}*") if linked else ():
        if time.time() - part.stat().st_mtime > STALE_SECONDS:
            _drop_folder(part)


def linked_folders_drop(linked: Path, file: os.stat_result, pins: NameLocks) -> bool:
    """Remove the folders that link to this file. False when one of them is in use; then it stays whole."""
    for folder in linked.glob("[!.]*"):
        if not any(os.path.samestat(path.stat(), file) for path in folder.rglob("*")):
            continue
        with pins.exclusive_now(folder_pin(folder)) as is_free:
            if not is_free:
                return False
            # Its name goes first: half a folder is never seen under it.
            aside = folder.with_name(f"{PART}{uuid.uuid4().hex}")
            with side_effect("cache.unlink_folder"):
                folder.rename(aside)
            _drop_folder(aside)
            logger.info("cache dropped a folder of links folder=%s", folder.name)
    return True


def _drop(path: Path) -> None:
    with side_effect("cache.sweep"):
        path.unlink(missing_ok=True)


def _drop_folder(folder: Path) -> None:
    with side_effect("cache.sweep_folder"):
        shutil.rmtree(folder, ignore_errors=True)
