"""Who waits for whose row, and who must not: transactions of two connections, on PostgreSQL."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.db import connection, transaction

from jobs import claims
from jobs.artifacts import artifact_name, artifact_put_stream, artifacts_pin, blob_store
from jobs.errors import TooBusy
from jobs.garbage import artifacts_remove
from jobs.models import Job, User, WorkerProcess
from jobs.status import JobKind
from jobs.submission import job_submit
from jobs.taking import Wanted, jobs_take
from jobs.usage import usage_lock
from jobs.workers import worker_register
from tests.services import postgres

ON_POSTGRESQL = "postgresql" in django_settings.DATABASES["default"]["ENGINE"]
rows_lock = pytest.mark.skipif(not ON_POSTGRESQL, reason="row locks are PostgreSQL's; run by the last test here")
WAITS_SECONDS = 0.7


class Other(threading.Thread):
    """Something that another process does at the same time, on a connection of its own."""

    def __init__(self, action: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._action = action
        self.answer: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.answer = self._action()
        except TooBusy as busy:
            self.answer = busy
        finally:
            connection.close()

    def is_done_within(self, seconds: float) -> bool:
        self.join(seconds)
        return not self.is_alive()


@pytest.fixture
def limit(settings: Any) -> Callable[..., None]:
    def set_limits(**values: int) -> None:
        settings.LORASITE = {**settings.LORASITE, **values}

    return set_limits


@contextmanager
def released_after(other_starts: Callable[[], Other]) -> Iterator[None]:
    """Inside the block's transaction, start somebody else and see that they wait for its end."""
    with transaction.atomic():
        yield
        other = other_starts()
        assert not other.is_done_within(WAITS_SECONDS), f"did not wait: {other.answer}"
    assert other.is_done_within(20)


def submit(owner: User) -> Job:
    return job_submit(owner=owner, kind=JobKind.GENERATE, spec={}, attach=lambda job: None)


def claim(worker: WorkerProcess) -> Job | None:
    return next((taken.job for taken in claims.jobs_claim(kind=JobKind.GENERATE, worker=worker)), None)


@rows_lock
@pytest.mark.django_db(transaction=True)
def test_a_claim_does_not_wait_behind_a_row_that_another_claim_has_locked() -> None:
    first, second = (submit(User.objects.create_user(name)) for name in ("first", "second"))
    worker = worker_register(queues=["gpu"], device="cpu")
    with transaction.atomic():
        Job.objects.select_for_update().get(pk=first.pk)
        other = Other(lambda: claim(worker))
        assert other.is_done_within(10)
    assert other.answer == second


@rows_lock
@pytest.mark.django_db(transaction=True)
def test_a_claim_waits_while_another_takes_the_last_place_of_the_same_person(limit: Callable[..., None]) -> None:
    limit(MAX_RUNNING_GENERATIONS_PER_PERSON=1)
    owner = User.objects.create_user("owner")
    first, _ = submit(owner), submit(owner)
    workers = [worker_register(queues=["gpu"], device="cpu") for _ in range(2)]
    others = []

    def claim_too() -> Other:
        others.append(Other(lambda: claim(workers[1])))
        return others[0]

    with released_after(claim_too):
        usage_lock(owner.pk)
        assert jobs_take([Wanted(first.pk, owner.pk, first.kind)], worker=workers[0], limits={})[0]
    assert others[0].answer is None


@rows_lock
@pytest.mark.django_db(transaction=True)
def test_a_submission_waits_while_another_takes_the_last_place_of_the_same_person(limit: Callable[..., None]) -> None:
    limit(MAX_QUEUED_JOBS_PER_PERSON=1)
    owner = User.objects.create_user("owner")
    others = []

    def submit_too() -> Other:
        others.append(Other(lambda: submit(owner)))
        return others[0]

    with released_after(submit_too):
        submit(owner)
    assert isinstance(others[0].answer, TooBusy)


@rows_lock
@pytest.mark.django_db(transaction=True)
def test_a_sweep_leaves_what_a_writer_is_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(django_settings.LORASITE, "GARBAGE_AFTER_SECONDS", -60.0)  # Everything counts as old.
    sha256, _ = artifact_put_stream(BytesIO(os.urandom(50)))
    with transaction.atomic():
        artifacts_pin([sha256])
        sweep = Other(lambda: artifacts_remove([sha256]))
        assert sweep.is_done_within(10)
    assert sweep.answer == 0
    assert blob_store().sizes([artifact_name(sha256)])


@pytest.mark.slow
@pytest.mark.skipif(ON_POSTGRESQL, reason="runs there already")
def test_these_locks_hold_on_postgresql(tmp_path: Path) -> None:
    with postgres(tmp_path) as url:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
            env=os.environ | {"LORASITE_DATABASE_URL": url},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "4 passed" in done.stdout
