"""The auditor finds what it is there for: a healthy record passes, and each planted fault is found and named."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import expected, journal
from tests.chaos.audit_report import CATEGORIES, Report
from tests.chaos.auditor import audit
from tests.chaos.database import Database
from tests.chaos.stored_blobs import FolderBlobs

TABLES = """
CREATE TABLE jobs_job (id TEXT, kind TEXT, state TEXT, token INTEGER, spec TEXT, error_code TEXT, error_message TEXT,
    attempts_count INTEGER, barren_losses INTEGER, checkpoint TEXT, checkpoint_step INTEGER, used_worker_seconds REAL,
    cancel_requested_at TEXT, not_before TEXT, idempotency_key TEXT, stage TEXT, figures TEXT);
CREATE TABLE jobs_jobattempt (job_id TEXT, token INTEGER, worker_name TEXT, started_at TEXT, ended_at TEXT,
    outcome TEXT, reason TEXT, from_step INTEGER, to_step INTEGER);
CREATE TABLE jobs_jobevent (id INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT, at TEXT, old_state TEXT, new_state TEXT,
    token INTEGER, reason TEXT);
CREATE TABLE jobs_generationrequest (id TEXT, job_id TEXT);
CREATE TABLE jobs_generatedimage (request_id TEXT, number INTEGER, seed INTEGER, sha256 TEXT, size_bytes INTEGER);
CREATE TABLE jobs_trainingrun (id TEXT, job_id TEXT, lora_name TEXT, samples TEXT);
CREATE TABLE jobs_lora (id TEXT, name TEXT);
CREATE TABLE jobs_loraversion (id TEXT, lora_id TEXT, number INTEGER, training_run_id TEXT, kohya_sha256 TEXT,
    kohya_size_bytes INTEGER, peft_files TEXT);
