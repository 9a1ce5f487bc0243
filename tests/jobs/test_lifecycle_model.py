"""Every rule of a job's life against arbitrary histories: a state machine drives the real functions on a real database.

The database's clock is simulated, workers die between any two statements, doorbells come twice, never, or forged, and
frozen workers wake up and write with the tokens they had.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from django.conf import settings
from django.db import connection, transaction
from django.db.models import Sum
from hypothesis import HealthCheck, Phase, note, strategies
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from core import failpoints
from jobs import leases, lifecycle, recovery
from jobs.errors import Conflict, LeaseLost
from jobs.models import GeneratedImage, GenerationRequest, Job, JobEvent, OwnerUsage, User
from jobs.status import LEASED, TERMINAL, TRANSITIONS, AttemptOutcome, JobKind, JobState
from jobs.submission import generation_submit, job_submit
from jobs.taking import Claim
from jobs.workers import worker_register
from tests.factories import claim_one, make_base_model

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.skipif("sqlite" not in settings.DATABASES["default"]["ENGINE"], reason="simulates SQLite's clock"),
]

KINDS = [JobKind.GENERATE, JobKind.TRAIN]
PEOPLE, WORKERS = 2, 3
WRITES = ["heartbeat", "checkpoint", "upload", "upload", "publish", "publish", "fail", "release", "preempt", "stop"]
WRITES += ["give_up"]
picks = strategies.integers(min_value=0, max_value=10**6)
crashes = strategies.one_of(strategies.none(), strategies.integers(min_value=0, max_value=12))


def fenced_of(renewal: Any) -> set[UUID]:
    """Jobs that a renewal found to be held by others."""
    return renewal[0] if isinstance(renewal, tuple) else renewal.fenced


class Died(BaseException):
    """The process is gone at this point: nothing after it happens, what was not committed is undone."""


class Clock:
    """The database's clock, moved by hand. After `stop` it is the real one again."""

    def __init__(self) -> None:
        self.now: datetime = datetime.now(UTC)
        self._stopped = False
        connection.ensure_connection()
        connection.connection.create_function("strftime", -1, self._strftime)

    def stop(self) -> None:
        self._stopped = True

    def _strftime(self, form: str, what: str, *rest: str) -> str:
        assert (form, what, rest) == ("%Y-%m-%d %H:%M:%f", "NOW", ()), "another use of the clock: teach it here"
        now = datetime.now(UTC) if self._stopped else self.now
        return now.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


