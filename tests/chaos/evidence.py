"""Everything an audit looks at, read once: rows by own SQL, journals, and which acts of the monkey hit whom.

Shares no code with the product.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.chaos import journal
from tests.chaos.database import Database
from tests.chaos.stored_blobs import Blobs

Row = dict[str, Any]
SLACK_SECONDS = 1.5
"""Around the window of a fault: what it started may show a moment later."""


@dataclass(frozen=True)
class Window:
    """A fault's time, wall clock seconds."""

    fault: str
    begin: float
    end: float
    node: str = ""

    def meets(self, begin: float, end: float) -> bool:
        """Whether both times have a moment in common, with some slack."""
        return self.begin - SLACK_SECONDS <= end and begin <= self.end + SLACK_SECONDS


@dataclass
class Evidence:
    """Rows by job id, in the order in which they were written."""

    jobs: dict[str, Row]
    attempts: dict[str, list[Row]]
    events: dict[str, list[Row]]
    history: dict[str, list[Row]]
    requests: dict[str, str]  # job: generation request
    images: dict[str, list[Row]]  # by request
    runs: dict[str, Row]  # by job
    versions: dict[str, list[Row]]  # by training run
    imports: dict[str, Row]  # by job
    versions_by_name: dict[str, list[Row]]  # by the name of their LoRA
    dataset_versions: dict[str, Row]  # by job
    store: Blobs
    submitted: dict[str, Row] = field(default_factory=dict)
    cancels: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))
    work: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))  # worker journal lines by job
    hit: set[tuple[str, int]] = field(default_factory=set)  # (job, token) whose holder was killed or frozen
    windows: list[Window] = field(default_factory=list)
    troubles: dict[int, list[Window]] = field(default_factory=lambda: defaultdict(list))  # by pid
    node_of_pid: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    kills: int = 0

    def loss_is_explained(self, attempt: Row) -> bool:
        """Whether the monkey, or a machine that gave the process no time, may have cost this try its lease."""
        if (attempt["job"], attempt["token"]) in self.hit:
            return True
        begin, end = span(attempt)
        own = self.troubles.get(_pid_of(attempt), [])
        cut_off = [window for window in self.windows if window.fault.startswith("database")]
        return any(window.meets(begin, end) for window in (*own, *cut_off))

    def disk_was_full(self, attempt: Row) -> bool:
        """Whether the disk of the attempt's worker was full while it ran."""
        nodes = self.node_of_pid.get(_pid_of(attempt), set())
        begin, end = span(attempt)
        return any(w.fault == "full disk" and w.node in nodes and w.meets(begin, end) for w in self.windows)

    def story(self, job: str) -> tuple[str, ...]:
        """The job's history in lines: row, events, attempts, acts."""
        lines = [f"row {self.jobs.get(job)}"]
        lines += [
            f"event {e['at']:%H:%M:%S.%f} {e['old_state'] or 'new'}->{e['new_state']} token={e['token']} {e['reason']}"
            for e in self.events.get(job, [])
        ]
        for attempt in self.attempts.get(job, []):
            hit = " (killed or frozen by the monkey)" if (job, attempt["token"]) in self.hit else ""
            lines.append(
                f"attempt token={attempt['token']} on {attempt['worker_name']} {attempt['started_at']:%H:%M:%S.%f} to "
                f"{attempt['ended_at']} {attempt['outcome']} steps {attempt['from_step']}-{attempt['to_step']}{hit}"
            )
        for line in self.work.get(job, []):
            if line["event"] != "step":
                lines.append(f"journal {datetime.fromtimestamp(line['wall']):%H:%M:%S.%f} {line}")
        return tuple(lines)


def _pid_of(attempt: Row) -> int:
    return int(attempt["worker_name"].rsplit(":", 1)[1])


def span(attempt: Row) -> tuple[float, float]:
    """Wall clock seconds of an attempt; one that is open lasts until now."""
    end = attempt["ended_at"]
    return attempt["started_at"].timestamp(), end.timestamp() if end else float("inf")


