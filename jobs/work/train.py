"""A train job: a frozen dataset version in, a LoRA version out. Checkpoints are stored, so that any node can go on."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from django.db import transaction
from django.db.models import Max

from core.errors import Paused
from core.failpoints import side_effect
from core.manifest import DatasetManifest
from core.train_config import TrainConfig
from jobs.artifacts import artifact_put, artifacts_pin
from jobs.heartbeat import Hold, Preempted
from jobs.leases import checkpoint_record
from jobs.models import Lora, LoraVersion, TrainingRun
from jobs.node_cache import node_cache
from jobs.scratch import scratch_open
from jobs.uploader import Upload
from jobs.worker_context import current

SHUTDOWN_WAIT_SECONDS = 30.0
PREEMPT_WAIT_SECONDS = 10.0
"""For the last checkpoint to reach the store; without it the next try goes on from the one before."""
KEPT_ASIDE = 2
"""The newest checkpoint, and the one that may be on its way into the store."""


class TrainWork:
    """One claimed train job."""

    def __init__(self, hold: Hold, *, run: Callable[..., Any]) -> None:
        self.hold, self._run = hold, run
        self.training_run = TrainingRun.objects.select_related("dataset_version", "base_model").get(job=hold.job)
        self._newest: Upload | None = None

    def compute(self) -> None:
        """Put the last checkpoint in place, train, and have each new checkpoint stored meanwhile."""
        self.folder = scratch_open(self.hold)
        fetch = self.hold.watched(node_cache().checking(self.hold.heed).get)
        for name, sha256 in (self.hold.job.checkpoint or {}).items():
            fetch(sha256)
            node_cache().copy_to(sha256, self.folder / name)
        base_model = self.training_run.base_model
        manifest = DatasetManifest.from_json(self.training_run.dataset_version.manifest)
        try:
            self.result = self._run(
                config=TrainConfig.parse(self.hold.job.spec),
                base_fingerprint=base_model.fingerprint,
                base_files=base_model.files,
                base_name=base_model.name,
                lora_name=self.training_run.lora_name,
                manifest=manifest,
                fetch=fetch,
                work_folder=self.folder,
                report=self.hold.report,
                on_checkpoint=self._checkpoint,
                memory_rung=self.hold.job.memory_rung,
            )
        except Paused as pause:
            if self._newest is not None:
                seconds = PREEMPT_WAIT_SECONDS if isinstance(pause, Preempted) else SHUTDOWN_WAIT_SECONDS
                current().uploader.wait_for(self._newest, seconds)
            raise

    def _checkpoint(self, checkpoint: Path, step: int) -> None:
        """Put the newest checkpoint and the pictures made so far aside, and let the uploader store them.

        The training goes on at once, and drops old step folders while these files may still wait.
        """
        aside = self.folder / "outbox" / f"{step:06d}"
        kept = [path for path in checkpoint.rglob("*") if path.is_file()]
        kept += [path for path in (self.folder / "samples").rglob("*.png") if path.is_file()]
        files = {path.relative_to(self.folder).as_posix(): path for path in sorted(kept)}
        for name, path in files.items():
            _link(path, aside / name)

        def attempt() -> None:
            self.hold.check()
            stored = {name: artifact_put(aside / name)[0] for name in files}
            with side_effect("checkpoint.commit"), transaction.atomic():
                artifacts_pin(stored.values())
                checkpoint_record(job_id=self.hold.job.pk, token=self.hold.token, step=step, files=stored)
            with side_effect("checkpoint.clear_aside"):
                shutil.rmtree(aside, ignore_errors=True)

        self._newest = current().uploader.add(Upload(self.hold, attempt, is_result=False))
        for superseded in sorted(aside.parent.iterdir())[:-KEPT_ASIDE]:
            with side_effect("checkpoint.drop_superseded"):
                shutil.rmtree(superseded, ignore_errors=True)

    def files(self) -> list[Path]:
        """LoRA files and samples."""
        peft = sorted(path for path in self.result.peft_folder.iterdir() if path.is_file())
        return [
            self.result.kohya_file,
            self.result.diffusers_file,
            *peft,
            *(sample.path for sample in self.result.samples),
        ]

    def store(self) -> None:
        """LoRA files and samples go to the store under their hashes."""
        self.kohya_sha256, self.kohya_size_bytes = artifact_put(self.result.kohya_file)
        self.diffusers_sha256, _ = artifact_put(self.result.diffusers_file)
        self.peft_files = {
            path.name: artifact_put(path)[0] for path in sorted(self.result.peft_folder.iterdir()) if path.is_file()
        }
        self.samples: list[dict[str, Any]] = []
        for sample in self.result.samples:
            self.hold.check()
            sha256 = artifact_put(sample.path)[0]
            self.samples.append({"step": sample.step, "prompt": sample.prompt, "sha256": sha256})

    def record(self) -> None:
        """The LoRA version becomes visible."""
        samples = [sample["sha256"] for sample in self.samples]
        artifacts_pin([self.kohya_sha256, self.diffusers_sha256, *self.peft_files.values(), *samples])
        run = self.training_run
        with side_effect("lora.get_or_create"):
            lora, _ = Lora.objects.get_or_create(
                owner=run.owner,
                name=run.lora_name,
                defaults={
                    "base_model": run.base_model,
                    "trigger_word": (run.dataset_version.manifest or {})["config"]["trigger_word"],
                },
            )
        # The row lock makes the next number ours; SQLite writes one transaction at a time anyway.
        Lora.objects.select_for_update().get(pk=lora.pk)
        newest = lora.versions.aggregate(Max("number"))["number__max"] or 0
        with side_effect("lora_version.record"):
            LoraVersion.objects.create(
                owner=run.owner,
                lora=lora,
                number=newest + 1,
                training_run=run,
                kohya_sha256=self.kohya_sha256,
                kohya_size_bytes=self.kohya_size_bytes,
                model_hash=self.result.facts["sshs_model_hash"],
                peft_files=self.peft_files,
                diffusers_sha256=self.diffusers_sha256,
                facts=self.result.facts,
            )
            TrainingRun.objects.filter(pk=run.pk).update(losses=self.result.losses, samples=self.samples)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with side_effect("checkpoint.put_aside"):
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)  # A file system without hard links.
