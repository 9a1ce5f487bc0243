"""A slice of the chaos in every test run: some minutes on PostgreSQL with S3, one on SQLite with a folder.

`make chaos` is the whole of it. The number of kills depends on how busy the machine is, so only a floor is asked for.
"""

from pathlib import Path

import pytest

from tests.chaos.run import Options, Outcome, chaos

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone(reason="it lasts some minutes by the clock, and asks for a number of kills within them"),
    pytest.mark.timeout(420),
]


def no_promise_is_broken(outcome: Outcome, *, kills: int) -> None:
    found = "\n".join(finding.text() for finding in outcome.report.findings)
    zeros = "lost=0 duplicated=0 overlaps=0 stale_writes=0"
    assert outcome.last_line() == f"chaos: kills={outcome.kills} jobs={outcome.jobs} {zeros} seed={outcome.seed}", found
    assert outcome.kills >= kills
    assert outcome.jobs >= outcome.kills
    assert outcome.acts["kill_child"] > 0


def test_postgresql_s3_and_the_broker_may_fail_and_workers_die_without_breaking_a_promise(tmp_path: Path) -> None:
    outcome = chaos(Options(kills=90, seed=11, minutes=1.3, folder=tmp_path))
    no_promise_is_broken(outcome, kills=10)


def test_with_sqlite_and_a_folder_workers_die_without_breaking_a_promise(tmp_path: Path) -> None:
    options = Options(kills=50, seed=12, database="sqlite", minutes=0.6, workers=2, children=2, folder=tmp_path)
    no_promise_is_broken(chaos(options), kills=4)
