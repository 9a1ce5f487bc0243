"""The store: bytes under their hash, verified on every way out, in real files."""

import errno
import hashlib
import os
import random
import re
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage

from core import failpoints
from core.file_cache import FileCache
from jobs.artifacts import artifact_download, artifact_name, artifact_open, artifact_put, artifact_put_stream
from jobs.backoff import Backoff, is_transient
from jobs.errors import ArtifactDamaged, LeaseLost
from jobs.local_storage import LocalArtifactStorage
from jobs.models import Artifact
from jobs.node_cache import NodeCache

Blobs = Callable[[], set[str]]


def fresh() -> bytes:
    """Bytes that no other test stored."""
    return os.urandom(5000)


def stored_path(sha256: str) -> Path:
    return Path(default_storage.path(artifact_name(sha256)))


def test_bytes_are_stored_once_under_their_hash(blobs: Blobs) -> None:
    content, before = fresh(), blobs()
    sha256, size = artifact_put_stream(BytesIO(content))
    assert (sha256, size) == (hashlib.sha256(content).hexdigest(), 5000)
    assert artifact_put_stream(BytesIO(content)) == (sha256, size)
    assert blobs() - before == {f"sha256/{sha256[:2]}/{sha256}"}


def test_a_stream_is_stored_from_its_beginning_wherever_it_stands(blobs: Blobs) -> None:
    stream = BytesIO(fresh())
    stream.read(100)
    sha256, size = artifact_put_stream(stream)
    with artifact_open(sha256) as stored:
        assert stored.read() == stream.getvalue()
    assert size == 5000


def test_a_file_is_stored_and_fetched_unchanged(tmp_path: Path, blobs: Blobs) -> None:
    source, destination = tmp_path / "a", tmp_path / "deep" / "folder" / "b"
    source.write_bytes(fresh())
    sha256, _ = artifact_put(source)
    artifact_download(sha256, destination)
    assert destination.read_bytes() == source.read_bytes()
    assert [path.name for path in destination.parent.iterdir()] == ["b"]


def test_the_empty_file_is_a_file_like_any_other(blobs: Blobs) -> None:
    sha256, size = artifact_put_stream(BytesIO(b""))
    with artifact_open(sha256) as stream:
        assert (stream.read(), size) == (b"", 0)


@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "gone"])
def test_damaged_bytes_are_refused_whole(damage: str, tmp_path: Path, blobs: Blobs) -> None:
    content = fresh()
    sha256, _ = artifact_put_stream(BytesIO(content))
    path = stored_path(sha256)
    if damage == "gone":
        path.unlink()
    else:
        changed = {"flipped": bytes([content[0] ^ 1]) + content[1:], "cut": content[:-1], "longer": content + b"x"}
        path.write_bytes(changed[damage])
    with pytest.raises(ArtifactDamaged, match=sha256):
        artifact_open(sha256)
    destination = tmp_path / "out"
    with pytest.raises(ArtifactDamaged):
        artifact_download(sha256, destination)
    assert list(tmp_path.iterdir()) == []


def test_a_torn_write_is_healed_by_storing_again(blobs: Blobs) -> None:
    content = fresh()
    sha256, _ = artifact_put_stream(BytesIO(content))
    stored_path(sha256).write_bytes(content[:100])
    artifact_put_stream(BytesIO(content))
    with artifact_open(sha256) as stream:
        assert stream.read() == content


@pytest.mark.parametrize(
    "name",
    ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 65, "a" * 63 + "\n", "a" * 64 + "\n", "/" + "a" * 63, "g" * 64],
)
def test_only_a_hash_is_a_name(name: str) -> None:
    with pytest.raises(ValueError, match="is not a SHA-256"):
        artifact_name(name)


def test_stored_files_are_the_services_own(blobs: Blobs) -> None:
    sha256, _ = artifact_put_stream(BytesIO(fresh()))
    assert stored_path(sha256).stat().st_mode & 0o077 == 0


