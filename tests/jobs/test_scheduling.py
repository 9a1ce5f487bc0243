"""The claim order, as pure values."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from jobs.scheduling import Candidate, claim_order

T0 = datetime(2026, 1, 1, tzinfo=UTC)


def candidate(number: int, *, owner: int = 1, lost: bool = False, priority: int = 0, base: str = "") -> Candidate:
    return Candidate(
        job_id=UUID(int=number),
        owner_id=UUID(int=owner),
        was_lost=lost,
        priority=priority,
        created_at=T0 + timedelta(seconds=number),
        base_fingerprint=base,
    )


def order(*candidates: Candidate, seconds: dict[int, float] | None = None, warm: tuple[str, ...] = ()) -> list[int]:
    used = {UUID(int=owner): value for owner, value in (seconds or {}).items()}
    return [c.job_id.int for c in claim_order(candidates, owner_seconds=used, warm_bases=frozenset(warm))]


def test_equal_jobs_go_by_age() -> None:
    assert order(candidate(3), candidate(1), candidate(2)) == [1, 2, 3]


def test_lost_work_goes_before_everything() -> None:
    assert order(candidate(1, priority=9), candidate(2, lost=True)) == [2, 1]


def test_the_least_served_owner_goes_before_priority() -> None:
    assert order(candidate(1, owner=1, priority=9), candidate(2, owner=2), seconds={1: 100.0}) == [2, 1]


def test_priority_orders_one_owners_jobs() -> None:
    assert order(candidate(1), candidate(2, priority=5)) == [2, 1]


def test_a_warm_base_breaks_the_tie_before_age() -> None:
    assert order(candidate(1, base="cold"), candidate(2, base="warm"), warm=("warm",)) == [2, 1]


@given(st.permutations(range(1, 8)))
def test_the_order_does_not_depend_on_how_the_candidates_came(numbers: list[int]) -> None:
    jobs = {n: candidate(n, owner=n % 3, lost=n % 4 == 0, priority=n % 2) for n in range(1, 8)}
    reference = order(*jobs.values(), seconds={1: 3.0})
    assert order(*(jobs[n] for n in numbers), seconds={1: 3.0}) == reference
