"""Ten times too much: every request is accepted or told when to come back, and is accepted then."""

import json
import re
from typing import Any

import pytest
from django.core.cache import cache
from django.test import Client
from django.urls import reverse
from pytest_django.fixtures import Settings
from rest_framework.test import APIClient

from jobs.models import BaseModel, Job, User
from jobs.status import JobState
from tests.conftest import MakeClient
from tests.factories import bring_to, make_base_model, make_dataset, make_dataset_version
from tests.jobs.test_submission import at_once

LIMIT = 4


@pytest.fixture(autouse=True)
def _small_limits(settings: Settings) -> None:
    cache.clear()
    settings.LORASITE = {**settings.LORASITE, "MAX_QUEUED_JOBS_PER_PERSON": LIMIT, "MAX_QUEUED_JOBS": 2 * LIMIT}


def generate(api: APIClient, base: BaseModel, number: int, **body: Any) -> Any:
    body = {"base_model": base.name, "prompt": f"picture {number}", **body}
    headers = {"Idempotency-Key": f"request-{number}"}
    return api.post(reverse("generations"), body, format="json", headers=headers)


def check_refusal(response: Any, code: str) -> None:
    """The one error shape and a whole number of seconds."""
    body = response.json()
    assert (response.status_code, body["code"], body["fields"]) == (429, code, {})
    assert re.fullmatch(r"[1-9]\d*", response["Retry-After"])
    assert int(response["Retry-After"]) <= 3600
    assert "again" in body["message"] and str(LIMIT) in body["message"]


def test_ten_times_the_limit_is_refused_politely_and_accepted_after_draining(api: APIClient) -> None:
    base = make_base_model()
    answers = {number: generate(api, base, number) for number in range(10 * LIMIT)}
    assert sorted({answer.status_code for answer in answers.values()}) == [202, 429]
    open_requests = [number for number, answer in answers.items() if answer.status_code == 429]
    assert len(open_requests) == 9 * LIMIT
    for number in open_requests:
        check_refusal(answers[number], "too_many_jobs")
    while open_requests:
        for job in Job.objects.filter(state=JobState.QUEUED):
            bring_to(job, JobState.SUCCEEDED)
        again = {number: generate(api, base, number) for number in open_requests[:LIMIT]}
        assert {answer.status_code for answer in again.values()} == {202}
        open_requests = open_requests[LIMIT:]
    assert Job.objects.count() == 10 * LIMIT, "each request made its job, and none twice"


def test_a_full_site_refuses_everybody_with_a_code_of_its_own(
    owner: User, teammate: User, stranger: User, client_of: MakeClient
) -> None:
    base = make_base_model()
    for person in (owner, teammate):
        for number in range(LIMIT):
            assert generate(client_of(person), base, number).status_code == 202
    response = generate(client_of(stranger), base, 1)
    assert (response.status_code, response.json()["code"]) == (429, "queue_full")
    assert int(response["Retry-After"]) >= 1


def test_every_post_that_starts_a_job_is_limited(api: APIClient, owner: User) -> None:
    base, version, dataset = make_base_model(), make_dataset_version(owner), make_dataset(owner)
    for number in range(LIMIT):
        assert generate(api, base, number).status_code == 202
    training = {"dataset_version": str(version.pk), "base_model": base.name, "lora_name": "ink"}
    for response in (
        generate(api, base, 99),
        api.post(reverse("trainings"), training, format="json"),
        api.post(reverse("dataset-preprocess", args=[dataset.pk]), {}, format="json"),
    ):
        check_refusal(response, "too_many_jobs")


def test_a_repeated_request_is_answered_with_its_job_while_everything_else_is_refused(api: APIClient) -> None:
    base = make_base_model()
    first = [generate(api, base, number).json()["id"] for number in range(LIMIT)]
    assert [generate(api, base, number).json()["id"] for number in range(LIMIT)] == first
    assert generate(api, base, LIMIT).status_code == 429


def test_cancelling_makes_room_at_once(api: APIClient) -> None:
    base = make_base_model()
    first, *_ = [generate(api, base, number).json() for number in range(LIMIT)]
    assert generate(api, base, 50).status_code == 429
    assert api.post(reverse("job-cancel", args=[first["id"]])).status_code == 200
    assert generate(api, base, 50).status_code == 202


@pytest.mark.django_db(transaction=True)
def test_requests_at_once_are_accepted_up_to_the_limit_and_none_fails(client_of: MakeClient) -> None:
    owner, base = User.objects.create_user("hurried"), make_base_model()
    api = client_of(owner)
    credentials = api._credentials
    numbers = iter(range(1000))

    def post() -> int:
        own = APIClient(raise_request_exception=False)
        own.credentials(**credentials)
        return int(generate(own, base, next(numbers)).status_code)

    assert sorted(at_once(10 * LIMIT, post)) == [202] * LIMIT + [429] * 9 * LIMIT


def test_a_job_says_how_long_it_will_probably_take(api: APIClient) -> None:
    job = generate(api, make_base_model(), 1, steps=10, count=2).json()
    assert job["estimated_seconds"] == pytest.approx(64 * 64 * 10 * 2 * 2 / 1e6 * 0.2)


def test_one_request_that_asks_for_too_much_is_told_the_budget(api: APIClient) -> None:
    response = generate(api, make_base_model(), 1, width=2048, height=2048, steps=150, count=64)
    assert (response.status_code, response.json()["code"]) == (400, "invalid")
    assert "one request may have 1000" in response.json()["message"]
    assert not Job.objects.exists()


@pytest.mark.parametrize("prompt", ["a\0b", "a\u009fb", "x" * 4001])
def test_prompts_that_are_no_text_are_refused_by_field(prompt: str, api: APIClient) -> None:
    response = generate(api, make_base_model(), 1, prompt=prompt)
    assert response.status_code == 400
    assert set(response.json()["fields"]) == {"prompt"}


def test_prompts_are_stored_composed(api: APIClient) -> None:
    assert generate(api, make_base_model(), 1, prompt="cafe\u0301").status_code == 202
    assert Job.objects.get().spec["prompt"] == "caf\u00e9"


def test_the_document_says_429_with_its_header_wherever_a_job_starts() -> None:
    document = json.loads(Client().get("/api/schema/", {"format": "json"}).content)
    starts = {
        path: operation["responses"]
        for path, operations in document["paths"].items()
        for operation in operations.values()
        if "202" in operation["responses"]
    }
    assert {path.rstrip("/").rpartition("/")[2] for path in starts} == {
        "generations",
        "lora-imports",
        "preprocess",
        "trainings",
    }
    for responses in starts.values():
        header = responses["429"]["headers"]["Retry-After"]["schema"]
        assert header == {"type": "integer", "minimum": 1, "maximum": 3600}
    others = [
        operation
        for operations in document["paths"].values()
        for operation in operations.values()
        if "202" not in operation["responses"] and "429" in operation["responses"]
    ]
    assert not others
