"""Rows with sensible defaults, made through the real rules where there are some, with real bytes behind every hash."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from django.core.files.uploadedfile import SimpleUploadedFile
from PIL import Image
from safetensors.numpy import save as save_safetensors

from core.config import PreprocessConfig
from core.manifest import DatasetManifest, PreparedImage
from core.train_config import TrainConfig
from jobs import lifecycle, recovery
from jobs.artifacts import artifact_put_stream
from jobs.claims import jobs_claim
from jobs.lora_imports import lora_import_submit
from jobs.models import (
    BaseModel,
    Dataset,
    DatasetVersion,
    GeneratedImage,
    GenerationRequest,
    InputImage,
    Job,
    Lora,
    LoraImport,
    LoraVersion,
    TrainingRun,
    User,
    WorkerProcess,
)
from jobs.status import JobState
from jobs.submission import generation_submit, preprocess_submit, training_submit
from jobs.taking import Claim, Wanted, jobs_take
from jobs.uploads import dataset_images_upload
from jobs.workers import worker_register

DEMO_FACTS: dict[str, Any] = {
    "family": "sd1",
    "default_clip_skip": 1,
    "prediction_type": "epsilon",
    "max_tokens": 32,
    "vae_factor": 4,
    "bucket_step_px": 16,
    "native_size_px": 64,
    "latent_channels": 4,
    "text_layers": 4,
}

_numbers = itertools.count(1)


def picture_bytes(
    *, seed: int | None = None, size: tuple[int, int] = (64, 64), kind: str = "PNG", **save: Any
) -> bytes:
    """A picture of noise, a different one on every call unless a seed is given."""
    noise = np.random.default_rng(next(_numbers) + 10**6 if seed is None else seed)
    pixels = noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, format=kind, **save)
    return file.getvalue()


def picture_file(name: str = "", content: bytes | None = None) -> SimpleUploadedFile:
    """An uploaded picture."""
    return SimpleUploadedFile(name or f"picture-{next(_numbers)}.png", picture_bytes() if content is None else content)


def store_bytes(content: bytes) -> tuple[str, int]:
    """(sha256, size) of bytes that are now in the store."""
    return artifact_put_stream(BytesIO(content))


def make_dataset(owner: User, *, pictures: int = 2, name: str = "") -> Dataset:
    """A dataset with uploaded pictures."""
    dataset = Dataset.objects.create(owner=owner, name=name or f"dataset {next(_numbers)}")
    if pictures:
        result = dataset_images_upload(dataset=dataset, owner=owner, files=[picture_file() for _ in range(pictures)])
        assert len(result.images) == pictures
    return dataset


def make_input_image(owner: User, *, name: str = "start.png") -> InputImage:
    """An uploaded picture to begin from, with its bytes in the store."""
    sha256, size_bytes = store_bytes(picture_bytes())
    return InputImage.objects.create(owner=owner, name=name, sha256=sha256, size_bytes=size_bytes, width=64, height=64)


def make_worker() -> WorkerProcess:
    """A worker process as the database sees it."""
    return worker_register(queues=["gpu", "cpu"], device="cpu")


def claim(job: Job) -> int:
    """A worker takes this very job; returns its token."""
    taken = take(job, make_worker())
    assert taken is not None
    return taken.token


def take(job: Job, worker: WorkerProcess) -> Claim | None:
    """This worker takes this very job if it still waits, whosever turn it is."""
    claims, _ = jobs_take([Wanted(job.pk, job.owner_id, job.kind)], worker=worker, limits={})
    return next(iter(claims), None)


def claim_one(*, kinds: Sequence[str], worker: WorkerProcess) -> Claim | None:
    """This worker takes the best job of the first of these kinds that has one."""
    for kind in kinds:
        if taken := jobs_claim(kind=kind, worker=worker):
            return taken[0]
    return None


def bring_to(job: Job, state: JobState) -> Job:
    """Take a QUEUED job to a state by the lifecycle's own functions; its request row stays as it is."""
    if state == JobState.CANCELLED:
        lifecycle.job_cancel(job=job)
    elif state == JobState.EXPIRED:
        Job.objects.filter(pk=job.pk).update(deadline="2000-01-01T00:00:00Z")
        assert recovery.queued_past_deadline_expire()
    elif state != JobState.QUEUED:
        token = claim(job)
        if state == JobState.FAILED:
            lifecycle.job_fail(
                job_id=job.pk, token=token, code="nan", message="The loss became NaN.", traceback="secret"
            )
        elif state != JobState.RUNNING:
            lifecycle.job_uploading(job_id=job.pk, token=token)
            if state == JobState.SUCCEEDED:
                lifecycle.job_succeed(job_id=job.pk, token=token)
    job.refresh_from_db()
    assert job.state == state
    return job


def make_job(owner: User, state: JobState = JobState.QUEUED, *, base_model: BaseModel | None = None) -> Job:
    """A generate job in any state."""
    values = {"prompt": f"prompt {next(_numbers)}", "count": 1}
    job = generation_submit(owner=owner, base_model=base_model or make_base_model(), loras=[], values=values)
    return bring_to(job, state)


