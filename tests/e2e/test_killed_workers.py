"""kill -9 in the middle of a training: it goes on from its checkpoint, ends once, and with the same bytes."""

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from tests.e2e.conftest import add_base, prepare_dataset, train
from tests.services import wait_until
from tests.stack import Stack, stack

pytestmark = pytest.mark.slow

CONFIG = {"steps": 60, "checkpoint_every_steps": 5, "targets": "with_conv"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("site")) as running:
        running.start_dispatcher()
        running.start_worker()
        yield running


@pytest.fixture(scope="module")
def version(site: Stack, tiny_source: Path) -> str:
    return prepare_dataset(site, add_base(site, tiny_source))


@pytest.fixture(scope="module")
def uninterrupted_hash(site: Stack, version: str) -> str:
    done = site.wait_for_job(train(site, version, "uninterrupted", **CONFIG))
    assert len(done["attempts"]) == 1
    return model_hash(site, "uninterrupted")


def model_hash(site: Stack, name: str) -> str:
    (lora,) = [lora for lora in site.call("GET", "/api/v1/loras/")["results"] if lora["name"] == name]
    (version,) = lora["versions"]
    return str(version["model_hash"])


def wait_for_step(site: Stack, job: dict[str, object], step: int) -> None:
    def reached() -> bool:
        now = site.call("GET", f"/api/v1/jobs/{job['id']}/")
        assert now["state"] in ("queued", "running"), now
        return bool(now["stage"] == "training" and now["progress"]["step"] >= step)

    wait_until(reached, f"the training reaches step {step}", seconds=90, log=site.log("worker"))


def test_the_parent_holds_the_heavy_libraries_so_that_a_new_child_need_not_load_them(site: Stack, version: str) -> None:
    parent = psutil.Process(site.processes["worker"].pid)
    assert any("libtorch_cpu" in mapped.path for mapped in parent.memory_maps())


def test_a_cpu_worker_prepares_datasets_without_ever_loading_torch(site: Stack, version: str) -> None:
    site.start_worker("cpu-only", queues="cpu")
    wait_until(lambda: "cpu-only@" in site.log("cpu-only").read_text(), "the cpu worker starts", seconds=30)
    parent = psutil.Process(site.processes["cpu-only"].pid)
    done = ""

    def has_worked() -> bool:
        nonlocal done
        prepare_again = site.call("GET", f"/api/v1/dataset-versions/{version}/")["dataset"]
        body = {"resolution": 64, "bucket_step_px": 8}
        job = site.wait_for_job(site.call("POST", f"/api/v1/datasets/{prepare_again}/preprocess/", body))
        done = job["attempts"][-1]["worker"]
        return int(done.rsplit(":", 1)[1]) in {child.pid for child in parent.children()}

    wait_until(has_worked, "a job of queue cpu goes to the cpu worker", seconds=60, log=site.log("cpu-only"))
    for process in (parent, *parent.children()):
        assert not [mapped.path for mapped in process.memory_maps() if "libtorch" in mapped.path]


def test_a_restarted_worker_loads_the_warm_base_before_it_says_ready(site: Stack, version: str) -> None:
    site.kill_child_of("worker")
    wait_until(lambda: "warm=1" in site.log("worker").read_text(), "the new child loads the base", seconds=60)
    (base,) = site.call("GET", "/api/v1/base-models/")["results"]
    script = "from jobs.models import WorkerProcess as W; print(W.objects.filter(state='ready').first().warm_bases)"
    wait_until(lambda: base["fingerprint"] in site.manage("shell", "-c", script), "the worker says READY", seconds=30)


def test_a_killed_child_is_replaced_and_the_training_ends_with_the_same_bytes(
    site: Stack, version: str, uninterrupted_hash: str
) -> None:
    job = train(site, version, "child-killed", **CONFIG)
    wait_for_step(site, job, 12)
    site.kill_child_of("worker")
    done = site.wait_for_job(job, seconds=150)
    assert [attempt["outcome"] for attempt in done["attempts"]] == ["lost", "succeeded"]
    assert done["attempts"][1]["from_step"] >= 10, "it went on from a checkpoint, not from the start"
    assert model_hash(site, "child-killed") == uninterrupted_hash


def test_a_killed_worker_leaves_no_child_and_its_successor_ends_with_the_same_bytes(
    site: Stack, version: str, uninterrupted_hash: str
) -> None:
    job = train(site, version, "worker-killed", **CONFIG)
    wait_for_step(site, job, 12)
    (child,) = psutil.Process(site.processes["worker"].pid).children()
    site.kill("worker")
    wait_until(
        lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the child dies too", seconds=5
    )
    site.start_worker("worker")
    done = site.wait_for_job(job, seconds=150)
    assert [attempt["outcome"] for attempt in done["attempts"]] == ["lost", "succeeded"]
    assert model_hash(site, "worker-killed") == uninterrupted_hash


def test_a_stopped_worker_gives_its_training_back_at_once(site: Stack, version: str, uninterrupted_hash: str) -> None:
    job = train(site, version, "worker-stopped", **CONFIG)
    wait_for_step(site, job, 12)
    worker = site.processes["worker"]
    worker.terminate()
    assert worker.wait(timeout=30) == 0
    given_back = site.call("GET", f"/api/v1/jobs/{job['id']}/")
    assert given_back["state"] == "queued"
    assert given_back["attempts"][0]["outcome"] == "released"
    site.start_worker("worker")
    done = site.wait_for_job(job, seconds=150)
    assert [attempt["outcome"] for attempt in done["attempts"]] == ["released", "succeeded"]
    assert done["attempts"][1]["from_step"] == done["attempts"][0]["to_step"]
    assert model_hash(site, "worker-stopped") == uninterrupted_hash


def test_a_frozen_worker_is_fenced_and_publishes_nothing(site: Stack, version: str, uninterrupted_hash: str) -> None:
    job = train(site, version, "worker-frozen", **CONFIG)
    wait_for_step(site, job, 12)
    (child,) = psutil.Process(site.processes["worker"].pid).children()
    child.suspend()
    site.start_worker("second")
    try:
        done = site.wait_for_job(job, seconds=150)
    finally:
        child.resume()
    time.sleep(2)
    after = site.call("GET", f"/api/v1/jobs/{job['id']}/")
    assert (after["state"], len(after["attempts"])) == ("succeeded", 2)
    assert done["attempts"] == after["attempts"]
    assert model_hash(site, "worker-frozen") == uninterrupted_hash


def test_jobs_are_accepted_while_the_broker_is_frozen_and_run_when_it_wakes(site: Stack, version: str) -> None:
    assert "LORASITE_BROKER_URL" not in site.environment
    server = psutil.Process(int(redis.Redis.from_url(site.broker_url).info("server")["process_id"]))
    server.suspend()
    try:
        job = train(site, version, "accepted-while-frozen", steps=2)
        assert job["state"] == "queued"
    finally:
        server.resume()
    site.wait_for_job(job, seconds=120)
