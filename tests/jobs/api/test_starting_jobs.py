"""POSTs that start work: 202 with a job to poll, or a refusal that leaves nothing behind."""

from typing import Any
from uuid import uuid4

import pytest
from django.urls import reverse
from rest_framework.test import APIClient

from jobs.models import DatasetVersion, GenerationLora, GenerationRequest, Job, JobEvent, TrainingRun, User
from tests.factories import (
    add_lora_version,
    make_base_model,
    make_dataset,
    make_dataset_version,
    make_lora,
)


def rows() -> list[int]:
    models: list[Any] = [Job, JobEvent, TrainingRun, GenerationRequest, GenerationLora, DatasetVersion]
    return [model.objects.count() for model in models]


def generate(api: APIClient, **body: Any) -> Any:
    return api.post(reverse("generations"), {"prompt": "a red apple", **body}, format="json")


def train(api: APIClient, **body: Any) -> Any:
    return api.post(reverse("trainings"), {"lora_name": "ink", **body}, format="json")


def test_preprocessing_answers_202_with_the_job_and_its_address(api: APIClient, owner: User) -> None:
    dataset = make_dataset(owner)
    response = api.post(reverse("dataset-preprocess", args=[dataset.pk]), {"resolution": 64}, format="json")
    job = response.json()
    assert response.status_code == 202
    assert response["Location"] == job["url"] == f"/api/v1/jobs/{job['id']}/"
    assert (job["kind"], job["state"], job["result"]) == ("preprocess", "queued", None)
    assert Job.objects.get().spec["resolution"] == 64
    version = api.get(job["request"]["url"]).json()
    assert (version["number"], version["ready"], version["dataset"]) == (1, False, str(dataset.pk))
    assert version["job"]["id"] == job["id"]


def test_preprocessing_without_a_body_takes_the_defaults(api: APIClient, owner: User) -> None:
    response = api.post(reverse("dataset-preprocess", args=[make_dataset(owner).pk]))
    assert response.status_code == 202


def test_a_dataset_without_pictures_is_not_ready(api: APIClient, owner: User) -> None:
    url = reverse("dataset-preprocess", args=[make_dataset(owner, pictures=0).pk])
    before = rows()
    response = api.post(url, {}, format="json")
    assert (response.status_code, response.json()["code"]) == (409, "not_ready")
    assert rows() == before


@pytest.mark.parametrize("by", ["id", "name"])
def test_a_training_names_its_base_by_id_or_name(by: str, api: APIClient, owner: User) -> None:
    version, base = make_dataset_version(owner), make_base_model()
    chosen = str(base.pk) if by == "id" else base.name
    response = train(api, dataset_version=version.pk, base_model=chosen, config={"steps": 3})
    assert response.status_code == 202
    training = api.get(response.json()["request"]["url"]).json()
    assert training["base_model"] == {"id": str(base.pk), "name": base.name}
    assert (training["dataset_version"], training["lora_name"]) == (str(version.pk), "ink")
    assert (training["config"]["steps"], training["config"]["rank"]) == (3, 16)
    assert (training["losses"], training["samples"], training["lora_version"]) == ([], [], None)


def test_a_training_refuses_what_is_not_ready(api: APIClient, owner: User) -> None:
    waiting, ready = make_dataset_version(owner, ready=False), make_dataset_version(owner)
    base, raw = make_base_model(), make_base_model(ready=False)
    before = rows()
    for version, model in ((waiting, base), (ready, raw)):
        response = train(api, dataset_version=version.pk, base_model=model.name)
        assert (response.status_code, response.json()["code"]) == (409, "not_ready")
    assert rows() == before


def test_a_training_refuses_unknown_and_foreign_rows_by_id(api: APIClient, owner: User, teammate: User) -> None:
    foreign, mine, base = make_dataset_version(teammate), make_dataset_version(owner), make_base_model()
    before = rows()
    unknown = uuid4()
    for body, named in (
        ({"dataset_version": foreign.pk, "base_model": base.name}, str(foreign.pk)),
        ({"dataset_version": unknown, "base_model": base.name}, str(unknown)),
        ({"dataset_version": mine.pk, "base_model": "no-such-base"}, "no-such-base"),
    ):
        response = train(api, **body)
        assert (response.status_code, response.json()["code"]) == (404, "not_found")
        assert named in response.json()["message"]
    assert rows() == before


def test_a_trainings_wrong_settings_are_named_below_config(api: APIClient, owner: User) -> None:
    version, base = make_dataset_version(owner), make_base_model()
    before = rows()
    response = train(
        api, dataset_version=version.pk, base_model=base.name, config={"rank": 0, "optimizer": "x"}, extra=1
    )
    assert response.status_code == 400
    assert set(response.json()["fields"]) == {"config.rank", "config.optimizer", "extra"}
    assert rows() == before


def test_clip_skip_beyond_the_bases_layers_is_refused(api: APIClient, owner: User) -> None:
    version, base = make_dataset_version(owner), make_base_model()
    before = rows()
    responses = [
        generate(api, base_model=base.name, clip_skip=5),
        train(api, dataset_version=version.pk, base_model=base.name, config={"clip_skip": 5}),
    ]
    assert [(r.status_code, r.json()["code"]) for r in responses] == [(400, "invalid")] * 2
    assert rows() == before


