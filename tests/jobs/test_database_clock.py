"""Leases are counted by the database's clock, whatever the worker's says."""

import time

import pytest

from jobs.database_clock import after
from jobs.models import WorkerProcess


@pytest.mark.django_db
def test_the_time_is_the_databases_when_it_answers_and_not_the_workers_when_it_asks(worker: WorkerProcess) -> None:
    hour_ahead, now = after(3600.0), after(0.0)
    row = WorkerProcess.objects.annotate(early=now, late=hour_ahead).values_list("early", "late")
    first = row.get(pk=worker.pk)
    time.sleep(0.05)
    second = row.get(pk=worker.pk)
    assert (first[1] - first[0]).total_seconds() == pytest.approx(3600.0)
    assert (second[0] - first[0]).total_seconds() >= 0.05
    assert (second[1] - first[1]).total_seconds() >= 0.05
