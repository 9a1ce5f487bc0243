"""What lists and details say: jobs in every state, filters, pages, and how many queries they cost."""

from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from pytest_django import DjangoAssertNumQueries
from rest_framework.test import APIClient

from jobs.models import Dataset, Job, Lora, User
from jobs.status import JobState
from tests.factories import (
    add_lora_version,
    bring_to,
    make_base_model,
    make_dataset,
    make_dataset_version,
    make_generation,
    make_job,
    make_lora,
    make_training,
)


def test_a_failed_job_says_why_but_shows_no_traceback(api: APIClient, owner: User) -> None:
    job = make_job(owner, JobState.FAILED)
    response = api.get(reverse("job", args=[job.pk]))
    body = response.json()
    assert body["error"] == {"code": "nan", "message": "The loss became NaN."}
    assert "secret" not in response.content.decode()
    attempt = body["attempts"][0]
    assert (attempt["number"], attempt["outcome"]) == (1, "failed")
    assert attempt["ended_at"] is not None


def test_progress_is_steps_and_percent(api: APIClient, owner: User) -> None:
    job = make_job(owner, JobState.RUNNING)
    Job.objects.filter(pk=job.pk).update(progress_step=5, progress_total=20, stage="training", figures={"loss": 0.5})
    body = api.get(reverse("job", args=[job.pk])).json()
    assert body["progress"] == {"step": 5, "total": 20, "percent": 25}
    assert (body["stage"], body["figures"], body["error"], body["result"]) == ("training", {"loss": 0.5}, None, None)


def test_each_kind_of_job_points_to_what_came_out(api: APIClient, owner: User) -> None:
    version, generation = make_dataset_version(owner), make_generation(owner)
    run = make_training(owner)
    lora = make_lora(owner, base_model=run.base_model, versions=0)
    lora_version = add_lora_version(lora, number=1, training_run=run)
    bring_to(run.job, JobState.SUCCEEDED)
    for job, kind, row_id in (
        (version.job, "dataset_version", version.pk),
        (generation.job, "generation", generation.pk),
        (run.job, "lora_version", lora_version.pk),
    ):
        result = api.get(reverse("job", args=[job.pk])).json()["result"]
        assert (result["type"], result["id"]) == (kind, str(row_id))
        assert api.get(result["url"]).status_code == 200
    training = api.get(reverse("training", args=[run.pk])).json()
    assert training["lora_version"] == str(lora_version.pk)
    assert training["losses"] == [0.5, 0.25]
    assert api.get(training["samples"][0]["url"]).status_code == 200


def test_jobs_are_filtered_by_kind_and_state(api: APIClient, owner: User) -> None:
    version = make_dataset_version(owner)
    waiting = make_job(owner)
    url = reverse("jobs")

    def ids(**query: str) -> set[str]:
        return {row["id"] for row in api.get(url, query).json()["results"]}

    assert ids(state="queued") == {str(waiting.pk)}
    assert ids(kind="preprocess") == {str(version.job_id)}
    assert ids(kind="preprocess", state="queued") == set()
    assert ids() == {str(waiting.pk), str(version.job_id)}


def test_versions_are_filtered_by_dataset(api: APIClient, owner: User) -> None:
    version = make_dataset_version(owner)
    make_dataset_version(owner)
    rows = api.get(reverse("dataset-versions"), {"dataset": str(version.dataset_id)}).json()["results"]
    assert [row["id"] for row in rows] == [str(version.pk)]
    assert (rows[0]["ready"], rows[0]["image_count"], rows[0]["manifest_hash"]) == (True, 2, version.manifest_hash)


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING])
def test_cancel_ends_a_waiting_job_and_asks_a_running_one(state: JobState, api: APIClient, owner: User) -> None:
    job = make_job(owner, state)
    response = api.post(reverse("job-cancel", args=[job.pk]))
    assert response.status_code == 200
    body = response.json()
    if state == JobState.QUEUED:
        assert (body["state"], body["finished_at"] is None) == ("cancelled", False)
    else:
        assert (body["state"], body["cancel_requested_at"] is None) == ("running", False)


def test_cancelling_an_ended_job_is_409(api: APIClient, owner: User) -> None:
    job = make_job(owner, JobState.SUCCEEDED)
    response = api.post(reverse("job-cancel", args=[job.pk]))
    assert (response.status_code, response.json()["code"]) == (409, "conflict")


def test_events_are_told_in_order(api: APIClient, owner: User) -> None:
    job = make_job(owner, JobState.SUCCEEDED)
    url: str | None = reverse("job-events", args=[job.pk]) + "?page_size=1"
    states = []
    while url:
        page = api.get(url).json()
        states += [event["new_state"] for event in page["results"]]
        url = page["next"]
    assert states == ["queued", "running", "uploading", "succeeded"]


