"""Two prepared bases, known by value, and a file store that is a folder."""

from collections.abc import Callable
from pathlib import Path

import pytest

from core.file_cache import FileCache
from core.file_hash import hash_file
from core.prepared_base import prepare_base
from gpu_worker.settings import BaseRef, WorkerSettings
from tests.tiny_models import make_tiny_pipeline


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], list[BaseRef]]:
    """({sha256: file}, two bases): what an artifact store would hold."""
    files: dict[str, Path] = {}
    refs = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"base{seed}")
        prepared = prepare_base(make_tiny_pipeline(folder / "source", seed=seed), folder / "prepared")
        named = {p.relative_to(prepared.folder).as_posix(): p for p in prepared.folder.rglob("*") if p.is_file()}
        hashes = {name: hash_file(path) for name, path in named.items()}
        files |= {hashes[name]: path for name, path in named.items()}
        refs.append(BaseRef(name=f"base{seed}", fingerprint=prepared.fingerprint, files=hashes))
    return files, refs


@pytest.fixture
def fetch(stored: tuple[dict[str, Path], list[BaseRef]], tmp_path: Path) -> Callable[[str], Path]:
    """Through a real file cache, as in a worker."""
    files, _ = stored
    cache = FileCache(tmp_path / "files", download=lambda sha, to: to.write_bytes(files[sha].read_bytes()) and None)
    return cache.get


@pytest.fixture
def bases(stored: tuple[dict[str, Path], list[BaseRef]]) -> list[BaseRef]:
    return stored[1]


@pytest.fixture
def settings_of_worker(tmp_path: Path, fetch: Callable[[str], Path]) -> WorkerSettings:
    return WorkerSettings(device="cpu", cache_folder=tmp_path / "cache", fetch=fetch)
