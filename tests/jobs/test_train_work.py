"""A train job's checkpoints: put aside at once, stored by the uploader, whole even when the training moves on."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core.errors import Paused
from jobs.artifacts import artifact_name, artifact_open, blob_store
from jobs.drain import run
from jobs.models import Job, LoraVersion, User
from jobs.scratch import scratch_open
from jobs.status import JobKind, JobState
from jobs.work.train import TrainWork
from jobs.worker_context import WorkerContext
from tests.factories import claim_one, make_training
from tests.jobs.storages import OUTAGE


def take_training(context: WorkerContext, owner: User) -> Any:
    make_training(owner)
    claim = claim_one(kinds=[JobKind.TRAIN], worker=context.worker)
    assert claim is not None
    return context.heartbeat.take(claim)


def save(folder: Path, step: int) -> Path:
    checkpoint = folder / "checkpoints" / f"step-{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(f"state at {step}")
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "samples" / f"{step}.png").write_bytes(f"picture at {step}".encode())
    return checkpoint


def finished(folder: Path) -> SimpleNamespace:
    (folder / "peft").mkdir()
    (folder / "peft" / "adapter.safetensors").write_bytes(b"peft")
    (folder / "lora.safetensors").write_bytes(b"kohya")
    (folder / "diffusers.safetensors").write_bytes(b"diffusers")
    sample = SimpleNamespace(step=0, prompt="a disc", path=folder / "samples" / "2.png")
    return SimpleNamespace(
        kohya_file=folder / "lora.safetensors",
        peft_folder=folder / "peft",
        diffusers_file=folder / "diffusers.safetensors",
        samples=[sample],
        losses=[0.5],
        facts={"sshs_model_hash": "0" * 64},
    )


def training(steps: Callable[[Path, Callable[[Path, int], None]], Any]) -> Callable[..., Any]:
    """A `run` whose loop is `steps(work_folder, on_checkpoint)`."""

    def run_training(*, work_folder: Path, on_checkpoint: Callable[[Path, int], None], **_: Any) -> Any:
        return steps(work_folder, on_checkpoint)

    return run_training


def text_of(sha256: str) -> str:
    with artifact_open(sha256) as stream:
        return stream.read().decode()


def test_a_pause_waits_for_the_last_checkpoint_and_the_next_try_finds_its_files(
    context: WorkerContext, owner: User
) -> None:
    def steps(folder: Path, on_checkpoint: Callable[[Path, int], None]) -> None:
        on_checkpoint(save(folder, 2), 2)
        on_checkpoint(save(folder, 4), 4)
        shutil.rmtree(folder / "checkpoints")  # as a training drops old ones
        raise Paused("this worker is shutting down")

    hold = take_training(context, owner)
    run([hold], lambda hold: TrainWork(hold, run=training(steps)))
    job = Job.objects.get(pk=hold.job.pk)
    assert (job.state, job.checkpoint_step) == (JobState.QUEUED, 4)
    assert job.checkpoint is not None
    assert {name: text_of(sha256) for name, sha256 in job.checkpoint.items()} == {
        "checkpoints/step-000004/state.json": "state at 4",
        "samples/2.png": "picture at 2",
        "samples/4.png": "picture at 4",
    }

    seen: list[str] = []

    def go_on(folder: Path, on_checkpoint: Callable[[Path, int], None]) -> Any:
        seen.append((folder / "checkpoints/step-000004/state.json").read_text())
        return finished(folder)

    claim = claim_one(kinds=[JobKind.TRAIN], worker=context.worker)
    assert claim is not None
    run([context.heartbeat.take(claim)], lambda hold: TrainWork(hold, run=training(go_on)))
    context.uploader.turn()
    assert seen == ["state at 4"]
    assert Job.objects.get(pk=hold.job.pk).state == JobState.SUCCEEDED
    assert LoraVersion.objects.get().training_run.job_id == hold.job.pk  # type: ignore[union-attr]


@pytest.mark.django_db
def test_an_outage_never_stops_a_training_and_its_result_makes_waiting_checkpoints_needless(
    context: WorkerContext, owner: User, settings: Any
) -> None:
    hold = take_training(context, owner)
    settings.STORAGES = settings.STORAGES | {
        "default": settings.STORAGES["default"] | {"BACKEND": "tests.jobs.storages.FlakyStorage"}
    }

    def steps(folder: Path, on_checkpoint: Callable[[Path, int], None]) -> Any:
        OUTAGE.is_on = True
        for step in (2, 4):
            on_checkpoint(save(folder, step), step)
            context.uploader.turn()
        return finished(folder)

    try:
        run([hold], lambda hold: TrainWork(hold, run=training(steps)))
        context.uploader.turn()
        job = Job.objects.get(pk=hold.job.pk)
        assert (job.state, job.checkpoint_step) == (JobState.UPLOADING, 0)
    finally:
        OUTAGE.is_on = False
    for upload in context.uploader._pending:
        upload.due_at = 0.0
    context.uploader.turn()
    job.refresh_from_db()
    assert (job.state, job.checkpoint_step) == (JobState.SUCCEEDED, 0)
    assert not scratch_open(hold).parent.joinpath("outbox").exists()
    shutil.rmtree(scratch_open(hold).parent)


def test_a_lora_whose_bytes_vanished_before_the_record_is_stored_again(context: WorkerContext, owner: User) -> None:
    """Until its record, nothing names what a job stored: a sweep may remove it when the job was slow."""

    class Swept(TrainWork):
        stores = 0

        def store(self) -> None:
            super().store()
            Swept.stores += 1
            if Swept.stores == 1:
                blob_store().delete(artifact_name(self.kohya_sha256))

    def steps(folder: Path, on_checkpoint: Callable[[Path, int], None]) -> Any:
        on_checkpoint(save(folder, 2), 2)
        return finished(folder)

    hold = take_training(context, owner)
    run([hold], lambda hold: Swept(hold, run=training(steps)))
    context.uploader.turn()
    assert not LoraVersion.objects.exists()
    for upload in context.uploader._pending:
        upload.due_at = 0.0
    context.uploader.turn()
    assert Swept.stores == 2
    assert Job.objects.get(pk=hold.job.pk).state == JobState.SUCCEEDED
    assert text_of(LoraVersion.objects.get().kohya_sha256) == "kohya"
