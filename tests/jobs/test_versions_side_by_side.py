"""Rolling deploys: the first release's code works on today's schema, and neither version breaks the other's jobs."""

from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from django.apps.registry import Apps
from django.db import connection, models
from django.db.migrations.loader import MigrationLoader
from django.test import Client
from django.urls import reverse
from django.utils import timezone
from rest_framework.test import APIClient

from jobs import lifecycle, recovery
from jobs.models import Job, JobAttempt, User, WorkerProcess
from jobs.models.job import SPEC_VERSION
from jobs.queue import waiting_by_kind
from jobs.status import JobKind, JobState
from jobs.submission import job_submit
from tests.factories import bring_to, claim_one, make_job, make_worker, take

FIRST = [("jobs", "0001_initial")]


@pytest.fixture(scope="module")
def first_apps() -> Apps:
    """The models of the first release, as the code of that time has them."""
    apps: Apps = MigrationLoader(None).project_state(FIRST).apps
    return apps


@pytest.fixture
def old_person(first_apps: Apps, db: None) -> Any:
    """An account that the first release made."""
    return first_apps.get_model("jobs", "User").objects.create(username="old", password="!")


def old_models(apps: Apps) -> list[Any]:
    """All models of the first release, link tables included."""
    return [model for model in apps.get_models(include_auto_created=True) if model._meta.app_label == "jobs"]


def old_job(apps: Apps, owner: Any, **columns: Any) -> Any:
    """A job as the first release inserts it."""
    values = {"kind": "generate", "state": "queued", "spec": {"prompt": "x"}, "spec_hash": "0" * 64, **columns}
    return apps.get_model("jobs", "Job").objects.create(owner=owner, **values)


def test_a_job_of_the_first_release_is_claimed_and_finished_by_todays_code(first_apps: Apps, old_person: Any) -> None:
    old = old_job(first_apps, old_person)
    first_apps.get_model("jobs", "JobEvent").objects.create(job=old, at=timezone.now(), new_state="queued")
    job = Job.objects.get(pk=old.pk)
    assert (job.spec_version, job.batch_key, job.estimated_seconds, job.memory_rung) == (1, "", 0.0, 0)
    assert abs(job.queued_at - timezone.now()) < timedelta(seconds=60)
    assert waiting_by_kind() == {"generate": 1}
    claim = claim_one(kinds=[JobKind.GENERATE], worker=make_worker())
    assert claim is not None and claim.job.pk == old.pk
    lifecycle.job_uploading(job_id=job.pk, token=claim.token)
    lifecycle.job_succeed(job_id=job.pk, token=claim.token)
    after = first_apps.get_model("jobs", "Job").objects.get(pk=old.pk)
    assert (after.state, after.token, after.attempts.get().outcome) == ("succeeded", 1, "succeeded")


def test_the_first_release_claims_loses_and_ends_todays_jobs(first_apps: Apps, owner: User) -> None:
    OldJob, OldAttempt = (first_apps.get_model("jobs", name) for name in ("Job", "JobAttempt"))
    worker = first_apps.get_model("jobs", "WorkerProcess").objects.create(
        host="old", pid=1, heartbeat_at=timezone.now()
    )
    job = make_job(owner)
    until = timezone.now() - timedelta(seconds=5)
    taken = OldJob.objects.filter(pk=job.pk, state="queued", token=0).update(
        state="running", token=1, worker=worker, lease_until=until, attempts_count=1, started_at=timezone.now()
    )
    assert taken == 1
    OldAttempt.objects.create(job_id=job.pk, token=1, worker=worker, worker_name="old:1", started_at=timezone.now())
    assert JobAttempt.objects.get().memory_rung == 0

    assert recovery.expired_leases_requeue() == 1
    job.refresh_from_db()
    assert (job.state, job.barren_losses) == (JobState.QUEUED, 1)
    # The old worker's late writes name a token that the row still has, but no state that allows them.
    assert not OldJob.objects.filter(pk=job.pk, token=1, state__in=["running", "uploading"]).update(state="uploading")

    claim = claim_one(kinds=[JobKind.GENERATE], worker=make_worker())
    assert claim is not None and claim.token == 2
    ended = OldJob.objects.filter(pk=job.pk, token=1).update(state="failed", error_code="x", lease_until=None)
    assert not ended, "fenced"
    lifecycle.job_release(job_id=job.pk, token=2, reason="deploy")
    OldJob.objects.filter(pk=job.pk, state="queued").update(state="cancelled", finished_at=timezone.now())
    job.refresh_from_db()
    assert job.state == JobState.CANCELLED


