"""The machine's file cache: one download per hash, nothing wrong is ever kept."""

import hashlib
import threading
from pathlib import Path

import pytest

from core.file_cache import CachedFileDamaged, FileCache
from tests.write_order import write_order

CONTENT = b"the right bytes"
SHA = hashlib.sha256(CONTENT).hexdigest()


def test_a_file_is_downloaded_once_and_then_served_from_disk(tmp_path: Path) -> None:
    downloads: list[str] = []

    def download(sha256: str, destination: Path) -> None:
        downloads.append(sha256)
        destination.write_bytes(CONTENT)

    cache = FileCache(tmp_path, download=download)
    assert cache.get(SHA).read_bytes() == CONTENT
    assert cache.get(SHA).read_bytes() == CONTENT
    assert downloads == [SHA]


def test_wrong_bytes_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, download=lambda sha256, destination: destination.write_bytes(b"tampered") and None)
    with pytest.raises(CachedFileDamaged, match="other bytes"):
        cache.get(SHA)
    assert list(tmp_path.glob("??/*")) == []


def test_a_download_that_breaks_off_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    def broken(sha256: str, destination: Path) -> None:
        destination.write_bytes(CONTENT[:4])
        raise ConnectionError("reset")

    with pytest.raises(ConnectionError):
        FileCache(tmp_path, download=broken).get(SHA)
    assert FileCache(tmp_path, download=lambda s, d: d.write_bytes(CONTENT) and None).get(SHA).read_bytes() == CONTENT
    assert not list(tmp_path.rglob(".part-*"))


def test_many_readers_at_once_cause_one_download(tmp_path: Path) -> None:
    downloads: list[str] = []

    def download(sha256: str, destination: Path) -> None:
        downloads.append(sha256)
        destination.write_bytes(CONTENT)

    readers = [threading.Thread(target=FileCache(tmp_path, download=download).get, args=(SHA,)) for _ in range(8)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert downloads == [SHA]


def test_a_copy_may_be_changed_without_touching_the_cache(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", download=lambda s, d: d.write_bytes(CONTENT) and None)
    cache.copy_to(SHA, tmp_path / "deep" / "copy")
    (tmp_path / "deep" / "copy").write_bytes(b"mine")
    assert cache.get(SHA).read_bytes() == CONTENT


def test_bytes_are_durable_before_they_get_their_name(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, download=lambda s, d: d.write_bytes(CONTENT) and None)
    with write_order() as order:
        cache.get(SHA)
    assert [what for what in order if what == "fsync"] == ["fsync"]
    assert order.index("fsync") < len(order) - 1 - order[::-1].index("rename")
