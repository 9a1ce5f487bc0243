"""A worker process that comes up while the database is away must not stay useless once it is back."""

import sys
from pathlib import Path

import pytest

from tests.chaos.database import Database
from tests.chaos.fault_proxy import Fault
from tests.chaos.site import Site, spawn
from tests.services import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_jobs_run_after_a_worker_started_without_its_database(tmp_path: Path) -> None:
    site = Site(tmp_path, database="postgres", workers=1, children=1)
    try:
        site.start()
        assert site.database_proxy is not None
        database = Database(site.database_url)
        workload = spawn(
            [sys.executable, "-m", "tests.chaos.workload", "1", "3", "3"], tmp_path / "workload.log", site.environment
        )
        wait_until(lambda: database.unfinished() > 0, "jobs wait", log=tmp_path / "workload.log")
        workload.terminate()
        workload.wait(timeout=60)

        site.database_proxy.set(Fault.REFUSE)
        site.start_all()
        log = tmp_path / "node0.log"
        wait_until(lambda: log.exists() and "could not start" in log.read_text(), "a child fails to start", log=log)
        site.database_proxy.set(Fault.NONE)
        wait_until(lambda: database.unfinished() == 0, "the waiting jobs end", seconds=90, log=log)
        states = {row["state"] for row in database.rows("SELECT state FROM jobs_job")}
        assert "succeeded" in states
        assert states <= {"succeeded", "cancelled"}
        database.close()
    finally:
        site.close()
