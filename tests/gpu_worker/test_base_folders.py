"""Prepared folders are rebuilt from stored files, on any machine, and stale ones are refused."""

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from core.errors import BaseModelError
from core.prepared_base import open_prepared
from gpu_worker.base_folders import base_folder
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
