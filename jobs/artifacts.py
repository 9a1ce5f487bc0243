"""Content-addressed storage of everything that jobs produce or people upload, through Django's storage API.

Nothing else builds storage paths. Bytes are hashed by us before they are stored and checked again on every way out.
"""

import hashlib
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import IO, BinaryIO

from django.core.files import File
from django.core.files.storage import default_storage

from jobs.errors import ArtifactDamaged
from jobs.models.record import SHA256_PATTERN

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
SPOOL_BYTES = 8 << 20  # verified reads stay in memory up to this size


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


def artifact_put_stream(stream: BinaryIO | IO[bytes]) -> tuple[str, int]:
    """Store bytes under their hash. Storing the same bytes twice is harmless.

    Returns:
        (sha256, size in bytes).
    """
    sha256, size = hash_stream(stream)
    name = artifact_name(sha256)
    if not _is_stored(name, size):
        if default_storage.exists(name):
            # A torn write of an earlier crash: the right bytes go in its place.
            logger.warning("artifact replaced name=%s reason=stored size differs", name)
            default_storage.delete(name)
        default_storage.save(name, File(stream, name=name))
        if not default_storage.exists(name):
            raise ArtifactDamaged(f"{name} was stored but is not there; look at the storage settings")
    return sha256, size


def artifact_put(path: Path) -> tuple[str, int]:
    """Store a file under its hash. Returns (sha256, size in bytes)."""
    with path.open("rb") as stream:
        return artifact_put_stream(stream)


def _is_stored(name: str, size: int) -> bool:
    try:
        return default_storage.exists(name) and default_storage.size(name) == size
    except FileNotFoundError:
        return False  # Removed between the two questions.


def artifact_open(sha256: str) -> IO[bytes]:
    """The bytes of a hash, verified before the first one is handed out. The caller closes the stream.

    Raises:
        ArtifactDamaged: The stored bytes are missing, or have another hash.
    """
    name = artifact_name(sha256)
    spool: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - handed to the caller
    try:
        with default_storage.open(name, "rb") as stored:
            digest = hashlib.sha256()
            while chunk := stored.read(CHUNK_BYTES):
                digest.update(chunk)
                spool.write(chunk)
    except FileNotFoundError as error:
        spool.close()
        raise ArtifactDamaged(f"artifact {sha256} is not in the store") from error
    if digest.hexdigest() != sha256:
        spool.close()
        raise ArtifactDamaged(f"artifact {sha256} holds bytes of another hash ({digest.hexdigest()}); restore a backup")
    spool.seek(0)
    return spool


def artifact_download(sha256: str, destination: Path) -> None:
    """Write the verified bytes of a hash to a file: temporary name, fsync, rename.

    Raises:
        ArtifactDamaged: As `artifact_open`.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    with artifact_open(sha256) as stream:
        handle, part = tempfile.mkstemp(prefix=".part-", dir=destination.parent)
        try:
            with os.fdopen(handle, "wb") as out:
                while chunk := stream.read(CHUNK_BYTES):
                    out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
            Path(part).replace(destination)
        finally:
            Path(part).unlink(missing_ok=True)