def collect(database: Database, journals: Path, store: Blobs) -> Evidence:
    """Read it all."""
    jobs = database.rows(
        "SELECT id, kind, state, token, spec, error_code, error_message, attempts_count, barren_losses, checkpoint, "
        "checkpoint_step, used_worker_seconds, cancel_requested_at, not_before, idempotency_key, stage FROM jobs_job"
    )
    attempts = database.rows(
        "SELECT job_id AS job, token, worker_name, started_at, ended_at, outcome, reason, from_step, to_step "
        "FROM jobs_jobattempt ORDER BY token"
    )
    events = database.rows(
        "SELECT id AS number, job_id AS job, at, old_state, new_state, token, reason FROM jobs_jobevent ORDER BY id"
    )
    history = database.rows("SELECT id AS number, * FROM chaos_history ORDER BY id")
    requests = database.rows("SELECT id AS request_id, job_id AS job FROM jobs_generationrequest")
    images = database.rows(
        "SELECT request_id, number, seed, sha256, size_bytes FROM jobs_generatedimage ORDER BY number"
    )
    runs = database.rows("SELECT id AS training_run_id, job_id AS job, lora_name, samples FROM jobs_trainingrun")
    versions = database.rows(
        "SELECT v.id AS lora_version_id, v.training_run_id, v.kohya_sha256, v.kohya_size_bytes, v.peft_files, "
        "l.name AS lora_name FROM jobs_loraversion v JOIN jobs_lora l ON l.id = v.lora_id ORDER BY v.number"
    )
    imports = database.rows("SELECT job_id AS job, lora_name, sha256, lora_version_id FROM jobs_loraimport")
    frozen = database.rows("SELECT job_id AS job, manifest_hash, manifest FROM jobs_datasetversion")
    evidence = Evidence(
        jobs={row["id"]: row for row in jobs},
        attempts=_by("job", attempts),
        events=_by("job", events),
        history=_by("job", history),
        requests={row["job"]: row["request_id"] for row in requests},
        images=_by("request_id", images),
        runs={row["job"]: row for row in runs},
        versions=_by("training_run_id", versions),
        imports={row["job"]: row for row in imports},
        versions_by_name=_by("lora_name", versions),
        dataset_versions={row["job"]: row for row in frozen},
        store=store,
    )
    _read_journals(evidence, journals)
    return evidence


def _read_journals(evidence: Evidence, journals: Path) -> None:
    for line in journal.read(journals, "workload"):
        if line["event"] == "submitted":
            evidence.submitted[line["job"]] = line
        elif line["event"] == "cancel":
            evidence.cancels[line["job"]].append(line)
    for line in journal.read(journals, "worker-"):
        if line["event"] == "child":
            evidence.node_of_pid[line["pid"]].add(line["node"])
        elif line["event"] == "lag":
            window = Window("lag", line["wall"] - line["seconds"], line["wall"])
            evidence.troubles[line["pid"]].append(window)
        elif "job" in line:
            evidence.work[line["job"]].append(line)
    began: dict[str, Row] = {}
    for line in journal.read(journals, "monkey"):
        if line["event"] in ("kill", "freeze"):
            evidence.hit |= {(held["job"], held["token"]) for held in line["held"]}
            for pid in line["pids"]:
                window = Window(line["event"], line["wall"], line["wall"] + line.get("seconds", 0.0))
                evidence.troubles[pid].append(window)
            evidence.kills += len(line["holders"]) if line["event"] == "kill" else 0
        elif line["event"] == "fault":
            began[line["fault"]] = line
        elif line["event"] == "fault_ended" and line["fault"] in began:
            begin = began.pop(line["fault"])
            evidence.windows.append(Window(line["fault"], begin["wall"], line["wall"], begin.get("node", "")))
        elif line["event"] == "database_reset":
            evidence.windows.append(Window("database reset", line["wall"], line["wall"]))


def _by(name: str, rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row[name]].append(row)
    return found
