"""Rebuilds prepared base folders on this machine from content-addressed files."""

import os
import shutil
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.cache_locks import NameLocks, SharedLocks
from core.cache_rooms import folder_pin
from core.errors import BaseModelError
from core.failpoints import side_effect
from core.prepared_base import MANIFEST_NAME, open_prepared
from gpu_worker.settings import BaseRef, Fetch

VAE = "vae"
HELD_FOLDERS = 8
"""The cache removes none of the folders that this process used last."""
_held: OrderedDict[Path, SharedLocks] = OrderedDict()
_holding = threading.Lock()


def base_folder(ref: BaseRef, cache_folder: Path, fetch: Fetch) -> Path:
    """The prepared folder of `ref`, built when it is not there; hard links into the file cache cost no space.

    Raises:
        BaseModelError: The rebuilt folder is stale or has another fingerprint than the record says.
    """
    folder = cache_folder / "bases" / ref.fingerprint
    _hold(folder)
    if not folder.is_dir():
        part = folder.with_name(f".part-{uuid.uuid4().hex}")
        try:
            for name, sha256 in ref.files.items():
                target = part / name
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(fetch(sha256), target)
            try:
                with side_effect("base_folder.rename"):
                    part.rename(folder)
            except OSError:
                if not folder.is_dir():  # Otherwise another process finished the same folder first.
                    raise
        finally:
            _clean_up(part)
    _check(folder, ref)
    return folder


@contextmanager
def lent_vae(ref: BaseRef, cache_folder: Path, fetch: Fetch) -> Iterator[Path]:
    """The VAE's folder of a base, for as long as the context: of all its files only these are fetched.

    Raises:
        BaseModelError: The base is stale.
    """
    if (cache_folder / "bases" / ref.fingerprint).is_dir():
        yield base_folder(ref, cache_folder, fetch) / VAE
        return
    part = cache_folder / "bases" / f".part-{uuid.uuid4().hex}"
    try:
        (part / VAE).mkdir(parents=True)
        for name in ("model_index.json", MANIFEST_NAME, *(name for name in ref.files if name.startswith(f"{VAE}/"))):
            _link(fetch(ref.files[name]), part / name)
        _check(part, ref, only=f"{VAE}/")
        yield part / VAE
    finally:
        _clean_up(part)


def _clean_up(part: Path) -> None:
    with side_effect("base_folder.clean_up"):
        shutil.rmtree(part, ignore_errors=True)


def _check(folder: Path, ref: BaseRef, *, only: str = "") -> None:
    try:
        prepared = open_prepared(folder, only=only)
    except BaseModelError as error:
        raise BaseModelError(
            f"base model {ref.name!r} cannot be used here ({error}): prepare it again, in the admin or with "
            f"`manage.py base prepare {ref.name}`"
        ) from error
    if prepared.fingerprint != ref.fingerprint:
        raise BaseModelError(
            f"base model {ref.name!r} has fingerprint {prepared.fingerprint[:12]} on this machine, "
            f"{ref.fingerprint[:12]} is recorded: prepare it again"
        )


def _hold(folder: Path) -> None:
    """Before it is looked for: whoever finds it can read it at leisure."""
    with _holding:
        if folder not in _held:
            pins = NameLocks(folder.parent.parent / "files" / ".pins").shared()
            pins.add(folder_pin(folder))
            _held[folder] = pins
        _held.move_to_end(folder)
        while len(_held) > HELD_FOLDERS:
            _held.popitem(last=False)[1].close()


def _link(source: Path, target: Path) -> None:
    with side_effect("base_folder.add_file"):
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)  # Another file system.
