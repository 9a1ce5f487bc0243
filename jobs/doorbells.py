"""Rings workers: Celery messages without arguments, one task per job kind. A lost, doubled or forged one is harmless.

Only the dispatcher uses this; the web tier holds no broker address.
"""

import json
import logging
import time
from collections import Counter

from celery import Celery, current_app
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from jobs.status import QUEUES, JobKind

logger = logging.getLogger(__name__)

LOOK_AT_MOST = 500
"""Messages of a queue that are looked at; more than that means that somebody else writes to it."""
PAUSE_AFTER_FAILURE_SECONDS = 2.0


def task_name(kind: JobKind) -> str:
    """Celery name of a kind's task."""
    return f"jobs.tasks.{kind.value}"


class Doorbells:
    """Keeps as many doorbells of each kind as wanted. Survives a broker that is gone, frozen or emptied."""

    def __init__(self, app: Celery | None = None) -> None:
        self._app = app or current_app._get_current_object()
        self._broken_until = 0.0
        self._said_broken = False

    def top_up(self, wanted: dict[JobKind, int]) -> int:
        """Publish what is missing. Returns the number of messages sent; 0 when the broker does not answer.

        Args:
            wanted: Doorbells that should lie in the queue of each kind, >= 0.
        """
        wanted = {kind: count for kind, count in wanted.items() if count > 0}
        if not wanted or time.monotonic() < self._broken_until:
            return 0
        try:
            sent = self._top_up(wanted)
        except (OperationalError, RedisError, OSError) as error:
            if not self._said_broken:
                logger.warning("broker does not answer, jobs wait in the database: %s", error)
            self._said_broken, self._broken_until = True, time.monotonic() + PAUSE_AFTER_FAILURE_SECONDS
            self._app.pool.force_close_all()
            return 0
        if self._said_broken:
            logger.info("broker answers again")
        self._said_broken = False
        return sent

    def _top_up(self, wanted: dict[JobKind, int]) -> int:
        sent = 0
        with self._app.connection_for_write(transport_options=self._short_timeouts()) as connection:
            channel = connection.default_channel
            for queue in sorted({QUEUES[kind] for kind in wanted}):
                # kombu prefixes only some commands of its client; LRANGE is not one of them.
                raw = channel.client.execute_command("LRANGE", f"{channel.global_keyprefix}{queue}", 0, LOOK_AT_MOST)
                lying = Counter(_task_of(message) for message in raw)
                for kind, count in wanted.items():
                    for _ in range(count - lying[task_name(kind)] if QUEUES[kind] == queue else 0):
                        self._app.send_task(
                            task_name(kind), queue=queue, connection=connection, retry=False, ignore_result=True
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
