"""The folder storage: whole files or none, one file per name."""

import io
import threading
from pathlib import Path

import pytest
from django.core.files.base import ContentFile, File

from jobs.local_storage import LocalArtifactStorage
from tests.write_order import write_order


@pytest.fixture
def storage(tmp_path: Path) -> LocalArtifactStorage:
    return LocalArtifactStorage(location=tmp_path, file_permissions_mode=0o600, directory_permissions_mode=0o700)


def test_a_name_written_twice_is_one_file(storage: LocalArtifactStorage, tmp_path: Path) -> None:
    assert storage.save("sha256/aa/x", ContentFile(b"bytes")) == "sha256/aa/x"
    assert storage.save("sha256/aa/x", ContentFile(b"bytes")) == "sha256/aa/x"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["x"]


def test_a_write_that_breaks_off_leaves_nothing(storage: LocalArtifactStorage, tmp_path: Path) -> None:
    class Breaking(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise ConnectionError("the other side went away")

    with pytest.raises(ConnectionError):
        storage.save("sha256/aa/x", File(Breaking(b"bytes"), name="x"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_files_are_private(storage: LocalArtifactStorage, tmp_path: Path) -> None:
    storage.save("sha256/aa/x", ContentFile(b"bytes"))
    assert (tmp_path / "sha256/aa/x").stat().st_mode & 0o077 == 0


def test_writers_at_once_end_with_the_right_bytes(storage: LocalArtifactStorage, tmp_path: Path) -> None:
    content = b"z" * 3_000_000
    writers = [threading.Thread(target=storage.save, args=("sha256/aa/x", ContentFile(content))) for _ in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert (tmp_path / "sha256/aa/x").read_bytes() == content
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["x"]


def test_bytes_are_durable_before_their_name_and_the_name_before_the_answer(storage: LocalArtifactStorage) -> None:
    with write_order() as stored:
        storage.save("sha256/aa/x", ContentFile(b"torn"))
    assert stored == ["fsync", "write", "fsync", "link", "fsync"], "the first one makes the new folder durable"
    with write_order() as replaced:
        storage.replace("sha256/aa/x", ContentFile(b"right"))
    assert replaced == ["write", "fsync", "rename", "fsync"]
