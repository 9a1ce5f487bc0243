"""The main job through REST against real processes: preprocess, train, generate; on local files and on real S3."""

import io
import json
import struct
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.conftest import add_base, png, prepare_dataset, train
from tests.services import postgres, seaweedfs, wait_until
from tests.stack import ApiError, Stack, stack

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["sqlite and local files", "postgresql and S3"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("site")
    with ExitStack() as exits:
        environment = {}
        if request.param == "postgresql and S3":
            environment["LORASITE_DATABASE_URL"] = exits.enter_context(postgres(folder / "pg"))
            environment |= exits.enter_context(seaweedfs(folder / "s3")).environment()
        running = exits.enter_context(stack(folder, **environment))
        running.start_dispatcher()
        running.start_worker()
        yield running


def test_pictures_become_a_lora_and_the_lora_becomes_pictures(site: Stack, tiny_source: Path) -> None:
    base = add_base(site, tiny_source)
    version = prepare_dataset(site, base)
    frozen = site.call("GET", f"/api/v1/dataset-versions/{version}/")
    assert frozen["ready"] and frozen["image_count"] == 6 and len(frozen["manifest_hash"]) == 64

    job = train(site, version, "discs", steps=6, sample_prompts=["a red picture"], sample_steps=2)
    done = site.wait_for_job(job)
    training = site.call("GET", done["request"]["url"])
    assert len(training["losses"]) == 6
    assert {sample["step"] for sample in training["samples"]} == {0, 6}
    sample = site.raw("GET", training["samples"][0]["url"])
    assert Image.open(io.BytesIO(sample)).size == (base["facts"]["native_size_px"],) * 2

    (lora,) = site.call("GET", "/api/v1/loras/")["results"]
    (lora_version,) = lora["versions"]
    kohya = site.raw("GET", lora_version["file_url"])
    header = json.loads(kohya[8 : 8 + struct.unpack("<Q", kohya[:8])[0]])
    modules = {name.rsplit(".", 2)[0] for name in header if name.endswith("lora_down.weight")}
    assert modules and {f"{module}.alpha" for module in modules} <= set(header)
    assert header["__metadata__"]["sshs_model_hash"] == lora_version["model_hash"]
    peft = zipfile.ZipFile(io.BytesIO(site.raw("GET", f"/api/v1/lora-versions/{lora_version['id']}/peft/")))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {Path(name).name for name in peft.namelist()}

    body = {"base_model": "tiny", "prompt": "a red picture", "count": 3, "seed": 11, "steps": 3, "guidance": 3}
    plain = site.wait_for_job(site.call("POST", "/api/v1/generations/", body))
    with_lora = {**body, "loras": [{"lora": lora["id"], "weight": 1.0}]}
    styled = site.wait_for_job(site.call("POST", "/api/v1/generations/", with_lora))
    first, second = (site.call("GET", job["request"]["url"])["images"] for job in (plain, styled))
    assert [image["seed"] for image in first] == [11, 12, 13]
    before, after = (site.raw("GET", images[0]["url"]) for images in (first, second))
    assert Image.open(io.BytesIO(before)).format == "PNG"
    assert before != after

    again = site.wait_for_job(site.call("POST", "/api/v1/generations/", body))
    repeated = site.call("GET", again["request"]["url"])["images"]
    assert site.raw("GET", repeated[1]["url"]) == site.raw("GET", first[1]["url"]), "the same seed, the same bytes"


def test_a_submitted_job_is_cancelled_while_it_runs(site: Stack, tiny_source: Path) -> None:
    version = site.call("GET", "/api/v1/dataset-versions/")["results"][0]["id"]
    job = train(site, version, "never", steps=20_000, checkpoint_every_steps=1000)
    wait_until(
        lambda: site.call("GET", f"/api/v1/jobs/{job['id']}/")["progress"]["step"] > 0, "the training runs", seconds=60
    )
    site.call("POST", f"/api/v1/jobs/{job['id']}/cancel/")
    site.wait_for_job(job, state="cancelled", seconds=15)
    assert "never" not in [lora["name"] for lora in site.call("GET", "/api/v1/loras/")["results"]]


def test_bad_input_is_answered_with_a_sentence_and_leaves_nothing(site: Stack) -> None:
    dataset = site.call("POST", "/api/v1/datasets/", {"name": "bad"})
    with pytest.raises(ApiError) as not_ready:
        site.call("POST", f"/api/v1/datasets/{dataset['id']}/preprocess/", {})
    assert (not_ready.value.status, not_ready.value.body["code"]) == (409, "not_ready")
    for files in ({"a.png": b""}, {"a.png": b"GIF89a not a picture"}, {"notes.exe": b"MZ"}):
        with pytest.raises(ApiError) as refused:
            site.upload(dataset["id"], files)
        assert refused.value.status == 400 and refused.value.body["message"]
    with pytest.raises(ApiError) as unknown:
        site.call("POST", "/api/v1/generations/", {"base_model": "tiny", "prompt": "x", "stepz": 3})
    assert unknown.value.status == 400 and "stepz" in json.dumps(unknown.value.body)
    assert site.call("GET", f"/api/v1/datasets/{dataset['id']}/images/")["results"] == []


def test_a_good_picture_among_bad_ones_is_kept_and_the_bad_ones_are_named(site: Stack) -> None:
    dataset = site.call("POST", "/api/v1/datasets/", {"name": "mixed"})
    answer = site.upload(dataset["id"], {"good.png": png("teal"), "bad.png": b"no picture"})
    assert [image["name"] for image in answer["images"]] == ["good.png"]
    assert [rejected["name"] for rejected in answer["rejected"]] == ["bad.png"]
