"""Statements that are compiled once answer as the ORM's own, with the values of each run."""

from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.db.models import CharField, F, IntegerField, QuerySet, UUIDField
from django.db.models.functions import Now
from django.db.models.sql import InsertQuery, UpdateQuery
from django.utils import timezone

from jobs.models import Job, JobEvent
from jobs.prepared_sql import Parameter, Read, Write, insert_of, listed, parameters, rounded_up, send, update_of
from jobs.status import JobKind
from tests.jobs.conftest import MakeJob

COLUMNS = ("id", "owner_id", "kind", "spec", "created_at", "lease_until", "estimated_seconds", "base_model__name")


def test_rows_come_back_as_the_orm_would_give_them(make_job: MakeJob) -> None:
    jobs = [make_job(spec={"count": 2, "prompt": "100 %s %%"}), make_job(kind=JobKind.TRAIN)]

    def build() -> "QuerySet[Job, Any]":
        return Job.objects.filter(pk=Parameter("job_id", UUIDField())).annotate(now=Now()).values_list(*COLUMNS, "now")

    read = Read(build)
    for job in jobs:
        (row,) = read.rows(job_id=job.pk)
        assert tuple(row[:-1]) == Job.objects.values_list(*COLUMNS).get(pk=job.pk)
        assert abs(timezone.now() - row[-1]) < timedelta(minutes=1)


def test_a_statement_is_built_once_for_each_shape(make_job: MakeJob) -> None:
    jobs, built = [make_job() for _ in range(3)], []

    def build(count: int) -> "QuerySet[Job, Any]":
        built.append(count)
        return Job.objects.filter(pk__in=parameters("job", count, UUIDField())).values_list("pk")

    read = Read(build)
    for wanted in ([jobs[0]], [jobs[1]], jobs, jobs[:2], jobs[1:]):
        count = rounded_up(len(wanted))
        rows = read.rows(count, **listed("job", count, [job.pk for job in wanted]))
        assert {pk for (pk,) in rows} == {job.pk for job in wanted}
    assert built == [1, 4, 2]


def test_an_update_changes_what_fits_and_says_how_much(make_job: MakeJob) -> None:
    job, other = make_job(), make_job()

    def build() -> UpdateQuery:
        fitting = Job.objects.filter(pk=Parameter("job_id", UUIDField()), token=Parameter("token", IntegerField()))
        return update_of(fitting, stage=Parameter("stage", CharField()), progress_total=F("progress_total") + 1)

    update = Write(build)
    assert update.write(job_id=job.pk, token=0, stage="it's 5 %") == 1
    assert update.write(job_id=job.pk, token=7, stage="fenced") == 0
    assert update.write(job_id=other.pk, token=0, stage="second") == 1
    rows = Job.objects.order_by("created_at").values_list("stage", "progress_total")
    assert list(rows) == [("it's 5 %", 1), ("second", 1)]


def test_an_insert_makes_a_row_with_the_models_defaults(make_job: MakeJob) -> None:
    job = make_job()

    def build() -> InsertQuery:
        brought: dict[str, Any] = {"job_id": Parameter("job_id", UUIDField()), "reason": Parameter("why", CharField())}
        return insert_of(JobEvent(at=Now(), new_state="queued", **brought))

    insert = Write(build)
    assert [insert.write(job_id=job.pk, why=why) for why in ("first", "second")] == [1, 1]
    rows = job.events.filter(reason__in=["first", "second"]).values_list("reason", "old_state", "new_state", "token")
    assert list(rows) == [("first", "", "queued", 0), ("second", "", "queued", 0)]


def test_several_statements_sent_together_answer_each_and_see_those_before(make_job: MakeJob) -> None:
    job, other = make_job(), make_job()

    def build() -> UpdateQuery:
        return update_of(Job.objects.filter(pk=Parameter("job_id", UUIDField())), stage=Parameter("stage", CharField()))

    def stages() -> "QuerySet[Job, Any]":
        return Job.objects.filter(owner=Parameter("owner_id", UUIDField())).order_by("stage").values_list("stage")

    update, read = Write(build), Read(stages)
    before = read.run(owner_id=job.owner_id)
    first, second = update.run(job_id=job.pk, stage="a; %"), update.run(job_id=other.pk, stage="b'")
    results = send(before, first, second, read.run(owner_id=job.owner_id))
    assert results == [[[""], [""]], 1, 1, [["a; %"], ["b'"]]]


def test_a_run_that_forgets_a_value_is_refused(make_job: MakeJob) -> None:
    read = Read(lambda: Job.objects.filter(pk=Parameter("job_id", UUIDField())).values_list("pk"))
    with pytest.raises(KeyError, match="job_id"):
        read.rows()


@pytest.mark.parametrize(("count", "places"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (200, 256)])
def test_lists_are_rounded_up_to_powers_of_two(count: int, places: int) -> None:
    assert rounded_up(count) == places
    values = listed("x", places, range(count))
    assert list(values.values()) == [*range(count), *[count - 1] * (places - count)]


def _plans_of_this_connection() -> set[str]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT statement FROM pg_prepared_statements WHERE name LIKE 'lorasite_%%'")
        return {statement for (statement,) in cursor.fetchall()}


@pytest.mark.skipif(connection.vendor != "postgresql", reason="only PostgreSQL keeps plans; runs there as well")
def test_postgresql_plans_a_statement_once_for_all_its_runs(make_job: MakeJob) -> None:
    jobs = [make_job(), make_job()]
    wanted = Parameter("job_id", UUIDField())
    read = Read(lambda: Job.objects.filter(pk=wanted, stage="").exclude(stage="100 %s %").values_list("pk"))
    before = _plans_of_this_connection()

    assert [read.rows(job_id=job.pk) for job in jobs] == [[[job.pk]] for job in jobs]

    (plan,) = _plans_of_this_connection() - before
    assert "$1" in plan
    assert "100 %s %" in plan


@pytest.mark.skipif(connection.vendor != "postgresql", reason="only PostgreSQL keeps plans; runs there as well")
def test_nothing_is_planned_ahead_behind_a_pooler_of_transactions(make_job: MakeJob) -> None:
    job, before = make_job(), _plans_of_this_connection()
    read = Read(lambda: Job.objects.filter(pk=Parameter("job_id", UUIDField())).values_list("pk"))
    connection.settings_dict["DISABLE_SERVER_SIDE_CURSORS"] = True
    try:
        assert read.rows(job_id=job.pk) == [[job.pk]]
    finally:
        connection.settings_dict["DISABLE_SERVER_SIDE_CURSORS"] = False
    assert _plans_of_this_connection() == before
