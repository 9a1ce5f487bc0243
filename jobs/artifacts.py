"""Content-addressed storage of everything that jobs produce or people upload, through Django's storage API.

Nothing else builds storage paths. A row knows each blob before its bytes are stored (`jobs/models/artifact.py`), and
the bytes are hashed by us before they are stored and on every way out.
"""

import hashlib
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, TypeVar, cast

from django.core.files import File
from django.core.files.storage import default_storage
from django.db import connection
from django.db.models.functions import Now

from core.failpoints import side_effect
from jobs.errors import ArtifactDamaged, ArtifactMissing
from jobs.models import Artifact
from jobs.models.record import SHA256_PATTERN

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

CHUNK_BYTES = 1 << 20
SPOOL_BYTES = 8 << 20
"""Verified reads stay in memory up to this size, and a blob that is there already is read back up to it."""
READS = 3
"""Bytes that come with another hash are read again: most often they were damaged on their way."""


class BlobStore(Protocol):
    """What artifacts need of a storage class. Names are hashes, so equal names mean equal bytes."""

    def save(self, name: str, content: "File[Any]") -> str: ...
    def replace(self, name: str, content: "File[Any]") -> None: ...
    def open(self, name: str, mode: str) -> "File[Any]": ...
    def delete(self, name: str) -> None: ...
    def sizes(self, names: Iterable[str]) -> dict[str, int]: ...
    def names_after(self, after: str, limit: int) -> list[tuple[str, int]]: ...
    def leftovers_remove(self, older_than_seconds: float, limit: int) -> int: ...


def blob_store() -> BlobStore:
    """The configured store."""
    return cast(BlobStore, default_storage)


def artifact_name(sha256: str) -> str:
    """Storage name of a hash.

    Raises:
        ValueError: Not 64 lowercase hex digits. A name never comes from anywhere else, so nothing can point outside.
    """
    if not re.fullmatch(SHA256_PATTERN, sha256):
        raise ValueError(f"{sha256!r:.80} is not a SHA-256 in lowercase hex")
    return f"sha256/{sha256[:2]}/{sha256}"


