"""Rings workers: Celery messages without arguments, one task per job kind. A lost, doubled or forged one is harmless.

Only the dispatcher uses this; the web tier holds no broker address.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from celery import Celery, current_app
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as BrokerConnectionError
from redis.exceptions import RedisError

from core.failpoints import side_effect
from jobs.status import INTERACTIVE, QUEUES, JobKind

logger = logging.getLogger(__name__)

LOOK_AT_MOST = 500
"""Messages of a queue that are looked at; more than that means that somebody else writes to it."""
PAUSE_AFTER_FAILURE_SECONDS = 2.0
PER_CHILD = 2
"""Doorbells that lie ready for each worker process: one to take, one for when it comes back."""


def task_name(kind: JobKind) -> str:
    """Celery name of a kind's task."""
    return f"jobs.tasks.{kind.value}"


def doorbells_wanted(waiting: Mapping[str, int], children: Mapping[str, int]) -> dict[JobKind, int]:
    """How many doorbells of each kind should lie ready, interactive kinds first.

    Per queue `PER_CHILD` times its live children in all, however many jobs wait, and one at least of each kind that
    waits; the kinds take turns, so that a thousand of one do not keep another from being rung.

    Args:
        waiting: {kind: claimable jobs}.
        children: {queue: live worker processes that serve it}.
    """
    wanted: dict[JobKind, int] = {}
    for queue in dict.fromkeys(QUEUES.values()):
        kinds = sorted((k for k, q in QUEUES.items() if q == queue), key=lambda kind: kind not in INTERACTIVE)
        left = {kind: waiting.get(kind, 0) for kind in kinds if waiting.get(kind, 0) > 0}
        room = max(PER_CHILD * children.get(queue, 0), len(left)) if children.get(queue, 0) else 0
        while room > 0 and any(left.values()):
            for kind in [kind for kind, count in left.items() if count][:room]:
                left[kind] -= 1
                wanted[kind] = wanted.get(kind, 0) + 1
                room -= 1
    return wanted


class Doorbells:
    """Keeps as many doorbells of each kind as wanted. Survives a broker that is gone, frozen, restarted or emptied."""

    def __init__(self, app: Celery | None = None) -> None:
        self._app = app or current_app._get_current_object()
        self._connection: Any = None
        self._producer: Any = None
        self._broken_until = 0.0
        self._said_broken = False

    def top_up(self, wanted: Mapping[JobKind, int]) -> int:
        """Publish what is missing. Returns the number of messages sent; 0 when the broker does not answer.

        Args:
            wanted: Doorbells that should lie in the queue of each kind, >= 0.
        """
        wanted = {kind: count for kind, count in wanted.items() if count > 0}
        if not wanted or time.monotonic() < self._broken_until:
            return 0
        was_open = self._connection is not None
        try:
            try:
                sent = self._top_up(wanted)
            except (OperationalError, BrokerConnectionError):
                if not was_open:
                    raise
                self.close()  # The broker was restarted since the last time: a fresh connection will do.
                sent = self._top_up(wanted)
        except (OperationalError, RedisError, OSError) as error:
            if not self._said_broken:
                logger.warning("broker does not answer, jobs wait in the database: %s", error)
            self._said_broken, self._broken_until = True, time.monotonic() + PAUSE_AFTER_FAILURE_SECONDS
            self.close()
            return 0
        if self._said_broken:
            logger.info("broker answers again")
        self._said_broken = False
        return sent

    def close(self) -> None:
        """Drop the connection; the next ring opens one."""
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            try:
                connection.release()
            except (OperationalError, RedisError, OSError) as error:
                logger.debug("broker connection did not close cleanly: %s", error)

    def _top_up(self, wanted: Mapping[JobKind, int]) -> int:
        if self._connection is None:
            self._connection = self._app.connection_for_write(transport_options=self._short_timeouts())
            self._producer = self._app.amqp.Producer(self._connection)
        sent, channel = 0, self._producer.channel
        for queue in sorted({QUEUES[kind] for kind in wanted}):
            # kombu prefixes only some commands of its client; LRANGE is not one of them.
            raw = channel.client.execute_command("LRANGE", f"{channel.global_keyprefix}{queue}", 0, LOOK_AT_MOST)
            lying = Counter(_task_of(message) for message in raw)
            for kind, count in wanted.items():
                for _ in range(count - lying[task_name(kind)] if QUEUES[kind] == queue else 0):
                    with side_effect("doorbell.ring"):
                        self._app.send_task(
                            task_name(kind), queue=queue, producer=self._producer, retry=False, ignore_result=True
                        )
                    sent += 1
        return sent

    def _short_timeouts(self) -> dict[str, object]:
        options = dict(self._app.conf.broker_transport_options or {})
        return options | {"socket_timeout": 1, "socket_connect_timeout": 1, "retry_on_timeout": False}


def _task_of(message: bytes) -> str:
    try:
        return str(json.loads(message)["headers"]["task"])
    except (ValueError, KeyError, TypeError):
        return ""  # Not ours; workers drop it as well.
