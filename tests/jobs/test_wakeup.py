"""The dispatcher hears of commits at once, on SQLite by its change counter, on PostgreSQL by LISTEN."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from django.db import connection
from django.db.backends.postgresql.base import DatabaseWrapper as PostgresqlConnection
from django.db.backends.sqlite3.base import DatabaseWrapper as SqliteConnection

from jobs.wakeup import CHANNEL, PostgresqlWakeup, SqliteWakeup
from tests.services import postgres

pytestmark = pytest.mark.django_db


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[tuple[SqliteWakeup, SqliteConnection]]:
    """A watcher, and another connection that writes."""
    values = connection.settings_dict | {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "a.sqlite3")}
    values["OPTIONS"] = {"init_command": "PRAGMA journal_mode=WAL"}
    writer = SqliteConnection(values)
    with writer.cursor() as cursor:
        cursor.execute("CREATE TABLE line (word TEXT)")
    watcher = SqliteWakeup(SqliteConnection(values))
    yield watcher, writer
    watcher.close()
    writer.close()


@pytest.fixture(scope="module")
def postgresql_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture
def listener(postgresql_url: str) -> Iterator[PostgresqlWakeup]:
    info = psycopg.conninfo.conninfo_to_dict(postgresql_url)
    values = connection.settings_dict | {"ENGINE": "django.db.backends.postgresql", "OPTIONS": {}}
    values |= {"NAME": info["dbname"], "USER": info["user"], "HOST": info["host"], "PORT": info["port"]}
    own = PostgresqlWakeup(PostgresqlConnection(values))
    own.wait(threading.Event(), 0.0)  # Connects and listens.
    yield own
    own.close()


def test_a_commit_of_another_connection_ends_the_wait(sqlite: tuple[SqliteWakeup, SqliteConnection]) -> None:
    watcher, writer = sqlite
    watcher.wait(threading.Event(), 0.05)
    with writer.cursor() as cursor:
        cursor.execute("INSERT INTO line VALUES ('new')")
    began = time.monotonic()
    watcher.wait(threading.Event(), 30.0)
    assert time.monotonic() - began < 15


def test_without_a_commit_the_wait_lasts_its_time(sqlite: tuple[SqliteWakeup, SqliteConnection]) -> None:
    watcher, _ = sqlite
    watcher.wait(threading.Event(), 0.05)
    began = time.monotonic()
    watcher.wait(threading.Event(), 0.3)
    assert time.monotonic() - began >= 0.3


def test_a_stop_ends_the_wait(sqlite: tuple[SqliteWakeup, SqliteConnection]) -> None:
    watcher, _ = sqlite
    watcher.wait(threading.Event(), 0.05)
    stop = threading.Event()
    stop.set()
    began = time.monotonic()
    watcher.wait(stop, 30.0)
    assert time.monotonic() - began < 15


def test_a_word_is_heard_when_its_transaction_commits_and_not_before(
    listener: PostgresqlWakeup, postgresql_url: str
) -> None:
    with psycopg.connect(postgresql_url) as submitter:
        submitter.execute("SELECT pg_notify(%s, %s)", [CHANNEL, "generate"])
        assert not listener.wait(threading.Event(), 0.3)
        submitter.commit()
        assert listener.wait(threading.Event(), 30.0) == {"generate": 1}


def test_a_word_of_a_transaction_that_was_rolled_back_is_never_heard(
    listener: PostgresqlWakeup, postgresql_url: str
) -> None:
    with psycopg.connect(postgresql_url) as submitter:
        submitter.execute("SELECT pg_notify(%s, %s)", [CHANNEL, "generate"])
        submitter.rollback()
    assert not listener.wait(threading.Event(), 0.3)


def test_a_lost_connection_is_waited_out_and_made_again(listener: PostgresqlWakeup, postgresql_url: str) -> None:
    with psycopg.connect(postgresql_url, autocommit=True) as other:
        kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' OR query = ''"
        other.execute(kill + " AND pid <> pg_backend_pid()")
        assert not listener.wait(threading.Event(), 0.2)
        listener._try_at = 0.0
        listener.wait(threading.Event(), 0.0)
        other.execute("SELECT pg_notify(%s, %s)", [CHANNEL, "train"])
        assert listener.wait(threading.Event(), 30.0) == {"train": 1}


@pytest.mark.django_db(transaction=True)
def test_submitting_a_job_announces_its_kind_on_postgresql(django_user_model: type) -> None:
    from jobs.status import JobKind
    from jobs.submission import job_submit
    from jobs.wakeup import wakeup

    if connection.vendor != "postgresql":
        pytest.skip("SQLite has no announcements")
    bell = wakeup()
    bell.wait(threading.Event(), 0.0)
    owner = django_user_model.objects.create_user("announcer")  # type: ignore[attr-defined]
    job_submit(owner=owner, kind=JobKind.GENERATE, spec={}, attach=lambda job: None)
    assert bell.wait(threading.Event(), 30.0) == {"generate": 1}
    bell.close()
