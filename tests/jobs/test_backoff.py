"""Waits between tries, and which errors deserve another one."""

import errno
import random
import sqlite3
from collections.abc import Callable

import pytest
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    IncompleteReadError,
    NoCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from django.db import IntegrityError, OperationalError
from django.db import connection as database
from hypothesis import given
from hypothesis import strategies as st

from jobs.backoff import CHECK_SECONDS, Backoff, is_transient, retrying
from jobs.errors import ArtifactDamaged, ArtifactMissing, LeaseLost


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, [0.0]

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def s3_answer(status: int, code: str = "Whatever") -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    "error",
    [
        s3_answer(500),
        s3_answer(503, "SlowDown"),
        s3_answer(429),
        s3_answer(409, "ConditionalRequestConflict"),
        s3_answer(400, "RequestTimeout"),
        s3_answer(404, "NoSuchUpload"),
        EndpointConnectionError(endpoint_url="http://x"),
        ConnectTimeoutError(endpoint_url="http://x"),
        ReadTimeoutError(endpoint_url="http://x"),
        IncompleteReadError(actual_bytes=1, expected_bytes=2),
        ResponseStreamingError(error="reset"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        BrokenPipeError(errno.EPIPE, "pipe"),
        TimeoutError(),
        OSError(errno.EIO, "input/output error"),
        OSError(errno.ENETUNREACH, "unreachable"),
        OSError(errno.ESTALE, "stale file handle"),
        OperationalError("server closed the connection unexpectedly"),
        ArtifactMissing("gone"),
    ],
    ids=repr,
)
def test_what_time_may_heal_is_transient(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "no space left on device"),
        OSError(errno.EDQUOT, "quota"),
        PermissionError(errno.EACCES, "denied"),
        FileNotFoundError(errno.ENOENT, "missing"),
        OSError("no number"),
        s3_answer(403, "AccessDenied"),
        s3_answer(404, "NoSuchKey"),
        s3_answer(412, "PreconditionFailed"),
        s3_answer(400, "InvalidRequest"),
        NoCredentialsError(),
        BotoCoreError(),
        IntegrityError("unique"),
        ArtifactDamaged("flipped"),
        LeaseLost("fenced"),
        ValueError("x"),
        MemoryError(),
    ],
    ids=repr,
)
def test_what_time_does_not_heal_is_not_transient(error: Exception) -> None:
    assert not is_transient(error)


@pytest.mark.django_db
def test_a_database_whose_disk_is_full_is_not_transient() -> None:
    if database.vendor != "sqlite":
        pytest.skip("this way of filling a database is SQLite's")
    with pytest.raises(OperationalError) as caught, database.cursor() as cursor:
        cursor.execute("CREATE TEMP TABLE fills (x BLOB)")
        cursor.execute("PRAGMA temp.max_page_count = 4")
        cursor.execute("INSERT INTO fills VALUES (zeroblob(1000000))")
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    assert not is_transient(caught.value)


@given(first=st.floats(0.01, 5), cap=st.floats(0.01, 100), budget=st.floats(0.1, 1000), seed=st.integers(0, 2**32))
def test_a_delay_is_below_its_cap_and_never_passes_the_end_of_the_budget(
    first: float, cap: float, budget: float, seed: int
) -> None:
    clock = Clock()
    backoff = Backoff(first_seconds=first, cap_seconds=cap, budget_seconds=budget, clock=clock, rng=random.Random(seed))
    end = clock.now + budget
    for number, delay in zip(range(200), backoff, strict=False):
        assert 0 <= delay <= min(cap, first * 2**number)
        clock.sleep(delay)
        assert clock.now <= end + 1e-6


def test_jitter_is_full_so_that_clients_spread_over_the_whole_interval() -> None:
    delays = []
    for seed in range(400):
        backoff = Backoff(first_seconds=1, cap_seconds=8, clock=Clock(), rng=random.Random(seed))
        delays.append([backoff.next_delay() or 0 for _ in range(6)][-1])
    counts = [sum(low <= delay < low + 2 for delay in delays) for low in (0, 2, 4, 6)]
    assert all(60 < count < 140 for count in counts), counts  # 100 each in expectation


def test_after_many_tries_the_cap_still_rules() -> None:
    backoff = Backoff(first_seconds=1, cap_seconds=2, budget_seconds=1e9, clock=Clock())
    assert all((backoff.next_delay() or 9) <= 2 for _ in range(5000))


def failing(times: int, error: Exception) -> Callable[[], int]:
    """A call that fails so often, then answers with the number of its calls."""
    calls = 0

    def call() -> int:
        nonlocal calls
        calls += 1
        if calls <= times:
            raise error
        return calls

    return call


def test_transient_errors_are_tried_again_until_it_works() -> None:
    clock = Clock()
    assert retrying(failing(5, TimeoutError()), backoff=Backoff(clock=clock), sleep=clock.sleep) == 6


def test_other_errors_come_out_at_once() -> None:
    clock = Clock()
    with pytest.raises(OSError, match="no space"):
        retrying(failing(1, OSError(errno.ENOSPC, "no space")), backoff=Backoff(clock=clock), sleep=clock.sleep)
    assert clock.now == 1000.0


def test_a_spent_budget_gives_the_last_error() -> None:
    clock = Clock()
    with pytest.raises(TimeoutError):
        retrying(failing(10**9, TimeoutError()), backoff=Backoff(budget_seconds=30, clock=clock), sleep=clock.sleep)
    assert clock.now == pytest.approx(1030.0)


def test_a_lost_lease_ends_a_wait_within_half_a_second() -> None:
    clock = Clock()

    def check() -> None:
        if clock.now > 1003.0:
            raise LeaseLost("fenced")

    backoff = Backoff(first_seconds=60, clock=clock, rng=random.Random(1))
    with pytest.raises(LeaseLost):
        retrying(failing(10**9, TimeoutError()), check=check, backoff=backoff, sleep=clock.sleep)
    assert clock.now <= 1003.0 + CHECK_SECONDS + 1e-6
    assert max(clock.slept) <= CHECK_SECONDS
