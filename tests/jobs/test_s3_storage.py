"""Artifacts in a real S3 server (SeaweedFS): never overwritten, nothing torn kept, no multipart left behind."""

import hashlib
import os
import threading
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
from botocore.exceptions import ClientError
from django.core.files.base import ContentFile
from django.core.files.storage import storages
from django.test import override_settings

from core import failpoints
from jobs import s3_storage
from jobs.artifacts import artifact_name, artifact_open, artifact_put_stream, artifacts_pin
from jobs.backoff import is_transient
from jobs.errors import ArtifactDamaged, ArtifactMissing
from jobs.models import Artifact
from jobs.s3_storage import MULTIPART_FROM_BYTES, PART_BYTES, S3ArtifactStorage
from tests.services import S3, free_ports, seaweedfs

pytestmark = pytest.mark.django_db


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with seaweedfs(tmp_path_factory.mktemp("s3")) as s3:
        yield s3


def options(server: S3) -> dict[str, Any]:
    return {
        "bucket_name": server.bucket,
        "endpoint_url": server.endpoint_url,
        "region_name": "us-east-1",
        "access_key": server.access_key,
        "secret_key": server.secret_key,
        "signature_version": "s3v4",
        "addressing_style": "path",
    }


@pytest.fixture
def store(server: S3) -> Iterator[S3ArtifactStorage]:
    """The server as the site's artifact store, empty."""
    backend = {"BACKEND": "jobs.s3_storage.S3ArtifactStorage", "OPTIONS": options(server)}
    with override_settings(STORAGES={"default": backend}):
        storage = storages["default"]
        assert isinstance(storage, S3ArtifactStorage)
        for name, _ in storage.names_after("", 10_000):
            storage.delete(name)
        yield storage


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multipart from 6 MiB in parts of 5 MiB, the least that S3 allows."""
    monkeypatch.setattr(s3_storage, "MULTIPART_FROM_BYTES", 6 << 20)
    monkeypatch.setattr(s3_storage, "PART_BYTES", 5 << 20)


@pytest.fixture
def points() -> Iterator[list[str]]:
    """Names of the store calls of this test; removes any hook afterwards."""
    seen: list[str] = []
    failpoints.install(lambda point: seen.append(point) if point.endswith(":after") else None)
    yield seen
    failpoints.install(None)


def multiparts(store: S3ArtifactStorage) -> list[dict[str, Any]]:
    return list(store.client.list_multipart_uploads(Bucket=store.bucket_name).get("Uploads", []))


def read(sha256: str) -> bytes:
    with artifact_open(sha256) as stream:
        return stream.read()


def test_bytes_come_back_and_are_sent_once(store: S3ArtifactStorage, points: list[str]) -> None:
    content = os.urandom(100_000)
    sha256, size = artifact_put_stream(BytesIO(content))
    assert (read(sha256), size) == (content, 100_000)
    artifact_put_stream(BytesIO(content))
    assert points.count("s3.put:after") == 1
    assert store.names_after("", 10) == [(artifact_name(sha256), 100_000)]


def test_a_blob_that_is_there_is_never_overwritten(store: S3ArtifactStorage) -> None:
    name = artifact_name(hashlib.sha256(b"x").hexdigest())
    store.save(name, ContentFile(b"first"))
    store.save(name, ContentFile(b"other"))
    with store.open(name, "rb") as stream:
        assert stream.read() == b"first"


@pytest.mark.usefixtures("small_parts")
def test_a_large_blob_that_is_there_is_never_overwritten_and_leaves_no_multipart(store: S3ArtifactStorage) -> None:
    name, first = artifact_name(hashlib.sha256(b"y").hexdigest()), os.urandom(7 << 20)
    store.save(name, ContentFile(first))
    store.save(name, ContentFile(os.urandom(7 << 20)))
    with store.open(name, "rb") as stream:
        assert stream.read() == first
    assert multiparts(store) == []


@pytest.mark.parametrize("size", [1000, 7 << 20], ids=["one request", "multipart"])
@pytest.mark.usefixtures("small_parts")
def test_eight_publishers_of_the_same_bytes_make_one_blob(store: S3ArtifactStorage, size: int) -> None:
    content, errors = os.urandom(size), list[Exception]()
    name = artifact_name(hashlib.sha256(content).hexdigest())
    together = threading.Barrier(8)

    def publish() -> None:
        together.wait()
        try:
            store.save(name, ContentFile(content))
        except ClientError as error:
            if not is_transient(error):  # 409: two completed at the same moment; the caller tries again
                errors.append(error)

    publishers = [threading.Thread(target=publish) for _ in range(8)]
    for publisher in publishers:
        publisher.start()
    for publisher in publishers:
        publisher.join()
    assert errors == []
    assert store.names_after("", 10) == [(name, size)]
    with store.open(name, "rb") as stream:
        assert stream.read() == content
    assert multiparts(store) == []


@pytest.mark.parametrize("torn", [b"", b"half", None], ids=["empty", "cut", "same size"])
def test_wrong_bytes_in_the_place_are_replaced_by_storing_again(store: S3ArtifactStorage, torn: bytes | None) -> None:
    content = os.urandom(5000)
    sha256 = hashlib.sha256(content).hexdigest()
    store.save(artifact_name(sha256), ContentFile(os.urandom(5000) if torn is None else torn))
    with pytest.raises(ArtifactDamaged):
        artifact_open(sha256)
    artifact_put_stream(BytesIO(content))
    assert read(sha256) == content


def test_the_server_refuses_bytes_that_changed_on_their_way(store: S3ArtifactStorage) -> None:
    def change(params: dict[str, Any], **_: Any) -> None:
        params["body"] = BytesIO(b"Y" + params["body"].read()[1:])

    store.client.meta.events.register("before-call.s3.PutObject", change)
    try:
        with pytest.raises(ClientError) as caught:
            artifact_put_stream(BytesIO(b"X" * 1000))
    finally:
        store.client.meta.events.unregister("before-call.s3.PutObject", change)
    assert is_transient(caught.value)
    assert store.names_after("", 10) == []


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("point", ["s3.multipart_part:after", "s3.multipart_complete:before"])
def test_an_upload_that_breaks_off_leaves_neither_blob_nor_multipart(store: S3ArtifactStorage, point: str) -> None:
    def fail(reached: str) -> None:
        if reached == point:
            raise ConnectionResetError("the network went away")

    failpoints.install(fail)
    try:
        with pytest.raises(ConnectionResetError):
            artifact_put_stream(BytesIO(os.urandom(7 << 20)))
    finally:
        failpoints.install(None)
    assert store.names_after("", 10) == []
    assert multiparts(store) == []


@pytest.mark.usefixtures("small_parts")
def test_a_source_that_changes_while_it_is_sent_is_not_kept(store: S3ArtifactStorage) -> None:
    class Changing(BytesIO):
        reads = 0

        def seek(self, *where: int) -> int:
            Changing.reads += 1
            if Changing.reads == 3:  # hashed and rewound; now it is sent
                self.getbuffer()[6 << 20] ^= 1
            return super().seek(*where)

    with pytest.raises(ArtifactDamaged, match="changed while it was stored"):
        artifact_put_stream(Changing(os.urandom(7 << 20)))
    assert store.names_after("", 10) == []
    assert multiparts(store) == []


def test_multiparts_of_dead_workers_are_aborted_once_they_are_old(store: S3ArtifactStorage) -> None:
    name = artifact_name("a" * 64)
    for _ in range(50):
        upload = store.client.create_multipart_upload(Bucket=store.bucket_name, Key=name)
        store.client.upload_part(
            Bucket=store.bucket_name, Key=name, UploadId=upload["UploadId"], PartNumber=1, Body=b"part"
        )
    assert store.leftovers_remove(3600, 100) == 0
    assert len(multiparts(store)) == 50
    assert store.leftovers_remove(-5, 30) == 30
    assert store.leftovers_remove(-5, 30) == 20
    assert multiparts(store) == []


def test_a_listing_goes_on_where_the_last_page_ended(store: S3ArtifactStorage) -> None:
    names = sorted(artifact_name(hashlib.sha256(bytes([i])).hexdigest()) for i in range(7))
    for name in names:
        store.save(name, ContentFile(b"z"))
    first = store.names_after("", 3)
    second = store.names_after(first[-1][0], 3)
    third = store.names_after(second[-1][0], 3)
    assert [name for name, _ in first + second + third] == names
    assert store.names_after(names[-1], 3) == []


def test_sizes_tell_what_is_there(store: S3ArtifactStorage) -> None:
    there = [artifact_put_stream(BytesIO(os.urandom(10 + i))) for i in range(12)]
    names = {artifact_name(sha256): size for sha256, size in there}
    assert store.sizes([*names, artifact_name("b" * 64)]) == names


def test_references_are_pinned_only_while_the_server_has_the_bytes(store: S3ArtifactStorage) -> None:
    sha256, _ = artifact_put_stream(BytesIO(b"pinned"))
    artifacts_pin([sha256])
    store.delete(artifact_name(sha256))
    assert Artifact.objects.filter(pk=sha256).exists()
    with pytest.raises(ArtifactMissing):
        artifacts_pin([sha256])


def test_a_missing_blob_is_damage_and_a_silent_server_is_a_reason_to_wait(store: S3ArtifactStorage, server: S3) -> None:
    with pytest.raises(ArtifactDamaged, match="not in the store"):
        artifact_open("c" * 64)
    (port,) = free_ports(1)
    away = S3ArtifactStorage(**(options(server) | {"endpoint_url": f"http://127.0.0.1:{port}"}))
    for call in (
        lambda: away.sizes(["sha256/aa/x"]),
        lambda: away.save("x", ContentFile(b"x")),
        lambda: away.open("x"),
    ):
        with pytest.raises(Exception) as caught:
            call()
        assert is_transient(caught.value)


def test_the_client_gives_up_soon_and_leaves_waiting_to_the_caller(store: S3ArtifactStorage) -> None:
    config = store.client.meta.config
    assert (config.connect_timeout, config.read_timeout) == (5, 30)
    assert config.retries["total_max_attempts"] == 2
    assert config.s3["addressing_style"] == "path"
    assert PART_BYTES < MULTIPART_FROM_BYTES
