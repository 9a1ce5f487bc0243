"""The auditor's own reader of the artifact store: an S3 bucket through boto3, or a folder. Writes nothing."""

from pathlib import Path
from typing import Protocol

from tests.services import S3


class Blobs(Protocol):
    """Reads one blob by its hash."""

    def read(self, sha256: str) -> bytes | None:
        """The stored bytes; None when there are none."""


def _name(sha256: str) -> str:
    return f"sha256/{sha256[:2]}/{sha256}"


class FolderBlobs:
    """Artifacts under a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, sha256: str) -> bytes | None:
        """As `Blobs.read`."""
        path = self._folder / _name(sha256)
        return path.read_bytes() if path.is_file() else None


class S3Blobs:
    """Artifacts in a bucket, past the fault proxy."""

    def __init__(self, s3: S3) -> None:
        import boto3
        from botocore.config import Config

        self._bucket = s3.bucket
        self._client = boto3.client(
            "s3",
            endpoint_url=s3.endpoint_url,
            aws_access_key_id=s3.access_key,
            aws_secret_access_key=s3.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 5}),
        )

    def read(self, sha256: str) -> bytes | None:
        """As `Blobs.read`."""
        from botocore.exceptions import ClientError

        try:
            content: bytes = self._client.get_object(Bucket=self._bucket, Key=_name(sha256))["Body"].read()
        except ClientError as error:
            if error.response["Error"]["Code"] in ("NoSuchKey", "404"):
                return None
            raise
        return content
