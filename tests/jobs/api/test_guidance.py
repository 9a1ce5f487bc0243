"""Pictures to begin from, styles, LoRAs named in prompts, previews and picture formats through the API."""

from typing import Any

import pytest
from django.urls import reverse
from rest_framework.test import APIClient

from core.image_files import encode_picture
from jobs.lifecycle import job_fail
from jobs.models import BaseModel, GeneratedImage, InputImage, Job, JobPreview, Style, User
from jobs.previews import Preview, preview_drop, preview_write, previews_sweep
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
    picture_bytes,
    picture_file,
    store_bytes,
)


@pytest.fixture
def base(db: None) -> BaseModel:
    return make_base_model()


def generate(api: APIClient, base: BaseModel, **body: Any) -> Any:
    return api.post(reverse("generations"), {"base_model": base.name, "prompt": "a red apple", **body}, format="json")


def spec_of(response: Any) -> dict[str, Any]:
    assert response.status_code == 202, response.json()
    return Job.objects.get(pk=response.json()["id"]).spec


def test_an_uploaded_picture_is_judged_stored_once_and_downloaded(api: APIClient, owner: User) -> None:
    content = picture_bytes(kind="JPEG")
    files = [picture_file("dir/a.jpg", content), picture_file("b.txt", b"words"), picture_file("c.png", b"no picture")]

    first = api.post(reverse("input-images"), {"files": files}, format="multipart")
    again = api.post(reverse("input-images"), {"files": [picture_file("z.jpg", content)]}, format="multipart")

    (image,) = first.json()["images"]
    assert (first.status_code, image["name"], image["width"]) == (201, "a.jpg", 64)
    assert {row["name"]: row["code"] for row in first.json()["rejected"]} == {
        "b.txt": "image_rejected", "c.png": "image_rejected",
    }  # fmt: skip
    assert again.json()["images"][0]["id"] == image["id"]
    assert InputImage.objects.count() == 1
    download = api.get(image["file_url"])
    assert download["Content-Type"] == "image/png"
    assert api.delete(reverse("input-image", args=[image["id"]])).status_code == 204
    assert not InputImage.objects.exists()


def test_an_upload_without_any_picture_is_refused(api: APIClient, owner: User) -> None:
    response = api.post(reverse("input-images"), {"files": [picture_file("c.png", b"x")]}, format="multipart")

    assert (response.status_code, response.json()["code"]) == (400, "invalid")


@pytest.mark.parametrize("kind", ["uploaded", "dataset", "generated"])
def test_a_generation_begins_from_any_picture_of_ones_own(
    kind: str, api: APIClient, owner: User, base: BaseModel
) -> None:
    picture: Any = {
        "uploaded": lambda: make_input_image(owner),
        "dataset": lambda: make_dataset(owner).images.all()[0],
        "generated": lambda: make_generation(owner).images.get(),
    }[kind]()
    mask = make_input_image(owner)

    response = generate(api, base, init_image=picture.pk, mask=mask.pk, denoising_strength=0.4)

    spec = spec_of(response)
    assert (spec["init_image"], spec["mask"], spec["denoising_strength"]) == (picture.sha256, mask.sha256, 0.4)
    assert Job.objects.get(pk=response.json()["id"]).spec_version == 2


def test_another_persons_picture_cannot_be_begun_from_by_id_or_by_hash(
    api: APIClient, owner: User, stranger: User, base: BaseModel
) -> None:
    foreign = make_input_image(stranger)

    by_id, by_hash = (generate(api, base, init_image=value) for value in (foreign.pk, foreign.sha256))

    assert (by_id.status_code, by_id.json()["code"]) == (404, "not_found")
    assert by_hash.status_code == 400
    assert "init_image" in by_hash.json()["fields"]
    assert not Job.objects.filter(owner=owner).exists()


