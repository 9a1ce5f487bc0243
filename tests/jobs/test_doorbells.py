"""How many doorbells lie ready, and a ringing connection that outlives whatever happens to the broker."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from jobs.doorbells import Doorbells, doorbells_wanted
from jobs.status import JobKind
from tests.jobs.conftest import app_for
from tests.services import valkey


@contextmanager
def frozen(client: redis.Redis) -> Iterator[None]:
    server = int(client.info("server")["process_id"])
    os.kill(server, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server, signal.SIGCONT)


def lying(client: redis.Redis, queue: str = "gpu") -> list[str]:
    return [json.loads(message)["headers"]["task"] for message in client.lrange(f"lorasite:{queue}", 0, -1)]


def test_two_thousand_waiting_jobs_need_two_doorbells_a_child() -> None:
    wanted = doorbells_wanted({"generate": 1500, "train": 480, "prepare_base": 20}, {"gpu": 4, "cpu": 1})
    assert sum(wanted.values()) == 8
    assert set(wanted) == {JobKind.GENERATE, JobKind.TRAIN, JobKind.PREPARE_BASE}


def test_each_waiting_kind_is_rung_even_for_one_child_and_interactive_ones_first() -> None:
    wanted = doorbells_wanted({"train": 5, "generate": 5, "prepare_base": 5}, {"gpu": 1})
    assert wanted == {JobKind.GENERATE: 1, JobKind.TRAIN: 1, JobKind.PREPARE_BASE: 1}
    assert next(iter(wanted)) == JobKind.GENERATE


def test_a_queue_without_children_is_not_rung() -> None:
    assert doorbells_wanted({"train": 5, "preprocess": 1}, {"gpu": 0, "cpu": 1}) == {JobKind.PREPROCESS: 1}


def test_one_connection_rings_many_times(tmp_path: Path) -> None:
    with valkey(tmp_path) as url:
        client, bells = redis.Redis.from_url(url), Doorbells(app_for(url))
        bells.top_up({JobKind.GENERATE: 1})
        before = client.info("stats")["total_connections_received"]
        for count in range(2, 30):
            assert bells.top_up({JobKind.GENERATE: count}) == 1
        assert client.info("stats")["total_connections_received"] == before
        bells.close()


def test_a_broken_connection_is_replaced_in_the_same_ring(tmp_path: Path) -> None:
    with valkey(tmp_path) as url:
        client, bells = redis.Redis.from_url(url), Doorbells(app_for(url))
        bells.top_up({JobKind.GENERATE: 1})
        client.client_kill_filter(_type="normal", skipme=True)
        assert bells.top_up({JobKind.GENERATE: 2}) == 1
        assert len(lying(client)) == 2
        bells.close()


def test_an_emptied_broker_is_rung_at_the_next_look(tmp_path: Path) -> None:
    with valkey(tmp_path) as url:
        client, bells = redis.Redis.from_url(url), Doorbells(app_for(url))
        bells.top_up({JobKind.TRAIN: 2})
        client.flushall()
        assert bells.top_up({JobKind.TRAIN: 2}) == 2
        bells.close()


def test_a_frozen_broker_holds_nobody_up_for_long_and_is_rung_when_it_wakes(tmp_path: Path) -> None:
    with valkey(tmp_path) as url:
        client, bells = redis.Redis.from_url(url), Doorbells(app_for(url))
        bells.top_up({JobKind.GENERATE: 1})
        with frozen(client):
            began = time.monotonic()
            assert bells.top_up({JobKind.GENERATE: 2}) == 0
            assert time.monotonic() - began < 12
            began = time.monotonic()
            assert bells.top_up({JobKind.GENERATE: 2}) == 0
            assert time.monotonic() - began < 1, "a broker known to be away is left alone for a while"
        bells._broken_until = 0.0
        bells.top_up({JobKind.GENERATE: 2})
        assert len(lying(client)) == 2
        bells.close()
