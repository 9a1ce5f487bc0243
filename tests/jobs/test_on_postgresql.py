"""The rules of jobs hold on PostgreSQL as well: the same tests, run once more on a real server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services import postgres

HERE = Path(__file__).parent


@pytest.mark.slow
def test_the_job_tests_pass_on_postgresql(tmp_path: Path) -> None:
    names = ["lifecycle", "prepared_sql", "drain", "heartbeat", "dispatch", "quotas", "versions_side_by_side"]
    files = [str(HERE / f"test_{name}.py") for name in names] + [str(HERE / "api" / "test_admission.py")]
    with postgres(tmp_path) as url:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
            env=os.environ | {"LORASITE_DATABASE_URL": url},
            cwd=HERE.parents[1],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