CREATE TABLE jobs_loraimport (job_id TEXT, lora_name TEXT, sha256 TEXT, lora_version_id TEXT);
CREATE TABLE jobs_datasetversion (job_id TEXT, manifest_hash TEXT, manifest TEXT);
"""
GENERATION, TRAINING, IMPORT = "a" * 32, "b" * 32, "e" * 32
PROMPT, SEED, STEPS, LORA, BROUGHT = "a red apple", 7, 8, "apples", "pears"
NOON = 1_800_000_000  # wall clock seconds; the rows' times are counted from here


class Record:
    """What a quiet run leaves behind: two pictures; a LoRA trained by token 2, token 1 was killed; one imported."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.journals = folder, folder / "journals"
        self.sql = sqlite3.connect(folder / "record.sqlite3", isolation_level=None)
        self.sql.executescript("PRAGMA synchronous=OFF; PRAGMA journal_mode=MEMORY;" + TABLES)
        self.sql.executemany("INSERT INTO jobs_lora VALUES (?, ?)", [(LORA, LORA), (BROUGHT, BROUGHT)])
        self.database = Database(f"sqlite:///{folder}/record.sqlite3")
        self.database.install_history()
        self.workload = journal.Journal(self.journals / "workload.jsonl")
        self.monkey = journal.Journal(self.journals / "monkey.jsonl")
        self._generation()
        self._training()
        self._import()

    def audit(self) -> Report:
        return audit(database=self.database, journals=self.journals, store=FolderBlobs(self.folder / "store"))

    def put(self, content: bytes) -> str:
        sha256 = expected.sha256(content)
        path = self.folder / "store" / "sha256" / sha256[:2] / sha256
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return sha256

    def blob(self, sha256: str) -> Path:
        return self.folder / "store" / "sha256" / sha256[:2] / sha256

    def change(self, job: str, state: str, token: int, **columns: Any) -> None:
        """As a guarded update with its event."""
        (old,) = self.sql.execute("SELECT state FROM jobs_job WHERE id = ?", [job]).fetchone()
        self.event(job, old, state, token)
        self.update(job, state=state, token=token, **columns)

    def update(self, job: str, **columns: Any) -> None:
        names = ", ".join(f"{name} = ?" for name in columns)
        self.sql.execute(f"UPDATE jobs_job SET {names} WHERE id = ?", [*columns.values(), job])  # noqa: S608

    def event(self, job: str, old: str, new: str, token: int) -> None:
        values = [job, time(0), old, new, token, "told"]
        self.sql.execute(
            "INSERT INTO jobs_jobevent (job_id, at, old_state, new_state, token, reason) VALUES (?,?,?,?,?,?)", values
        )

    def job(self, job: str, kind: str, **promised: Any) -> None:
        row = [job, kind, "queued", 0, "{}", "", "", 0, 0, None, 0, 0.0, None, None, f"key {job}", "", "{}"]
        self.sql.execute(f"INSERT INTO jobs_job VALUES ({','.join('?' * len(row))})", row)  # noqa: S608
        self.event(job, "", "queued", 0)
        self.workload.write("submitted", job=job, kind=kind, **promised)

    def attempt(self, job: str, token: int, begin: float, end: float | None, outcome: str, from_step: int = 0) -> None:
        row = [job, token, f"vm:{100 + token}", time(begin), time(end), outcome, "", from_step, 0]
        self.sql.execute("INSERT INTO jobs_jobattempt VALUES (?,?,?,?,?,?,?,?,?)", row)

    def work(self, event: str, job: str, token: int, wall: float, **values: Any) -> None:
        """A line of a worker's journal."""
        path = self.journals / f"worker-node0-{100 + token}.jsonl"
        line = {"event": event, "job": job, "token": token, "wall": NOON + wall, "pid": 100 + token, **values}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def killed(self, job: str, token: int) -> None:
        held = [{"job": job, "token": token, "kind": "train", "pid": 100 + token}]
        self.monkey.write("kill", what="child", node="node0", pids=[100 + token], holders=[100 + token], held=held)

    def checkpoint(self, token: int, step: int, *, written_by: int | None = None) -> None:
        """The job's checkpoint changes; `written_by` is whose state it is."""
        state = json.dumps({"job": TRAINING, "token": written_by or token, "step": step})
        files = {f"checkpoints/step-{step:06d}/state.json": self.put(state.encode())}
        self.update(TRAINING, checkpoint=json.dumps(files), checkpoint_step=step)

    def _generation(self) -> None:
        self.job(GENERATION, "generate", prompt=PROMPT, seed=SEED, count=2)
        self.sql.execute("INSERT INTO jobs_generationrequest VALUES (?, ?)", ["r" * 32, GENERATION])
        self.change(GENERATION, "running", 1, attempts_count=1)
        self.update(GENERATION, figures=json.dumps({"token": 1.0}))
        self.work("begin", GENERATION, 1, 0, kind="generate", node="node0")
        self.change(GENERATION, "uploading", 1)
        for number in range(2):
            self.picture(number)
        self.change(GENERATION, "succeeded", 1, used_worker_seconds=1.0)
        self.attempt(GENERATION, 1, 0, 1, "succeeded")

    def picture(self, number: int, seed: int | None = None) -> str:
        content = expected.picture_bytes(PROMPT, SEED + number if seed is None else seed)
        row = ["r" * 32, number, SEED + number, self.put(content), len(content)]
        self.sql.execute("INSERT INTO jobs_generatedimage VALUES (?,?,?,?,?)", row)
        return str(row[3])

    def _training(self) -> None:
        self.job(TRAINING, "train", seed=SEED, steps=STEPS, lora_name=LORA)
        self.sql.execute("INSERT INTO jobs_trainingrun VALUES (?,?,?,?)", ["t" * 32, TRAINING, LORA, "[]"])
        self.change(TRAINING, "running", 1, attempts_count=1)
        self.work("begin", TRAINING, 1, 0, kind="train", node="node0")
        for step in range(5):
            self.work("step", TRAINING, 1, 0.1 * (step + 1), step=step)
        self.checkpoint(1, 4)
        self.killed(TRAINING, 1)
        self.change(TRAINING, "queued", 1)
        self.attempt(TRAINING, 1, 0, 3, "lost")
        self.change(TRAINING, "running", 2, attempts_count=2)
        self.work("begin", TRAINING, 2, 4, kind="train", node="node0")
        self.work("resume", TRAINING, 2, 4.1, step=4, of_token=1, right=True)
        for step in range(4, STEPS):
            self.work("step", TRAINING, 2, 4.2 + 0.1 * step, step=step)
        self.checkpoint(2, STEPS)
        self.change(TRAINING, "uploading", 2)
        self.version()
        self.change(TRAINING, "succeeded", 2, used_worker_seconds=5.0)
        self.attempt(TRAINING, 2, 4, 6, "succeeded", from_step=4)

    def version(self, state: str = "") -> str:
        state = state or expected.chain(SEED, STEPS, LORA, STEPS)
        content = expected.kohya_bytes(state)
        peft = {"adapter_model.safetensors": self.put(expected.adapter_bytes(state))}
        return self.lora_version(LORA, content, training_run="t" * 32, peft=peft)

    def imported(self, seed: int = SEED) -> str:
        """Another version of the brought LoRA; its id."""
        return self.lora_version(BROUGHT, expected.uploaded_bytes(seed))

    def lora_version(
        self, name: str, content: bytes, *, training_run: str | None = None, peft: dict[str, str] | None = None
    ) -> str:
        (number,) = self.sql.execute("SELECT COUNT(*) FROM jobs_loraversion WHERE lora_id = ?", [name]).fetchone()
        row = [f"{name} {number}", name, number + 1, training_run, self.put(content), len(content)]
        self.sql.execute("INSERT INTO jobs_loraversion VALUES (?,?,?,?,?,?,?)", [*row, json.dumps(peft or {})])
        return str(row[0])

    def _import(self) -> None:
        self.job(IMPORT, "import_lora", seed=SEED, lora_name=BROUGHT)
        self.change(IMPORT, "running", 1, attempts_count=1)
        self.change(IMPORT, "uploading", 1)
        asked = [IMPORT, BROUGHT, self.put(expected.uploaded_bytes(SEED)), self.imported()]
        self.sql.execute("INSERT INTO jobs_loraimport VALUES (?,?,?,?)", asked)
        self.change(IMPORT, "succeeded", 1, used_worker_seconds=1.0)
        self.attempt(IMPORT, 1, 7, 8, "succeeded")


