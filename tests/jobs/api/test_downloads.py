"""Files leave verified, under a fixed type and a safe name, and never as somebody else's bytes."""

import hashlib
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.files.storage import default_storage
from django.urls import reverse
from PIL import Image
from rest_framework.test import APIClient, APIRequestFactory

from jobs.api.files import ArtifactResponse, artifact_response, safe_filename
from jobs.artifacts import artifact_name
from jobs.models import User
from tests.factories import make_dataset, make_generation, make_lora, make_training, store_bytes


def body_of(response: Any) -> bytes:
    return b"".join(response.streaming_content)


def damage(sha256: str) -> Path:
    """Flip one byte of a stored artifact; its length stays."""
    path = Path(default_storage.path(artifact_name(sha256)))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))
    return path


def test_a_lora_file_is_an_attachment_named_after_it(api: APIClient, owner: User) -> None:
    version = make_lora(owner, name="ink: sketch/한글").versions.get()
    response = api.get(reverse("lora-version-file", args=[version.pk]))
    raw = body_of(response)
    assert hashlib.sha256(raw).hexdigest() == version.kohya_sha256
    assert response["Content-Length"] == str(version.kohya_size_bytes) == str(len(raw))
    assert response["Content-Type"] == "application/octet-stream"
    assert response["X-Content-Type-Options"] == "nosniff"
    assert response["Content-Disposition"].startswith("attachment; filename*=utf-8''ink_%20sketch_%ED%95%9C")
    assert response["Content-Disposition"].endswith("-v1.safetensors")
    assert response["ETag"] == f'"{version.kohya_sha256}"'
    assert response["Cache-Control"] == "private, max-age=31536000, immutable"


def test_the_peft_folder_comes_as_a_zip_with_the_very_bytes(api: APIClient, owner: User) -> None:
    version = make_lora(owner).versions.get()
    url = reverse("lora-version-peft", args=[version.pk])
    first, second = api.get(url), api.get(url)
    raw = body_of(first)
    with zipfile.ZipFile(BytesIO(raw)) as archive:
        hashes = {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}
    assert hashes == version.peft_files
    assert raw == body_of(second)
    assert first["Content-Type"] == "application/zip"
    assert api.get(url, headers={"If-None-Match": first["ETag"]}).status_code == 304


@pytest.mark.parametrize("kind", ["dataset-image-file", "image-file", "training-sample"])
def test_pictures_come_as_png(kind: str, api: APIClient, owner: User) -> None:
    if kind == "dataset-image-file":
        image = make_dataset(owner, pictures=1).images.get()
        args: list[Any] = [image.pk]
    elif kind == "image-file":
        args = [make_generation(owner).images.get().pk]
    else:
        run = make_training(owner)
        args = [run.pk, run.samples[0]["sha256"]]
    response = api.get(reverse(kind, args=args), headers={"Accept": "image/png"})
    assert response["Content-Type"] == "image/png"
    assert response["Content-Disposition"].startswith("inline; filename=")
    assert Image.open(BytesIO(body_of(response))).size == (64, 64)


def test_a_client_that_has_the_bytes_gets_304_without_any(api: APIClient, owner: User) -> None:
    image = make_generation(owner).images.get()
    url = reverse("image-file", args=[image.pk])
    response = api.get(url, headers={"If-None-Match": f'W/"other", "{image.sha256}"'})
    assert (response.status_code, response.content, response["ETag"]) == (304, b"", f'"{image.sha256}"')
    assert api.get(url, headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize("route", ["lora-version-file", "lora-version-peft"])
def test_damaged_bytes_are_never_sent(route: str, api: APIClient, owner: User) -> None:
    version = make_lora(owner).versions.get()
    damage(version.kohya_sha256)
    damage(version.peft_files["adapter_model.safetensors"])
    response = api.get(reverse(route, args=[version.pk]))
    assert response.status_code == 500
    assert response.json()["code"] == "artifact_damaged"
    assert "Traceback" not in response.content.decode()


def test_missing_bytes_say_so(api: APIClient, owner: User) -> None:
    image = make_dataset(owner, pictures=1).images.get()
    default_storage.delete(artifact_name(image.sha256))
    response = api.get(reverse("dataset-image-file", args=[image.pk]))
    assert (response.status_code, response.json()["code"]) == (500, "artifact_damaged")


def test_only_a_runs_own_samples_are_served(api: APIClient, owner: User) -> None:
    run, other = make_training(owner), make_training(owner)
    for sha256 in (other.samples[0]["sha256"], "0" * 64, "..%2F..%2Fetc", "x"):
        assert api.get(reverse("training-sample", args=[run.pk, sha256])).status_code == 404


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("../../etc/passwd", "_.._etc_passwd"),
        ('a"b\r\nSet-Cookie: x', "a_b__Set-Cookie_ x"),
        ("\u202egnp.exe", "_gnp.exe"),
        ("...", "file"),
        ("한글 lora", "한글 lora"),
    ],
)
def test_download_names_are_only_names(given: str, kept: str) -> None:
    assert safe_filename(given) == kept


def test_an_asgi_server_gets_the_file_in_pieces(db: None) -> None:
    content = bytes(range(256)) * 4096
    sha256, _ = store_bytes(content)
    request = APIRequestFactory().get("/")
    response = artifact_response(request, sha256, content_type="image/png", filename="x.png")
    assert isinstance(response, ArtifactResponse)

    async def collect() -> list[bytes]:
        return [piece async for piece in response]

    pieces = async_to_sync(collect)()
    assert b"".join(pieces) == content
    assert [len(piece) for piece in pieces] == [ArtifactResponse.block_size] * 4
