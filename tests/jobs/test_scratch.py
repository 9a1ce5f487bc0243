"""Scratch folders never pile up, and nobody removes another attempt's."""

from pathlib import Path

from django.conf import settings

from core.errors import TrainingDiverged
from jobs import lifecycle, recovery
from jobs.drain import run
from jobs.heartbeat import Hold
from jobs.models import WorkerProcess
from jobs.scratch import scratch_open, scratch_remove, scratch_sweep
from jobs.status import JobKind
from jobs.worker_context import WorkerContext
from tests.factories import claim_one
from tests.jobs.conftest import MakeJob, expire_lease


def take(worker: WorkerProcess) -> Hold:
    claim = claim_one(kinds=[JobKind.GENERATE], worker=worker)
    assert claim is not None
    return Hold(claim, lambda: False)


def folders() -> list[Path]:
    return list((Path(settings.LORASITE["DATA"]) / "scratch").glob("*/*"))


def test_a_failed_job_leaves_no_folder(make_job: MakeJob, context: WorkerContext) -> None:
    class Failing:
        def __init__(self, hold: Hold) -> None:
            self.hold = hold
            self.folder = scratch_open(hold)

        def compute(self) -> None:
            (self.folder / "half.safetensors").write_bytes(b"x")
            raise TrainingDiverged("nan")

        def files(self) -> list[Path]:
            return []

        def store(self) -> None: ...

        def record(self) -> None: ...

    make_job()
    run([take(context.worker)], Failing)
    assert folders() == []


def test_a_zombie_removes_its_own_folder_and_not_its_successors(make_job: MakeJob, worker: WorkerProcess) -> None:
    job = make_job()
    zombie = take(worker)
    scratch_open(zombie)
    expire_lease(job)
    successor = take(worker)
    kept = scratch_open(successor)
    (kept / "checkpoint").write_text("mine")
    scratch_remove(zombie)
    assert folders() == [kept]
    scratch_remove(successor)
    assert folders() == []


def test_a_starting_worker_sweeps_what_a_crash_left_and_keeps_what_is_held(
    make_job: MakeJob, worker: WorkerProcess
) -> None:
    crashed_job = make_job()
    crashed = take(worker)
    scratch_open(crashed)
    expire_lease(crashed_job)
    recovery.expired_leases_requeue()
    lifecycle.job_cancel(job=crashed_job)
    make_job()
    held = scratch_open(take(worker))
    assert scratch_sweep() == 1
    assert folders() == [held]
    scratch_remove_all()


def scratch_remove_all() -> None:
    for folder in folders():
        folder.rmdir()
        folder.parent.rmdir()
