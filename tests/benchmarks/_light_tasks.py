"""Bodies that claim as the real ones do and note when they began. Run by `_light_worker`.

They append lines to `LORASITE_BENCHMARK_JOURNAL`; CLOCK_MONOTONIC is the same in all processes of a machine.
"""

import os
import time

from celery import shared_task
from django.db import transaction

from core.errors import Interrupted
from core.progress import Progress
from jobs import lifecycle
from jobs.claims import jobs_claim
from jobs.doorbells import task_name
from jobs.endings import job_end
from jobs.status import JobKind
from jobs.worker_context import current

JOURNAL = "LORASITE_BENCHMARK_JOURNAL"
RAW_TASK = "benchmark.raw"


def note(*words: object) -> None:
    """One line of the journal, written in one call."""
    line = " ".join(str(word) for word in (*words, os.getpid())) + "\n"
    file = os.open(os.environ[JOURNAL], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())
    os.close(file)


@shared_task(name=RAW_TASK)
def raw(key: str) -> None:
    """Celery's own way, for comparison."""
    note("raw", key, time.monotonic_ns(), time.monotonic_ns())


def work(kind: JobKind) -> None:
    """Claim as a drain does; a job of `{"hold": seconds}` is worked on for so long, under the real heartbeat."""
    taken_at = time.monotonic_ns()
    note("begin", "drain")
    try:
        _claim_and_hold(kind, taken_at)
    finally:
        note("end", "drain")


def _claim_and_hold(kind: JobKind, taken_at: int) -> None:
    context = current()
    while claims := jobs_claim(kind=kind, worker=context.worker):
        for claim in claims:
            note("job", claim.job.pk, taken_at, time.monotonic_ns(), claim.token)
            hold = context.heartbeat.take(claim)
            end = time.monotonic() + float(claim.job.spec.get("hold", 0))
            try:
                while time.monotonic() < end and claim.token == 1:  # the second try is done at once
                    hold.report(Progress(stage="holding", step=1, total=2))
                    time.sleep(0.05)
            except Interrupted as wish:
                job_end(hold, wish)
                context.heartbeat.let_go(hold)
                return
            context.heartbeat.let_go(hold)
            lifecycle.job_uploading(job_id=claim.job.pk, token=claim.token)
            with transaction.atomic():
                lifecycle.job_succeed(job_id=claim.job.pk, token=claim.token)
        taken_at = time.monotonic_ns()


@shared_task(name=task_name(JobKind.TRAIN))
def train() -> None:
    """A training that only holds its lease."""
    work(JobKind.TRAIN)


@shared_task(name=task_name(JobKind.GENERATE))
def generate() -> None:
    """A generation that only holds its lease."""
    work(JobKind.GENERATE)
