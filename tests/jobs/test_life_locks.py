"""A worker process that was killed is noticed by its lock; a living one, or one of another machine, is left alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.life_locks import _boot_id, dead_workers_close
from jobs.models import Job, WorkerProcess
from jobs.status import AttemptOutcome, JobState, WorkerState
from tests.factories import take
from tests.jobs.conftest import MakeJob

HOLDER = """
import os, sys, types
import django; django.setup()
from django.conf import settings
settings.LORASITE["DATA"] = sys.argv[1]
from jobs.life_locks import life_lock_take
life_lock_take(types.SimpleNamespace(pk=sys.argv[2]))
sys.stdout.write("held\\n"); sys.stdout.flush()
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path, settings: Any) -> Path:
    settings.LORASITE = settings.LORASITE | {"DATA": tmp_path}
    return tmp_path / "workers"


def living(folder: Path, worker: WorkerProcess) -> "subprocess.Popen[bytes]":
    """A process that holds this worker's lock."""
    command = [sys.executable, "-c", HOLDER, str(folder.parent), str(worker.pk)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def held_job(make_job: MakeJob, worker: WorkerProcess) -> Job:
    job = make_job()
    assert take(job, worker) is not None
    return job


def test_a_killed_worker_loses_its_jobs_at_once_and_only_then(
    folder: Path, make_job: MakeJob, worker: WorkerProcess
) -> None:
    job = held_job(make_job, worker)
    process = living(folder, worker)
    assert dead_workers_close() == 0
    os.kill(process.pid, signal.SIGSTOP)
    assert dead_workers_close() == 0, "a frozen process is not dead"
    process.kill()
    process.wait()
    assert dead_workers_close() == 1
    job.refresh_from_db()
    assert (job.state, job.barren_losses) == (JobState.QUEUED, 1)
    assert job.attempts.get().outcome == AttemptOutcome.LOST
    worker.refresh_from_db()
    assert worker.state == WorkerState.GONE
    assert list(folder.iterdir()) == []


def test_a_job_that_others_hold_by_now_is_not_touched(folder: Path, make_job: MakeJob, worker: WorkerProcess) -> None:
    from tests.factories import make_worker

    other = make_worker()
    job = held_job(make_job, other)
    process = living(folder, worker)
    process.kill()
    process.wait()
    assert dead_workers_close() == 0
    job.refresh_from_db()
    assert (job.state, job.worker_id) == (JobState.RUNNING, other.pk)


def test_locks_of_another_machine_are_not_tried(folder: Path, make_job: MakeJob, worker: WorkerProcess) -> None:
    job = held_job(make_job, worker)
    folder.mkdir()
    lock = folder / f"{worker.pk}.another-boot"
    lock.touch()
    assert dead_workers_close() == 0
    assert lock.exists(), "its worker was heard just now"
    WorkerProcess.objects.filter(pk=worker.pk).update(state=WorkerState.GONE)
    assert dead_workers_close() == 0
    assert not lock.exists()
    job.refresh_from_db()
    assert job.state == JobState.RUNNING
    assert _boot_id() != "another-boot"
