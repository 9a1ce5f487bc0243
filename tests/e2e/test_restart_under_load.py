"""A rolling restart while people keep submitting: every request is answered in the end, every job succeeds once."""

import http.client
import itertools
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import add_base, pictures
from tests.stack import ApiError, Stack, stack

pytestmark = pytest.mark.slow

PAUSE_SECONDS = 0.15  # between two requests of one client
CLIENTS = 2


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    limits = {"LORASITE_MAX_QUEUED_JOBS_PER_PERSON": "1000"}
    with stack(tmp_path_factory.mktemp("site"), **limits) as running:
        running.start_dispatcher()
        running.start_worker()
        yield running


class Load:
    """Clients that submit without a break, and repeat what got no answer under the same key."""

    def __init__(self, site: Stack, dataset_id: str) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.errors: list[ApiError] = []
        self.unreachable = 0
        self._site, self._dataset_id = site, dataset_id
        self._numbers, self._stop = itertools.count(), threading.Event()
        self._threads = [threading.Thread(target=self._client, daemon=True) for _ in range(CLIENTS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=30)
            assert not thread.is_alive(), "a client still waits for an answer"

    def wait_for_more(self, count: int = 6) -> None:
        """Until so many further requests were accepted."""
        goal, end = len(self.jobs) + count, time.monotonic() + 120
        while len(self.jobs) < goal:
            assert time.monotonic() < end and not self.errors, (len(self.jobs), goal, self.errors[:3])
            time.sleep(0.05)

    def _client(self) -> None:
        while not self._stop.wait(PAUSE_SECONDS):
            number = next(self._numbers)
            key = f"load-{number}"
            path, body = self._request(number)
            while key not in self.jobs:
                try:
                    self.jobs[key] = self._site.call("POST", path, body, {"Idempotency-Key": key})
                except ApiError as error:
                    self.errors.append(error)
                    return
                except (urllib.error.URLError, http.client.HTTPException, ConnectionError):
                    self.unreachable += 1
                    time.sleep(0.1)

    def _request(self, number: int) -> tuple[str, dict[str, Any]]:
        if number % 4 == 0:
            return f"/api/v1/datasets/{self._dataset_id}/preprocess/", {"resolution": 64, "bucket_step_px": 8}
        return "/api/v1/generations/", {"base_model": "tiny", "prompt": f"a disc {number}", "seed": number, "steps": 2}


def stop(site: Stack, name: str) -> None:
    """SIGTERM, and in good order."""
    process = site.processes[name]
    process.terminate()
    assert process.wait(timeout=60) in (0, -15), site.log(name).read_text(errors="replace")[-3000:]


def test_a_rolling_restart_under_load_loses_and_fails_nothing(site: Stack, tiny_source: Path) -> None:
    add_base(site, tiny_source)
    dataset = site.call("POST", "/api/v1/datasets/", {"name": "discs"})
    site.upload(dataset["id"], pictures())

    with Load(site, dataset["id"]) as load:
        load.wait_for_more()
        stop(site, "worker")
        load.wait_for_more()
        site.start_worker()
        load.wait_for_more()
        stop(site, "dispatch")
        load.wait_for_more()
        site.start_dispatcher()
        load.wait_for_more()
        before = load.unreachable
        stop(site, "web")
        site.start_web()
        assert load.unreachable > before, "the web process was away for a moment, and clients noticed"
        load.wait_for_more()

    assert load.errors == [], "no answer but 202, whatever was restarting"
    submitted = [job["id"] for job in load.jobs.values()]
    assert len(set(submitted)) == len(load.jobs)
    for job in load.jobs.values():
        done = site.wait_for_job(job, seconds=120)
        assert {attempt["outcome"] for attempt in done["attempts"][:-1]} <= {"released"}, done["attempts"]
    script = "from jobs.models import Job; print('jobs:', Job.objects.exclude(kind='prepare_base').count())"
    assert f"jobs: {len(submitted)}" in site.manage("shell", "-c", script), "nothing was submitted twice"