def test_pages_show_every_row_once_while_rows_are_added(api: APIClient, owner: User) -> None:
    names = [f"d{number}" for number in range(7)]
    for name in names:
        Dataset.objects.create(owner=owner, name=name)
    url: str | None = reverse("datasets") + "?page_size=3"
    seen: list[str] = []
    while url:
        page = api.get(url).json()
        seen += [row["name"] for row in page["results"]]
        Dataset.objects.create(owner=owner, name=f"late {len(seen)}")
        url = page["next"]
    assert seen == names[::-1]


def test_lists_cost_the_same_queries_for_one_row_and_for_many(
    api: APIClient, owner: User, django_assert_num_queries: DjangoAssertNumQueries
) -> None:
    def fill() -> None:
        version = make_dataset_version(owner)
        make_training(owner, dataset_version=version)
        lora = make_lora(owner)
        make_generation(owner, loras=[(lora.versions.get(), 1.0)], count=2)
        make_job(owner, JobState.FAILED)

    names = ["base-models", "datasets", "dataset-versions", "trainings", "generations", "jobs", "loras", "images"]
    fill()
    for name in names:  # the first use of the key writes
        api.get(reverse(name))
    costs = {}
    for name in names:
        with CaptureQueriesContext(connection) as queries:
            api.get(reverse(name))
        costs[name] = len(queries)
    for _ in range(3):
        fill()
    for name, cost in costs.items():
        with django_assert_num_queries(cost):
            body = api.get(reverse(name)).json()
        assert len(body["results"]) >= 4, name
    assert max(costs.values()) <= 8


def test_lists_never_read_manifests_losses_or_tracebacks(api: APIClient, owner: User) -> None:
    make_training(owner)
    for name in ("jobs", "trainings"):
        with CaptureQueriesContext(connection) as queries:
            api.get(reverse(name))
        text = " ".join(query["sql"] for query in queries.captured_queries)
        for column in ("error_traceback", '"manifest"', '"losses"'):
            assert column not in text, (name, column)


def test_base_models_tell_facts_and_readiness_to_everybody(api: APIClient) -> None:
    ready, raw = make_base_model(), make_base_model(ready=False)
    rows = {row["name"]: row for row in api.get(reverse("base-models")).json()["results"]}
    assert (rows[ready.name]["ready"], rows[ready.name]["facts"]["bucket_step_px"]) == (True, 16)
    assert (rows[raw.name]["ready"], rows[raw.name]["facts"], rows[raw.name]["state"]) == (False, None, None)


def test_a_dataset_is_made_listed_and_deleted(api: APIClient) -> None:
    made = api.post(reverse("datasets"), {"name": "  apples  "}, format="json")
    body = made.json()
    assert (made.status_code, body["name"], body["image_count"], body["versions"]) == (201, "apples", 0, [])
    taken = api.post(reverse("datasets"), {"name": "apples"}, format="json")
    assert (taken.status_code, taken.json()["code"]) == (409, "conflict")
    url = reverse("dataset", args=[body["id"]])
    assert api.get(url).json() == body
    assert api.delete(url).status_code == 204
    assert not Dataset.objects.exists()


def test_a_dataset_in_use_is_kept(api: APIClient, owner: User) -> None:
    trained = make_training(owner).dataset_version.dataset
    preparing = make_dataset_version(owner, ready=False).dataset
    for dataset, word in ((trained, "training"), (preparing, "being prepared")):
        response = api.delete(reverse("dataset", args=[dataset.pk]))
        assert response.status_code == 409
        assert word in response.json()["message"]
    assert Dataset.objects.count() == 2


def test_a_dataset_counts_its_pictures_and_names_its_versions(api: APIClient, owner: User) -> None:
    dataset = make_dataset(owner, pictures=3)
    for _ in range(2):
        make_dataset_version(owner, dataset=dataset)
    body = api.get(reverse("dataset", args=[dataset.pk])).json()
    assert body["image_count"] == 3
    assert [(version["number"], version["ready"]) for version in body["versions"]] == [(2, True), (1, True)]


def test_a_lora_in_use_is_kept_and_another_is_deleted(api: APIClient, owner: User) -> None:
    used, free = make_lora(owner), make_lora(owner)
    make_generation(owner, loras=[(used.versions.get(), 1.0)])
    refused: Any = api.delete(reverse("lora", args=[used.pk]))
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert api.delete(reverse("lora", args=[free.pk])).status_code == 204
    assert list(Lora.objects.all()) == [used]


def test_a_generated_picture_can_be_removed(api: APIClient, owner: User) -> None:
    generation = make_generation(owner, count=2)
    first = generation.images.order_by("number")[0]
    url = reverse("image", args=[first.pk])
    assert api.get(url).json()["seed"] == 0
    assert api.delete(url).status_code == 204
    assert len(api.get(reverse("generation", args=[generation.pk])).json()["images"]) == 1