def make_dataset_version(owner: User, *, dataset: Dataset | None = None, ready: bool = True) -> DatasetVersion:
    """A version whose preparation succeeded, or still waits; prepared pictures of 64x64 are in the store."""
    dataset = dataset or make_dataset(owner)
    job = preprocess_submit(owner=owner, dataset=dataset, config=PreprocessConfig(resolution=64, bucket_step_px=16))
    version: DatasetVersion = job.dataset_version
    if ready:
        images = []
        for image in dataset.images.all():
            sha256, _ = store_bytes(picture_bytes())
            images.append(
                PreparedImage(
                    sha256=sha256, source_sha256=image.sha256, name=image.name, width=64, height=64, caption="a picture"
                )
            )
        manifest = DatasetManifest(config=PreprocessConfig.parse(job.spec), images=tuple(images))
        version.manifest, version.manifest_hash = manifest.to_json(), manifest.content_hash()
        version.image_count = len(images)
        version.save()
        bring_to(job, JobState.SUCCEEDED)
    return DatasetVersion.objects.get(pk=version.pk)


def make_base_model(*, ready: bool = True, name: str = "") -> BaseModel:
    """A base model with the facts of the small demo model."""
    name = name or f"base {next(_numbers)}"
    prepared = {}
    if ready:
        sha256, _ = store_bytes(json.dumps({"name": name}).encode())
        prepared = {
            "fingerprint": hashlib.sha256(name.encode()).hexdigest(),
            "facts": dict(DEMO_FACTS),
            "files": {"manifest.json": sha256},
        }
    return BaseModel.objects.create(name=name, source=f"/models/{name}", **prepared)


def make_training(
    owner: User,
    *,
    dataset_version: DatasetVersion | None = None,
    base_model: BaseModel | None = None,
    lora_name: str = "",
    state: JobState = JobState.QUEUED,
) -> TrainingRun:
    """A training with two losses and a sample picture, its job in any state."""
    job = training_submit(
        owner=owner,
        dataset_version=dataset_version or make_dataset_version(owner),
        base_model=base_model or make_base_model(),
        lora_name=lora_name or f"lora {next(_numbers)}",
        config=TrainConfig(steps=2),
    )
    run: TrainingRun = job.training_run
    sha256, _ = store_bytes(picture_bytes())
    run.losses, run.samples = [0.5, 0.25], [{"step": 0, "prompt": "a sample", "sha256": sha256}]
    run.save()
    bring_to(job, state)
    return TrainingRun.objects.get(pk=run.pk)


def lora_bytes(*, rank: int = 2) -> bytes:
    """A kohya/WebUI file of one layer with random weights."""
    noise = np.random.default_rng(next(_numbers))
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{layer}.lora_down.weight": noise.standard_normal((rank, 32), dtype=np.float32),
        f"{layer}.lora_up.weight": noise.standard_normal((32, rank), dtype=np.float32),
        f"{layer}.alpha": np.array(float(rank), dtype=np.float32),
    }
    return save_safetensors(tensors, metadata={"ss_network_dim": str(rank)})


def make_lora(
    owner: User, *, base_model: BaseModel | None = None, name: str = "", visibility: str = "private", versions: int = 1
) -> Lora:
    """A LoRA; each version's files are in the store."""
    lora = Lora.objects.create(
        owner=owner,
        name=name or f"lora {next(_numbers)}",
        base_model=base_model or make_base_model(),
        visibility=visibility,
        trigger_word="sks",
    )
    for number in range(1, versions + 1):
        add_lora_version(lora, number=number)
    return lora


def add_lora_version(lora: Lora, *, number: int, training_run: TrainingRun | None = None) -> LoraVersion:
    """One more version of a LoRA."""
    content = lora_bytes()
    sha256, size_bytes = store_bytes(content)
    header_end = 8 + int.from_bytes(content[:8], "little")
    peft_sha256, _ = store_bytes(lora_bytes())
    config_sha256, _ = store_bytes(json.dumps({"r": 2, "number": next(_numbers)}).encode())
    diffusers_sha256, _ = store_bytes(lora_bytes())
    return LoraVersion.objects.create(
        owner=lora.owner,
        lora=lora,
        number=number,
        training_run=training_run,
        kohya_sha256=sha256,
        kohya_size_bytes=size_bytes,
        model_hash=hashlib.sha256(content[header_end:]).hexdigest(),
        peft_files={"adapter_config.json": config_sha256, "adapter_model.safetensors": peft_sha256},
        diffusers_sha256=diffusers_sha256,
        facts={"rank": 2, "alpha": 2.0},
    )


def lora_file(name: str = "ink.safetensors", content: bytes | None = None) -> SimpleUploadedFile:
    """An uploaded LoRA."""
    return SimpleUploadedFile(name, lora_bytes() if content is None else content)


def make_lora_import(owner: User, *, base_model: BaseModel | None = None, lora_name: str = "") -> LoraImport:
    """An upload whose job waits."""
    job = lora_import_submit(
        owner=owner,
        base_model=base_model or make_base_model(),
        lora_name=lora_name or f"lora {next(_numbers)}",
        file=lora_file(),
    )
    return LoraImport.objects.get(job=job)


def make_generation(
    owner: User, *, loras: Sequence[tuple[LoraVersion, float]] = (), base_model: BaseModel | None = None, count: int = 1
) -> GenerationRequest:
    """A request that succeeded, with its pictures."""
    base_model = base_model or (loras[0][0].lora.base_model if loras else make_base_model())
    values = {"prompt": f"prompt {next(_numbers)}", "count": count}
    job = generation_submit(owner=owner, base_model=base_model, loras=loras, values=values)
    request: GenerationRequest = job.generation_request
    for number in range(count):
        sha256, size_bytes = store_bytes(picture_bytes())
        GeneratedImage.objects.create(
            owner=owner,
            request=request,
            number=number,
            seed=number,
            sha256=sha256,
            size_bytes=size_bytes,
            width=64,
            height=64,
        )
    bring_to(job, JobState.SUCCEEDED)
    return GenerationRequest.objects.get(pk=request.pk)
