"""Tells the dispatcher in milliseconds that something was committed. Losing a word is harmless: it looks by itself.

`announce` is called in the transactions that make a job claimable; only the dispatcher waits here.
"""

import logging
import threading
import time
from collections import Counter
from typing import Protocol

import django.db
from django.db import DatabaseError
from django.db.backends.base.base import BaseDatabaseWrapper

from core.failpoints import side_effect

logger = logging.getLogger(__name__)

CHANNEL = "lorasite_jobs"
LOOK_SECONDS = 0.01
"""Between two looks at SQLite's change counter; one costs some microseconds."""
CONNECT_AGAIN_SECONDS = 5.0


def announce(kind: str = "") -> None:
    """Say that a job can be claimed once this transaction commits. Costs nothing on SQLite.

    Args:
        kind: Spares the dispatcher a query before it rings; empty where it is not at hand.
    """
    if django.db.connection.vendor == "postgresql":
        with side_effect("job.announce"), django.db.connection.cursor() as cursor:
            cursor.execute("SELECT pg_notify(%s, %s)", [CHANNEL, kind])


class Wakeup(Protocol):
    """Something to wait on between two looks at the database."""

    def wait(self, stop: threading.Event, seconds: float) -> Counter[str]:
        """Return early when something was committed or `stop` is set.

        Returns:
            {kind: announcements}; empty where nothing was heard, or the database does not say what changed.
        """

    def close(self) -> None:
        """Give the connection back."""


def wakeup() -> Wakeup:
    """The quickest that the site's database offers, on a connection of its own."""
    own = django.db.connection.copy()
    return PostgresqlWakeup(own) if own.vendor == "postgresql" else SqliteWakeup(own)


class PostgresqlWakeup:
    """LISTEN. Without a connection it sleeps, and tries again after some seconds."""

    def __init__(self, own: BaseDatabaseWrapper) -> None:
        self._own = own
        self._try_at = 0.0

    def wait(self, stop: threading.Event, seconds: float) -> Counter[str]:
        """See `Wakeup`. A stop is noticed after `seconds` at most."""
        heard: Counter[str] = Counter()
        if stop.is_set() or not self._listens():
            stop.wait(seconds)
            return heard
        try:
            with self._own.wrap_database_errors:
                heard = Counter(word.payload for word in self._own.connection.notifies(timeout=seconds, stop_after=1))
        except DatabaseError as error:
            logger.warning("no longer listening for new jobs, looking every %g s: %s", seconds, error)
            self.close()
        return heard

    def close(self) -> None:
        """See `Wakeup`."""
        self._own.close()

    def _listens(self) -> bool:
        if self._own.connection is not None:
            return True
        if time.monotonic() < self._try_at:
            return False
        self._try_at = time.monotonic() + CONNECT_AGAIN_SECONDS
        try:
            with self._own.cursor() as cursor:
                cursor.execute(f"LISTEN {CHANNEL}")
        except DatabaseError as error:
            logger.warning("cannot listen for new jobs: %s", error)
            self._own.close()
            return False
        return True


class SqliteWakeup:
    """`PRAGMA data_version` changes with every commit of another connection; which kind of job it was is not known."""

    def __init__(self, own: BaseDatabaseWrapper) -> None:
        self._own = own
        self._seen = -1

    def wait(self, stop: threading.Event, seconds: float) -> Counter[str]:
        """See `Wakeup`."""
        end = time.monotonic() + seconds
        while not stop.wait(min(LOOK_SECONDS, max(0.0, end - time.monotonic()))):
            try:
                version = self._version()
            except DatabaseError as error:
                logger.warning("cannot watch the database for new jobs: %s", error)
                self.close()
                stop.wait(seconds)
                break
            if version != self._seen:
                self._seen = version
                break
            if time.monotonic() >= end:
                break
        return Counter()

    def close(self) -> None:
        """See `Wakeup`."""
        self._own.close()

    def _version(self) -> int:
        with self._own.cursor() as cursor:
            cursor.execute("PRAGMA data_version")
            return int(cursor.fetchone()[0])
