"""Which file of a cache goes first."""

import json
import random

from hypothesis import given
from hypothesis import strategies as st

from core.cache_policy import CachePolicy

REQUESTS = st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=300)


def size_of(name: int) -> int:
    return 1 + 7 * name % 23


def play(policy: CachePolicy, requests: list[tuple[int, bool]]) -> list[bool]:
    return [policy.request(str(name), size_of(name), ahead=ahead) for name, ahead in requests]


@given(requests=REQUESTS, capacity=st.integers(23, 150))
def test_the_bytes_add_up_and_never_exceed_the_capacity(requests: list[tuple[int, bool]], capacity: int) -> None:
    policy = CachePolicy(capacity)
    held: set[int] = set()
    for name, ahead in requests:
        was_there = policy.request(str(name), size_of(name), ahead=ahead)
        assert was_there == (name in held)
        assert str(name) in policy  # what was asked for is here now
        held = {int(name) for name in policy.names()}
        assert policy.used == sum(map(size_of, held)) <= capacity


@given(requests=REQUESTS, more=REQUESTS)
def test_a_saved_policy_goes_on_as_the_one_that_stayed(
    requests: list[tuple[int, bool]], more: list[tuple[int, bool]]
) -> None:
    policy = CachePolicy(90)
    play(policy, requests)
    again = CachePolicy.load(json.loads(json.dumps(policy.dump())), 90)
    assert play(again, more) == play(policy, more)
    assert again.dump() == policy.dump()


@given(requests=REQUESTS)
def test_every_entry_is_offered_once_and_memory_is_bounded(requests: list[tuple[int, bool]]) -> None:
    policy = CachePolicy(60)
    play(policy, requests)
    assert sorted(policy.victims()) == sorted(policy.names())
    assert len(policy.dump()["real"]["ghosts"]) <= 2 * max(1, len(set(requests)))
    for name in policy.names():
        policy.forget(name)
    assert (policy.used, len(policy)) == (0, 0)
    assert len(policy.dump()["real"]["ghosts"]) <= 1


def test_a_scan_pushes_out_nothing_that_came_back() -> None:
    policy = CachePolicy(10)
    for _ in range(3):
        for favourite in "abcdef":
            policy.request(favourite, 1)
    for number in range(30):
        policy.request(f"once {number}", 1)
    assert set("abcdef") <= set(policy.names())


def test_a_favourite_of_yesterday_makes_room_for_one_of_today() -> None:
    policy = CachePolicy(10)
    for _ in range(100):
        for old in "abcdefghij":
            policy.request(old, 1)
    chance = random.Random(1)
    for _ in range(1000):
        policy.request(chance.choice("ABCDEFGHIJ"), 1)
    assert set(policy.names()) == set("ABCDEFGHIJ")


def test_fetching_ahead_counts_as_the_request_that_it_was_for() -> None:
    fetched_ahead, asked = CachePolicy(10), CachePolicy(10)
    fetched_ahead.request("lora", 1, ahead=True)
    fetched_ahead.request("lora", 1, ahead=True)  # looked at again while its job waits
    fetched_ahead.request("lora", 1)
    asked.request("lora", 1)
    assert [len(p.dump()["real"]["held"][0][2]) for p in (fetched_ahead, asked)] == [1, 1]


def test_one_that_comes_back_soon_after_it_left_is_no_stranger() -> None:
    policy = CachePolicy(4)
    for _ in range(2):
        for name in "abcd":
            policy.request(name, 1)
    policy.request("new", 1)  # somebody leaves
    gone = (set("abcd") - set(policy.names())).pop()
    policy.request(gone, 1)
    assert len(next(entry[2] for entry in policy.dump()["real"]["held"] if entry[0] == gone)) == 3