class Jobs(RuleBasedStateMachine):
    """All that people, workers, the dispatcher and accidents can do, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.undo = transaction.atomic()
        self.undo.__enter__()
        self.clock = Clock()
        self.people = [User.objects.create_user(f"person-{number}") for number in range(PEOPLE)]
        self.workers = [worker_register(queues=["gpu"], device="cpu") for _ in range(WORKERS)]
        self.base = make_base_model()
        self.claims: list[Claim] = []  # every claim ever, the fenced ones too
        self.ended: dict[Any, str] = {}
        for number, kind in enumerate([*KINDS, JobKind.GENERATE]):
            self.submit(person=number, kind=kind, priority=0, dies=None)
        for kind in KINDS:
            self.doorbell(worker=0, kind=kind, dies=None)

    def teardown(self) -> None:
        failpoints.install(None)
        transaction.set_rollback(True)
        self.undo.__exit__(None, None, None)
        self.clock.stop()

    # --- accidents ---------------------------------------------------------------------------------------------------

    @contextmanager
    def maybe_dying(self, at: int | None) -> Iterator[None]:
        """Run the block; die at its `at`-th point, if there are that many."""
        seen = 0

        def hook(point: str) -> None:
            nonlocal seen
            seen += 1
            if at is not None and seen > at:
                failpoints.install(None)
                note(f"died at {point}")
                raise Died

        failpoints.install(hook)
        try:
            with transaction.atomic():  # so that an inner rollback leaves the outer transaction usable
                yield
        except Died:
            pass
        finally:
            failpoints.install(None)

    # --- people ------------------------------------------------------------------------------------------------------

    @rule(person=picks, kind=strategies.sampled_from(KINDS), priority=strategies.integers(0, 1), dies=crashes)
    def submit(self, person: int, kind: JobKind, priority: int, dies: int | None) -> None:
        owner = self.people[person % PEOPLE]
        with self.maybe_dying(dies):
            if kind == JobKind.GENERATE:
                values = {"prompt": "a picture", "count": 1}
                job = generation_submit(owner=owner, base_model=self.base, loras=[], values=values)
            else:
                job = job_submit(owner=owner, kind=kind, spec={}, attach=lambda job: None)
            Job.objects.filter(pk=job.pk).update(priority=priority)

    @rule(pick=picks, dies=crashes)
    def cancel(self, pick: int, dies: int | None) -> None:
        jobs = list(Job.objects.order_by("created_at"))
        if jobs:
            job = jobs[pick % len(jobs)]
            ended = job.state in TERMINAL
            with self.maybe_dying(dies):
                try:
                    lifecycle.job_cancel(job=job)
                    assert not ended
                except Conflict:
                    assert ended

    # --- workers -----------------------------------------------------------------------------------------------------

    @rule(worker=picks, kind=strategies.sampled_from(KINDS), dies=crashes)
    def doorbell(self, worker: int, kind: JobKind, dies: int | None) -> None:
        """Rung once, twice, by a forger or for nothing: all the same to the worker."""
        who = self.workers[worker % WORKERS]
        claim = None
        with self.maybe_dying(dies):
            claim = claim_one(kinds=[kind], worker=who)
        if claim is not None and Job.objects.filter(pk=claim.job.pk, token=claim.token).exists():
            self.check_turn(claim)
            self.claims.append(claim)

    def check_turn(self, claim: Claim) -> None:
        """Among equal jobs of one person that never ran, the oldest goes first."""
        if claim.token > 1:
            return
        job = Job.objects.get(pk=claim.job.pk)
        waiting = Job.objects.claimable().filter(owner=job.owner, kind=job.kind, priority=job.priority, token=0)
        assert not waiting.filter(created_at__lt=job.created_at).exists(), "a younger job was taken first"

    @precondition(lambda self: self.claims)
    @rule(pick=picks, what=strategies.sampled_from(WRITES), dies=crashes)
    def write(self, pick: int, what: str, dies: int | None) -> None:
        """A worker writes with some token that was ever given out: of a living, dead or frozen attempt.

        Passes exactly when the job is held with this very token.
        """
        claim = self.claims[-1 - pick % min(4, len(self.claims))]  # the newest ones matter most
        before = Job.objects.get(pk=claim.job.pk)
        holds = before.state in LEASED and before.token == claim.token
        with self.maybe_dying(dies):
            try:
                getattr(self, f"do_{what}")(claim, before)
                assert holds, f"a fenced worker could {what}: token {claim.token}, {before.state} with {before.token}"
            except LeaseLost:
                wrong_state = (before.state == JobState.UPLOADING) == (what == "upload")
                assert not holds or (what in ("upload", "publish") and wrong_state), f"the holder could not {what}"

    def do_heartbeat(self, claim: Claim, before: Job) -> None:
        lost = leases.leases_renew({claim.job.pk: claim.token}, {claim.job.pk: {"stage": f"by {claim.token}"}})
        after = Job.objects.get(pk=claim.job.pk)
        if claim.job.pk in fenced_of(lost):
            assert (after.lease_until, after.stage) == (before.lease_until, before.stage), "a fenced worker renewed"
            raise LeaseLost

    def do_checkpoint(self, claim: Claim, before: Job) -> None:
        step = before.checkpoint_step + 1
        leases.checkpoint_record(job_id=claim.job.pk, token=claim.token, step=step, files={})

    def do_upload(self, claim: Claim, before: Job) -> None:
        lifecycle.job_uploading(job_id=claim.job.pk, token=claim.token)

    def do_publish(self, claim: Claim, before: Job) -> None:
        with transaction.atomic():
            for request in GenerationRequest.objects.filter(job=claim.job):
                GeneratedImage.objects.create(
                    owner=request.owner, request=request, number=request.images.count(), seed=1, sha256="a" * 64,
                    size_bytes=1, width=8, height=8,
                )  # fmt: skip
            lifecycle.job_succeed(job_id=claim.job.pk, token=claim.token)

    def do_fail(self, claim: Claim, before: Job) -> None:
        lifecycle.job_fail(job_id=claim.job.pk, token=claim.token, code="nan", message="not a number")

    def do_release(self, claim: Claim, before: Job) -> None:
        lifecycle.job_release(job_id=claim.job.pk, token=claim.token, reason="going down")

    def do_preempt(self, claim: Claim, before: Job) -> None:
        lifecycle.job_preempted(job_id=claim.job.pk, token=claim.token, reason="others wait")

    def do_stop(self, claim: Claim, before: Job) -> None:
        lifecycle.job_cancelled(job_id=claim.job.pk, token=claim.token)

    def do_give_up(self, claim: Claim, before: Job) -> None:
        before.token = claim.token
        if lifecycle.job_lost(job=before, reason="stuck", only_expired=False) is None:
            raise LeaseLost

    # --- dispatcher and time -----------------------------------------------------------------------------------------

    @rule(seconds=strategies.sampled_from([0.5, 10.0, 29.0, 3600.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += timedelta(seconds=seconds)

    @rule(worker=picks, dies=crashes)
    def workers_fall_silent_and_another_takes_over(self, worker: int, dies: int | None) -> None:
        self.clock.now += timedelta(seconds=settings.LORASITE["LEASE_SECONDS"] + 1)
        for kind in KINDS:
            self.doorbell(worker=worker, kind=kind, dies=dies)

    @rule(dies=crashes)
    def sweep(self, dies: int | None) -> None:
        with self.maybe_dying(dies):
            recovery.expired_leases_requeue()
            recovery.waiting_cancel()
            recovery.queued_past_deadline_expire()

    @rule(pick=picks)
    def deadline_set(self, pick: int) -> None:
        jobs = list(Job.objects.filter(state=JobState.QUEUED).order_by("created_at"))
        if jobs:
            Job.objects.filter(pk=jobs[pick % len(jobs)].pk).update(deadline=self.clock.now + timedelta(seconds=20))

    # --- what must always hold ---------------------------------------------------------------------------------------

    @invariant()
    def one_live_token(self) -> None:
        for job in Job.objects.all():
            open_tokens = list(job.attempts.filter(ended_at__isnull=True).values_list("token", flat=True))
            assert open_tokens == ([job.token] if job.state in LEASED else [])
            assert (job.worker_id is not None) == (job.lease_until is not None) == (job.state in LEASED)
            assert list(job.attempts.values_list("token", flat=True)) == list(range(1, job.token + 1))

    @invariant()
    def the_end_is_the_end(self) -> None:
        for job_id, state in Job.objects.filter(state__in=TERMINAL).values_list("pk", "state"):
            assert self.ended.setdefault(job_id, state) == state
        assert Job.objects.filter(pk__in=self.ended, state__in=TERMINAL).count() == len(self.ended)

    @invariant()
    def pictures_exactly_where_it_succeeded(self) -> None:
        for request in GenerationRequest.objects.select_related("job"):
            assert request.images.count() == (1 if request.job.state == JobState.SUCCEEDED else 0)

    @invariant()
    def the_ledger_sums_up(self) -> None:
        for job in Job.objects.all():
            closed = job.attempts.filter(ended_at__isnull=False)
            seconds = sum(
                (ended - began).total_seconds() for began, ended in closed.values_list("started_at", "ended_at")
            )
            assert job.used_worker_seconds == pytest.approx(seconds, abs=0.01)
        for usage in OwnerUsage.objects.all():
            used = Job.objects.filter(owner=usage.owner).aggregate(Sum("used_worker_seconds"))
            assert 0 <= usage.worker_seconds <= (used["used_worker_seconds__sum"] or 0) + 0.01

    @invariant()
    def tries_are_counted(self) -> None:
        for job in Job.objects.all():
            assert job.attempts_count == job.attempts.exclude(outcome=AttemptOutcome.PREEMPTED).count()
            assert job.barren_losses <= lifecycle.MAX_BARREN_LOSSES

    @invariant()
    def a_poisoned_job_was_lost_three_times_in_a_row(self) -> None:
        for job in Job.objects.filter(error_code="poison"):
            assert job.attempts.filter(outcome=AttemptOutcome.LOST).count() >= lifecycle.MAX_BARREN_LOSSES

    @invariant()
    def every_state_has_an_event_and_every_event_a_way(self) -> None:
        for job in Job.objects.all():
            state = ""
            for event in JobEvent.objects.filter(job=job).order_by("id"):
                assert event.old_state == state
                assert not state or event.new_state in TRANSITIONS[JobState(state)]
                state = event.new_state
            assert state == job.state

    @invariant()
    def nothing_stays_held_by_the_dead(self) -> None:
        """A sweep after a lease leaves no job behind; tried on a copy of the world that is then undone."""
        if not Job.objects.filter(state__in=LEASED).exists():
            return
        with transaction.atomic():
            now = self.clock.now
            self.clock.now += timedelta(seconds=settings.LORASITE["LEASE_SECONDS"] + 1)
            recovery.expired_leases_requeue()
            self.clock.now = now
            assert not Job.objects.filter(state__in=LEASED).exists()
            transaction.set_rollback(True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_no_history_breaks_a_rule(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several short searches find more than one long one: each begins afresh instead of varying what it knows."""
    monkeypatch.setattr("hypothesis.core.global_force_seed", seed)
    run_state_machine_as_test(
        Jobs,
        settings=hypothesis_settings(
            max_examples=10,
            stateful_step_count=35,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
