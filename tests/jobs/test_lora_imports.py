"""LoRA files from elsewhere: refused at once where they are rubbish, judged by a job, then as good as trained ones."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from django.urls import reverse
from PIL import Image
from pytest_django.fixtures import Settings
from rest_framework.test import APIClient
from safetensors.numpy import load, save

from core.prepared_base import prepare_base
from jobs import tasks
from jobs.artifacts import artifact_name, artifact_open, artifact_put, blob_store
from jobs.models import BaseModel, GeneratedImage, Job, Lora, LoraImport, LoraVersion, User
from jobs.node_cache import node_cache
from jobs.retry import job_retry
from jobs.status import JobState
from jobs.submission import generation_submit
from jobs.work.import_lora import ImportLoraWork
from jobs.worker_context import WorkerContext
from tests.conftest import MakeClient
from tests.factories import lora_bytes, lora_file, make_base_model, make_lora, store_bytes
from tests.tiny_models import make_tiny_pipeline

Blobs = Callable[[], set[str]]
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def base(db: None) -> BaseModel:
    """A base whose UNet has the one layer that `lora_bytes` changes."""
    base = make_base_model()
    unet, _ = store_bytes(save({f"{LAYER}.weight": np.zeros((32, 32), dtype=np.float16)}))
    base.files |= {"unet/diffusion_pytorch_model.safetensors": unet}
    base.save()
    return base


def send(api: APIClient, base: BaseModel, file: SimpleUploadedFile | None = None, key: str = "", **values: Any) -> Any:
    body = {"base_model": base.name, "lora_name": "ink", "file": file or lora_file(), **values}
    headers = {"HTTP_IDEMPOTENCY_KEY": key} if key else {}
    return api.post(reverse("lora-imports"), body, format="multipart", **headers)


def work(context: WorkerContext) -> None:
    """As a cpu worker whose doorbell rang."""
    tasks.import_lora.run()
    context.uploader.turn()


def test_an_uploaded_lora_becomes_a_version_that_says_where_it_came_from(
    api: APIClient, base: BaseModel, context: WorkerContext
) -> None:
    content = lora_bytes(rank=4)
    answer = send(api, base, lora_file("Ink v3.safetensors", content), trigger_word="sks", visibility="public")
    assert answer.status_code == 202, answer.json()
    job = answer.json()
    assert (job["kind"], job["state"], job["result"], job["request"]["type"]) == (
        "import_lora",
        "queued",
        None,
        "lora_import",
    )
    work(context)
    job = api.get(job["url"]).json()
    assert (job["state"], job["result"]["type"]) == ("succeeded", "lora_version"), job["error"]
    lora = api.get(job["result"]["url"]).json()
    assert (lora["name"], lora["trigger_word"], lora["visibility"]) == ("ink", "sks", "public")
    (version,) = lora["versions"]
    facts = version["facts"]
    assert (facts["source"], facts["kind"], facts["rank"], facts["alpha"], facts["modules"]) == (
        "imported",
        "kohya",
        4,
        4.0,
        1,
    )
    assert facts["file_name"] == "Ink v3.safetensors"
    assert b"".join(api.get(version["file_url"]).streaming_content) == content
    row = LoraVersion.objects.get()
    assert row.model_hash == hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert api.get(job["request"]["url"]).json()["lora_version"] == version["id"]
    assert [found["id"] for found in api.get(reverse("lora-imports")).json()["results"]] == [job["request"]["id"]]


RUBBISH = {
    "a pickle": (b"\x80\x02}q\x00." + b"\0" * 100, "pickle"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "a picture"),
    "cut off": (lora_bytes()[:-4], "cut off"),
    "another model": (save({"model.x": np.ones(3, dtype=np.float32)}), "no part of a LoRA"),
    "a folder's weights": (
        save({f"base_model.model.{LAYER}.lora_{x}.weight": np.ones((2, 2), dtype=np.float32) for x in "AB"}),
        "convert the folder first",
    ),
}


@pytest.mark.parametrize("case", RUBBISH)
def test_rubbish_is_400_at_once_and_leaves_nothing(case: str, api: APIClient, base: BaseModel, blobs: Blobs) -> None:
    content, sentence = RUBBISH[case]
    before = blobs()
    answer = send(api, base, lora_file("mine.safetensors", content))
    assert answer.status_code == 400
    assert sentence in str(answer.json()) and "mine.safetensors" in str(answer.json())
    assert (blobs(), Job.objects.count(), LoraImport.objects.count()) == (before, 0, 0)


def test_a_file_above_the_cap_is_refused(api: APIClient, base: BaseModel, settings: Settings, blobs: Blobs) -> None:
    settings.LORASITE = settings.LORASITE | {"LORA_MAX_BYTES": 100}
    before = blobs()
    answer = send(api, base)
    assert answer.status_code == 400
    assert "larger than 100 bytes" in str(answer.json())
    settings.LORASITE = settings.LORASITE | {"LORA_MAX_BYTES": -(2**20)}
    assert send(api, base).status_code == 413
    assert (blobs(), Job.objects.count()) == (before, 0)


def test_unknown_fields_and_missing_ones_are_named(api: APIClient, base: BaseModel) -> None:
    assert "unknown field" in str(send(api, base, size="9").json())
    answer = api.post(reverse("lora-imports"), {"lora_name": "x"}, format="multipart")
    assert answer.status_code == 400
    assert {"file", "base_model"} <= set(answer.json()["fields"])


def test_a_name_of_another_base_and_an_unprepared_base_are_409(api: APIClient, base: BaseModel, owner: User) -> None:
    make_lora(owner, name="taken")
    assert send(api, base, lora_name="taken").status_code == 409
    assert send(api, make_base_model(ready=False)).status_code == 409
    assert not Job.objects.exists()


def test_the_same_key_is_the_same_import(api: APIClient, base: BaseModel) -> None:
    content = lora_bytes()
    first = send(api, base, lora_file(content=content), key="once")
    again = send(api, base, lora_file(content=content), key="once")
    assert first.json()["id"] == again.json()["id"]
    assert send(api, base, lora_file(content=lora_bytes()), key="once").status_code == 422
    assert LoraImport.objects.count() == 1


def test_too_many_waiting_imports_are_429(api: APIClient, base: BaseModel, settings: Settings) -> None:
    settings.LORASITE = settings.LORASITE | {"MAX_QUEUED_JOBS_PER_PERSON": 1}
    assert send(api, base).status_code == 202
    answer = send(api, base)
    assert (answer.status_code, answer.json()["code"]) == (429, "too_many_jobs")
    assert int(answer["Retry-After"]) > 0


def test_others_see_what_the_owner_made_public_and_nothing_else(
    api: APIClient, base: BaseModel, context: WorkerContext, teammate: User, stranger: User, client_of: MakeClient
) -> None:
    mine = [send(api, base, lora_name=name, visibility=name).json() for name in ("private", "public")]
    work(context)
    for person in (teammate, stranger):
        client = client_of(person)
        assert [lora["name"] for lora in client.get(reverse("loras")).json()["results"]] == ["public"]
        assert client.get(reverse("lora-imports")).json()["results"] == []
        for job in mine:
            assert client.get(job["request"]["url"]).status_code == 404
            assert client.get(job["url"]).status_code == 404
    assert Lora.objects.count() == 2


@pytest.mark.parametrize("wrong", ["numbers", "shape"])
def test_what_only_the_whole_file_shows_fails_the_job_with_its_reason(
    wrong: str, api: APIClient, base: BaseModel, context: WorkerContext
) -> None:
    tensors = {name: tensor.copy() for name, tensor in load(lora_bytes()).items()}
    up = next(name for name in tensors if "lora_up" in name)
    if wrong == "numbers":
        tensors[up][3, 1] = np.nan
    else:
        tensors[up] = np.ones((320, 2), dtype=np.float32)
    job = send(api, base, lora_file("odd.safetensors", save(tensors))).json()
    work(context)
    error = api.get(job["url"]).json()["error"]
    assert error["code"] == "lora_file_error"
    assert error["message"].startswith("odd.safetensors")
    assert ("NaN" if wrong == "numbers" else "does not fit base model") in error["message"]
    assert not Lora.objects.exists()


def test_a_cancelled_import_can_be_tried_again(api: APIClient, base: BaseModel, context: WorkerContext) -> None:
    job = send(api, base).json()
    api.post(reverse("job-cancel", args=[job["id"]]))
    again = job_retry(Job.objects.get(pk=job["id"]))
    work(context)
    again.refresh_from_db()
    assert again.state == JobState.SUCCEEDED
    assert LoraVersion.objects.get().lora_import.job == again


def test_a_second_import_of_the_name_is_the_next_version(
    api: APIClient, base: BaseModel, context: WorkerContext
) -> None:
    send(api, base, lora_file(content=lora_bytes()))
    send(api, base, lora_file(content=lora_bytes()))
    work(context)
    assert sorted(LoraVersion.objects.values_list("number", flat=True)) == [1, 2]


def test_an_import_whose_bytes_vanished_before_the_record_stores_them_again(
    api: APIClient, base: BaseModel, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until its record a sweep may take a file that nothing else names; here it comes right after the storing."""
    store, stored = ImportLoraWork.store, []

    def store_and_be_swept(work: ImportLoraWork) -> None:
        store(work)
        stored.append(work.lora_import.sha256)
        if len(stored) == 1:
            blob_store().delete(artifact_name(stored[0]))

    monkeypatch.setattr(ImportLoraWork, "store", store_and_be_swept)
    job = send(api, base).json()
    work(context)
    assert not LoraVersion.objects.exists()
    for upload in context.uploader._pending:
        upload.due_at = 0.0
    context.uploader.turn()
    assert api.get(job["url"]).json()["state"] == "succeeded"
    version = LoraVersion.objects.get()
    with artifact_open(version.kohya_sha256) as stream:
        assert len(stream.read()) == version.kohya_size_bytes
    assert len(stored) == 2


