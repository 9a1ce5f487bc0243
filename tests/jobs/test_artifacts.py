"""The store: bytes under their hash, verified on every way out, in real files."""

import hashlib
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from django.core.files.storage import default_storage

from jobs.artifacts import artifact_download, artifact_name, artifact_open, artifact_put, artifact_put_stream
from jobs.errors import ArtifactDamaged

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
