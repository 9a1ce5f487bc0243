"""Every error has one JSON shape, and tells no tracebacks."""

import json
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.urls import reverse
from pytest_django.fixtures import Settings
from rest_framework.test import APIClient

from jobs.models import Dataset, Job, User
from tests.factories import make_base_model, make_dataset, make_job, make_lora

DATASETS, GENERATIONS = "/api/v1/datasets/", "/api/v1/generations/"


def shape(response: Any) -> tuple[int, str, dict[str, list[str]]]:
    """(status, code, fields) of an error in the one shape."""
    body = response.json()
    assert set(body) == {"code", "message", "fields"}, body
    assert isinstance(body["message"], str) and body["message"]
    assert "Traceback" not in response.content.decode()
    return response.status_code, body["code"], body["fields"]


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"name": "x", "color": 1, "_connector": "OR"}, {"color", "_connector"}),
        ({}, {"name"}),
        ({"name": ""}, {"name"}),
        ({"name": "x" * 101}, {"name"}),
        ({"name": "a\u0007b"}, {"name"}),
        ({"name": ["x"]}, {"name"}),
        ({"name": None}, {"name"}),
        ([], {"body"}),
        ("text", {"body"}),
    ],
)
def test_wrong_bodies_are_400_and_name_their_fields(body: Any, fields: set[str], api: APIClient) -> None:
    status, code, named = shape(api.post(DATASETS, body, format="json"))
    assert (status, code, set(named)) == (400, "invalid", fields)
    assert not Dataset.objects.exists()


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"steps": 0, "width": 7}, {"steps", "width"}),
        ({"color": "red"}, {"color"}),
        ({"prompt": "x" * 4001}, {"prompt"}),
        ({"prompt": "a\u0000b"}, {"prompt"}),
        ({"loras": [{"lora": "no id", "weigth": 1}]}, {"loras.0.lora", "loras.0.weigth"}),
        ({"seed": 2**63 - 1, "count": 2}, {"body"}),
        ({"guidance": "much"}, {"guidance"}),
    ],
)
def test_wrong_settings_are_400_and_name_their_fields(change: dict[str, Any], fields: set[str], api: APIClient) -> None:
    body = {"base_model": make_base_model().name, "prompt": "x"} | change
    status, code, named = shape(api.post(GENERATIONS, body, format="json"))
    assert (status, code, set(named)) == (400, "invalid_config", fields)
    assert not Job.objects.exists()


@pytest.mark.parametrize(
    "raw",
    [b"{", b"\xff\xfe", b'{"name": NaN}', b"[" * 100_000, b'{"name": ' + b"9" * 10_000 + b"}"],
    ids=["cut", "bytes", "nan", "nested", "digits"],
)
@pytest.mark.parametrize("url", [DATASETS, GENERATIONS])
def test_what_is_not_json_is_400(raw: bytes, url: str, api: APIClient) -> None:
    status, _, _ = shape(api.post(url, raw, content_type="application/json"))
    assert status == 400


def test_lone_surrogates_are_refused_before_the_database_sees_them(api: APIClient) -> None:
    base = make_base_model()
    for url, raw in (
        (DATASETS, b'{"name": "\\ud800"}'),
        (GENERATIONS, json.dumps({"base_model": base.name, "prompt": "\ud800"}).encode()),
    ):
        assert shape(api.post(url, raw, content_type="application/json"))[0] == 400


def test_a_chunked_body_is_refused_instead_of_taken_for_an_empty_one(api: APIClient) -> None:
    response = api.post(DATASETS, headers={"Transfer-Encoding": "chunked"})
    assert shape(response)[:2] == (400, "parse_error")
    assert "Content-Length" in response.json()["message"]


def test_a_body_that_is_too_large_is_413(api: APIClient, settings: Settings) -> None:
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 1000
    for url in (DATASETS, GENERATIONS):
        assert shape(api.post(url, {"name": "x" * 2000}, format="json"))[:2] == (413, "too_large")


def test_the_rest_of_the_protocol_has_the_same_shape(
    api: APIClient, anonymous: APIClient, owner: User, settings: Settings
) -> None:
    assert shape(anonymous.get(DATASETS))[:2] == (401, "not_authenticated")
    assert shape(api.put(DATASETS, {}, format="json"))[:2] == (405, "method_not_allowed")
    assert shape(api.post(DATASETS, "a=1", content_type="text/csv"))[:2] == (415, "unsupported_media_type")
    assert shape(api.get("/api/v1/datasets/00000000-0000-0000-0000-000000000000/"))[:2] == (404, "not_found")
    assert shape(api.get("/api/v1/no-such-thing/"))[:2] == (404, "not_found")
    assert shape(api.get("/api/v1/datasets/not-an-id/"))[:2] == (404, "not_found")
    assert shape(api.get(DATASETS, {"cursor": "garbage"}))[:2] == (404, "not_found")
    assert shape(api.get("/api/v1/jobs/", {"state": "asleep"}))[:2] == (400, "invalid")
    assert shape(api.get("/api/v1/dataset-versions/", {"dataset": "x"}))[:2] == (400, "invalid")
    settings.ALLOWED_HOSTS = ["elsewhere"]
    assert shape(api.get(DATASETS))[:2] == (400, "bad_request")


def test_a_cursor_of_foreign_making_never_reaches_the_database(api: APIClient, owner: User) -> None:
    make_dataset(owner, pictures=0)
    for cursor in ("cD1ub3QtYS1kYXRl", "cD05OTk5LTk5LTk5", "cD0lMDA="):  # p=not-a-date, p=9999-99-99, p=%00
        assert shape(api.get(DATASETS, {"cursor": cursor}))[:2] == (404, "not_found")


def test_undeclared_filters_do_nothing(api: APIClient, owner: User) -> None:
    make_dataset(owner, pictures=0)
    query = {"_connector": "OR 1=1", "owner__password__startswith": "x", "owner": "x", "format": "xml"}
    for name in ("datasets", "jobs", "loras", "images", "trainings", "generations", "dataset-versions"):
        assert api.get(reverse(name), query).status_code == 200, name


def test_a_surprise_is_500_without_its_traceback(api: APIClient, owner: User) -> None:
    job = make_job(owner)
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE jobs_jobevent RENAME TO lost_table")  # rolled back with the test
    response = api.get(reverse("job-events", args=[job.pk]))
    assert shape(response) == (500, "internal", {})
    assert "jobs_jobevent" not in response.content.decode()


def test_pages_outside_the_api_keep_djangos_answers(client: Client, db: None) -> None:
    response = client.get("/no-such-page")
    assert response.status_code == 404
    assert response["Content-Type"].startswith("text/html")


def test_changing_a_lora_to_a_taken_name_is_409(api: APIClient, owner: User) -> None:
    make_lora(owner, name="taken", versions=0)
    lora = make_lora(owner, name="mine", versions=0)
    url = reverse("lora", args=[lora.pk])
    assert shape(api.patch(url, {"name": "taken"}, format="json"))[:2] == (409, "conflict")
    assert shape(api.patch(url, {"owner": "x"}, format="json")) == (
        400,
        "invalid",
        {"owner": ["unknown field; known are: name, trigger_word, visibility"]},
    )
    lora.refresh_from_db()
    assert lora.name == "mine"