def test_a_mask_without_a_picture_is_refused_with_the_reason(api: APIClient, owner: User, base: BaseModel) -> None:
    response = generate(api, base, mask=make_input_image(owner).pk)

    assert response.status_code == 400
    assert "mask needs init_image" in response.json()["message"]


def test_samplers_are_taken_under_webuis_names_and_hires_settings_kept(
    api: APIClient, owner: User, base: BaseModel
) -> None:
    response = generate(api, base, sampler="DPM++ 2M Karras", hires={"scale": 1.5}, image_format="webp")
    shown = api.get(response.json()["request"]["url"]).json()["config"]

    assert (shown["sampler"], shown["schedule"], shown["image_format"]) == ("dpmpp_2m", "karras", "webp")
    assert shown["hires"] == {"scale": 1.5, "steps": None, "denoising_strength": 0.7, "upscaler": "latent"}
    assert (shown["init_image"], shown["preview_every_steps"]) == (None, 0)


def test_styles_are_made_changed_listed_removed_and_applied_in_order(
    api: APIClient, owner: User, base: BaseModel
) -> None:
    made = api.post(
        reverse("styles"),
        {"name": "ink", "prompt": "ink drawing of {prompt}, (fine:1.2)", "negative_prompt": "colour"},
        format="json",
    )
    api.post(reverse("styles"), {"name": "calm", "prompt": "calm"}, format="json")
    twin = api.post(reverse("styles"), {"name": "ink"}, format="json")

    assert (made.status_code, twin.status_code, twin.json()["code"]) == (201, 409, "conflict")
    assert [row["name"] for row in api.get(reverse("styles")).json()["results"]] == ["calm", "ink"]
    spec = spec_of(generate(api, base, styles=["ink", "calm"], negative_prompt="blurry"))
    assert spec["prompt"] == "ink drawing of a red apple, (fine:1.2), calm"
    assert spec["negative_prompt"] == "blurry, colour"

    url = reverse("style", args=[made.json()["id"]])
    assert api.patch(url, {"prompt": "pencil"}, format="json").json()["prompt"] == "pencil"
    assert Style.objects.get(name="ink").negative_prompt == "colour"
    assert api.delete(url).status_code == 204
    missing = generate(api, base, styles=["ink"])
    assert (missing.status_code, missing.json()["message"]) == (404, "you have no style 'ink'; yours are: calm")


def test_a_style_that_cannot_be_read_is_refused_where_it_is_written(api: APIClient, owner: User) -> None:
    response = api.post(reverse("styles"), {"name": "x", "prompt": "a AND b"}, format="json")

    assert response.status_code == 400
    assert "AND" in response.json()["fields"]["prompt"][0]


def test_a_lora_named_in_the_prompt_is_the_newest_of_ones_own_before_public_ones(
    api: APIClient, owner: User, teammate: User, base: BaseModel
) -> None:
    mine = make_lora(owner, base_model=base, name="ink", versions=2)
    make_lora(teammate, base_model=base, name="ink", visibility="public")
    theirs = make_lora(teammate, base_model=base, name="wood", visibility="public")

    response = generate(api, base, prompt="a cat <lora:ink:0.8> <lora:wood>")

    spec = spec_of(response)
    newest = mine.versions.order_by("-number").first()
    assert newest is not None
    assert spec["prompt"] == "a cat"
    assert spec["loras"] == [
        {"sha256": newest.kohya_sha256, "weight": 0.8},
        {"sha256": theirs.versions.get().kohya_sha256, "weight": 1.0},
    ]
    assert [use["name"] for use in api.get(response.json()["request"]["url"]).json()["loras"]] == ["ink", "wood"]