def test_rows_of_every_table_of_the_first_release_are_still_inserted(first_apps: Apps, old_person: Any) -> None:
    get = first_apps.get_model
    now = timezone.now()
    base = get("jobs", "BaseModel").objects.create(name="old base", source="/old")
    dataset = get("jobs", "Dataset").objects.create(owner=old_person, name="old")
    get("jobs", "DatasetImage").objects.create(
        owner=old_person, dataset=dataset, name="a", sha256="0" * 64, size_bytes=1, width=1, height=1
    )
    version = get("jobs", "DatasetVersion").objects.create(
        owner=old_person, dataset=dataset, number=1, job=old_job(first_apps, old_person, kind="preprocess")
    )
    run = get("jobs", "TrainingRun").objects.create(
        owner=old_person,
        job=old_job(first_apps, old_person, kind="train", base_model=base),
        dataset_version=version,
        base_model=base,
        lora_name="old",
    )
    lora = get("jobs", "Lora").objects.create(owner=old_person, name="old", base_model=base)
    lora_version = get("jobs", "LoraVersion").objects.create(
        owner=old_person,
        lora=lora,
        number=1,
        training_run=run,
        kohya_sha256="0" * 64,
        kohya_size_bytes=1,
        model_hash="0" * 64,
    )
    request = get("jobs", "GenerationRequest").objects.create(
        owner=old_person, job=old_job(first_apps, old_person), base_model=base
    )
    get("jobs", "GenerationLora").objects.create(request=request, lora_version=lora_version)
    get("jobs", "GeneratedImage").objects.create(
        owner=old_person, request=request, number=0, seed=0, sha256="0" * 64, size_bytes=1, width=1, height=1
    )
    get("jobs", "ApiKey").objects.create(user=old_person, name="k", prefix="lrs_", secret_sha256="0" * 64)
    get("jobs", "LeaderLease").objects.create(role="r", holder="h", lease_until=now, beat_at=now)
    worker = get("jobs", "WorkerProcess").objects.create(host="old", pid=1, heartbeat_at=now)
    job = request.job
    get("jobs", "JobAttempt").objects.create(job=job, token=1, worker=worker, worker_name="w", started_at=now)
    get("jobs", "JobEvent").objects.create(job=job, at=now, new_state="queued")
    empty = {model._meta.model_name for model in old_models(first_apps) if not model.objects.exists()}
    # Who belongs to which group is Django's own table, without a column of ours.
    assert empty == {"user_groups", "user_user_permissions"}


def columns_of(table: str) -> dict[str, dict[str, Any]]:
    """{column: {null, default, size}} of the real table."""
    with connection.cursor() as cursor:
        if connection.vendor == "sqlite":
            cursor.execute(f"PRAGMA table_info({connection.ops.quote_name(table)})")
            rows = [(name, not notnull, default) for _, name, _, notnull, default, _ in cursor.fetchall()]
        else:
            cursor.execute(
                "SELECT column_name, is_nullable = 'YES', column_default FROM information_schema.columns "
                "WHERE table_schema = current_schema() AND table_name = %s",
                [table],
            )
            rows = cursor.fetchall()
        found: dict[str, dict[str, Any]] = {name: {"null": null, "default": default} for name, null, default in rows}
        for column in connection.introspection.get_table_description(cursor, table):
            found[column.name]["size"] = column.display_size
    return found


def test_every_column_of_later_is_optional_and_none_of_the_first_was_removed_or_narrowed(
    first_apps: Apps, db: None
) -> None:
    checked = 0
    for model in old_models(first_apps):
        real = columns_of(model._meta.db_table)
        first = {field.column: field for field in model._meta.local_concrete_fields}
        assert set(first) <= set(real), f"{model._meta.db_table} lost a column that the first release writes"
        for name, field in first.items():
            if field.null:
                assert real[name]["null"], f"{model._meta.db_table}.{name} no longer takes NULL"
            length = real[name]["size"]
            if isinstance(field, models.CharField) and connection.vendor == "postgresql" and length:
                assert length >= field.max_length, f"{model._meta.db_table}.{name} became shorter"
        for name in set(real) - set(first):
            optional = real[name]["null"] or real[name]["default"] is not None
            assert optional, f"{model._meta.db_table}.{name} has neither NULL nor a default: old code cannot insert"
            checked += 1
    assert checked >= 12, "the columns of 0002 at least"


