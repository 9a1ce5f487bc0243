"""A site with one row of everything, as the admin tests look at it."""

from dataclasses import dataclass
from datetime import timedelta
from io import BytesIO

import pytest
from django.test import Client
from django.utils import timezone
from PIL import Image

from core.config import GenerateConfig, PreprocessConfig
from core.train_config import TrainConfig
from jobs.artifacts import artifact_put_stream
from jobs.lifecycle import job_created
from jobs.models import (
    ApiKey,
    Artifact,
    BaseModel,
    Dataset,
    DatasetImage,
    DatasetVersion,
    GeneratedImage,
    GenerationLora,
    GenerationRequest,
    InputImage,
    Job,
    JobAttempt,
    JobPreview,
    LeaderLease,
    Lora,
    LoraImport,
    LoraVersion,
    OwnerUsage,
    Style,
    TrainingRun,
    User,
    WorkerProcess,
)
from jobs.status import AttemptOutcome, JobKind, JobState, WorkerState

FACTS = {
    "family": "sd1",
    "default_clip_skip": 1,
    "prediction_type": "epsilon",
    "max_tokens": 77,
    "vae_factor": 8,
    "bucket_step_px": 32,
    "native_size_px": 64,
    "latent_channels": 4,
    "text_layers": 4,
}


@dataclass
class Site:
    """The rows."""

    operator: User
    creator: User
    base: BaseModel
    dataset: Dataset
    picture: DatasetImage
    version: DatasetVersion
    training: TrainingRun
    lora: Lora
    request: GenerationRequest
    image: GeneratedImage


def stored_picture(colour: str, side_px: int = 64) -> tuple[str, int]:
    """(sha256, bytes) of a PNG in the store."""
    out = BytesIO()
    Image.new("RGB", (side_px, side_px), colour).save(out, "PNG")
    return artifact_put_stream(out)


def make_job(owner: User, kind: JobKind, state: JobState, spec: dict[str, object], **columns: object) -> Job:
    """A job that is in this state already, with the columns that the state demands."""
    now = timezone.now()
    if state in (JobState.RUNNING, JobState.UPLOADING):
        columns |= {"lease_until": now + timedelta(seconds=30), "token": 1}
    elif state != JobState.QUEUED:
        columns |= {"finished_at": now, "started_at": now - timedelta(seconds=83)}
    job = Job.objects.create(owner=owner, kind=kind, state=state, spec=spec, spec_hash="0" * 64, **columns)
    job_created(job)
    return job