def test_zero_terminal_snr_is_refused_for_a_base_that_predicts_noise(api: APIClient, owner: User) -> None:
    version, base = make_dataset_version(owner), make_base_model()
    before = rows()
    response = train(api, dataset_version=version.pk, base_model=base.name, config={"zero_terminal_snr": True})
    assert (response.status_code, response.json()["code"]) == (400, "invalid")
    assert "predict v" in str(response.json())
    assert rows() == before


def test_a_generation_takes_the_bases_native_size_and_its_loras(api: APIClient, owner: User) -> None:
    lora = make_lora(owner, versions=2)
    old, new = lora.versions.order_by("number")
    response = generate(
        api, base_model=lora.base_model.name, loras=[{"lora": lora.pk, "weight": 0.5}, {"lora": old.pk}]
    )
    assert response.status_code == 202, response.json()
    generation = api.get(response.json()["request"]["url"]).json()
    assert [(use["lora_version"], use["number"], use["weight"]) for use in generation["loras"]] == [
        (str(new.pk), 2, 0.5),
        (str(old.pk), 1, 1.0),
    ]
    assert (generation["config"]["width"], generation["config"]["height"]) == (64, 64)
    assert [use["sha256"] for use in generation["config"]["loras"]] == [new.kohya_sha256, old.kohya_sha256]


def test_a_public_lora_of_somebody_else_may_be_used(api: APIClient, teammate: User) -> None:
    lora = make_lora(teammate, visibility="public")
    assert generate(api, base_model=lora.base_model.name, loras=[{"lora": lora.pk}]).status_code == 202


def test_a_private_lora_of_somebody_else_does_not_exist(api: APIClient, teammate: User) -> None:
    lora = make_lora(teammate)
    before = rows()
    for chosen in (lora.pk, lora.versions.get().pk, uuid4()):
        response = generate(api, base_model=lora.base_model.name, loras=[{"lora": chosen}])
        assert (response.status_code, response.json()["code"]) == (404, "not_found")
        assert str(chosen) in response.json()["message"]
    assert rows() == before


def test_a_generation_refuses_what_does_not_fit_together(api: APIClient, owner: User) -> None:
    lora, other = make_lora(owner), make_base_model()
    empty = make_lora(owner, versions=0)
    base = lora.base_model.name
    before = rows()
    for body, status, code in (
        ({"base_model": other.name, "loras": [{"lora": lora.pk}]}, 400, "invalid"),
        ({"base_model": base, "width": 72}, 400, "invalid"),
        ({"base_model": base, "loras": [{"lora": lora.pk}, {"lora": lora.versions.get().pk}]}, 400, "invalid"),
        ({"base_model": base, "loras": [{"lora": empty.pk}]}, 409, "not_ready"),
        ({"base_model": base, "loras": [{"lora": lora.pk, "weight": 5}]}, 400, "invalid_config"),
        ({"base_model": base, "loras": [{"lora": str(uuid4())}] * 9}, 400, "invalid_config"),
        ({"base_model": make_base_model(ready=False).name}, 409, "not_ready"),
    ):
        response = generate(api, **body)
        assert (response.status_code, response.json()["code"]) == (status, code), body
    assert rows() == before


def test_the_newest_version_counts_at_the_time_of_the_request(api: APIClient, owner: User) -> None:
    lora = make_lora(owner)
    first = generate(api, base_model=lora.base_model.name, loras=[{"lora": lora.pk}])
    newest = add_lora_version(lora, number=2)
    second = generate(api, base_model=lora.base_model.name, loras=[{"lora": lora.pk}])
    numbers = [api.get(r.json()["request"]["url"]).json()["loras"][0]["number"] for r in (first, second)]
    assert numbers == [1, newest.number]


def test_the_same_key_and_body_start_one_job(api: APIClient, owner: User, teammate: User) -> None:
    dataset, version, base = make_dataset(owner), make_dataset_version(owner), make_base_model()
    posts = [
        (reverse("dataset-preprocess", args=[dataset.pk]), {"resolution": 64}),
        (reverse("trainings"), {"dataset_version": str(version.pk), "base_model": base.name, "lora_name": "ink"}),
        (reverse("generations"), {"base_model": base.name, "prompt": "x"}),
    ]
    for number, (url, body) in enumerate(posts):
        headers = {"Idempotency-Key": f"key-{number}"}
        answers = [api.post(url, body, format="json", headers=headers) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [202] * 3
        assert len({answer.json()["id"] for answer in answers}) == 1
    assert Job.objects.filter(idempotency_key__isnull=False).count() == 3


def test_the_same_key_with_another_body_is_422(api: APIClient) -> None:
    base = make_base_model()
    headers = {"Idempotency-Key": "k"}
    url = reverse("generations")
    api.post(url, {"base_model": base.name, "prompt": "x"}, format="json", headers=headers)
    response = api.post(url, {"base_model": base.name, "prompt": "y"}, format="json", headers=headers)
    assert (response.status_code, response.json()["code"]) == (422, "idempotency_mismatch")
    assert Job.objects.count() == 1


@pytest.mark.parametrize("key", ["", "x" * 201, "schlüssel", "a\tb"])
def test_a_key_that_is_none_is_refused(key: str, api: APIClient) -> None:
    body = {"base_model": make_base_model().name, "prompt": "x"}
    response = api.post(reverse("generations"), body, format="json", HTTP_IDEMPOTENCY_KEY=key)
    assert (response.status_code, response.json()["code"]) == (400, "invalid")
    assert not Job.objects.exists()
