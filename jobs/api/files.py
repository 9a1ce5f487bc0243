"""How stored bytes leave: verified before the first one is sent, under a fixed content type and a safe name."""

import tempfile
import unicodedata
import zipfile
from collections.abc import AsyncIterator
from typing import IO, cast

from asgiref.sync import sync_to_async
from django.http import FileResponse, HttpResponse, HttpResponseBase
from django.utils.http import parse_etags
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiResponse
from rest_framework.request import Request

from core.config import canonical_json_hash
from jobs.artifacts import CHUNK_BYTES, SPOOL_BYTES, artifact_open

PNG = "image/png"
SAFETENSORS = "application/octet-stream"
ZIP = "application/zip"

# Old, but the ZIP format can say nothing older; equal files give equal archives.
ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def file_responses(content_type: str, description: str) -> dict[object, object]:
    """What the OpenAPI document says of a download."""
    return {
        (200, content_type): OpenApiResponse(OpenApiTypes.BINARY, description=description),
        304: OpenApiResponse(description="You have these bytes (If-None-Match)."),
    }


class ArtifactResponse(FileResponse):
    """A file response that an ASGI server sends in pieces; Django's own would first read it all into memory."""

    block_size = 256 * 1024

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Pieces of `block_size` bytes, read off the event loop."""
        read = sync_to_async(cast(IO[bytes], self.file_to_stream).read)
        while piece := await read(self.block_size):
            yield piece


def artifact_response(
    request: Request, sha256: str, *, content_type: str, filename: str, attachment: bool = False
) -> HttpResponseBase:
    """The verified bytes of a hash, or 304 where the client has them.

    Raises:
        ArtifactDamaged: The stored bytes are missing or wrong; nothing of them is sent.
    """
    if _has(request, sha256):
        return _immutable(HttpResponse(status=304), sha256)
    stream = artifact_open(sha256)
    response = ArtifactResponse(
        stream, content_type=content_type, filename=safe_filename(filename), as_attachment=attachment
    )
    return _immutable(response, sha256)


def archive_response(request: Request, files: dict[str, str], *, filename: str) -> HttpResponseBase:
    """A ZIP of {file name: sha256}, each file verified.

    Raises:
        ArtifactDamaged: A stored file is missing or wrong; nothing is sent.
    """
    tag = canonical_json_hash(files)
    if _has(request, tag):
        return _immutable(HttpResponse(status=304), tag)
    response = ArtifactResponse(_archive(files), content_type=ZIP, filename=safe_filename(filename), as_attachment=True)
    return _immutable(response, tag)


def safe_filename(name: str) -> str:
    """A download name that is only a name: no folders, control characters or characters that file systems refuse."""
    kept = "".join(
        "_" if character in '/\\:*?"<>|' or unicodedata.category(character) in ("Cc", "Cf", "Cs") else character
        for character in name
    )
    return kept.lstrip(". ")[-200:] or "file"


def _has(request: Request, tag: str) -> bool:
    known = parse_etags(request.headers.get("If-None-Match", ""))
    return "*" in known or f'"{tag}"' in known or f'W/"{tag}"' in known


def _immutable(response: HttpResponseBase, tag: str) -> HttpResponseBase:
    response["ETag"] = f'"{tag}"'
    response["Cache-Control"] = "private, max-age=31536000, immutable"
    response["X-Content-Type-Options"] = "nosniff"
    return response


def _archive(files: dict[str, str]) -> IO[bytes]:
    spool: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - handed to the response
    try:
        with zipfile.ZipFile(spool, "w", zipfile.ZIP_STORED) as archive:
            for name, sha256 in sorted(files.items()):
                entry = zipfile.ZipInfo(safe_filename(name), ZIP_DATE)
                with artifact_open(sha256) as stream, archive.open(entry, "w") as out:
                    while piece := stream.read(CHUNK_BYTES):
                        out.write(piece)
    except BaseException:
        spool.close()
        raise
    spool.seek(0)
    return spool
