"""Pictures come in by content, with a reason for each one left out, and nothing half-made."""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.urls import reverse
from PIL import Image
from pytest_django.fixtures import Settings
from rest_framework.test import APIClient

from jobs.artifacts import artifact_open
from jobs.errors import NotFound
from jobs.models import Dataset, DatasetImage, User
from jobs.uploads import FileRejected, dataset_images_upload, label_of
from tests.factories import make_dataset, picture_bytes, picture_file

Blobs = Callable[[], set[str]]


@pytest.fixture
def dataset(owner: User) -> Dataset:
    return make_dataset(owner, pictures=0)


def send(api: APIClient, dataset: Dataset, *files: SimpleUploadedFile) -> Any:
    return api.post(reverse("dataset-images", args=[dataset.pk]), {"files": list(files)}, format="multipart")


def png_header_of(width: int, height: int) -> bytes:
    """A PNG whose header promises a size; hardly any data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


BAD_FILES = {
    "text": (SimpleUploadedFile("cat.png", b"I am no picture"), "not a PNG, JPEG or WebP"),
    "empty": (SimpleUploadedFile("cat.png", b""), "empty (0 bytes)"),
    "huge": (SimpleUploadedFile("cat.png", png_header_of(30_000, 30_000)), "30000 x 30000|pixels is too large"),
    "cut": (SimpleUploadedFile("cat.png", picture_bytes(seed=1)[:900]), "damaged or cut off"),
    "svg": (SimpleUploadedFile("cat.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>"), "not a PNG"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_alone_is_400_with_a_sentence_and_leaves_nothing(
    kind: str, api: APIClient, dataset: Dataset, blobs: Blobs
) -> None:
    file, sentence = BAD_FILES[kind]
    file.seek(0)
    before = blobs()
    response = send(api, dataset, file)
    body = response.json()
    assert response.status_code == 400
    assert body["code"] == "invalid"
    assert any(part in body["fields"]["files"][0] for part in sentence.split("|")), body
    assert body["fields"]["files"][0].startswith("cat.")
    assert DatasetImage.objects.count() == 0
    assert blobs() == before


def test_good_files_are_kept_and_bad_ones_named(api: APIClient, dataset: Dataset, blobs: Blobs) -> None:
    before = blobs()
    bad = SimpleUploadedFile("notes.png", b"no picture")
    response = send(api, dataset, picture_file("a.png"), bad, picture_file("b.png"))
    body = response.json()
    assert response.status_code == 201
    assert [image["name"] for image in body["images"]] == ["a.png", "b.png"]
    assert [(file["name"], file["code"]) for file in body["rejected"]] == [("notes.png", "image_rejected")]
    rows = DatasetImage.objects.all()
    assert {f"sha256/{row.sha256[:2]}/{row.sha256}" for row in rows} == blobs() - before


def test_what_is_stored_is_an_upright_png_without_metadata(api: APIClient, dataset: Dataset) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    exif[0x010F] = "Camera of somebody"
    file = SimpleUploadedFile("photo.jpg", picture_bytes(size=(80, 48), kind="JPEG", exif=exif))
    image = send(api, dataset, file).json()["images"][0]
    assert (image["width"], image["height"]) == (48, 80)
    with artifact_open(image["sha256"]) as stream:
        raw = stream.read()
    stored = Image.open(BytesIO(raw))
    assert (stored.format, stored.mode, stored.size, dict(stored.getexif())) == ("PNG", "RGB", (48, 80), {})
    assert b"Camera" not in raw


def test_a_sidecar_captions_the_picture_of_its_stem(api: APIClient, dataset: Dataset) -> None:
    sidecar = SimpleUploadedFile("사과.txt", "\ufeffa red apple, 사과\r\n".encode())
    body = send(api, dataset, sidecar, picture_file("사과.png"), picture_file("pear.png")).json()
    assert {image["name"]: image["caption"] for image in body["images"]} == {
        "사과.png": "a red apple, 사과",
        "pear.png": "",
    }
    assert body["rejected"] == []


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"\xff\xfe\xfa", "invalid_caption"), (b"x" * 4001, "invalid_caption"), (b"a\x00b", "invalid_caption")],
)
def test_a_bad_sidecar_is_named_and_its_picture_kept(
    content: bytes, code: str, api: APIClient, dataset: Dataset
) -> None:
    body = send(api, dataset, SimpleUploadedFile("a.txt", content), picture_file("a.png")).json()
    assert [(file["name"], file["code"]) for file in body["rejected"]] == [("a.txt", code)]
    assert body["images"][0]["caption"] == ""


def test_a_sidecar_without_its_picture_is_rejected(api: APIClient, dataset: Dataset) -> None:
    response = send(api, dataset, SimpleUploadedFile("lonely.txt", b"a caption"))
    assert response.status_code == 400
    assert "lonely" in response.json()["fields"]["files"][0]


def test_the_same_picture_twice_is_rejected_the_second_time(api: APIClient, dataset: Dataset) -> None:
    content = picture_bytes()
    body = send(api, dataset, picture_file("a.png", content), picture_file("b.png", content)).json()
    assert [file["code"] for file in body["rejected"]] == ["duplicate"]
    again = send(api, dataset, picture_file("c.png", content))
    assert again.status_code == 400
    assert "already" in again.json()["message"]
    assert DatasetImage.objects.count() == 1


def test_a_file_over_the_cap_is_rejected_and_not_kept_whole(
    api: APIClient, dataset: Dataset, settings: Settings, blobs: Blobs
) -> None:
    settings.LORASITE = settings.LORASITE | {"UPLOAD_MAX_BYTES": 100_000}
    before = blobs()
    large = picture_file("large.png", picture_bytes(size=(400, 400)))
    body = send(api, dataset, large, picture_file("small.png")).json()
    assert [(file["name"], file["code"]) for file in body["rejected"]] == [("large.png", "file_too_large")]
    assert [image["name"] for image in body["images"]] == ["small.png"]
    assert len(blobs() - before) == 1


def test_a_request_over_the_total_is_413(api: APIClient, dataset: Dataset, settings: Settings) -> None:
    settings.LORASITE = settings.LORASITE | {"UPLOAD_MAX_BYTES": 2_000}
    response = send(api, dataset, *[picture_file() for _ in range(4)])
    assert (response.status_code, response.json()["code"]) == (413, "too_large")


def test_more_than_200_files_are_refused(api: APIClient, dataset: Dataset) -> None:
    response = send(api, dataset, *[SimpleUploadedFile(f"{n}.png", b"x") for n in range(201)])
    assert response.status_code == 400
    assert set(response.json()) == {"code", "message", "fields"}
    assert DatasetImage.objects.count() == 0


def test_unknown_parts_are_refused_by_name(api: APIClient, dataset: Dataset) -> None:
    url = reverse("dataset-images", args=[dataset.pk])
    response = api.post(url, {"files": [picture_file()], "folder": "/etc", "more": picture_file()}, format="multipart")
    assert response.status_code == 400
    assert set(response.json()["fields"]) == {"folder", "more"}
    assert DatasetImage.objects.count() == 0


def test_no_files_at_all_is_400(api: APIClient, dataset: Dataset) -> None:
    response = api.post(reverse("dataset-images", args=[dataset.pk]), {}, format="multipart")
    assert response.json()["fields"] == {"files": ["send at least one file as a part of this name"]}


def test_json_is_not_an_upload(api: APIClient, dataset: Dataset) -> None:
    response = api.post(reverse("dataset-images", args=[dataset.pk]), {"files": []}, format="json")
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("given", "kept"),
    [("../../etc/passwd.png", "passwd.png"), ("C:\\photos\\cat.png", "cat.png"), ("/abs/dog.png", "dog.png")],
)
def test_a_name_is_a_label_without_folders(given: str, kept: str) -> None:
    assert label_of(given) == kept


@pytest.mark.parametrize("given", ["", "..", "a\x00b.png", "a\nb.png", "x" * 256, None])
def test_a_name_that_is_none_is_refused(given: str | None) -> None:
    with pytest.raises(FileRejected) as refused:
        label_of(given)
    assert refused.value.code == "invalid_name"


def test_a_dataset_deleted_during_the_upload_gets_no_rows(owner: User, dataset: Dataset) -> None:
    Dataset.objects.filter(pk=dataset.pk).delete()
    with pytest.raises(NotFound, match="was deleted during the upload"):
        dataset_images_upload(dataset=dataset, owner=owner, files=[picture_file()])
    assert DatasetImage.objects.count() == 0


def test_a_caption_can_be_changed_and_a_picture_removed(api: APIClient, owner: User) -> None:
    image = make_dataset(owner, pictures=1).images.get()
    url = reverse("dataset-image", args=[image.pk])
    assert api.patch(url, {"caption": "a new one"}, format="json").json()["caption"] == "a new one"
    too_long = api.patch(url, {"caption": "x" * 4001}, format="json")
    assert set(too_long.json()["fields"]) == {"caption"}
    assert api.delete(url).status_code == 204
    assert api.get(url).status_code == 404
