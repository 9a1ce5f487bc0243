"""The monkey's and the auditor's own way to the database: plain SQL past the proxy, and triggers that write history.

Imports nothing of the product. The triggers write every change of a job's state, token, checkpoint or figures into
`chaos_history`, in the order in which the row locks let them happen.
"""

import json
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg.rows import dict_row

CHANGED = (
    "OLD.state IS DISTINCT FROM NEW.state OR OLD.token IS DISTINCT FROM NEW.token OR OLD.checkpoint IS DISTINCT FROM "
    "NEW.checkpoint OR OLD.checkpoint_step IS DISTINCT FROM NEW.checkpoint_step OR OLD.figures IS DISTINCT FROM "
    "NEW.figures"
)
COLUMNS = (
    "job, old_state, new_state, old_token, new_token, old_step, new_step, old_checkpoint, new_checkpoint, "
    "old_figures, new_figures"
)
VALUES = (
    "CAST(NEW.id AS TEXT), OLD.state, NEW.state, OLD.token, NEW.token, OLD.checkpoint_step, NEW.checkpoint_step, "
    "CAST(OLD.checkpoint AS TEXT), CAST(NEW.checkpoint AS TEXT), CAST(OLD.figures AS TEXT), CAST(NEW.figures AS TEXT)"
)
REMEMBER = f"INSERT INTO chaos_history ({COLUMNS}) VALUES ({VALUES})"  # noqa: S608 - constants of this file
TABLE = """CREATE TABLE chaos_history (
    id {serial}, at {time}, job TEXT, old_state TEXT, new_state TEXT, old_token BIGINT, new_token BIGINT,
    old_step BIGINT, new_step BIGINT, old_checkpoint TEXT, new_checkpoint TEXT, old_figures TEXT, new_figures TEXT
)"""
POSTGRES_TRIGGER = [
    TABLE.format(serial="BIGSERIAL PRIMARY KEY", time="TIMESTAMPTZ DEFAULT clock_timestamp()"),
    f"CREATE FUNCTION chaos_remember() RETURNS trigger AS $$ BEGIN {REMEMBER}; RETURN NULL; END $$ LANGUAGE plpgsql",
    f"""CREATE TRIGGER chaos_remember AFTER UPDATE ON jobs_job FOR EACH ROW
        WHEN ({CHANGED}) EXECUTE FUNCTION chaos_remember()""",
]
SQLITE_TRIGGER = [
    TABLE.format(
        serial="INTEGER PRIMARY KEY AUTOINCREMENT", time="TEXT DEFAULT (STRFTIME('%Y-%m-%d %H:%M:%f', 'NOW'))"
    ),
    f"""CREATE TRIGGER chaos_remember AFTER UPDATE ON jobs_job
        WHEN {CHANGED.replace("IS DISTINCT FROM", "IS NOT")} BEGIN {REMEMBER}; END""",
]
HELD = """SELECT j.id AS job, j.token AS token, j.kind AS kind, w.pid AS pid
    FROM jobs_job j JOIN jobs_workerprocess w ON w.id = j.worker_id
    WHERE j.state IN ('running', 'uploading') AND j.lease_until > {now}"""


class Database:
    """A connection of our own; dict rows, ids as 32 hex digits, times as aware datetimes, JSON parsed."""

    def __init__(self, url: str) -> None:
        self.is_postgres = url.startswith("postgres")
        self._connection: Any
        if self.is_postgres:
            self._connection = psycopg.connect(url, autocommit=True, row_factory=dict_row)  # type: ignore[arg-type]
        else:
            self._connection = sqlite3.connect(Path(urlsplit(url).path), timeout=20, isolation_level=None)
            self._connection.row_factory = sqlite3.Row

    def install_history(self) -> None:
        """Create the table and its trigger."""
        for statement in POSTGRES_TRIGGER if self.is_postgres else SQLITE_TRIGGER:
            self._connection.execute(statement)

    def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """All rows of a query; placeholders are written %s."""
        if not self.is_postgres:
            query = query.replace("%s", "?")
        found = self._connection.execute(query, values).fetchall() if values else self._connection.execute(query)
        return [{name: _plain(name, value) for name, value in dict(row).items()} for row in found]

    def held(self) -> list[dict[str, Any]]:
        """Live leases of this moment: job, token, kind, pid of the holder."""
        now = "now()" if self.is_postgres else "STRFTIME('%Y-%m-%d %H:%M:%f', 'NOW')"
        return self.rows(HELD.format(now=now))

    def was_lost(self, job: str, token: int) -> bool:
        """Whether this try has ended as lost by now."""
        query = "SELECT outcome FROM jobs_jobattempt WHERE job_id = %s AND token = %s"
        return [row["outcome"] for row in self.rows(query, job, token)] == ["lost"]

    def unfinished(self) -> int:
        """Jobs that have not ended."""
        query = "SELECT COUNT(*) AS n FROM jobs_job WHERE state IN ('queued', 'running', 'uploading')"
        return int(self.rows(query)[0]["n"])

    def leading_dispatcher(self) -> str:
        """Who holds the lead, in the dispatcher's own words: host and pid are in it."""
        rows = self.rows("SELECT holder FROM jobs_leaderlease WHERE role = 'dispatcher'")
        return str(rows[0]["holder"]) if rows else ""

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


IDS = {"id", "job", "job_id", "request_id", "training_run_id", "lora_id", "lora_version_id"}
TIMES = {
    "at",
    "started_at",
    "ended_at",
    "finished_at",
    "created_at",
    "cancel_requested_at",
    "lease_until",
    "not_before",
}
DOCUMENTS = {"spec", "checkpoint", "old_checkpoint", "new_checkpoint", "old_figures", "new_figures", "peft_files"}
DOCUMENTS |= {"samples", "manifest", "files"}


def _plain(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in IDS and not isinstance(value, int):
        return str(value).replace("-", "")
    if name in TIMES and isinstance(value, str):
        return datetime.fromisoformat(value).replace(tzinfo=UTC)
    if name in DOCUMENTS and isinstance(value, str):
        return json.loads(value)
    return value