@pytest.fixture
def site(db: None) -> Site:
    """One row of everything, jobs in several states."""
    operator = User.objects.create_superuser("operator", "operator@example.com", "operator-password")
    creator = User.objects.create_user("creator", "creator@example.com", "creator-password")
    ApiKey.issue(user=creator, name="laptop")
    worker = WorkerProcess.objects.create(
        host="node-1", pid=4242, queues=["gpu"], device="cpu", state=WorkerState.READY, heartbeat_at=timezone.now()
    )
    LeaderLease.objects.create(
        role="dispatcher", holder="node-1:99", lease_until=timezone.now(), beat_at=timezone.now()
    )
    base = BaseModel.objects.create(
        name="demo", source="demo/tiny-sd-emoji", keep_warm=True, fingerprint="f" * 64, facts=FACTS, files={}
    )
    base.job = make_job(operator, JobKind.PREPARE_BASE, JobState.SUCCEEDED, {"source": base.source}, base_model=base)
    base.save()

    OwnerUsage.objects.create(owner=creator, worker_seconds=540.0, as_of=timezone.now())

    dataset = Dataset.objects.create(owner=creator, name="blueprints")
    sha256, size_bytes = stored_picture("navy")
    Artifact.objects.get_or_create(sha256=sha256, defaults={"size_bytes": size_bytes})
    picture = DatasetImage.objects.create(
        owner=creator,
        dataset=dataset,
        name="house <b>.png",
        caption="a house, blueprint style",
        sha256=sha256,
        size_bytes=size_bytes,
        width=64,
        height=64,
    )
    InputImage.objects.create(
        owner=creator,
        name="start <script>alert(1)</script>.png",
        sha256=sha256,
        size_bytes=size_bytes,
        width=64,
        height=64,
    )
    Style.objects.create(owner=creator, name="blueprint", prompt="{prompt}, blueprint style")
    preprocess = PreprocessConfig(resolution=64, bucket_step_px=32).dump()
    version = DatasetVersion.objects.create(
        owner=creator,
        dataset=dataset,
        number=1,
        job=make_job(creator, JobKind.PREPROCESS, JobState.SUCCEEDED, preprocess),
        manifest={"images": [{"name": "house.png", "width": 64, "height": 64}]},
        manifest_hash="a" * 64,
        image_count=1,
        rejected=[{"name": "broken.png", "reason": "not a picture"}],
    )
    train_job = make_job(
        creator,
        JobKind.TRAIN,
        JobState.RUNNING,
        TrainConfig(steps=400).dump(),
        base_model=base,
        worker=worker,
        stage="training",
        progress_step=150,
        progress_total=400,
        figures={"loss": 0.1234, "steps_per_second": 3.5},
        started_at=timezone.now(),
    )
    JobPreview.objects.create(job=train_job, token=1, step=150, jpeg=b"a look")
    JobAttempt.objects.create(job=train_job, token=1, worker=worker, worker_name=str(worker), started_at=timezone.now())
    training = TrainingRun.objects.create(
        owner=creator,
        job=train_job,
        dataset_version=version,
        base_model=base,
        lora_name="blueprint",
        losses=[0.4 / (1 + step / 40) + 0.03 * ((step * 7919) % 13) / 13 for step in range(150)],
        samples=[
            {"step": step, "prompt": prompt, "sha256": stored_picture(colour)[0]}
            for step, colour in ((0, "red"), (100, "blue"))
            for prompt in ("a red apple", "a house")
        ],
    )
    lora = Lora.objects.create(owner=creator, name="blueprint", base_model=base, trigger_word="bprnt")
    lora_version = LoraVersion.objects.create(
        owner=creator,
        lora=lora,
        number=1,
        kohya_sha256="b" * 64,
        kohya_size_bytes=3_456_789,
        model_hash="c" * 64,
        peft_files={"adapter_model.safetensors": "d" * 64},
        facts={"rank": 16, "final_loss": 0.1},
    )
    generate = GenerateConfig(prompt="a red apple", width=64, height=64, seed=3).dump()
    request = GenerationRequest.objects.create(
        owner=creator,
        base_model=base,
        job=make_job(creator, JobKind.GENERATE, JobState.SUCCEEDED, generate, base_model=base),
    )
    GenerationLora.objects.create(request=request, lora_version=lora_version, weight=0.8)
    LoraImport.objects.create(
        owner=creator,
        job=make_job(creator, JobKind.IMPORT_LORA, JobState.SUCCEEDED, {"sha256": "e" * 64}, base_model=base),
        base_model=base,
        lora_name="ink <script>alert(1)</script>",
        file_name="ink.safetensors",
        sha256="e" * 64,
        size_bytes=1234,
        lora_version=lora_version,
    )
    sha256, size_bytes = stored_picture("green", side_px=512)
    image = GeneratedImage.objects.create(
        owner=creator,
        request=request,
        number=0,
        seed=3,
        sha256=sha256,
        size_bytes=size_bytes,
        width=512,
        height=512,
    )
    failed = make_job(
        creator,
        JobKind.PREPROCESS,
        JobState.FAILED,
        preprocess,
        error_code="dataset",
        error_message="No picture is left: <script>alert(1)</script>",
        error_traceback="Traceback (most recent call last): ...",
        progress_step=1,
        progress_total=4,
    )
    JobAttempt.objects.create(
        job=failed,
        token=1,
        worker=worker,
        worker_name=str(worker),
        started_at=timezone.now(),
        ended_at=timezone.now(),
        outcome=AttemptOutcome.FAILED,
        reason="No picture is left",
    )
    make_job(creator, JobKind.PREPROCESS, JobState.QUEUED, preprocess)
    return Site(operator, creator, base, dataset, picture, version, training, lora, request, image)


@pytest.fixture
def operator_client(site: Site, client: Client) -> Client:
    """A browser of the operator."""
    client.force_login(site.operator)
    return client