def test_every_value_that_the_first_release_may_write_is_still_a_choice(first_apps: Apps) -> None:
    for today, name in ((Job, "kind"), (Job, "state"), (JobAttempt, "outcome"), (WorkerProcess, "state")):
        first = first_apps.get_model("jobs", today.__name__)._meta.get_field(name)
        assert {value for value, _ in first.choices} <= {value for value, _ in today._meta.get_field(name).choices}


@pytest.fixture
def job_of_tomorrow(owner: User) -> Job:
    """A job that newer code submitted, with a field that this code does not know."""
    job = make_job(owner)
    Job.objects.filter(pk=job.pk).update(spec_version=SPEC_VERSION + 1, spec={**job.spec, "field_of_tomorrow": 1})
    job.refresh_from_db()
    return job


def test_a_job_of_a_newer_specification_is_left_to_newer_workers(job_of_tomorrow: Job) -> None:
    worker = make_worker()
    assert claim_one(kinds=list(JobKind), worker=worker) is None
    assert take(job_of_tomorrow, worker) is None
    assert waiting_by_kind() == {}, "the dispatcher rings nobody for it"
    job_of_tomorrow.refresh_from_db()
    assert (job_of_tomorrow.state, job_of_tomorrow.attempts_count) == (JobState.QUEUED, 0)


def test_a_job_of_a_newer_specification_does_not_stand_in_the_way_of_others(job_of_tomorrow: Job, owner: User) -> None:
    other = make_job(owner, base_model=job_of_tomorrow.base_model)
    assert waiting_by_kind() == {"generate": 1}
    claim = claim_one(kinds=[JobKind.GENERATE], worker=make_worker())
    assert claim is not None and claim.job.pk == other.pk


def test_a_job_of_a_newer_specification_is_seen_and_cancelled_by_its_owner(
    job_of_tomorrow: Job, api: APIClient
) -> None:
    url = reverse("job", args=[job_of_tomorrow.pk])
    assert api.get(url).json()["state"] == "queued"
    assert [row["id"] for row in api.get(reverse("jobs")).json()["results"]] == [str(job_of_tomorrow.pk)]
    generation = api.get(api.get(url).json()["request"]["url"])
    assert generation.status_code == 200 and generation.json()["config"]["field_of_tomorrow"] == 1
    assert api.post(reverse("job-cancel", args=[job_of_tomorrow.pk])).json()["state"] == "cancelled"


def test_a_job_of_a_newer_specification_has_a_page_in_the_admin(job_of_tomorrow: Job, client: Client) -> None:
    client.force_login(User.objects.create_superuser("root"))
    assert client.get(reverse("admin:jobs_job_change", args=[job_of_tomorrow.pk])).status_code == 200
    assert client.get(reverse("admin:jobs_job_changelist")).status_code == 200
    assert client.get(reverse("admin:index")).status_code == 200


def test_a_lost_job_of_a_newer_specification_goes_back_to_the_queue(job_of_tomorrow: Job) -> None:
    # As if a newer worker had claimed it and died: the sweep of this version may well be the one that finds it.
    Job.objects.filter(pk=job_of_tomorrow.pk).update(spec_version=SPEC_VERSION)
    bring_to(job_of_tomorrow, JobState.RUNNING)
    Job.objects.filter(pk=job_of_tomorrow.pk).update(
        spec_version=SPEC_VERSION + 1, lease_until=timezone.now() - timedelta(seconds=5)
    )
    assert recovery.expired_leases_requeue() == 1
    job_of_tomorrow.refresh_from_db()
    assert (job_of_tomorrow.state, job_of_tomorrow.spec_version) == (JobState.QUEUED, SPEC_VERSION + 1)


def test_old_web_processes_and_new_ones_share_idempotency_keys(first_apps: Apps, old_person: Any) -> None:
    owner = User.objects.get(pk=old_person.pk)
    new = job_submit(
        owner=owner, kind=JobKind.GENERATE, spec={"prompt": "x"}, idempotency_key="k", attach=lambda job: None
    )
    OldJob = first_apps.get_model("jobs", "Job")
    assert OldJob.objects.get(owner=old_person, idempotency_key="k").request_hash == new.request_hash
    old = old_job(first_apps, old_person, idempotency_key=str(uuid4()), request_hash=new.request_hash)
    again = job_submit(
        owner=owner,
        kind=JobKind.GENERATE,
        spec={"prompt": "x"},
        idempotency_key=old.idempotency_key,
        attach=lambda job: None,
    )
    assert again.pk == old.pk