def hash_stream(stream: BinaryIO | IO[bytes]) -> tuple[str, int]:
    """(sha256, size in bytes) of a stream from its beginning; leaves it rewound."""
    stream.seek(0)
    digest, size = hashlib.sha256(), 0
    while chunk := stream.read(CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    stream.seek(0)
    return digest.hexdigest(), size


class _Hashed(File):  # type: ignore[type-arg]
    """A file whose chunks must add up to the hash that it was announced with."""

    def __init__(self, stream: BinaryIO | IO[bytes], sha256: str, size: int) -> None:
        super().__init__(stream, name=artifact_name(sha256))
        self.stream, self.sha256, self.size = stream, sha256, size

    def chunks(self, chunk_size: int | None = None) -> Iterator[bytes]:
        self.stream.seek(0)
        digest = hashlib.sha256()
        while chunk := self.stream.read(chunk_size or CHUNK_BYTES):
            digest.update(chunk)
            yield chunk
        if digest.hexdigest() != self.sha256:
            raise ArtifactDamaged(f"the source of {self.sha256} changed while it was stored; nothing was kept")


def artifact_put_stream(stream: BinaryIO | IO[bytes]) -> tuple[str, int]:
    """Store bytes under their hash, in one try. Storing the same bytes twice is harmless.

    Returns:
        (sha256, size in bytes).

    Raises:
        ArtifactMissing: The blob vanished while it was stored: try again.
        ArtifactDamaged: The stream changed under our hands, or the store keeps other bytes than it was given.
        OSError, ClientError: Of the store; `jobs.backoff.is_transient` says whether to try again.
    """
    sha256, size = hash_stream(stream)
    artifact_announce(sha256, size)
    blob_write(stream, sha256, size)
    return sha256, size


def artifact_put(path: Path) -> tuple[str, int]:
    """Store a file under its hash, as `artifact_put_stream`. Returns (sha256, size in bytes)."""
    with path.open("rb") as stream:
        return artifact_put_stream(stream)


def artifact_announce(sha256: str, size: int) -> None:
    """Make the blob known, or renew it; waits while the same blob is being removed."""
    with side_effect("artifact.announce"):
        Artifact.objects.bulk_create(
            [Artifact(sha256=sha256, size_bytes=size, put_at=Now())],
            update_conflicts=True,
            unique_fields=["sha256"],
            update_fields=["put_at", "size_bytes"],
        )


def blob_write(stream: BinaryIO | IO[bytes], sha256: str, size: int) -> None:
    """Bring announced bytes into the store; what lies there torn or wrong is replaced. Raises as the put functions."""
    store, name = blob_store(), artifact_name(sha256)
    content = _Hashed(stream, sha256, size)
    found = store.sizes([name]).get(name)
    if found == size and (size > SPOOL_BYTES or _has_hash(name, sha256)):
        return
    if found is None:
        with side_effect("artifact.store"):
            store.save(name, content)
    else:
        logger.warning("artifact replaced name=%s stored_bytes=%d right_bytes=%d", name, found, size)
        with side_effect("artifact.heal"):
            store.replace(name, content)
    found = store.sizes([name]).get(name)
    if found not in (None, size):
        # Somebody's torn blob came between the question and our conditional write.
        store.replace(name, content)
        found = store.sizes([name]).get(name)
    if found is None:
        raise ArtifactMissing(f"{name} was stored but is not there: removed meanwhile, or look at the storage settings")
    if found != size:
        raise ArtifactDamaged(f"{name} has {found} bytes in the store instead of {size}; look at the storage settings")


def artifacts_pin(shas: Iterable[str]) -> None:
    """Call inside the transaction that records references, before it writes them: until it ends no sweep removes these.

    Locks the rows in one order, asks the store for every blob (one request each), and renews them.

    Raises:
        ArtifactMissing: One is unknown or not in the store: roll back, store the bytes again, then record again.
    """
    if not connection.in_atomic_block:
        raise RuntimeError("artifacts_pin needs the transaction that records the references")
    wanted = sorted(set(shas))
    if not wanted:
        return
    with side_effect("artifact.pin"):
        rows = Artifact.objects.select_for_update().filter(pk__in=wanted).order_by("pk")
        known = dict(rows.values_list("pk", "size_bytes"))
        # Under the lock, since a row alone proves nothing: another writer may have announced it and died.
        stored = blob_store().sizes(artifact_name(sha256) for sha256 in known)
        missing = [sha256 for sha256 in wanted if stored.get(artifact_name(sha256), -1) != known.get(sha256, -2)]
        if missing:
            raise ArtifactMissing(f"{len(missing)} of {len(wanted)} artifacts must be stored again, first {missing[0]}")
        Artifact.objects.filter(pk__in=wanted).update(put_at=Now())


def artifact_open(sha256: str) -> IO[bytes]:
    """The bytes of a hash, verified before the first one is handed out. The caller closes the stream.

    Raises:
        ArtifactDamaged: The stored bytes are missing, or have another hash each time that they are read.
    """
    name = artifact_name(sha256)
    for number in range(1, READS + 1):
        spool: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - handed to the caller
        try:
            found = _copy(name, spool)
        except BaseException as error:
            spool.close()
            if isinstance(error, FileNotFoundError):
                raise ArtifactDamaged(f"artifact {sha256} is not in the store") from error
            raise
        if found == sha256:
            spool.seek(0)
            return spool
        spool.close()
        logger.error("artifact read with another hash sha256=%s found=%s read=%d of %d", sha256, found, number, READS)
    raise ArtifactDamaged(f"artifact {sha256} holds bytes of another hash ({found}); restore a backup")


def artifact_begin(sha256: str, read: Callable[[IO[bytes], int], Result]) -> Result:
    """What `read` makes of the first bytes of a blob and its size, which are NOT verified: the rest stays in the store.

    For headers that a strict parser judges and whose numbers decide nothing but whether a file fits. All other reads
    take `artifact_open` or `artifact_download`.

    Raises:
        ArtifactMissing: The store does not have it.
    """
    name = artifact_name(sha256)
    size = blob_store().sizes([name]).get(name)
    if size is None:
        raise ArtifactMissing(f"blob {sha256[:12]} is not in the store: store it again")
    with blob_store().open(name, "rb") as stream:
        return read(stream, size)


def artifact_download(sha256: str, destination: Path) -> str:
    """Write the bytes of a hash to a file that nobody else knows, hashed on their way; the caller makes them durable.

    Returns:
        The hash of what was written: `sha256`.

    Raises:
        ArtifactDamaged: As `artifact_open`.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        for number in range(1, READS + 1):
            with side_effect("download.write"), destination.open("wb") as out:
                found = _copy(artifact_name(sha256), out)
            if found == sha256:
                return found
            logger.error(
                "artifact read with another hash sha256=%s found=%s read=%d of %d", sha256, found, number, READS
            )
    except BaseException as error:
        _drop(destination)
        if isinstance(error, FileNotFoundError):
            raise ArtifactDamaged(f"artifact {sha256} is not in the store") from error
        raise
    _drop(destination)
    raise ArtifactDamaged(f"artifact {sha256} holds bytes of another hash ({found}); restore a backup")


def _drop(part: Path) -> None:
    with side_effect("download.part_remove"):
        part.unlink(missing_ok=True)


def _copy(name: str, spool: IO[bytes]) -> str:
    """Read a blob once into a file; returns the hash of what came."""
    digest = hashlib.sha256()
    with blob_store().open(name, "rb") as stored:
        while chunk := stored.read(CHUNK_BYTES):
            digest.update(chunk)
            spool.write(chunk)
    return digest.hexdigest()


def _has_hash(name: str, sha256: str) -> bool:
    try:
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as spool:
            return _copy(name, spool) == sha256
    except FileNotFoundError:
        return False  # Removed between the two questions.
