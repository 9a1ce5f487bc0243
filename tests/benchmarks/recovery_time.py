"""From kill -9 of a worker process that holds a job to the next try's body, and how long a generation waits for room.

    python -m tests.benchmarks.recovery_time [--kills N]

Real PostgreSQL, Valkey, dispatcher and two prefork workers, production's settings; generations and trainings take
turns. The last line is one JSON object.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.benchmarks._light_site import LightSite, light_site
from tests.services import wait_until

GOAL_SECONDS = {"generate": 15.0, "train": 40.0}
GOAL_ROOM_SECONDS = 5.0
HOLD_SECONDS = 600.0
WORKERS = ("worker0", "worker1")


def main() -> None:
    """Kill, wait, print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=20, help="of each kind")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder, light_site(Path(folder), database="postgres") as site:
        checks = measure(site, given.kills, given.seed)
    correct = all(check["goal"] is None or check["value"] <= check["goal"] for check in checks)
    body = {"name": "recovery_time", "correct": correct, "max_diff": 0.0, "checks": checks}
    sys.stdout.write(json.dumps(body) + "\n")


def measure(site: LightSite, kills: int, seed: int) -> list[dict[str, Any]]:
    """Seconds until the second try's body, per kind."""
    from jobs.models import User
    from jobs.status import JobKind
    from jobs.submission import job_submit
    from lorasite.celery import app

    app.set_current()
    owner = User.objects.create_user("benchmark")
    for name in WORKERS:
        site.start_worker(name, 1)
    site.start_dispatcher()
    pause = random.Random(seed)
    seconds: dict[str, list[float]] = {JobKind.GENERATE.value: [], JobKind.TRAIN.value: []}
    for _ in range(kills):
        for kind, found in seconds.items():
            job = job_submit(owner=owner, kind=JobKind(kind), spec={"hold": HOLD_SECONDS}, attach=lambda job: None)
            first = site.wait_for("job", job.pk)[0]
            time.sleep(pause.uniform(0.2, 2.5))  # somewhere between two heartbeats
            os.kill(first.pid, signal.SIGKILL)
            killed_ns = time.monotonic_ns()
            second = site.wait_for("job", job.pk, tries=2)[1]
            if second.token <= first.token or second.pid == first.pid:
                raise AssertionError(f"job {job.pk} went on without a new token: {first} {second}")
            found.append((second.claimed_ns - killed_ns) / 1e9)
    room = [_room_seconds(site, owner) for _ in range(max(1, kills // 4))]
    checks: list[dict[str, Any]] = []
    for kind, found in seconds.items():
        found.sort()
        # Of fewer than a hundred values, the largest is the 99th percentile.
        p99 = found[-1] if len(found) < 100 else statistics.quantiles(found, n=100)[-1]
        for what, value, goal in (("p50", statistics.median(found), None), ("p99", p99, GOAL_SECONDS[kind])):
            text = f"{kind}: kill -9 to the next try's body {what}, seconds"
            checks.append({"what": text, "value": round(value, 2), "goal": goal, "better": "lower"})
    text = "a generation behind running trainings begins, worst, seconds"
    checks.append({"what": text, "value": round(max(room), 2), "goal": GOAL_ROOM_SECONDS, "better": "lower"})
    return checks


def _room_seconds(site: LightSite, owner: Any) -> float:
    """How long a generation waits while both workers are deep in trainings, one of which makes room."""
    from django.utils import timezone

    from jobs.lifecycle import job_cancel
    from jobs.models import Job, JobAttempt
    from jobs.status import JobKind
    from jobs.submission import job_submit

    for _ in WORKERS:  # not all READY ones: a killed one's successor may still be starting
        job = job_submit(owner=owner, kind=JobKind.TRAIN, spec={"hold": HOLD_SECONDS}, attach=lambda job: None)
        site.wait_for("job", job.pk)
    # As if they had run for long: a training that has just begun is left alone.
    JobAttempt.objects.filter(ended_at__isnull=True).update(started_at=timezone.now() - timedelta(hours=1))
    job = job_submit(owner=owner, kind=JobKind.GENERATE, spec={}, attach=lambda job: None)
    submitted_ns = time.monotonic_ns()
    began_ns = site.wait_for("job", job.pk)[0].claimed_ns
    for pk in Job.objects.active().filter(kind=JobKind.TRAIN).values_list("pk", flat=True):
        job_cancel(job=Job.objects.get(pk=pk))
    wait_until(lambda: not Job.objects.active().exists(), "the trainings have stopped")
    return (began_ns - submitted_ns) / 1e9


if __name__ == "__main__":
    main()
