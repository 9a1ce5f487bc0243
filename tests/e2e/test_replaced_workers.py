"""A worker process that is replaced, or that changes its work, loses nothing and is no accident to Celery."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import add_base, prepare_dataset, train
from tests.e2e.test_killed_workers import CONFIG, model_hash, wait_for_step
from tests.services import wait_until
from tests.stack import Stack, stack

pytestmark = pytest.mark.slow

ASK_TO_YIELD = """
from django.db.models.functions import Now
from jobs.models import Job
assert Job.objects.filter(kind="train", state="running").update(yield_requested_at=Now()) == 1
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("site")) as running:
        running.start_dispatcher()
        running.start_worker()
        yield running


@pytest.fixture(scope="module")
def version(site: Stack, tiny_source: Path) -> str:
    return prepare_dataset(site, add_base(site, tiny_source))


def generate(site: Stack, **changes: object) -> dict[str, object]:
    body = {"base_model": "tiny", "prompt": "a disc", "width": 32, "height": 32, "steps": 3, "count": 1} | changes
    return dict(site.call("POST", "/api/v1/generations/", body))


def test_a_training_makes_room_for_a_generation_and_ends_with_the_same_bytes(site: Stack, version: str) -> None:
    config = CONFIG | {"steps": 120, "checkpoint_every_steps": 50}
    site.wait_for_job(train(site, version, "undisturbed", **config))
    training = train(site, version, "disturbed", **config)
    wait_for_step(site, training, 12)
    job = generate(site)
    # As the dispatcher asks, without its minute of patience.
    site.manage("shell", "-c", ASK_TO_YIELD)
    generation = site.wait_for_job(job, seconds=60)
    meanwhile = site.call("GET", f"/api/v1/jobs/{training['id']}/")
    assert meanwhile["attempts"][0]["outcome"] == "preempted", meanwhile
    assert generation["finished_at"] < site.wait_for_job(training, seconds=150)["finished_at"]
    done = site.call("GET", f"/api/v1/jobs/{training['id']}/")
    assert [attempt["outcome"] for attempt in done["attempts"]] == ["preempted", "succeeded"]
    assert done["attempts"][1]["from_step"] == done["attempts"][0]["to_step"] >= 12
    assert model_hash(site, "disturbed") == model_hash(site, "undisturbed")


def test_a_process_that_grew_too_large_is_replaced_between_jobs_without_a_word_of_error(
    site: Stack, version: str
) -> None:
    site.kill("worker")
    site.environment["LORASITE_WORKER_MEMORY_BYTES"] = str(1 << 20)
    site.start_worker("small")
    wait_until(lambda: "ready" in site.log("small").read_text(), "the worker starts", seconds=60)
    parent = psutil.Process(site.processes["small"].pid)
    workers = set()
    for seed in range(3):
        done = site.wait_for_job(generate(site, seed=seed), seconds=60)
        assert [attempt["outcome"] for attempt in done["attempts"]] == ["succeeded"]
        workers.add(done["attempts"][0]["worker"])
    assert len(workers) == 3, "each job was computed by another process"
    log = site.log("small").read_text()
    assert "it holds" in log
    for word in ("WorkerLostError", "exited prematurely", "exited with", "Traceback"):
        assert word not in log, word
    assert parent.is_running()
