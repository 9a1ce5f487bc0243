"""Whose turn it is, as pure values."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.scheduling import (
    AFFINITY_SECONDS,
    FETCH_SECONDS,
    STARVING_SECONDS,
    TRAINING_PATIENCE_SECONDS,
    Candidate,
    Owner,
    Running,
    Scheduler,
)
from jobs.status import JobKind

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def candidate(number: int, *, owner: int = 1, waited: float | None = None, **values: Any) -> Candidate:
    """Job `number`; lower numbers are older."""
    since = ago(20 - number if waited is None else waited)
    return Candidate(job_id=UUID(int=number), owner_id=UUID(int=owner), created_at=since, queued_at=since, **values)


def running(owner: int, *, count: int = 1, seconds: float = 0.0, **values: Any) -> list[Running]:
    values = {"kind": JobKind.GENERATE} | values
    return [Running(owner_id=UUID(int=owner), started_at=ago(seconds), **values) for _ in range(count)]


def scheduler(used: dict[int, float] | None = None, **values: Any) -> Scheduler:
    owners = {UUID(int=owner): Owner(used_seconds=s, served_at=ago(1)) for owner, s in (used or {}).items()}
    return Scheduler(**{"now": NOW, "owners": owners} | values)


def numbers(jobs: Sequence[Candidate]) -> list[int]:
    return [job.job_id.int for job in jobs]


def order(*jobs: Candidate, used: dict[int, float] | None = None, **values: Any) -> list[int]:
    return numbers(list(scheduler(used, **values).order(jobs)))


def test_equal_jobs_go_by_age() -> None:
    assert order(candidate(3), candidate(1), candidate(2)) == [1, 2, 3]


def test_lost_work_goes_before_everything() -> None:
    assert order(candidate(1, priority=9), candidate(2, was_lost=True)) == [2, 1]
    assert order(candidate(1), candidate(2, owner=2, was_lost=True), used={2: 1e6}) == [2, 1]


def test_the_least_served_owner_goes_before_priority() -> None:
    assert order(candidate(1, owner=1, priority=9), candidate(2, owner=2), used={1: 100.0}) == [2, 1]


def test_a_priority_counts_nothing_against_other_people() -> None:
    assert order(candidate(1, owner=1), candidate(2, owner=2, priority=9)) == [1, 2]


def test_priority_orders_one_owners_jobs() -> None:
    assert order(candidate(1), candidate(2, priority=5)) == [2, 1]


def test_what_runs_now_counts_as_used() -> None:
    jobs = candidate(1, owner=1), candidate(2, owner=2)
    assert order(*jobs, running=running(1, seconds=100)) == [2, 1]


def test_workers_that_are_free_in_the_same_second_do_not_all_go_to_one_person() -> None:
    jobs = candidate(1, owner=1), candidate(2, owner=2)
    assert order(*jobs, running=running(1, seconds=0, estimated_seconds=20.0)) == [2, 1]


def test_a_training_that_just_began_is_not_charged_for_hours_ahead() -> None:
    one = scheduler(running=running(1, kind=JobKind.TRAIN, seconds=0, estimated_seconds=7200.0))
    assert one.served(UUID(int=1)) < 60


def test_twice_the_weight_is_twice_the_share() -> None:
    owners = {UUID(int=1): Owner(used_seconds=150, weight=2.0), UUID(int=2): Owner(used_seconds=100)}
    jobs = candidate(1, owner=2), candidate(2, owner=1)
    assert order(*jobs, owners=owners) == [2, 1]
    shares = {1: 0.0, 2: 0.0}
    for _ in range(300):
        owners = {UUID(int=1): Owner(used_seconds=shares[1], weight=2.0), UUID(int=2): Owner(used_seconds=shares[2])}
        first = next(scheduler(owners=owners).order(jobs))
        shares[first.owner_id.int] += 10
    assert 1.9 < shares[1] / shares[2] < 2.1


def test_jobs_of_equally_served_people_alternate() -> None:
    jobs = [candidate(n, owner=1 if n < 4 else 2, estimated_seconds=10.0) for n in range(1, 7)]
    assert order(*jobs) == [1, 4, 2, 5, 3, 6]


def test_a_warm_base_breaks_the_tie_before_age() -> None:
    jobs = candidate(1, base_fingerprint="cold"), candidate(2, base_fingerprint="warm")
    assert order(*jobs, warm_bases=frozenset({"warm"})) == [2, 1]


def test_a_warm_lora_breaks_the_tie_but_counts_less_than_the_base() -> None:
    jobs = candidate(1, base_fingerprint="warm"), candidate(2, base_fingerprint="warm", loras=("style",))
    foreign = candidate(3, base_fingerprint="cold", loras=("style",))
    cold_lora = candidate(0, base_fingerprint="warm", loras=("other",))
    warm = {"warm_bases": frozenset({"warm"}), "warm_loras": frozenset({"style"})}
    assert order(foreign, cold_lora, *jobs, **warm) == [1, 2, 0, 3]


def test_a_job_that_waited_long_is_not_passed_over_for_a_warm_one() -> None:
    cold = candidate(1, base_fingerprint="cold", waited=AFFINITY_SECONDS + 1)
    assert order(candidate(2, base_fingerprint="warm"), cold, warm_bases=frozenset({"warm"})) == [1, 2]


def test_a_new_job_whose_lora_is_still_being_fetched_lets_others_go_first() -> None:
    jobs = candidate(1, owner=1, loras=("cold",), waited=FETCH_SECONDS / 2), candidate(2, owner=2, loras=("warm",))
    assert order(*jobs, used={2: 900.0}, warm_loras=frozenset({"warm"})) == [2, 1]
    assert order(*jobs, used={2: 900.0}, warm_loras=frozenset({"warm", "cold"})) == [1, 2]
    assert order(*jobs, used={2: 900.0}) == [1, 2], "a worker that fetches nothing ahead knows no LoRAs"


def test_a_cold_lora_never_costs_the_turn_for_longer_than_a_fetch() -> None:
    cold = candidate(1, owner=1, loras=("cold",), waited=FETCH_SECONDS)
    warm_one = candidate(2, owner=2, loras=("warm",), waited=60)
    assert order(cold, warm_one, used={2: 900.0}, warm_loras=frozenset({"warm"})) == [1, 2]


def test_lost_work_goes_first_although_its_lora_is_cold() -> None:
    lost = candidate(1, owner=1, loras=("cold",), waited=0, was_lost=True)
    assert order(candidate(2, owner=2), lost, warm_loras=frozenset({"warm"})) == [1, 2]


def test_a_job_is_coming_only_while_its_lora_may_still_arrive() -> None:
    fetches = scheduler(warm_loras=frozenset({"warm"}))
    assert fetches.is_coming(candidate(1, loras=("warm", "cold"), waited=0))
    assert not fetches.is_coming(candidate(1, loras=("cold",), waited=FETCH_SECONDS))
    assert not fetches.is_coming(candidate(1, loras=("warm",), waited=0))
    assert not fetches.is_coming(candidate(1, waited=0))
    assert not scheduler().is_coming(candidate(1, loras=("cold",), waited=0))


def test_a_person_at_the_limit_waits_and_others_go_on() -> None:
    jobs = candidate(1, owner=1), candidate(2, owner=2), candidate(3, owner=1, kind=JobKind.TRAIN)
    limits = {JobKind.GENERATE: 2}
    assert order(*jobs, running=running(1, count=2), limits=limits, used={2: 900.0}) == [3, 2]
    assert order(*jobs, running=running(1, count=1), limits=limits, used={2: 900.0})[-1] == 2


def test_lost_work_respects_limits() -> None:
    assert order(candidate(1, was_lost=True), running=running(1), limits={JobKind.GENERATE: 1}) == []


def test_someone_who_got_nothing_for_long_has_a_turn_whatever_was_used_before() -> None:
    waits = candidate(1, owner=1, waited=STARVING_SECONDS + 1)
    jobs = waits, candidate(2, owner=2)
    starved = {UUID(int=1): Owner(used_seconds=9000, served_at=ago(STARVING_SECONDS + 5))}
    assert order(*jobs, owners=starved) == [1, 2]
    served = {UUID(int=1): Owner(used_seconds=9000, served_at=ago(30))}
    assert order(*jobs, owners=served) == [2, 1]
    assert order(*jobs, owners=starved, running=running(1)) == [2, 1]


def batch(*jobs: Candidate, at_most: int = 8, **values: Any) -> list[int]:
    return numbers(scheduler(**values).batch(jobs[0], jobs, at_most=at_most))


def test_companions_share_the_batch_key_across_people() -> None:
    key = {"batch_key": "k"}
    jobs = candidate(1, **key), candidate(2, owner=2, **key), candidate(3, batch_key="other"), candidate(4)
    assert batch(*jobs) == [1, 2]


def test_a_job_without_batch_key_runs_alone() -> None:
    assert batch(candidate(1), candidate(2)) == [1]


def test_a_job_that_was_lost_before_runs_alone_so_that_it_takes_nobody_down_with_it() -> None:
    key = {"batch_key": "k"}
    lost = candidate(1, **key, was_lost=True)
    assert batch(lost, candidate(2, owner=2, **key)) == [1]
    assert batch(candidate(2, owner=2, **key), lost, candidate(3, owner=3, **key)) == [2, 3]


def test_a_batch_holds_at_most_eight_pictures_and_so_many_jobs_as_asked() -> None:
    jobs = [candidate(n, owner=n, batch_key="k", pictures=3) for n in range(1, 5)]
    assert batch(*jobs) == [1, 2]
    assert batch(*jobs, candidate(9, owner=9, batch_key="k", pictures=2)) == [1, 2, 9]
    assert batch(*[candidate(n, owner=n, batch_key="k") for n in range(1, 9)], at_most=3) == [1, 2, 3]


def test_a_batch_respects_the_limits_of_its_people() -> None:
    jobs = [candidate(n, owner=1, batch_key="k") for n in range(1, 6)]
    assert batch(*jobs, limits={JobKind.GENERATE: 3}, running=running(1)) == [1, 2]


def may_start(job: Candidate, *interactive: Candidate, free: int = 0, **values: Any) -> bool:
    return scheduler(**values).may_start(job, interactive=interactive, free_workers=free)


def test_a_training_does_not_take_the_last_free_worker_from_people_who_wait() -> None:
    training = candidate(1, kind=JobKind.TRAIN)
    assert not may_start(training, candidate(2))
    assert may_start(training, candidate(2), free=1)
    assert may_start(training)


def test_a_training_that_waited_longer_than_its_patience_starts_all_the_same() -> None:
    assert may_start(candidate(1, kind=JobKind.TRAIN, waited=TRAINING_PATIENCE_SECONDS + 1), candidate(2))


def test_interactive_work_of_people_at_their_limit_holds_no_training_back() -> None:
    waits = {"limits": {JobKind.GENERATE: 1}, "running": running(1)}
    assert may_start(candidate(1, kind=JobKind.TRAIN), candidate(2), **waits)


def test_interactive_work_always_may_start() -> None:
    assert may_start(candidate(1), candidate(2))


jobs_strategy = st.lists(
    st.builds(
        dict,
        owner=st.integers(1, 4),
        waited=st.floats(0, 2000, allow_nan=False),
        was_lost=st.booleans(),
        priority=st.integers(-2, 2),
        base_fingerprint=st.sampled_from(["", "warm", "cold"]),
        batch_key=st.sampled_from(["", "a", "b"]),
        pictures=st.integers(1, 8),
        estimated_seconds=st.floats(0, 50, allow_nan=False),
    ),
    max_size=14,
).map(lambda rows: [candidate(number, **row) for number, row in enumerate(rows, start=1)])
used_strategy = st.dictionaries(st.integers(1, 4), st.floats(0, 1e5, allow_nan=False))
warm = {"warm_bases": frozenset({"warm"})}


@settings(max_examples=60, deadline=None)
@given(jobs_strategy, used_strategy, st.randoms(use_true_random=False))
def test_the_order_holds_every_job_once_however_the_candidates_came(
    jobs: list[Candidate], used: dict[int, float], random: Any
) -> None:
    reference = order(*jobs, used=used, **warm)
    assert sorted(reference) == sorted(numbers(jobs))
    shuffled = list(jobs)
    random.shuffle(shuffled)
    assert order(*shuffled, used=used, **warm) == reference


@settings(max_examples=40, deadline=None)
@given(jobs_strategy, st.integers(1, 8), st.integers(1, 4))
def test_a_batch_never_breaks_a_limit(jobs: list[Candidate], at_most: int, limit: int) -> None:
    one = scheduler(limits={JobKind.GENERATE: limit})
    for first in one.order(jobs):
        chosen = one.batch(first, jobs, at_most=at_most)
        assert chosen[0] == first
        assert len(set(numbers(chosen))) == len(chosen) <= at_most
        assert len(chosen) == 1 or sum(job.pictures for job in chosen) <= 8
        assert len({job.batch_key for job in chosen}) == 1
        assert all(sum(job.owner_id == owner.owner_id for job in chosen) <= limit for owner in chosen)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.floats(0, 1e6, allow_nan=False), st.floats(15, 60, allow_nan=False))
def test_every_job_is_chosen_in_bounded_time_though_newcomers_never_end(
    newcomers: int, used: float, job_seconds: float
) -> None:
    """One worker, more new people than it can serve, and one person who used much before."""
    heavy, now, number = UUID(int=10**6), NOW, 1
    waits = Candidate(job_id=UUID(int=10**6), owner_id=heavy, created_at=now, queued_at=now)
    owners = {heavy: Owner(used_seconds=used, served_at=now)}
    line = [waits]
    while waits in line:
        for _ in range(newcomers):
            line.append(Candidate(job_id=UUID(int=number), owner_id=UUID(int=number), created_at=now, queued_at=now))
            number += 1
        # Newcomers who came at the same time as the heavy user are served within their own bound as well.
        line.remove(next(Scheduler(now=now, owners=owners).order(line)))
        now += timedelta(seconds=job_seconds)
        assert (now - NOW).total_seconds() < STARVING_SECONDS * (newcomers + 2)