class Flipping:
    """A store whose reads come with one random bit turned over, for the first `times` reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, times: int, rng: random.Random) -> None:
        self.left = times
        original = LocalArtifactStorage.open

        def open_(storage: LocalArtifactStorage, name: str, mode: str = "rb") -> Any:
            with original(storage, name, mode) as stored:
                content = bytearray(stored.read())
            if self.left > 0:
                self.left -= 1
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            return ContentFile(bytes(content))

        monkeypatch.setattr(LocalArtifactStorage, "open", open_)


def test_of_a_thousand_reads_with_one_turned_bit_none_is_served(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    content, rng = os.urandom(2000), random.Random(7)
    sha256, _ = artifact_put_stream(BytesIO(content))
    flipping = Flipping(monkeypatch, times=0, rng=rng)
    served_wrong = healed = refused = 0
    for number in range(1000):
        flipping.left = rng.choice([1, 2, 99])
        damaged_each_time = flipping.left == 99
        try:
            with artifact_open(sha256) as stream:
                served_wrong += stream.read() != content
            healed += 1
            assert not damaged_each_time, number
        except ArtifactDamaged:
            refused += 1
            assert damaged_each_time, number
    assert served_wrong == 0
    assert healed > 500
    assert refused > 200


@pytest.mark.parametrize("times", [1, 2])
def test_bytes_damaged_on_their_way_are_fetched_again(
    times: int, tmp_path: Path, blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = fresh()
    sha256, _ = artifact_put_stream(BytesIO(content))
    Flipping(monkeypatch, times=times, rng=random.Random(times))
    artifact_download(sha256, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content


def test_wrong_bytes_of_the_right_size_are_healed_by_storing_again(blobs: Blobs) -> None:
    content = fresh()
    sha256, _ = artifact_put_stream(BytesIO(content))
    stored_path(sha256).write_bytes(os.urandom(5000))
    artifact_put_stream(BytesIO(content))
    with artifact_open(sha256) as stream:
        assert stream.read() == content


def test_a_row_knows_a_blob_before_its_first_byte(blobs: Blobs) -> None:
    known_at_write: list[bool] = []
    content = fresh()
    sha256 = hashlib.sha256(content).hexdigest()

    def look(point: str) -> None:
        if point == "blob.write:before":
            known_at_write.append(Artifact.objects.filter(pk=sha256, size_bytes=5000).exists())

    failpoints.install(look)
    try:
        artifact_put_stream(BytesIO(content))
    finally:
        failpoints.install(None)
    assert known_at_write == [True]


def test_a_full_disk_is_named_as_such_leaves_nothing_and_is_no_reason_to_try_again(blobs: Blobs) -> None:
    def full(point: str) -> None:
        if point == "blob.write:before":
            raise OSError(errno.ENOSPC, "No space left on device")

    before = blobs()
    failpoints.install(full)
    try:
        with pytest.raises(OSError, match="No space left") as caught:
            artifact_put_stream(BytesIO(fresh()))
    finally:
        failpoints.install(None)
    assert caught.value.errno == errno.ENOSPC
    assert not is_transient(caught.value)
    assert blobs() == before


def test_a_source_that_changes_while_it_is_stored_is_not_kept(tmp_path: Path, blobs: Blobs) -> None:
    source, before = tmp_path / "source", blobs()
    source.write_bytes(fresh())

    def change(point: str) -> None:
        if point == "blob.write:before":
            source.write_bytes(fresh())

    failpoints.install(change)
    try:
        with pytest.raises(ArtifactDamaged, match="changed while it was stored"):
            artifact_put(source)
    finally:
        failpoints.install(None)
    assert blobs() == before


def test_no_part_of_the_product_reads_blobs_past_the_verification() -> None:
    root = Path(__file__).resolve().parents[2]
    readers = {
        path.relative_to(root).as_posix()
        for folder in ("jobs", "lorasite", "gpu_worker")
        for path in (root / folder).rglob("*.py")
        if re.search(r"default_storage|client\.get_object\(|blob_store\(\)\.open", path.read_text())
    }
    assert readers == {"jobs/artifacts.py", "jobs/s3_storage.py"}


def in_cache(folder: Path, sha256: str) -> Path:
    return folder / sha256[:2] / sha256


@pytest.mark.parametrize("damage", ["cut", "flipped", "swapped"])
def test_a_cached_file_that_was_damaged_on_disk_is_fetched_again(damage: str, tmp_path: Path, blobs: Blobs) -> None:
    content = fresh()
    sha256, _ = artifact_put_stream(BytesIO(content))
    cache = NodeCache(FileCache(tmp_path, download=artifact_download))
    path = cache.get(sha256)
    if damage == "cut":
        os.truncate(path, 100)
    elif damage == "flipped":
        times = path.stat()
        path.write_bytes(bytes([content[0] ^ 4]) + content[1:])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the change hides its time; ctime tells
    else:
        (tmp_path / "other").write_bytes(os.urandom(5000))
        (tmp_path / "other").replace(path)
    assert cache.get(sha256).read_bytes() == content
    another_process = NodeCache(FileCache(tmp_path, download=artifact_download))
    in_cache(tmp_path, sha256).write_bytes(b"rotten")
    assert another_process.get(sha256).read_bytes() == content


def test_a_download_waits_for_a_store_in_trouble(tmp_path: Path, blobs: Blobs) -> None:
    sha256, _ = artifact_put_stream(BytesIO(fresh()))
    tries = 0

    def download(wanted: str, destination: Path) -> None:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise ConnectionResetError("reset by peer")
        artifact_download(wanted, destination)

    quick = partial(Backoff, first_seconds=0.01, cap_seconds=0.02)
    cache = NodeCache(FileCache(tmp_path, download=download), backoff=quick)
    cache.copy_to(sha256, tmp_path / "copy")
    assert tries == 4
    assert hashlib.sha256((tmp_path / "copy").read_bytes()).hexdigest() == sha256


def test_a_lost_lease_ends_the_wait_for_a_download(tmp_path: Path, blobs: Blobs) -> None:
    def download(*_: object) -> None:
        raise TimeoutError("silent")

    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked > 3:
            raise LeaseLost("another attempt holds the job")

    cache = NodeCache(FileCache(tmp_path, download=download), backoff=partial(Backoff, first_seconds=0.01))
    with pytest.raises(LeaseLost):
        cache.checking(check).get("a" * 64)


def test_a_spent_budget_gives_the_stores_own_error(tmp_path: Path, blobs: Blobs) -> None:
    def download(*_: object) -> None:
        raise TimeoutError("silent")

    quick = partial(Backoff, first_seconds=0.01, budget_seconds=0.1)
    with pytest.raises(TimeoutError, match="silent"):
        NodeCache(FileCache(tmp_path, download=download), backoff=quick).get("a" * 64)


def test_a_lost_blob_is_reported_at_once(tmp_path: Path, blobs: Blobs) -> None:
    with pytest.raises(ArtifactDamaged, match="not in the store"):
        NodeCache(FileCache(tmp_path, download=artifact_download)).get("d" * 64)
