"""How long a claim takes on PostgreSQL beside 100,000 finished and 3,000 waiting jobs of 50 people; is it right?

    python -m tests.benchmarks.claim_scale [--claims N] [--finished N] [--queued N]

Starts a server of its own. The last line is one JSON object; times are wall times of the whole claim.
"""

import argparse
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.services import postgres

if TYPE_CHECKING:
    from jobs.models import WorkerProcess
    from jobs.taking import Claim

GOAL_P99_MS = 20.0
PEOPLE = 50
HELD_AT_ONCE = 16
THREADS = 4


def main() -> None:
    """Fill, claim, compare, print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--claims", type=int, default=400)
    options.add_argument("--finished", type=int, default=100_000)
    options.add_argument("--queued", type=int, default=3000)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch, postgres(Path(scratch)) as url:
        os.environ["LORASITE_DATABASE_URL"] = url
        os.environ["DJANGO_SETTINGS_MODULE"] = "lorasite.settings.test"
        import django

        django.setup()
        logging.disable(logging.CRITICAL)
        from django.core.management import call_command
        from django.db import connection

        call_command("migrate", verbosity=0)
        fill(given.finished, given.queued)
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE")
        result = measure(given.claims)
        connection.close()
    sys.stdout.write(json.dumps(result) + "\n")


def fill(finished: int, queued: int) -> None:
    """People with a history, and a line in which a few of them have most jobs (Zipf with exponent 1)."""
    from django.db import connection
    from django.db.models import F
    from django.utils import timezone

    from jobs.models import Job, OwnerUsage, User
    from jobs.status import JobKind

    chance, now = random.Random(7), timezone.now()
    people = [
        User(username=f"person-{number}", scheduling_weight=chance.choice((1, 1, 1, 2))) for number in range(PEOPLE)
    ]
    User.objects.bulk_create(people)
    OwnerUsage.objects.bulk_create(
        OwnerUsage(owner=person, worker_seconds=chance.uniform(0, 2000), as_of=now) for person in people
    )
    owners = chance.choices(people, weights=[1 / rank for rank in range(1, PEOPLE + 1)], k=queued)

    def job(owner: User, age_s: int) -> Job:
        return Job(
            owner=owner,
            kind=JobKind.GENERATE,
            spec={"prompt": "a picture of something that takes some words to say", "count": 1, "steps": 30},
            spec_hash="0" * 64,
            priority=chance.choice((0, 0, 0, 1)),
            batch_key=f"key-{chance.randrange(40)}",
            estimated_seconds=4.3,
            queued_at=now - timedelta(seconds=age_s),
        )

    Job.objects.bulk_create(job(owner, queued - number) for number, owner in enumerate(owners))
    # `created_at` is set by the insert: spread it as the ages say.
    Job.objects.update(created_at=F("queued_at"))
    columns = {field.column: f'"{field.column}"' for field in Job._meta.concrete_fields}
    columns |= {"id": "gen_random_uuid()", "state": "'succeeded'", "token": "1", "attempts_count": "1"}
    columns |= dict.fromkeys(("created_at", "started_at"), "queued_at - random() * interval '30 days'")
    columns |= {"finished_at": "queued_at", "used_worker_seconds": "4.3"}
    with connection.cursor() as cursor:
        names, values = ", ".join(f'"{name}"' for name in columns), ", ".join(columns.values())
        cursor.execute(
            f"INSERT INTO jobs_job ({names}) SELECT {values} FROM jobs_job, generate_series(1, %s) LIMIT %s",  # noqa: S608 - names of our own columns
            [finished // queued + 1, finished],
        )
        cursor.execute(
            "INSERT INTO jobs_jobattempt"
            " (job_id, token, worker_name, started_at, ended_at, outcome, reason, from_step, to_step)"
            " SELECT id, 1, 'past', started_at, finished_at, 'succeeded', '', 0, 0 FROM jobs_job WHERE token = 1"
        )


def measure(claims: int) -> dict[str, Any]:
    """Claims one by one and in batches, beside others and alone, each compared with the rules over the whole line."""
    from django.conf import settings

    from jobs.models import JobAttempt
    from jobs.workers import worker_ready, worker_register

    settings.LORASITE["MAX_RUNNING_GENERATIONS_PER_PERSON"] = 8
    worker = worker_register(queues=["gpu"], device="cpu")
    worker_ready(worker=worker, warm_bases=[])

    agreed: list[bool] = []
    cpu: list[float] = []
    single, taken = timed(claims, worker, at_most=1, agreed=agreed, cpu=cpu)
    batched, more = timed(claims // 4, worker, at_most=8, agreed=None, cpu=[])
    crowded, most = at_once(claims // 2)
    everything = taken + more + most
    once = len({claim.job.pk for claim in everything}) == len(everything)
    attempts = JobAttempt.objects.filter(job__in=[claim.job.pk for claim in everything]).count() == len(everything)
    per_batch = len(more) / len(batched)
    checks = [
        ("claim p50, ms", _quantile(single, 0.5), GOAL_P99_MS, "lower"),
        ("claim p99, ms", _quantile(single, 0.99), GOAL_P99_MS, "lower"),
        ("claim of a batch of 8 p99, ms", _quantile(batched, 0.99), 2 * GOAL_P99_MS, "lower"),
        (
            "claims that agree with the rules over the whole line, percent",
            100 * statistics.mean(agreed),
            99.0,
            "higher",
        ),
        ("jobs claimed twice", float(len(everything) - len({c.job.pk for c in everything})), 0.0, "lower"),
    ]
    return {
        "name": "claim_scale",
        "correct": once and attempts and statistics.mean(agreed) >= 0.99,
        "max_diff": 0.0,
        "claims": {"one by one": len(single), "batches": len(batched), "jobs per batch": per_batch},
        "beside others": {
            "threads": THREADS,
            "p50_ms": _quantile(crowded, 0.5),
            "p99_ms": _quantile(crowded, 0.99),
        },
        "claim, CPU ms of the claiming process": {"p50": _quantile(cpu, 0.5), "p99": _quantile(cpu, 0.99)},
        "load average": os.getloadavg(),
        "checks": [
            {"what": what, "value": value, "goal": goal, "better": better} for what, value, goal, better in checks
        ],
    }


def timed(
    rounds: int, worker: "WorkerProcess", *, at_most: int, agreed: list[bool] | None, cpu: list[float]
) -> "tuple[list[float], list[Claim]]":
    """(milliseconds of each claim, everything taken); older jobs end meanwhile, so that limits do not fill up."""
    from jobs.claims import jobs_claim
    from jobs.status import JobKind

    times, taken, held = [], [], []
    for _ in range(rounds):
        before = expected(worker) if agreed is not None else set()
        began, own = time.perf_counter(), time.thread_time()
        got = jobs_claim(kind=JobKind.GENERATE, worker=worker, at_most=at_most)
        times.append(1000 * (time.perf_counter() - began))
        cpu.append(1000 * (time.thread_time() - own))
        if agreed is not None:
            agreed.append(bool(got) and got[0].job.pk in before)
        taken += got
        held += got
        while len(held) > HELD_AT_ONCE:
            end(held.pop(0))
    for claim in held:
        end(claim)
    return times, taken


def at_once(rounds: int) -> "tuple[list[float], list[Claim]]":
    """The same by several workers at the same time."""
    from django.db import connection

    from jobs.claims import jobs_claim
    from jobs.status import JobKind
    from jobs.workers import worker_register

    times: list[float] = []
    taken: list[Claim] = []

    def work() -> None:
        worker = worker_register(queues=["gpu"], device="cpu")
        for _ in range(rounds // THREADS):
            began = time.perf_counter()
            got = jobs_claim(kind=JobKind.GENERATE, worker=worker)
            times.append(1000 * (time.perf_counter() - began))
            for claim in got:
                end(claim)
            taken.extend(got)
        connection.close()

    _in_threads(work)
    return times, taken


def expected(worker: "WorkerProcess") -> set[Any]:
    """Jobs that the rules choose when they see every waiting job, without the claim's own queries.

    More than one where the seconds until the claim itself looks may let a running job's use pass a step.
    """
    from django.conf import settings
    from django.utils import timezone

    from jobs.models import Job, OwnerUsage, User
    from jobs.scheduling import Candidate, Owner, Running, Scheduler
    from jobs.status import JobKind, JobState
    from jobs.usage import decayed

    now = timezone.now()
    columns = ("id", "owner_id", "priority", "created_at", "queued_at", "estimated_seconds")
    line = [
        Candidate(**{"job_id" if name == "id" else name: value for name, value in row.items()})
        for row in Job.objects.filter(state=JobState.QUEUED, kind=JobKind.GENERATE).values(*columns)
    ]
    weights = dict(User.objects.values_list("pk", "scheduling_weight"))
    owners = {
        usage.owner_id: Owner(
            used_seconds=decayed(usage.worker_seconds, usage.as_of, now),
            served_at=usage.as_of,
            weight=weights[usage.owner_id],
        )
        for usage in OwnerUsage.objects.all()
    }
    held = Job.objects.filter(state=JobState.RUNNING, attempts__ended_at__isnull=True)
    running = [
        Running(owner_id=owner_id, kind=kind, started_at=started_at, estimated_seconds=seconds)
        for owner_id, kind, started_at, seconds in held.values_list(
            "owner_id", "kind", "attempts__started_at", "estimated_seconds"
        )
    ]
    limits: dict[str, int] = {JobKind.GENERATE: settings.LORASITE["MAX_RUNNING_GENERATIONS_PER_PERSON"]}
    rules: dict[str, Any] = {
        "owners": owners,
        "running": running,
        "limits": limits,
        "warm_bases": frozenset(worker.warm_bases),
    }
    moments = (now + timedelta(seconds=later / 4) for later in range(9))
    return {next(Scheduler(now=moment, **rules).order(line)).job_id for moment in moments}


def end(claim: "Claim") -> None:
    """Let a claimed job succeed."""
    from django.db import transaction

    from jobs import lifecycle

    lifecycle.job_uploading(job_id=claim.job.pk, token=claim.token)
    with transaction.atomic():
        lifecycle.job_succeed(job_id=claim.job.pk, token=claim.token)


def _in_threads(work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


if __name__ == "__main__":
    main()