def time(seconds: float | None) -> str | None:
    """Seconds after noon as the database writes them."""
    from datetime import UTC, datetime

    return None if seconds is None else datetime.fromtimestamp(NOON + seconds, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path)


def test_a_healthy_record_passes_and_its_kill_counts(record: Record) -> None:
    report = record.audit()
    assert [finding.text() for finding in report.findings] == []
    assert report.kills == 1
    assert report.counts() == "lost=0 duplicated=0 overlaps=0 stale_writes=0"


def vanished(record: Record) -> None:
    record.sql.execute("DELETE FROM jobs_job WHERE id = ?", [GENERATION])


def never_ended(record: Record) -> None:
    record.job("c" * 32, "generate", prompt="x", seed=1, count=1)


def failed_for_nothing(record: Record) -> None:
    record.job("c" * 32, "generate", prompt="x", seed=1, count=1)
    record.change("c" * 32, "running", 1, attempts_count=1)
    record.change("c" * 32, "failed", 1, error_code="internal", used_worker_seconds=1.0)
    record.attempt("c" * 32, 1, 0, 1, "failed")


def poisoned_without_three_kills(record: Record) -> None:
    record.job("c" * 32, "generate", prompt="x", seed=1, count=1)
    for token in (1, 2, 3):
        record.change("c" * 32, "running", token, attempts_count=token)
        record.change("c" * 32, "queued" if token < 3 else "failed", token, error_code="poison")
        record.attempt("c" * 32, token, 10 * token, 10 * token + 1, "lost")
    record.update("c" * 32, used_worker_seconds=3.0)
    for token in (1, 2):
        record.killed("c" * 32, token)


def picture_missing(record: Record) -> None:
    record.sql.execute("DELETE FROM jobs_generatedimage WHERE number = 1")


def blob_missing(record: Record) -> None:
    record.blob(expected.sha256(expected.picture_bytes(PROMPT, SEED))).unlink()


def blob_damaged(record: Record) -> None:
    record.blob(expected.sha256(expected.picture_bytes(PROMPT, SEED))).write_bytes(b"other bytes")


def progress_thrown_away(record: Record) -> None:
    record.sql.execute("UPDATE jobs_jobattempt SET from_step = 6 WHERE token = 2 AND job_id = ?", [TRAINING])


def cancelled_by_nobody(record: Record) -> None:
    record.job("c" * 32, "generate", prompt="x", seed=1, count=1)
    record.change("c" * 32, "cancelled", 0)


def picture_doubled(record: Record) -> None:
    record.picture(2)


def second_lora_version(record: Record) -> None:
    record.version()


def other_bytes(record: Record) -> None:
    record.sql.execute("DELETE FROM jobs_loraversion WHERE lora_id = ?", [LORA])
    record.version(expected.chain(SEED, STEPS, LORA, STEPS - 1))


def import_without_a_version(record: Record) -> None:
    record.sql.execute("DELETE FROM jobs_loraversion WHERE lora_id = ?", [BROUGHT])


def import_of_a_lost_row(record: Record) -> None:
    record.sql.execute("DELETE FROM jobs_loraimport")


def import_names_another_version(record: Record) -> None:
    record.sql.execute("UPDATE jobs_loraimport SET lora_version_id = (SELECT id FROM jobs_loraversion LIMIT 1)")


def imported_file_missing(record: Record) -> None:
    record.blob(expected.sha256(expected.uploaded_bytes(SEED))).unlink()


