"""Artifacts in an S3-compatible store: never overwritten, checked by the server, no multipart left behind.

`jobs/artifacts.py` and `jobs/garbage.py` are the only callers; what they need of a store is `jobs.artifacts.BlobStore`.
"""

import base64
import hashlib
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

from botocore.config import Config
from botocore.exceptions import ClientError
from django.core.files.base import File
from storages.backends.s3 import S3Storage

from core.failpoints import side_effect

logger = logging.getLogger(__name__)

MULTIPART_FROM_BYTES = 64 << 20
"""Smaller blobs go out in one request from memory."""
PART_BYTES = 16 << 20
"""10,000 parts at most, so blobs of up to 160 GB."""
HEADS_AT_ONCE = 8

CONFIG = Config(
    connect_timeout=5,
    read_timeout=30,
    # One more try for a connection that died in the pool; longer waits are the caller's (`jobs/backoff.py`).
    retries={"total_max_attempts": 2, "mode": "standard"},
    max_pool_connections=16,
    # We hash by ourselves; servers that do not know the newer trailing checksums stay usable.
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
)


class S3ArtifactStorage(S3Storage):
    """django-storages' S3 with conditional writes, and reads that stream."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.client_config: Config = self.client_config.merge(CONFIG)

    @property
    def client(self) -> Any:
        """The thread's own S3 client."""
        return self.connection.meta.client

    def _open(self, name: str, mode: str = "rb") -> "File[Any]":
        """A stream of the bytes as they arrive; cannot seek."""
        try:
            answer = self.client.get_object(**self._where(name))
        except ClientError as error:
            if _status(error) == 404:
                raise FileNotFoundError(f"{name} is not in bucket {self.bucket_name}") from error
            raise
        return File(answer["Body"], name=name)

    def _save(self, name: str, content: "File[Any]") -> str:
        """Send the bytes, unless the name is taken: then they stay as they are."""
        try:
            self._send(name, content, IfNoneMatch="*")
        except ClientError as error:
            if _status(error) != 412:
                raise
            logger.info("blob is there already name=%s", name)
        return name

    def replace(self, name: str, content: "File[Any]") -> None:
        """Put the right bytes in the place of wrong ones, in one step."""
        self._send(name, content)

    def delete(self, name: str) -> None:
        """Remove a blob; not an error when it is gone."""
        with side_effect("s3.delete"):
            self.client.delete_object(**self._where(name))

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of each name that is there."""
        names, client = list(names), self.client  # clients may be shared between threads, sessions may not

        def size(name: str) -> int | None:
            try:
                return int(client.head_object(**self._where(name))["ContentLength"])
            except ClientError as error:
                if _status(error) == 404:
                    return None
                raise

        if len(names) == 1:
            found: Iterable[int | None] = [size(names[0])]
        else:
            with ThreadPoolExecutor(HEADS_AT_ONCE) as pool:
                found = list(pool.map(size, names))
        return {name: size for name, size in zip(names, found, strict=True) if size is not None}

    def names_after(self, after: str, limit: int) -> list[tuple[str, int]]:
        """At most `limit` (name, bytes) of `sha256/...`, in order, from the first one behind `after`."""
        root = self._normalize_name("")
        found: list[tuple[str, int]] = []
        while len(found) < limit:
            page = self.client.list_objects_v2(
                Bucket=self.bucket_name,
                Prefix=self._normalize_name("sha256/"),
                MaxKeys=min(1000, limit - len(found)),
                **({"StartAfter": self._normalize_name(found[-1][0] if found else after)} if found or after else {}),
            )
            found += [(entry["Key"].removeprefix(root), int(entry["Size"])) for entry in page.get("Contents", ())]
            if not page.get("IsTruncated") or not page.get("Contents"):
                break
        return found

    def leftovers_remove(self, older_than_seconds: float, limit: int) -> int:
        """Abort at most `limit` multipart uploads that began so long ago. Returns how many."""
        removed, oldest = 0, datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        pages = self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket_name)
        for upload in (upload for page in pages for upload in page.get("Uploads", ())):
            if removed >= limit:
                break
            if upload["Initiated"] < oldest and upload["Key"].startswith(self._normalize_name("sha256/")):
                self._abort(upload["Key"], upload["UploadId"])
                removed += 1
        return removed

    def _where(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket_name, "Key": self._normalize_name(name)}

    def _send(self, name: str, content: "File[Any]", **condition: str) -> None:
        if content.size >= MULTIPART_FROM_BYTES:
            self._send_in_parts(name, content, condition)
            return
        body = b"".join(content.chunks())
        with side_effect("s3.put"):
            self.client.put_object(
                Body=body,
                ContentType="application/octet-stream",
                **self._where(name),
                **_checksums(body),
                **condition,
            )

    def _send_in_parts(self, name: str, content: "File[Any]", condition: dict[str, str]) -> None:
        with side_effect("s3.multipart_begin"):
            upload_id = self.client.create_multipart_upload(
                ContentType="application/octet-stream", ChecksumAlgorithm="SHA256", **self._where(name)
            )["UploadId"]
        completed = False
        try:
            parts = []
            for number, body in enumerate(content.chunks(PART_BYTES), 1):
                with side_effect("s3.multipart_part"):
                    checksums = _checksums(body)
                    answer = self.client.upload_part(
                        Body=body, PartNumber=number, UploadId=upload_id, **self._where(name), **checksums
                    )
                checksums.pop("ContentMD5")
                parts.append({"ETag": answer["ETag"], "PartNumber": number, **checksums})
            with side_effect("s3.multipart_complete"):
                self.client.complete_multipart_upload(
                    MultipartUpload={"Parts": parts}, UploadId=upload_id, **self._where(name), **condition
                )
            completed = True
        finally:
            if not completed:
                self._abort_quietly(name, upload_id)

    def _abort(self, key: str, upload_id: str) -> None:
        with side_effect("s3.multipart_abort"):
            self.client.abort_multipart_upload(Bucket=self.bucket_name, Key=key, UploadId=upload_id)

    def _abort_quietly(self, name: str, upload_id: str) -> None:
        """The error that broke the upload off is the one to report; what stays is swept after a day."""
        try:
            self._abort(self._where(name)["Key"], upload_id)
        except Exception:
            logger.warning("multipart not aborted name=%s upload_id=%s", name, upload_id, exc_info=True)


def _checksums(body: bytes) -> dict[str, str]:
    """Two of them: some servers check only the older one, some only the newer."""
    return {
        "ChecksumSHA256": base64.b64encode(hashlib.sha256(body).digest()).decode(),
        "ContentMD5": base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode(),
    }


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
