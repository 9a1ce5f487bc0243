"""What must be true of a small site once all is over, read with plain SQL: nothing of the product here."""

import hashlib
import json
import sqlite3
from pathlib import Path

FINAL = {"succeeded", "failed", "cancelled", "expired"}


def findings(folder: Path, ends: dict[str, frozenset[str]]) -> list[str]:
    """Sentences about what is wrong; empty when all is well.

    Args:
        folder: Of the site.
        ends: Allowed final states by idempotency key; only "succeeded" where a key is not named.
    """
    database = sqlite3.connect(folder / "site.sqlite3")
    database.row_factory = sqlite3.Row
    found: list[str] = []
    for job in database.execute("select * from jobs_job where idempotency_key is not null"):
        found += [f"job {job['idempotency_key']}: {what}" for what in _of_job(database, job, ends)]
    found += _of_blobs(database, folder)
    database.close()
    return found


def _of_job(database: sqlite3.Connection, job: sqlite3.Row, ends: dict[str, frozenset[str]]) -> list[str]:
    found = []
    allowed = ends.get(job["idempotency_key"], frozenset({"succeeded"}))
    if job["state"] not in allowed:
        found.append(f"is {job['state']} ({job['error_code']} {job['error_message']}), not {' or '.join(allowed)}")
    attempts = database.execute("select * from jobs_jobattempt where job_id = ? order by token", [job["id"]]).fetchall()
    if job["state"] in FINAL and any(attempt["ended_at"] is None for attempt in attempts):
        found.append("has ended with an open attempt")
    if [attempt["token"] for attempt in attempts] != list(range(1, job["token"] + 1)):
        found.append(f"has tokens {[attempt['token'] for attempt in attempts]} and is at {job['token']}")
    if sum(attempt["outcome"] == "succeeded" for attempt in attempts) != (job["state"] == "succeeded"):
        found.append(f"is {job['state']} with outcomes {[attempt['outcome'] for attempt in attempts]}")
    chain = [""]
    for event in database.execute("select * from jobs_jobevent where job_id = ? order by id", [job["id"]]):
        if event["old_state"] != chain[-1]:
            found.append(f"went from {event['old_state']} while it was {chain[-1]}")
        if chain[-1] in FINAL:
            found.append(f"changed after its end: {chain}")
        chain.append(event["new_state"])
    if chain[-1] != job["state"]:
        found.append(f"is {job['state']}, its last event says {chain[-1]}")
    return found


def _of_blobs(database: sqlite3.Connection, folder: Path) -> list[str]:
    """Every hash that a result names is in the store with its bytes."""
    named: dict[str, str] = {}
    for table, column in (
        ("jobs_generatedimage", "sha256"),
        ("jobs_loraversion", "kohya_sha256"),
        ("jobs_datasetimage", "sha256"),
    ):
        named |= {row[0]: f"{table}.{column}" for row in database.execute(f"select {column} from {table}")}  # noqa: S608
    for table, column in (
        ("jobs_loraversion", "peft_files"),
        ("jobs_trainingrun", "samples"),
        ("jobs_datasetversion", "manifest"),
        ("jobs_basemodel", "files"),
    ):
        for (text,) in database.execute(f"select {column} from {table} where {column} is not null"):  # noqa: S608
            named |= dict.fromkeys(_hashes(json.loads(text)), f"{table}.{column}")
    found = []
    for sha256, where in named.items():
        path = folder / "storage" / "sha256" / sha256[:2] / sha256
        if not path.is_file():
            found.append(f"blob {sha256[:12]} of {where} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            found.append(f"blob {sha256[:12]} of {where} holds other bytes")
    return found


def _hashes(value: object) -> list[str]:
    if isinstance(value, dict):
        # The uploaded original is stored as well, the manifest's own hash is none of a blob.
        return [hash_ for key, inner in value.items() if key != "content_hash" for hash_ in _hashes(inner)]
    if isinstance(value, list):
        return [hash_ for inner in value for hash_ in _hashes(inner)]
    is_hash = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return [str(value)] if is_hash else []
