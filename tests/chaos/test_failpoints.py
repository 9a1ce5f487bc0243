"""Every named point of the product times every fault: die, fail, hang or freeze there, and all ends well."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LEAST_TRIALS = 4 * 60


@pytest.mark.slow
@pytest.mark.alone(reason="ten sites at a time with leases of a second: it takes both cores by itself")
@pytest.mark.timeout(1500)
def test_whatever_happens_at_any_point_every_job_ends_well_and_once() -> None:
    command = [sys.executable, "-m", "tests.chaos.failpoints"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout.strip(), done.stderr[-4000:]
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["failures"] == [], done.stdout[-12_000:]
    assert answer["unreached"] == [], "no story of tests/chaos/misfortunes.py reaches these points: write one"
    assert answer["trials"] >= LEAST_TRIALS
    assert done.returncode == 0
