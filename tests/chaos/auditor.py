"""Checks after a chaos run: every job ended rightly, with exactly its effects, and nobody wrote out of turn.

Shares no code with the product: rows by `evidence`, blobs by `stored_blobs`, expected bytes by `expected`.
"""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tests.chaos import expected
from tests.chaos.audit_report import Finding, Report
from tests.chaos.database import Database
from tests.chaos.evidence import Evidence, Row, collect
from tests.chaos.stored_blobs import Blobs

FINAL = {"succeeded", "failed", "cancelled", "expired"}
POISON_LOSSES = 3
STEPS_OF_A_ZOMBIE = 1
"""A frozen attempt wakes up inside a step and learns of its fate at the end of it."""


def audit(*, database: Database, journals: Path, store: Blobs, folder: Path | None = None) -> Report:
    """Look at everything. The site must be at rest."""
    evidence = collect(database, journals, store)
    audited = _Audit(evidence)
    audited.all()
    report = Report(kills=evidence.kills, findings=audited.findings, remarks=audited.remarks())
    if folder is not None and report.findings:
        (folder / "findings.txt").write_text("\n\n".join(finding.text() for finding in report.findings))
    return report


class _Audit:
    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.findings: list[Finding] = []
        self._blobs: dict[str, bytes | None] = {}

    def all(self) -> None:
        for job_id in self.evidence.submitted:
            if job_id not in self.evidence.jobs:
                self._found("lost", job_id, "was accepted and is not in the database")
        keys = Counter(job["idempotency_key"] for job in self.evidence.jobs.values() if job["idempotency_key"])
        for key, count in keys.items():
            if count > 1:
                self._found("duplicated", "-", f"{count} jobs of one idempotency key {key}")
        for job in self.evidence.jobs.values():
            self._ended(job)
            self._effects(job)
            self._attempts(job)
            self._history(job)
            self._overlaps(job["id"])

    def remarks(self) -> list[str]:
        every = [attempt for attempts in self.evidence.attempts.values() for attempt in attempts]
        outcomes = Counter(attempt["outcome"] for attempt in every)
        unexplained = sum(a["outcome"] == "lost" and not self.evidence.loss_is_explained(a) for a in every)
        states = Counter(job["state"] for job in self.evidence.jobs.values())
        codes = Counter(job["error_code"] for job in self.evidence.jobs.values() if job["error_code"])
        return [
            f"jobs by end: {dict(states)}; errors: {dict(codes)}",
            f"tries by end: {dict(outcomes)}; lost without an act of the monkey: {unexplained}",
        ]

    # --- ends ------------------------------------------------------------------------------------------------------

    def _ended(self, job: Row) -> None:
        job_id, state = job["id"], job["state"]
        attempts = self.evidence.attempts.get(job_id, [])
        cancels = self.evidence.cancels.get(job_id, [])
        if state not in FINAL:
            self._found("lost", job_id, f"has not ended: {state} ({job['stage']})")
        elif state == "expired":
            self._found("lost", job_id, "expired, though no job of this run may wait that long")
        elif state == "cancelled" and not cancels:
            self._found("lost", job_id, "was cancelled, and nobody asked for it")
        elif state == "failed" and job["error_code"] == "poison":
            losses = [attempt for attempt in attempts if attempt["outcome"] in ("lost", "device_error")]
            explained = [attempt for attempt in losses[-POISON_LOSSES:] if self.evidence.loss_is_explained(attempt)]
            if len(explained) < POISON_LOSSES:
                what = f"is poison, but the monkey explains only {len(explained)} of its last {POISON_LOSSES} losses"
                self._found("lost", job_id, what)
        elif state == "failed" and job["error_code"] == "disk_full":
            if not any(self.evidence.disk_was_full(attempt) for attempt in attempts):
                self._found("lost", job_id, "failed as disk_full while no disk was full")
        elif state == "failed":
            what = f"failed for a reason that nothing explains: {job['error_code']} {job['error_message']}"
            self._found("lost", job_id, what)
        if state != "cancelled" and any(line["answer"] == "cancelled" for line in cancels):
            self._found("stale_writes", job_id, f"was cancelled for good and is {state} now")

    # --- effects ---------------------------------------------------------------------------------------------------

    def _effects(self, job: Row) -> None:
        job_id, promised = job["id"], self.evidence.submitted.get(job["id"])
        if job["kind"] == "generate":
            self._pictures(job, promised)
        elif job["kind"] == "train":
            self._lora(job, promised)
        elif job["kind"] == "import_lora":
            self._import(job, promised)
        elif job["kind"] == "preprocess":
            version = self.evidence.dataset_versions.get(job_id)
            frozen = version is not None and bool(version["manifest_hash"])
            if job["state"] == "succeeded" and not frozen:
                self._found("lost", job_id, "succeeded without a frozen dataset version")
            if job["state"] != "succeeded" and frozen:
                self._found("duplicated", job_id, f"is {job['state']} and has a frozen dataset version")
            if version is not None and frozen:
                for image in version["manifest"]["images"]:
                    self._blob_is_right(job_id, image["sha256"], "a prepared picture")

    def _pictures(self, job: Row, promised: Row | None) -> None:
        job_id = job["id"]
        images = self.evidence.images.get(self.evidence.requests.get(job_id, ""), [])
        if job["state"] != "succeeded":
            if images:
                self._found("duplicated", job_id, f"is {job['state']} and has {len(images)} pictures")
            return
        if promised is None:
            return
        numbers = [image["number"] for image in images]
        missing = sorted(set(range(promised["count"])) - set(numbers))
        if missing:
            self._found("lost", job_id, f"succeeded without its pictures {missing}")
        if len(numbers) > promised["count"] or len(set(numbers)) < len(numbers):
            self._found("duplicated", job_id, f"asked for {promised['count']} pictures, has {numbers}")
        for image in images:
            seed = promised["seed"] + image["number"]
            right = expected.sha256(expected.picture_bytes(promised["prompt"], seed))
            if (image["seed"], image["sha256"]) != (seed, right):
                self._found("duplicated", job_id, f"picture {image['number']} has other bytes than its request gives")
            self._blob_is_right(job_id, image["sha256"], f"picture {image['number']}", image["size_bytes"])

    def _lora(self, job: Row, promised: Row | None) -> None:
        job_id, run = job["id"], self.evidence.runs.get(job["id"])
        versions = self.evidence.versions.get(run["training_run_id"], []) if run else []
        if job["state"] != "succeeded":
            if versions:
                self._found("duplicated", job_id, f"is {job['state']} and has {len(versions)} LoRA versions")
            return
        if promised is None or run is None:
            return
        if not versions:
            self._found("lost", job_id, "succeeded without a LoRA version")
        if len(versions) > 1:
            self._found("duplicated", job_id, f"has {len(versions)} LoRA versions")
        state = expected.chain(promised["seed"], promised["steps"], promised["lora_name"], promised["steps"])
        right = {"adapter_model.safetensors": expected.sha256(expected.adapter_bytes(state))}
        for version in versions:
            if version["kohya_sha256"] != expected.sha256(expected.kohya_bytes(state)):
                self._found("duplicated", job_id, "the LoRA file has other bytes than an uninterrupted run gives")
            if version["peft_files"].get("adapter_model.safetensors") != right["adapter_model.safetensors"]:
                self._found("duplicated", job_id, "the adapter has other bytes than an uninterrupted run gives")
            self._blob_is_right(job_id, version["kohya_sha256"], "the LoRA file", version["kohya_size_bytes"])
            for name, sha256 in version["peft_files"].items():
                self._blob_is_right(job_id, sha256, name)
        for sample in run["samples"]:
            self._blob_is_right(job_id, sample["sha256"], "a sample picture")

    def _import(self, job: Row, promised: Row | None) -> None:
        """Each import of a run is into a LoRA of its own, so that a version which no import names is found too."""
        job_id, asked = job["id"], self.evidence.imports.get(job["id"])
        if promised is None or asked is None:
            if job["state"] == "succeeded":
                self._found("lost", job_id, "succeeded, and nobody knows what was to be imported")
            return
        versions = self.evidence.versions_by_name.get(promised["lora_name"], [])
        if job["state"] != "succeeded":
            if versions or asked["lora_version_id"] is not None:
                self._found("duplicated", job_id, f"is {job['state']} and has {len(versions)} imported versions")
            return
        if not versions:
            self._found("lost", job_id, "succeeded without an imported version")
        if len(versions) > 1:
            self._found("duplicated", job_id, f"has {len(versions)} imported versions")
        if asked["lora_version_id"] not in [version["lora_version_id"] for version in versions]:
            self._found("lost", job_id, f"does not name its version, but {asked['lora_version_id']}")
        right = expected.sha256(expected.uploaded_bytes(promised["seed"]))
        for version in versions:
            if {version["kohya_sha256"], asked["sha256"]} != {right}:
                self._found("duplicated", job_id, "the imported version has other bytes than were uploaded")
            self._blob_is_right(job_id, version["kohya_sha256"], "the imported file", version["kohya_size_bytes"])

    def _blob_is_right(self, job_id: str, sha256: str, what: str, size_bytes: int | None = None) -> None:
        content = self._read(sha256)
        if content is None:
            self._found("lost", job_id, f"{what} is not in the store: {sha256}")
        elif expected.sha256(content) != sha256 or size_bytes not in (None, len(content)):
            self._found("lost", job_id, f"{what} is damaged in the store: {sha256}, {len(content)} bytes")

    def _read(self, sha256: str) -> bytes | None:
        if sha256 not in self._blobs:
            self._blobs[sha256] = self.evidence.store.read(sha256)
        return self._blobs[sha256]

    # --- tries -----------------------------------------------------------------------------------------------------

    def _attempts(self, job: Row) -> None:
        job_id, attempts = job["id"], self.evidence.attempts.get(job["id"], [])
        tokens = [attempt["token"] for attempt in attempts]
        if tokens != list(range(1, job["token"] + 1)):
            self._found("stale_writes", job_id, f"token {job['token']}, but tries with the tokens {tokens}")
        if job["state"] in FINAL and any(attempt["ended_at"] is None for attempt in attempts):
            self._found("stale_writes", job_id, "ended, but a try of it is still open")
        counted = sum(attempt["outcome"] != "preempted" for attempt in attempts)
        if job["attempts_count"] != counted:
            self._found("stale_writes", job_id, f"counts {job['attempts_count']} tries, there are {counted}")
        spans = [(a["started_at"], a["ended_at"]) for a in attempts if a["ended_at"] is not None]
        seconds = sum((end - begin).total_seconds() for begin, end in spans)
        if job["state"] in FINAL and abs(seconds - job["used_worker_seconds"]) > 0.1 + 0.01 * seconds:
            what = f"is charged {job['used_worker_seconds']:.2f} s, its tries took {seconds:.2f} s"
            self._found("duplicated", job_id, what)
        for (_, end), (begin, _) in pairwise(spans):
            if begin < end:
                self._found("overlaps", job_id, f"one try began at {begin}, before the one before it ended at {end}")

    def _history(self, job: Row) -> None:
        job_id, history = job["id"], self.evidence.history.get(job["id"], [])
        changes = [
            (h["old_state"], h["new_state"], h["new_token"]) for h in history if h["old_state"] != h["new_state"]
        ]
        told = [(e["old_state"], e["new_state"], e["token"]) for e in self.evidence.events.get(job_id, [])]
        if told != [("", "queued", 0), *changes]:
            self._found("stale_writes", job_id, f"state changes {changes} do not fit the recorded events {told}")
        if sum(new == "succeeded" for _, new, _ in changes) > 1:
            self._found("duplicated", job_id, "succeeded twice")
        for row in history:
            self._change(job_id, row)

    def _change(self, job_id: str, row: Row) -> None:
        """One change of the row, as the trigger saw it."""
        claimed = (row["old_state"], row["new_state"]) == ("queued", "running")
        if row["new_token"] - row["old_token"] != int(claimed):
            what = f"token {row['old_token']} became {row['new_token']} at {row['old_state']}->{row['new_state']}"
            self._found("stale_writes", job_id, what)
        if row["old_state"] in FINAL:
            self._found("stale_writes", job_id, f"was written after it had ended: {row}")
        figures = row["new_figures"] or {}
        if row["old_figures"] != row["new_figures"] and figures.get("token", row["new_token"]) != row["new_token"]:
            what = f"progress of token {figures['token']:g} was written under token {row['new_token']}"
            self._found("stale_writes", job_id, what)
        if row["new_checkpoint"] and row["old_checkpoint"] != row["new_checkpoint"]:
            self._checkpoint(job_id, row)

    def _checkpoint(self, job_id: str, row: Row) -> None:
        if row["new_step"] < row["old_step"]:
            self._found("stale_writes", job_id, f"its checkpoint went from step {row['old_step']} to {row['new_step']}")
        names = [name for name in row["new_checkpoint"] if name.endswith("/state.json")]
        if len(names) != 1:
            self._found("stale_writes", job_id, f"a checkpoint of {sorted(row['new_checkpoint'])}")
            return
        content = self._read(row["new_checkpoint"][names[0]])
        if content is None:
            self._found("lost", job_id, f"the checkpoint at step {row['new_step']} is not in the store")
            return
        facts = json.loads(content)
        if (facts["job"], facts["token"], facts["step"]) != (job_id, row["new_token"], row["new_step"]):
            what = f"a checkpoint of {facts} was written under token {row['new_token']} at step {row['new_step']}"
            self._found("stale_writes", job_id, what)

    # --- work ------------------------------------------------------------------------------------------------------

    def _overlaps(self, job_id: str) -> None:
        """Two tries at work at once, and tries that went on from the wrong place, by the workers' own journals."""
        lines = self.evidence.work.get(job_id, [])
        begins = [line for line in lines if line["event"] == "begin"]
        for token, count in Counter(token for token, _ in {(line["token"], line["pid"]) for line in begins}).items():
            if count > 1:
                self._found("overlaps", job_id, f"{count} workers worked under token {token}")
        for begin in begins:
            late = [
                line
                for line in lines
                if line["event"] == "step" and line["token"] < begin["token"] and line["wall"] > begin["wall"]
            ]
            for token, steps in Counter(line["token"] for line in late).items():
                if steps > STEPS_OF_A_ZOMBIE:
                    what = f"token {token} took {steps} steps after token {begin['token']} had begun"
                    self._found("overlaps", job_id, what)
        resumed = {line["token"]: line for line in lines if line["event"] == "resume"}
        from_steps = {attempt["token"]: attempt["from_step"] for attempt in self.evidence.attempts.get(job_id, [])}
        stepped = {line["token"] for line in lines if line["event"] == "step"}
        for begin in begins:
            line = resumed.get(begin["token"])
            if line is not None and not line["right"]:
                self._found("stale_writes", job_id, f"token {begin['token']} went on from a wrong checkpoint")
            step = line["step"] if line is not None else 0
            wanted = from_steps.get(begin["token"], 0)
            if begin["kind"] == "train" and begin["token"] in stepped and step != wanted:
                what = f"token {begin['token']} went on from step {step}, the stored checkpoint was at {wanted}"
                self._found("lost", job_id, what)

    def _found(self, category: str, job_id: str, what: str) -> None:
        self.findings.append(Finding(category, job_id, what, self.evidence.story(job_id)))
