"""Files of the next jobs come to this machine before their jobs do."""

import hashlib
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.db import OperationalError
from django.utils import timezone

from core.file_cache import FileCache
from jobs.claims import jobs_claim
from jobs.drain import drain
from jobs.models import BaseModel, Job, User, WorkerProcess
from jobs.prefetch import Prefetcher
from jobs.scheduling import FETCH_SECONDS, FETCHED_AHEAD_JOBS
from jobs.status import JobKind
from jobs.worker_context import WorkerContext
from tests.jobs.conftest import MakeJob
from tests.jobs.test_drain import Work


class Store:
    """Blobs whose content is a hash's text; may be away."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.is_away = False

    @staticmethod
    def name(number: int) -> str:
        return hashlib.sha256(f"lora {number}".encode()).hexdigest()

    def download(self, sha256: str, destination: Path) -> None:
        if self.is_away:
            raise TimeoutError("silent")
        self.reads.append(sha256)
        destination.write_bytes(next(f"lora {n}".encode() for n in range(100) if self.name(n) == sha256))


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def cache(tmp_path: Path, store: Store) -> FileCache:
    return FileCache(tmp_path / "files", download=store.download, capacity=1000)


@pytest.fixture
def prefetch(worker: WorkerProcess, cache: FileCache) -> Iterator[Prefetcher]:
    prefetch = Prefetcher(worker, cache)
    yield prefetch
    prefetch.stop()


def spec(*numbers: int) -> dict[str, Any]:
    return {"loras": [{"sha256": Store.name(number), "weight": 1.0} for number in numbers]}


def test_what_the_first_jobs_need_is_asked_for_in_their_order(
    make_job: MakeJob, prefetch: Prefetcher, worker: WorkerProcess
) -> None:
    for number in range(3, 3 + FETCHED_AHEAD_JOBS + 2):
        make_job(owner=User.objects.create_user(f"person {number}"), spec=spec(number, 1))
    assert prefetch.look() == [Store.name(number) for number in (3, 1, *range(4, 3 + FETCHED_AHEAD_JOBS))]
    Job.objects.all().delete()
    base = BaseModel.objects.create(name="b", source="b", fingerprint="f" * 64, files={"unet": Store.name(50)})
    make_job(spec=spec(1), base_model=base)
    assert prefetch.look() == [Store.name(1), Store.name(50)]
    worker.warm_bases = [base.fingerprint]
    assert prefetch.look() == [Store.name(1)]


def test_a_new_job_is_left_alone_until_its_lora_has_come(
    make_job: MakeJob, prefetch: Prefetcher, worker: WorkerProcess
) -> None:
    cold = make_job(spec=spec(1))
    assert jobs_claim(kind=JobKind.GENERATE, worker=worker, at_hand=prefetch.has) == []
    warm = make_job(spec=spec(), owner=User.objects.create_user("other"))
    (claim,) = jobs_claim(kind=JobKind.GENERATE, worker=worker, at_hand=prefetch.has)
    assert claim.job == warm
    (missing,) = prefetch.look()
    assert prefetch.fetch(missing)
    (claim,) = jobs_claim(kind=JobKind.GENERATE, worker=worker, at_hand=prefetch.has)
    assert claim.job == cold


def test_a_job_is_not_left_alone_for_long(make_job: MakeJob, prefetch: Prefetcher, worker: WorkerProcess) -> None:
    cold = make_job(spec=spec(1))
    Job.objects.filter(pk=cold.pk).update(queued_at=timezone.now() - timedelta(seconds=FETCH_SECONDS + 1))
    (claim,) = jobs_claim(kind=JobKind.GENERATE, worker=worker, at_hand=prefetch.has)
    assert claim.job == cold


def test_a_job_whose_lora_is_not_here_joins_nobody_and_one_with_it_does(
    make_job: MakeJob, prefetch: Prefetcher, worker: WorkerProcess
) -> None:
    prefetch.fetch(Store.name(2))
    first, cold, warm = (make_job(spec=spec(*numbers) | {"count": 1}) for numbers in ((), (1,), (2,)))
    Job.objects.update(batch_key="same")
    claims = jobs_claim(kind=JobKind.GENERATE, worker=worker, at_most=8, at_hand=prefetch.has)
    assert {claim.job for claim in claims} == {first, warm}
    assert cold in Job.objects.claimable()


def test_a_store_that_is_away_costs_the_job_nothing_but_the_time(
    make_job: MakeJob, prefetch: Prefetcher, store: Store
) -> None:
    make_job(spec=spec(1))
    store.is_away = True
    (missing,) = prefetch.look()
    assert not prefetch.fetch(missing)
    assert prefetch.look() == []  # not again at once
    assert not prefetch.wait(0)


def test_what_waits_for_its_job_is_not_removed(make_job: MakeJob, worker: WorkerProcess, tmp_path: Path) -> None:
    store = Store()
    cache = FileCache(tmp_path / "small", download=store.download, capacity=20)  # two files
    prefetch = Prefetcher(worker, cache)
    make_job(spec=spec(1))
    with cache.pins() as pins:
        cache.get(Store.name(1), pins=pins, ahead=True)
    prefetch.look()
    for number in range(2, 9):
        with cache.pins() as pins:
            cache.get(Store.name(number), pins=pins)
    assert cache.has(Store.name(1))
    Job.objects.all().delete()
    prefetch.look()
    for number in range(2, 9):
        with cache.pins() as pins:
            cache.get(Store.name(number), pins=pins)
    assert not cache.has(Store.name(1))


@pytest.mark.django_db(transaction=True)
def test_a_free_process_waits_for_the_file_and_computes_the_job(
    context: WorkerContext, make_job: MakeJob, cache: FileCache, store: Store
) -> None:
    job = make_job(spec=spec(1))
    context.prefetch = Prefetcher(context.worker, cache)
    context.prefetch.start()
    try:
        drain(JobKind.GENERATE, Work)
    finally:
        context.prefetch.stop()
    assert store.reads == [Store.name(1)]
    assert job.attempts.count() == 1


@pytest.mark.django_db(transaction=True)
def test_a_database_that_is_away_ends_no_thread(
    prefetch: Prefetcher, make_job: MakeJob, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_job(spec=spec(1))
    looked, look = threading.Event(), prefetch.look
    answers: list[Exception] = [OperationalError("gone"), ValueError("odd")]

    def failing() -> list[str]:
        if answers:
            raise answers.pop()
        looked.set()
        return look()

    monkeypatch.setattr(prefetch, "look", failing)
    monkeypatch.setattr("jobs.prefetch.FETCH_LOOK_SECONDS", 0.01)
    prefetch.start()
    assert looked.wait(10)
    assert prefetch.wait(5)
    assert store.reads == [Store.name(1)]