def test_the_admin_has_a_form_that_says_what_is_wrong(base: BaseModel, client: Client, db: None) -> None:
    operator = User.objects.create_superuser("operator")
    client.force_login(operator)
    url = reverse("admin:jobs_loraimport_add")
    assert client.get(url).status_code == 200
    values = {"base_model": str(base.pk), "lora_name": "ink", "trigger_word": "", "visibility": "private"}
    answer = client.post(url, {**values, "file": lora_file("bad.safetensors", b"GGUF" + b"\0" * 60)})
    assert answer.status_code == 200
    assert b"bad.safetensors is a GGUF file" in answer.content
    answer = client.post(url, {**values, "file": lora_file()})
    job = Job.objects.get()
    assert answer["Location"] == reverse("admin:jobs_job_change", args=[job.pk])
    assert (job.owner, job.lora_import.lora_name) == (operator, "ink")
    User.objects.filter(pk=operator.pk).update(is_superuser=False)
    assert client.get(url).status_code == 403


@pytest.mark.slow
def test_an_imported_file_changes_the_picture_as_its_weights_say(
    api: APIClient, owner: User, context: WorkerContext, tmp_path: Path
) -> None:
    """Upload, import, generate; only the pieces between the tasks are taken by hand."""
    from gpu_worker import runtime
    from gpu_worker.settings import WorkerSettings

    prepared = prepare_base(make_tiny_pipeline(tmp_path / "source"), tmp_path / "prepared")
    stored = {
        path.relative_to(prepared.folder).as_posix(): artifact_put(path)[0]
        for path in prepared.folder.rglob("*")
        if path.is_file()
    }
    base = BaseModel.objects.create(
        name="tiny", source="tiny", fingerprint=prepared.fingerprint, facts=prepared.facts.dump(), files=stored
    )
    ones = np.ones((2, 32), dtype=np.float32)
    name = f"lora_unet_{LAYER.replace('.', '_')}"
    strong = save({f"{name}.lora_down.weight": ones, f"{name}.lora_up.weight": np.ascontiguousarray(ones.T)})
    job = send(api, base, lora_file("strong.safetensors", strong)).json()
    work(context)
    version = LoraVersion.objects.get()
    assert api.get(job["url"]).json()["state"] == "succeeded"
    runtime.start(WorkerSettings(device="cpu", cache_folder=tmp_path / "bases", fetch=node_cache().get), [])
    values = {"prompt": "a red apple", "seed": 3, "steps": 2, "width": 32, "height": 32, "count": 1}
    jobs = [
        generation_submit(owner=owner, base_model=base, loras=loras, values=values)
        for loras in ([(version, 1.0)], [(version, 0.0)], [])
    ]
    tasks.generate.run()
    context.uploader.turn()
    with_it, weightless, without = (_pixels(GeneratedImage.objects.get(request__job=job)) for job in jobs)
    assert np.array_equal(weightless, without), "a LoRA of weight 0 changes the picture"
    assert not np.array_equal(with_it, without), "the LoRA changes nothing"


def _pixels(image: GeneratedImage) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """What people see, (height, width, 3): the file's bytes differ by the request's text in any case."""
    with artifact_open(image.sha256) as stream, Image.open(stream) as picture:
        return np.asarray(picture.convert("RGB"))