def imported_twice(record: Record) -> None:
    record.imported()


def other_bytes_imported(record: Record) -> None:
    record.sql.execute("DELETE FROM jobs_loraversion WHERE lora_id = ?", [BROUGHT])
    record.imported(SEED + 1)


def version_of_a_cancelled_import(record: Record) -> None:
    cancelled_after_all(record, IMPORT)


def results_of_a_cancelled_job(record: Record) -> None:
    cancelled_after_all(record, GENERATION)


def cancelled_after_all(record: Record, job: str) -> None:
    record.workload.write("cancel", job=job, answer="running")
    record.sql.execute("DROP TRIGGER chaos_remember")
    record.sql.execute("UPDATE jobs_job SET state = 'cancelled' WHERE id = ?", [job])
    record.sql.execute("UPDATE jobs_jobevent SET new_state = 'cancelled' WHERE new_state = 'succeeded'")
    record.sql.execute("UPDATE chaos_history SET new_state = 'cancelled' WHERE new_state = 'succeeded'")


def one_key_twice(record: Record) -> None:
    record.job("c" * 32, "train", seed=1, steps=1, lora_name="x")
    record.workload.write("cancel", job="c" * 32, answer="cancelled")
    record.change("c" * 32, "cancelled", 0)
    record.update(TRAINING, idempotency_key="key " + "c" * 32)


def charged_twice(record: Record) -> None:
    record.update(TRAINING, used_worker_seconds=10.0)


def zombie_works_on(record: Record) -> None:
    for step in (5, 6):
        record.work("step", TRAINING, 1, 4.5 + 0.1 * step, step=step)


def one_token_in_two_processes(record: Record) -> None:
    record.work("begin", TRAINING, 2, 5, kind="train", node="node1")
    lines = (record.journals / "worker-node0-102.jsonl").read_text()
    (record.journals / "worker-node1-109.jsonl").write_text(lines.replace('"pid": 102', '"pid": 109'))


def attempts_side_by_side(record: Record) -> None:
    record.sql.execute("UPDATE jobs_jobattempt SET started_at = ? WHERE job_id = ? AND token = 2", [time(2), TRAINING])
    record.update(TRAINING, used_worker_seconds=7.0)


def checkpoint_of_a_zombie(record: Record) -> None:
    record.change(TRAINING, "running", 3, attempts_count=3)
    record.checkpoint(3, STEPS + 2, written_by=2)


def checkpoint_goes_back(record: Record) -> None:
    record.checkpoint(2, 2)


def progress_of_a_zombie(record: Record) -> None:
    record.update(TRAINING, figures=json.dumps({"token": 1.0}))


def reopened(record: Record) -> None:
    record.change(GENERATION, "queued", 1)
    record.change(GENERATION, "running", 2, attempts_count=2)
    record.change(GENERATION, "uploading", 2)
    record.change(GENERATION, "succeeded", 2)
    record.attempt(GENERATION, 2, 2, 2, "succeeded")


def change_without_event(record: Record) -> None:
    record.sql.execute("DELETE FROM jobs_jobevent WHERE new_state = 'uploading' AND job_id = ?", [TRAINING])


def token_jumps(record: Record) -> None:
    record.job("c" * 32, "generate", prompt="x", seed=1, count=1)
    record.workload.write("cancel", job="c" * 32, answer="running")
    record.change("c" * 32, "running", 2, attempts_count=1)
    record.change("c" * 32, "cancelled", 2, used_worker_seconds=1.0)
    record.attempt("c" * 32, 2, 0, 1, "cancelled")


def attempt_left_open(record: Record) -> None:
    record.sql.execute("UPDATE jobs_jobattempt SET ended_at = NULL, outcome = '' WHERE token = 2")


def wrong_resume(record: Record) -> None:
    record.work("resume", TRAINING, 2, 4.15, step=4, of_token=1, right=False)


def published_after_a_final_cancel(record: Record) -> None:
    record.workload.write("cancel", job=GENERATION, answer="cancelled")


