"""A claim whose answer came late has less of its lease left than a fresh one."""

import time

import pytest
from django.conf import settings

from core import failpoints
from jobs.heartbeat import Fenced, Hold
from jobs.models import WorkerProcess
from jobs.status import JobKind
from tests.factories import claim_one
from tests.jobs.conftest import MakeJob


def test_a_worker_that_heard_of_its_claim_after_the_lease_ran_out_does_not_begin(
    make_job: MakeJob, worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(settings.LORASITE, "LEASE_SECONDS", 1.0)

    def answer_late(point: str) -> None:
        if point == "claim.commit:after":
            time.sleep(1.0)

    make_job()
    failpoints.install(answer_late)
    try:
        late = claim_one(kinds=[JobKind.GENERATE], worker=worker)
    finally:
        failpoints.install(None)
    make_job()
    prompt = claim_one(kinds=[JobKind.GENERATE], worker=worker)
    assert late is not None
    assert prompt is not None
    Hold(prompt, lambda: False).check()
    with pytest.raises(Fenced):
        Hold(late, lambda: False).check()
