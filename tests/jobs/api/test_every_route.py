"""Nobody reads or changes another person's rows: every route of the URLconf, every method, every kind of visitor."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from django.apps import apps
from django.forms.models import model_to_dict
from django.urls import URLPattern, reverse
from django.utils import timezone
from rest_framework.test import APIClient

from jobs.api.urls import v1
from jobs.models import ApiKey, Job, Style, User
from jobs.models.record import OwnedRecord
from jobs.previews import Preview, preview_write
from jobs.status import JobState
from tests.conftest import MakeClient
from tests.factories import (
    make_base_model,
    make_dataset,
    make_dataset_version,
    make_generation,
    make_input_image,
    make_job,
    make_lora,
    make_lora_import,
    make_training,
    picture_file,
)

METHODS = ("get", "head", "options", "post", "put", "patch", "delete")
ROUTES: dict[str, URLPattern] = {str(pattern.name): pattern for pattern in v1}
SHARED = {"base-models", "base-model"}
"""Rows without an owner: every account sees them, by design."""


@dataclass
class Home:
    """Everything that the owner has, under a name that nobody else uses."""

    owner: User
    ids: dict[str, dict[str, Any]]
    bodies: dict[str, Any]
    secrets: set[str]


@pytest.fixture
def home(owner: User) -> Home:
    base = make_base_model()
    dataset = make_dataset(owner, name="owners-dataset")
    image = dataset.images.all()[0]
    version = make_dataset_version(owner, dataset=dataset)
    run = make_training(owner, dataset_version=version, base_model=base, lora_name="owners-lora-name")
    lora = make_lora(owner, base_model=base, name="owners-lora")
    lora_version = lora.versions.get()
    generation = make_generation(owner, loras=[(lora_version, 0.5)])
    picture = generation.images.get()
    job = make_job(owner, base_model=base)
    running = make_job(owner, JobState.RUNNING, base_model=base)
    preview_write(job_id=running.pk, token=running.token, preview=Preview(step=3, jpeg=b"owners-look"))
    start = make_input_image(owner)
    imported = make_lora_import(owner, base_model=base, lora_name="owners-import")
    style = Style.objects.create(owner=owner, name="owners-style")
    ids: dict[str, dict[str, Any]] = {
        "base-model": {"base_model_id": base.pk},
        "dataset": {"dataset_id": dataset.pk},
        "dataset-images": {"dataset_id": dataset.pk},
        "dataset-preprocess": {"dataset_id": dataset.pk},
        "dataset-image": {"image_id": image.pk},
        "dataset-image-file": {"image_id": image.pk},
        "dataset-version": {"version_id": version.pk},
        "training": {"training_id": run.pk},
        "training-sample": {"training_id": run.pk, "sha256": run.samples[0]["sha256"]},
        "generation": {"generation_id": generation.pk},
        "input-image": {"image_id": start.pk},
        "input-image-file": {"image_id": start.pk},
        "style": {"style_id": style.pk},
        "job": {"job_id": job.pk},
        "job-preview": {"job_id": running.pk},
        "job-cancel": {"job_id": job.pk},
        "job-events": {"job_id": job.pk},
        "lora": {"lora_id": lora.pk},
        "lora-import": {"lora_import_id": imported.pk},
        "lora-version-file": {"version_id": lora_version.pk},
        "lora-version-peft": {"version_id": lora_version.pk},
        "lora-version-diffusers": {"version_id": lora_version.pk},
        "image": {"image_id": picture.pk},
        "image-file": {"image_id": picture.pk},
    }
    bodies = {
        "trainings": {"dataset_version": str(version.pk), "base_model": str(base.pk), "lora_name": "stolen"},
        "generations": {"base_model": str(base.pk), "prompt": "x", "loras": [{"lora": str(lora.pk)}]},
        "dataset-image": {"caption": "changed"},
        "lora": {"name": "changed"},
        "style": {"prompt": "changed"},
    }
    rows = [row for model in owned_models() for row in model.objects.filter(owner=owner)]
    secrets = {str(row.pk) for row in rows} | {"owners-dataset", "owners-lora", "owners-lora-name", image.sha256}
    secrets |= {"owners-import", imported.sha256}
    secrets |= {"owners-look", "owners-style", start.sha256}
    return Home(owner, ids, bodies, secrets)


def owned_models() -> Iterator[Any]:
    return (model for model in apps.get_app_config("jobs").get_models() if issubclass(model, OwnedRecord))


def everything(owner: User) -> str:
    """All rows of the owner, as text."""
    rows = [(m.__name__, model_to_dict(row)) for m in owned_models() for row in m.objects.filter(owner=owner)]
    return json.dumps(rows, default=str, sort_keys=True)


def visit(client: APIClient, home: Home, name: str, method: str) -> Any:
    url = reverse(name, kwargs=home.ids.get(name))
    if name in ("dataset-images", "input-images") and method == "post":
        return client.post(url, {"files": [picture_file()]}, format="multipart")
    if name == "lora-imports" and method == "post":
        return client.post(url, {"lora_name": "stolen", "file": picture_file()}, format="multipart")
    body = home.bodies.get(name, {}) if method in ("post", "put", "patch") else None
    return getattr(client, method)(url, body, format="json")


def content_of(response: Any) -> str:
    raw = b"".join(response.streaming_content) if response.streaming else response.content
    return str(raw.decode("latin-1")) + json.dumps(dict(response.headers))


def test_the_table_names_an_owned_row_for_every_route_with_an_id(home: Home) -> None:
    assert {name for name, pattern in ROUTES.items() if pattern.pattern.converters} == set(home.ids)


@pytest.mark.parametrize("name", ROUTES)
def test_without_a_valid_key_no_route_answers(
    name: str, home: Home, anonymous: APIClient, client_of: MakeClient
) -> None:
    revoked = client_of(home.owner)
    ApiKey.objects.filter(user=home.owner).update(revoked_at=timezone.now())
    before = everything(home.owner)
    for client in (anonymous, revoked):
        for method in METHODS:
            response = visit(client, home, name, method)
            assert response.status_code == 401, f"{method} {name}"
            assert response.headers["WWW-Authenticate"].startswith("Bearer"), f"{method} {name}"
            assert not [secret for secret in home.secrets if secret in content_of(response)], f"{method} {name}"
    assert everything(home.owner) == before


@pytest.mark.parametrize("name", ROUTES)
def test_a_stranger_and_staff_find_nothing_of_the_owner(
    name: str, home: Home, stranger: User, client_of: MakeClient
) -> None:
    before = everything(home.owner)
    staff = User.objects.create_superuser("staff")
    for visitor in (stranger, staff):
        client = client_of(visitor)
        for method in METHODS:
            response = visit(client, home, name, method)
            if name in home.ids and name not in SHARED:
                assert response.status_code in (404, 405), f"{method} {name}: {response.status_code}"
            else:
                assert response.status_code in (200, 201, 400, 404, 405), f"{method} {name}: {response.status_code}"
            content = content_of(response)
            sent = json.dumps(home.bodies.get(name, {})) if response.status_code == 404 else ""
            leaked = [secret for secret in home.secrets if secret in content and secret not in sent]
            url_ids = {str(value) for value in (home.ids.get(name) or {}).values()}
            assert not set(leaked) - url_ids, f"{method} {name}: {leaked}"
    assert everything(home.owner) == before
    assert not Job.objects.filter(owner__in=[stranger, staff]).exists()


def test_the_owner_reaches_every_route(home: Home, client_of: MakeClient) -> None:
    """The matrix above would also pass on a site that answers nobody."""
    client = client_of(home.owner)
    for name in ROUTES:
        method = "post" if name in ("dataset-preprocess", "job-cancel") else "get"
        assert visit(client, home, name, method).status_code in (200, 202), name


@pytest.mark.parametrize("state", JobState.values)
def test_a_job_in_any_state_is_the_owners_alone(
    state: str, owner: User, api: APIClient, stranger: User, client_of: MakeClient
) -> None:
    job = make_job(owner, JobState(state))
    url = reverse("job", args=[job.pk])
    assert api.get(url).json()["state"] == state
    assert client_of(stranger).get(url).status_code == 404


def test_a_public_lora_is_read_by_all_and_changed_by_its_owner_only(
    owner: User, teammate: User, api: APIClient, client_of: MakeClient
) -> None:
    lora = make_lora(owner, visibility="public", name="shared")
    url, reader = reverse("lora", args=[lora.pk]), client_of(teammate)
    assert reader.get(url).json()["name"] == "shared"
    assert [row["id"] for row in reader.get(reverse("loras")).json()["results"]] == [str(lora.pk)]
    assert reader.get(reverse("lora-version-file", args=[lora.versions.get().pk])).status_code == 200
    refused = reader.patch(url, {"name": "mine now"}, format="json")
    assert (refused.status_code, refused.json()["code"]) == (403, "permission_denied")
    assert reader.delete(url).status_code == 403
    lora.refresh_from_db()
    assert lora.name == "shared"
    assert api.patch(url, {"visibility": "private"}, format="json").json()["visibility"] == "private"
    assert reader.get(url).status_code == 404