@pytest.mark.parametrize(
    ("category", "plant", "words"),
    [
        ("lost", vanished, "not in the database"),
        ("lost", never_ended, "has not ended"),
        ("lost", failed_for_nothing, "nothing explains"),
        ("lost", poisoned_without_three_kills, "explains only 2"),
        ("lost", picture_missing, "without its pictures [1]"),
        ("lost", blob_missing, "not in the store"),
        ("lost", blob_damaged, "damaged in the store"),
        ("lost", progress_thrown_away, "went on from step 4"),
        ("lost", cancelled_by_nobody, "nobody asked"),
        ("duplicated", picture_doubled, "asked for 2 pictures"),
        ("duplicated", second_lora_version, "2 LoRA versions"),
        ("duplicated", other_bytes, "other bytes"),
        ("lost", import_without_a_version, "without an imported version"),
        ("lost", import_of_a_lost_row, "nobody knows what was to be imported"),
        ("lost", import_names_another_version, "does not name its version"),
        ("lost", imported_file_missing, "the imported file is not in the store"),
        ("duplicated", imported_twice, "2 imported versions"),
        ("duplicated", other_bytes_imported, "other bytes than were uploaded"),
        ("duplicated", version_of_a_cancelled_import, "is cancelled and has 1 imported versions"),
        ("duplicated", results_of_a_cancelled_job, "is cancelled and has 2 pictures"),
        ("duplicated", one_key_twice, "idempotency key"),
        ("duplicated", charged_twice, "is charged 10.00 s"),
        ("overlaps", zombie_works_on, "took 2 steps after token 2 had begun"),
        ("overlaps", one_token_in_two_processes, "2 workers worked under token 2"),
        ("overlaps", attempts_side_by_side, "before the one before it ended"),
        ("stale_writes", checkpoint_of_a_zombie, "was written under token 3"),
        ("stale_writes", checkpoint_goes_back, "went from step 8 to 2"),
        ("stale_writes", progress_of_a_zombie, "progress of token 1"),
        ("stale_writes", reopened, "after it had ended"),
        ("stale_writes", change_without_event, "do not fit the recorded events"),
        ("stale_writes", token_jumps, "token 0 became 2"),
        ("stale_writes", attempt_left_open, "still open"),
        ("stale_writes", wrong_resume, "wrong checkpoint"),
        ("stale_writes", published_after_a_final_cancel, "was cancelled for good"),
    ],
)
def test_a_planted_fault_is_found(record: Record, category: str, plant: Callable[[Record], None], words: str) -> None:
    plant(record)
    report = record.audit()
    found = [finding for finding in report.findings if finding.category == category]
    assert any(words in finding.what for finding in found), [finding.text() for finding in report.findings]
    assert report.count(category) > 0
    assert set(CATEGORIES) >= {finding.category for finding in report.findings}


def test_a_kill_is_counted_once_per_process_that_held_a_lease_when_it_died(record: Record) -> None:
    held = [{"job": GENERATION, "token": 1, "kind": "generate", "pid": 5}] * 2
    record.monkey.write("kill", what="worker", node="node0", pids=[4, 5, 6], holders=[5], held=held)
    record.monkey.write("kill", what="child", node="node0", pids=[7], holders=[], held=[])
    assert record.audit().kills == 2


def test_a_loss_is_explained_by_the_death_or_the_starvation_of_its_own_process_only(record: Record) -> None:
    poisoned_without_three_kills(record)
    assert record.audit().count("lost") == 1
    lag = {"event": "lag", "pid": 104, "seconds": 2.0, "wall": NOON + 31}
    (record.journals / "worker-node0-4.jsonl").write_text(json.dumps(lag) + "\n")
    assert record.audit().count("lost") == 1
    (record.journals / "worker-node0-4.jsonl").write_text(json.dumps(lag | {"pid": 103}) + "\n")
    assert record.audit().count("lost") == 0


def test_a_full_disk_excuses_the_job_that_it_hit_and_no_other(record: Record) -> None:
    for job, pid_token in (("c" * 32, 1), ("d" * 32, 2)):
        record.job(job, "generate", prompt="x", seed=1, count=1)
        for token in range(1, pid_token + 1):
            last = token == pid_token
            record.change(job, "running", token, attempts_count=token)
            record.change(job, "failed" if last else "queued", token, error_code="disk_full" if last else "")
            record.attempt(job, token, 100 * token, 100 * token + 1, "failed" if last else "released")
        record.update(job, used_worker_seconds=float(pid_token))
    (record.journals / "worker-small-1.jsonl").write_text(
        json.dumps({"event": "child", "pid": 101, "node": "small", "wall": NOON}) + "\n"
    )
    lines = [
        {"event": "fault", "fault": "full disk", "node": "small", "wall": NOON + 99},
        {"event": "fault_ended", "fault": "full disk", "wall": NOON + 102},
    ]
    (record.journals / "monkey-2.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    assert [finding.job for finding in record.audit().findings] == []
    record.sql.execute("UPDATE jobs_jobattempt SET worker_name = 'vm:999' WHERE job_id = ?", ["d" * 32])
    (found,) = record.audit().findings
    assert (found.job, found.category) == ("d" * 32, "lost")
