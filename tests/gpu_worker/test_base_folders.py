"""Prepared folders are rebuilt from stored files, on any machine, and stale ones are refused."""

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from core import prepared_base
from core.errors import BaseModelError
from core.file_cache import FileCache
from core.prepared_base import open_prepared
from gpu_worker import base_folders
from gpu_worker.base_folders import base_folder, lent_vae
from gpu_worker.settings import BaseRef

Fetch = Callable[[str], Path]


def test_a_folder_is_rebuilt_from_its_files(tmp_path: Path, bases: list[BaseRef], fetch: Fetch) -> None:
    folder = base_folder(bases[0], tmp_path, fetch)
    assert open_prepared(folder, verify=True).fingerprint == bases[0].fingerprint


def test_a_second_call_fetches_nothing(tmp_path: Path, bases: list[BaseRef], fetch: Fetch) -> None:
    first = base_folder(bases[0], tmp_path, fetch)

    def refuse(sha256: str) -> Path:
        raise AssertionError(f"fetched {sha256} again")

    assert base_folder(bases[0], tmp_path, refuse) == first


def test_a_fetch_that_breaks_off_leaves_no_folder(tmp_path: Path, bases: list[BaseRef], fetch: Fetch) -> None:
    fetched: list[str] = []

    def break_off(sha256: str) -> Path:
        fetched.append(sha256)
        if len(fetched) > 3:
            raise ConnectionError("gone")
        return fetch(sha256)

    with pytest.raises(ConnectionError):
        base_folder(bases[0], tmp_path, break_off)
    assert list((tmp_path / "bases").iterdir()) == []
    assert base_folder(bases[0], tmp_path, fetch).is_dir()


def test_processes_that_build_at_once_end_with_one_folder(tmp_path: Path, bases: list[BaseRef], fetch: Fetch) -> None:
    errors: list[BaseException] = []

    def build() -> None:
        try:
            base_folder(bases[0], tmp_path, fetch)
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=build) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [path.name for path in (tmp_path / "bases").iterdir()] == [bases[0].fingerprint]


def test_files_of_another_base_are_refused(tmp_path: Path, bases: list[BaseRef], fetch: Fetch) -> None:
    mixed_up = dataclasses.replace(bases[0], files=bases[1].files)
    with pytest.raises(BaseModelError, match="prepare it again"):
        base_folder(mixed_up, tmp_path, fetch)


def test_a_base_of_other_libraries_is_refused_with_how_to_prepare_it_again(
    tmp_path: Path, bases: list[BaseRef], fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_folder(bases[0], tmp_path, fetch)
    monkeypatch.setattr(prepared_base, "version", lambda name: "99.0")
    with pytest.raises(BaseModelError, match=r"stale: library_versions was .*`manage\.py base prepare base0`"):
        base_folder(bases[0], tmp_path, fetch)
    with pytest.raises(BaseModelError, match=r"stale: library_versions was .*`manage\.py base prepare base1`"):
        base_folder(bases[1], tmp_path, fetch)
    with (
        pytest.raises(BaseModelError, match=r"stale: library_versions was .*`manage\.py base prepare base1`"),
        lent_vae(bases[1], tmp_path / "elsewhere", fetch),
    ):
        pass


def test_a_lent_vae_is_all_that_is_fetched_of_its_base(tmp_path: Path, bases: list[BaseRef], fetch: Fetch) -> None:
    fetched: list[str] = []

    def count(sha256: str) -> Path:
        fetched.append(sha256)
        return fetch(sha256)

    with lent_vae(bases[0], tmp_path, count) as folder:
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    names = sorted(name for name, sha256 in bases[0].files.items() if sha256 in fetched)
    assert names == [
        "manifest.json",
        "model_index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert list((tmp_path / "bases").iterdir()) == []


def test_a_lent_vae_of_a_base_that_is_here_is_its_own_folders(
    tmp_path: Path, bases: list[BaseRef], fetch: Fetch
) -> None:
    folder = base_folder(bases[0], tmp_path, fetch)
    with lent_vae(bases[0], tmp_path, fetch) as vae:
        assert vae == folder / "vae"
    assert vae.is_dir()


def test_the_vae_of_another_base_than_recorded_is_refused(tmp_path: Path, bases: list[BaseRef], fetch: Fetch) -> None:
    mixed_up = dataclasses.replace(bases[0], files=bases[1].files)
    with pytest.raises(BaseModelError, match="prepare it again"), lent_vae(mixed_up, tmp_path, fetch):
        pass


def test_the_cache_removes_no_folder_that_this_process_uses(
    tmp_path: Path, stored: tuple[dict[str, Path], list[BaseRef]], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, (one, other) = stored

    def download(sha256: str, destination: Path) -> None:
        destination.write_bytes(files[sha256].read_bytes())

    def fetch(sha256: str) -> Path:
        with cache.pins() as pins:
            return cache.get(sha256, pins=pins)

    size = sum(files[sha256].stat().st_size for sha256 in one.files.values())
    cache = FileCache(tmp_path / "files", download=download, capacity=size, linked=tmp_path / "bases")
    folder = base_folder(one, tmp_path, fetch)
    for sha256 in other.files.values():
        fetch(sha256)
    assert open_prepared(folder, verify=True).fingerprint == one.fingerprint
    monkeypatch.setattr(base_folders, "HELD_FOLDERS", 0)
    base_folder(one, tmp_path, fetch)  # and lets go of it at once
    for sha256 in other.files.values():
        fetch(sha256)
    assert not folder.exists()
    assert open_prepared(base_folder(one, tmp_path, fetch), verify=True).fingerprint == one.fingerprint