def test_an_unknown_or_ambiguous_lora_name_is_refused_with_the_names_there_are(
    api: APIClient, owner: User, teammate: User, stranger: User, base: BaseModel
) -> None:
    make_lora(owner, base_model=base, name="mine")
    make_lora(stranger, base_model=base, name="secret")
    for person in (teammate, stranger):
        make_lora(person, base_model=base, name="shared", visibility="public")

    unknown, ambiguous = (generate(api, base, prompt=f"x <lora:{name}:1>") for name in ("secret", "shared"))

    assert (unknown.status_code, ambiguous.status_code) == (400, 400)
    assert "there are: mine, shared" in unknown.json()["message"]
    assert f"({teammate.username}, {stranger.username})" in ambiguous.json()["message"] or (
        f"({stranger.username}, {teammate.username})" in ambiguous.json()["message"]
    )
    assert not Job.objects.filter(owner=owner).exists()


def test_prompts_that_cannot_be_served_are_refused_before_they_wait(
    api: APIClient, owner: User, base: BaseModel
) -> None:
    for body, words in (
        ({"prompt": "a AND b"}, "AND"),
        ({"prompt": "[a:b:0.5]"}, "changes on the way"),
        ({"negative_prompt": "<lora:x:1>"}, "not in the negative prompt"),
    ):
        response = generate(api, base, **body)
        assert response.status_code == 400
        assert words in response.json()["message"]


def test_a_preview_is_shown_while_the_job_runs_and_dropped_at_its_end(api: APIClient, owner: User) -> None:
    job = make_job(owner, JobState.RUNNING)
    url = reverse("job-preview", args=[job.pk])
    assert api.get(url).status_code == 404

    for step in (2, 4):
        preview_write(job_id=job.pk, token=job.token, preview=Preview(step=step, jpeg=b"look %d" % step))
    preview_write(job_id=job.pk, token=job.token + 1, preview=Preview(step=9, jpeg=b"of another attempt"))

    shown = api.get(url)
    assert (shown.status_code, shown.content, shown["X-Step"]) == (200, b"look 4", "4")
    assert (shown["Content-Type"], shown["Cache-Control"]) == ("image/jpeg", "no-store")

    preview_drop(job_id=job.pk)
    assert api.get(url).status_code == 404


def test_previews_of_ended_jobs_are_hidden_and_swept(api: APIClient, owner: User) -> None:
    ended, running = make_job(owner, JobState.RUNNING), make_job(owner, JobState.RUNNING)
    for job in (ended, running):
        preview_write(job_id=job.pk, token=job.token, preview=Preview(step=1, jpeg=b"look"))
    job_fail(job_id=ended.pk, token=ended.token, code="nan", message="NaN", traceback="")

    assert api.get(reverse("job-preview", args=[ended.pk])).status_code == 404
    assert previews_sweep() == 1
    assert list(JobPreview.objects.values_list("job_id", flat=True)) == [running.pk]


def test_a_picture_is_downloaded_in_its_own_format(api: APIClient, owner: User, client_of: MakeClient) -> None:
    from PIL import Image

    image = make_generation(owner).images.get()
    sha256, _ = store_bytes(encode_picture(Image.new("RGB", (8, 8)), "x", image_format="webp"))
    GeneratedImage.objects.filter(pk=image.pk).update(sha256=sha256, image_format="webp")

    response = api.get(reverse("image-file", args=[image.pk]))

    assert response["Content-Type"] == "image/webp"
    assert f"{image.seed}-{image.number}.webp" in response["Content-Disposition"]
    assert api.get(reverse("image", args=[image.pk])).json()["image_format"] == "webp"


@pytest.mark.parametrize(("prompt", "words"), [("x <lora:a:1>", "samples show the LoRA"), ("a AND b", "AND")])
def test_sample_prompts_that_would_stop_a_training_are_refused_before_it(
    prompt: str, words: str, api: APIClient, owner: User, base: BaseModel
) -> None:
    version = make_dataset_version(owner)
    body = {"dataset_version": version.pk, "base_model": base.name, "lora_name": "ink"}

    response = api.post(reverse("trainings"), {**body, "config": {"sample_prompts": [prompt]}}, format="json")

    assert response.status_code == 400
    assert words in response.json()["message"]
