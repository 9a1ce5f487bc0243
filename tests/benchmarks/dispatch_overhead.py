"""From the COMMIT of a job to its claimed body, against Celery's own `delay()` to body in the same run.

    python -m tests.benchmarks.dispatch_overhead [--rounds N] [--database postgres|sqlite|both]

Real PostgreSQL (or SQLite), Valkey, dispatcher and prefork worker; rounds of both ways alternate while the worker is
idle. The last line is one JSON object.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks._light_site import LightSite, light_site

WARM_UP_ROUNDS = 5
GOAL_TIMES_RAW = 2.0
GOAL_SQLITE_MS = 50.0


def main() -> None:
    """Measure, print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=150)
    options.add_argument("--database", choices=["postgres", "sqlite", "both"], default="both")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    if given.database == "both":
        # One Django, and so one database, a process.
        results = [_in_own_process(database, given.rounds, given.seed) for database in ("postgres", "sqlite")]
        checks = [check for result in results for check in result["checks"]]
    else:
        with tempfile.TemporaryDirectory() as folder, light_site(Path(folder), database=given.database) as site:
            checks = measure(site, given.database, given.rounds, given.seed)
    correct = all(check["goal"] is None or check["value"] <= check["goal"] for check in checks)
    body = {"name": "dispatch_overhead", "correct": correct, "max_diff": 0.0, "checks": checks}
    sys.stdout.write(json.dumps(body) + "\n")


def measure(site: LightSite, database: str, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Alternate both ways; figures in milliseconds."""
    from celery import current_app

    from jobs.models import User
    from jobs.status import JobKind
    from jobs.submission import job_submit
    from lorasite.celery import app

    app.set_current()
    owner = User.objects.create_user("benchmark")
    site.start_worker("worker", 1)
    site.start_dispatcher()
    pause = random.Random(seed)
    raw_ms, ours_ms, until_taken_ms, claim_ms = [], [], [], []
    for number in range(rounds + WARM_UP_ROUNDS):
        # Idle, as nobody else's work is to be measured, and away from any rhythm of the loops that are.
        site.wait_until_idle()
        time.sleep(pause.uniform(0.4, 0.8))
        site.wait_until_idle()
        began = time.monotonic_ns()
        current_app.send_task("benchmark.raw", args=[str(number)], queue="gpu", ignore_result=True)
        raw = site.wait_for("raw", number)[0]
        time.sleep(pause.uniform(0.4, 0.8))
        job = job_submit(owner=owner, kind=JobKind.GENERATE, spec={}, attach=lambda job: None)
        committed = time.monotonic_ns()
        line = site.wait_for("job", job.pk)[0]
        if number >= WARM_UP_ROUNDS:
            raw_ms.append((raw.claimed_ns - began) / 1e6)
            ours_ms.append((line.claimed_ns - committed) / 1e6)
            until_taken_ms.append((line.taken_ns - committed) / 1e6)
            claim_ms.append((line.claimed_ns - line.taken_ns) / 1e6)
    p50 = statistics.median(ours_ms)
    checks: list[dict[str, Any]] = [
        _check(f"{database}: commit to claimed body p50, ms", p50, GOAL_SQLITE_MS if database == "sqlite" else None),
        _check(f"{database}: commit to claimed body p95, ms", statistics.quantiles(ours_ms, n=20)[-1]),
        _check(f"{database}: of it until the doorbell's body p50, ms", statistics.median(until_taken_ms)),
        _check(f"{database}: of it the claim p50, ms", statistics.median(claim_ms)),
        _check(f"{database}: raw delay() to body p50, ms", statistics.median(raw_ms)),
        _check(f"{database}: raw delay() to body p95, ms", statistics.quantiles(raw_ms, n=20)[-1]),
    ]
    if database == "postgres":
        checks.append(_check("postgres: p50 in times raw", p50 / statistics.median(raw_ms), GOAL_TIMES_RAW))
    return checks


def _check(what: str, value: float, goal: float | None = None) -> dict[str, Any]:
    return {"what": what, "value": round(value, 2), "goal": goal, "better": "lower"}


def _in_own_process(database: str, rounds: int, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.dispatch_overhead", "--database", database]
    command += ["--rounds", str(rounds), "--seed", str(seed)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
