"""What an operator sees of a job, and the two things that may be done to it."""

from datetime import timedelta
from uuid import uuid4

import pytest
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from jobs.models import DatasetVersion, Job, JobAttempt, JobEvent
from jobs.status import AttemptOutcome, JobKind, JobState
from tests.jobs.admin.conftest import Site, make_job

LIST = "/admin/jobs/job/"


def page(job: Job) -> str:
    return reverse("admin:jobs_job_change", args=[job.pk])


def messages_of(response: object) -> str:
    return " | ".join(str(message) for message in response.context["messages"])  # type: ignore[attr-defined]


def test_a_failed_job_shows_code_sentence_and_traceback(operator_client: Client) -> None:
    job = Job.objects.get(state=JobState.FAILED)
    text = operator_client.get(page(job)).content.decode()
    assert "No picture is left: &lt;script&gt;alert(1)" in text
    assert "Traceback (most recent call last)" in text
    assert "<b>dataset</b>" in text


def test_a_running_job_shows_stage_percentage_and_figures(site: Site, operator_client: Client) -> None:
    text = operator_client.get(page(site.training.job)).content.decode()
    assert "37 %" in text
    assert "150 / 400" in text
    assert "loss 0.1234" in text
    assert "node-1:4242" in text


def test_a_preempted_job_shows_its_tries_savings_wait_and_estimate(site: Site, operator_client: Client) -> None:
    now = timezone.now()
    job = make_job(
        site.creator,
        JobKind.TRAIN,
        JobState.QUEUED,
        {},
        queued_at=now - timedelta(seconds=600),
        estimated_seconds=5400.0,
        memory_rung=2,
        batch_key="b" * 64,
    )
    for token, outcome in ((1, AttemptOutcome.PREEMPTED), (2, AttemptOutcome.OUT_OF_MEMORY)):
        times = {"started_at": now, "ended_at": now}
        JobAttempt.objects.create(job=job, token=token, worker_name="node-9:1", outcome=outcome, memory_rung=1, **times)
    text = operator_client.get(page(job)).content.decode().replace("\N{NO-BREAK SPACE}", " ")
    for shown in ("10 min", "90 min", "rung 2", "made room for interactive work", "too little memory", "b" * 64):
        assert shown in text, shown
    tries = operator_client.get(reverse("admin:jobs_jobattempt_changelist")).content.decode()
    assert "preempted" in tries and "oom" in tries


def test_a_job_cannot_be_edited_added_or_deleted_by_post(site: Site, operator_client: Client) -> None:
    job = site.training.job
    before = Job.objects.values().get(pk=job.pk)
    assert operator_client.post(page(job), {"state": "succeeded", "_save": "Save"}).status_code == 403
    assert operator_client.post(reverse("admin:jobs_job_add"), {"kind": "train"}).status_code == 403
    assert operator_client.post(reverse("admin:jobs_job_delete", args=[job.pk]), {"post": "yes"}).status_code == 403
    operator_client.post(LIST, {"action": "delete_selected", "_selected_action": [str(job.pk)], "post": "yes"})
    assert Job.objects.values().get(pk=job.pk) == before


@pytest.mark.parametrize("model", [JobAttempt, JobEvent], ids=["attempts", "events"])
def test_history_cannot_be_deleted(model: type, operator_client: Client) -> None:
    row = model.objects.first()
    url = reverse(f"admin:jobs_{model._meta.model_name}_delete", args=[row.pk])
    assert operator_client.post(url, {"post": "yes"}).status_code == 403
    assert model.objects.filter(pk=row.pk).exists()


def test_cancelling_a_waiting_job_ends_it_and_asks_a_running_one(site: Site, operator_client: Client) -> None:
    waiting = Job.objects.get(state=JobState.QUEUED)
    chosen = [str(waiting.pk), str(site.training.job_id)]
    response = operator_client.post(LIST, {"action": "cancel_selected", "_selected_action": chosen}, follow=True)
    waiting.refresh_from_db()
    site.training.job.refresh_from_db()
    assert waiting.state == JobState.CANCELLED
    assert site.training.job.state == JobState.RUNNING
    assert site.training.job.cancel_requested_at is not None
    assert "stopped" in messages_of(response)
    assert "asked to stop" in messages_of(response)


def test_an_ended_job_says_why_it_cannot_be_cancelled(operator_client: Client) -> None:
    job = Job.objects.get(state=JobState.FAILED)
    response = operator_client.post(LIST, {"action": "cancel_selected", "_selected_action": [str(job.pk)]}, follow=True)
    assert "already ended" in messages_of(response)


def test_the_cancel_button_asks_first_and_changes_nothing_on_a_get(site: Site, operator_client: Client) -> None:
    url = reverse("admin:jobs_job_cancel", args=[site.training.job_id])
    assert b"Stop this job?" in operator_client.get(url).content
    site.training.job.refresh_from_db()
    assert site.training.job.cancel_requested_at is None
    response = operator_client.post(url, {"_form_submitted": "True"}, headers={"HX-Request": "true"})
    assert response.headers["HX-Redirect"] == page(site.training.job)
    site.training.job.refresh_from_db()
    assert site.training.job.cancel_requested_at is not None


@pytest.mark.parametrize("button", ["cancel", "retry"])
def test_a_button_of_a_job_that_is_not_there_answers_404(button: str, operator_client: Client) -> None:
    url = reverse(f"admin:jobs_job_{button}", args=[uuid4()])
    assert operator_client.post(url, {"_form_submitted": "True"}).status_code == 404


def test_retry_submits_the_same_work_again_and_leads_to_it(site: Site, operator_client: Client) -> None:
    spec = {**site.version.job.spec}
    job = make_job(site.creator, JobKind.PREPROCESS, JobState.EXPIRED, spec)
    DatasetVersion.objects.create(owner=site.creator, dataset=site.dataset, number=2, job=job)
    url = reverse("admin:jobs_job_retry", args=[job.pk])
    response = operator_client.post(url, {"_form_submitted": "True"}, follow=True)
    again = Job.objects.get(dataset_version__number=3)
    assert (again.owner, again.spec, again.state) == (site.creator, spec, JobState.QUEUED)
    assert str(again.pk) in messages_of(response)
    assert response.redirect_chain == [(page(again), 302)]
    job.refresh_from_db()
    assert job.state == JobState.EXPIRED


@pytest.mark.parametrize("state", [JobState.RUNNING, JobState.SUCCEEDED, JobState.QUEUED])
def test_only_jobs_that_ended_without_result_are_retried(state: JobState, site: Site, operator_client: Client) -> None:
    job = Job.objects.filter(state=state).first()
    assert job is not None
    count = Job.objects.count()
    response = operator_client.post(LIST, {"action": "retry_selected", "_selected_action": [str(job.pk)]}, follow=True)
    assert Job.objects.count() == count
    assert f"is {state}: only jobs that ended as" in messages_of(response)


def test_staff_who_may_only_look_have_no_actions(site: Site, client: Client) -> None:
    from django.contrib.auth.models import Permission

    from jobs.models import User

    looker = User.objects.create_user("looker", password="looker-password", is_staff=True)
    looker.user_permissions.add(Permission.objects.get(codename="view_job"))
    client.force_login(looker)
    job = Job.objects.get(state=JobState.QUEUED)
    assert client.get(LIST).status_code == 200
    client.post(LIST, {"action": "cancel_selected", "_selected_action": [str(job.pk)]})
    url = reverse("admin:jobs_job_cancel", args=[job.pk])
    assert client.post(url, {"_form_submitted": "True"}).status_code == 403
    job.refresh_from_db()
    assert job.state == JobState.QUEUED
