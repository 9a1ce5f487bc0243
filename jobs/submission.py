"""Everything that creates a job: one transaction writes the request row and the QUEUED job. Nothing is published.

Called by the API, the admin and management commands. Refuses with a sentence before anything is written.
"""

from collections.abc import Callable, Sequence
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import Max

from core.config import GenerateConfig, LoraUse, PreprocessConfig, canonical_json_hash
from core.failpoints import side_effect
from core.train_config import TrainConfig
from jobs import quotas
from jobs.artifacts import artifacts_pin
from jobs.errors import Conflict, IdempotencyMismatch, InvalidInput, NotReady
from jobs.estimates import estimated_seconds, generation_units, preprocess_units, training_units
from jobs.generation_specs import pictures_read, read_prompts, vae_lender
from jobs.lifecycle import job_created
from jobs.models import (
    BaseModel,
    Dataset,
    DatasetVersion,
    GenerationLora,
    GenerationRequest,
    Job,
    LoraVersion,
    TrainingRun,
    User,
)
from jobs.status import JobKind, JobState
from jobs.training_specs import refuse_misfit, refuse_training
from jobs.wakeup import announce

PICTURES_PER_BATCH = 8
"""Most pictures that one forward holds; larger requests run alone."""


def job_submit(
    *,
    owner: User,
    kind: JobKind,
    spec: dict[str, Any],
    base_model: BaseModel | None = None,
    idempotency_key: str | None = None,
    request: dict[str, Any] | None = None,
    units: float = 1.0,
    batch_key: str = "",
    spec_version: int = 1,
    refuse: Callable[[], None] = lambda: None,
    attach: Callable[[Job], object],
) -> Job:
    """Insert a QUEUED job and its request row in one transaction.

    Args:
        spec: The configuration's full dump.
        idempotency_key: The same key of the same owner returns the job made first.
        request: What the person asked for, to tell a repeated request from another one under the same key.
        units: Amount of work, as `jobs/estimates.py` counts it for this kind.
        batch_key: Jobs of the same key may share one forward; empty: runs alone.
        spec_version: The oldest workers that understand `spec`.
        refuse: Raises where the request cannot be served now; not asked again for a repeated request.
        attach: Creates the request row (TrainingRun ...) of the new job; runs in the same transaction.

    Raises:
        IdempotencyMismatch: The key was used for another request.
        TooBusy: Too much work waits; never for a repeated request.
    """
    request_hash = canonical_json_hash({"kind": kind, **(request or spec)})
    earlier = _made_earlier(owner, idempotency_key, request_hash)
    if earlier is not None:
        return earlier
    refuse()
    seconds = estimated_seconds(kind, units, base_model.pk if base_model else None)
    try:
        with side_effect("submission.commit"), transaction.atomic():
            now = quotas.lock(owner)
            # The twin of this request may have been first at the lock: its job is the answer, not a full queue.
            earlier = _made_earlier(owner, idempotency_key, request_hash)
            if earlier is not None:
                return earlier
            quotas.admit(owner=owner, kind=kind, estimated_seconds=seconds, now=now)
            with side_effect("submission.insert_job"):
                job = Job.objects.create(
                    owner=owner,
                    kind=kind,
                    spec=spec,
                    spec_version=spec_version,
                    spec_hash=canonical_json_hash(spec),
                    base_model=base_model,
                    batch_key=batch_key,
                    estimated_seconds=seconds,
                    idempotency_key=idempotency_key,
                    request_hash=request_hash,
                )
            with side_effect("submission.insert_request"):
                attach(job)
            job_created(job)
            announce(kind)
    except IntegrityError:
        # A web process of an older version takes no lock: the loser of the unique constraint answers with its job.
        earlier = _made_earlier(owner, idempotency_key, request_hash)
        if earlier is None:
            raise
        return earlier
    return job


def _made_earlier(owner: User, idempotency_key: str | None, request_hash: str) -> Job | None:
    """The job that this very request made before."""
    if idempotency_key is None:
        return None
    earlier: Job | None = Job.objects.filter(owner=owner, idempotency_key=idempotency_key).first()
    return None if earlier is None else _same_request(earlier, request_hash)


def _same_request(job: Job, request_hash: str) -> Job:
    if job.request_hash != request_hash:
        raise IdempotencyMismatch(
            f"Idempotency-Key {job.idempotency_key!r} was used for another request (job {job.pk}); use a new key"
        )
    return job


def preprocess_submit(
    *, owner: User, dataset: Dataset, config: PreprocessConfig, idempotency_key: str | None = None
) -> Job:
    """Start preparing a dataset: makes its next DatasetVersion.

    Raises:
        NotReady: The dataset has no pictures.
    """

    def refuse() -> None:
        if not dataset.images.exists():
            raise NotReady(f"dataset {dataset.name!r} has no pictures: upload some first")

    @side_effect("dataset_version.create")
    def attach(job: Job) -> None:
        # Two preparations at once take turns, so that each gets its own number.
        Dataset.objects.select_for_update().get(pk=dataset.pk)
        newest = dataset.versions.aggregate(Max("number"))["number__max"] or 0
        DatasetVersion.objects.create(owner=owner, dataset=dataset, number=newest + 1, job=job)

    return job_submit(
        owner=owner,
        kind=JobKind.PREPROCESS,
        spec=config.dump(),
        idempotency_key=idempotency_key,
        request={"dataset": str(dataset.pk), **config.dump()},
        units=preprocess_units(dataset.images.count()),
        refuse=refuse,
        attach=attach,
    )


def training_submit(
    *,
    owner: User,
    dataset_version: DatasetVersion,
    base_model: BaseModel,
    lora_name: str,
    config: TrainConfig,
    idempotency_key: str | None = None,
) -> Job:
    """Start training a LoRA on a prepared dataset version.

    Raises:
        NotReady: The version's preparation has not succeeded, or the base model is not prepared.
        InvalidInput: The configuration does not fit the base model, or asks for what `refuse_training` refuses.
        Conflict: The LoRA name belongs to a LoRA of another base model.
    """

    refuse_training(config)

    def refuse() -> None:
        if not dataset_version.is_ready:
            raise NotReady(
                f"dataset version {dataset_version} is not ready (its job is {dataset_version.job.state}): "
                "wait for its preprocessing to succeed"
            )
        facts = _facts(base_model)
        _check_clip_skip(config.clip_skip, base_model)
        refuse_misfit(base_model, config)
        step = facts.bucket_step_px
        wrong = [i for i in (dataset_version.manifest or {})["images"] if i["width"] % step or i["height"] % step]
        if wrong:
            raise InvalidInput(
                f"{len(wrong)} pictures of {dataset_version} do not fit base model {base_model.name!r}: sides must be "
                f"multiples of {step} px, {wrong[0]['name']!r} is {wrong[0]['width']}x{wrong[0]['height']}. "
                f"Preprocess again with bucket_step_px={step}"
            )
        other = owner.loras.filter(name=lora_name).exclude(base_model=base_model).first()
        if other is not None:
            raise Conflict(
                f"your LoRA {lora_name!r} belongs to base model {other.base_model.name!r}: choose another name"
            )

    @side_effect("training_run.create")
    def attach(job: Job) -> None:
        TrainingRun.objects.create(
            owner=owner, job=job, dataset_version=dataset_version, base_model=base_model, lora_name=lora_name
        )

    return job_submit(
        owner=owner,
        kind=JobKind.TRAIN,
        spec=config.dump(),
        base_model=base_model,
        idempotency_key=idempotency_key,
        request={
            "dataset_version": str(dataset_version.pk),
            "base_model": str(base_model.pk),
            "lora_name": lora_name,
            **config.dump(),
        },
        units=training_units(config),
        spec_version=config.spec_version,
        refuse=refuse,
        attach=attach,
    )


def generation_submit(
    *,
    owner: User,
    base_model: BaseModel,
    loras: Sequence[tuple[LoraVersion, float]],
    values: dict[str, Any],
    styles: Sequence[str] = (),
    idempotency_key: str | None = None,
) -> Job:
    """Start generating pictures.

    Args:
        loras: LoRA versions that the owner may see, with their weights.
        values: GenerateConfig fields without `loras`; width and height default to the base model's native size.
            Pictures to begin from must be the owner's. LoRAs named in the prompt are added to `loras`.
        styles: Names of the owner's styles.

    Raises:
        core.errors.ConfigError: A value is out of range.
        NotReady: The base model is not prepared.
        InvalidInput: A size or the VAE does not fit the base model, a LoRA belongs to another base model, or it is
            more work than one request may ask for.
    """
    facts = _facts(base_model)
    native = {"width": facts.native_size_px, "height": facts.native_size_px}
    values, loras = read_prompts(owner=owner, base_model=base_model, loras=loras, values=values, styles=styles)
    uses = tuple(LoraUse(sha256=version.kohya_sha256, weight=weight) for version, weight in loras)
    config = GenerateConfig.parse({**native, **values, "loras": [use.dump() for use in uses]})
    quotas.refuse_oversized_generation(config)
    step = facts.bucket_step_px
    if config.width % step or config.height % step:
        raise InvalidInput(
            f"{config.width}x{config.height} does not fit base model {base_model.name!r}: "
            f"both sides must be multiples of {step} px"
        )
    _check_clip_skip(config.clip_skip, base_model)
    lender = vae_lender(base_model, config.vae)
    if len({version.pk for version, _ in loras}) < len(loras):
        raise InvalidInput("a LoRA version is named twice: name it once, with the sum of its weights")
    for version, _ in loras:
        if version.lora.base_model_id != base_model.pk:
            raise InvalidInput(
                f"LoRA {version} was trained for base model {version.lora.base_model.name!r}, not {base_model.name!r}"
            )

    @side_effect("generation_request.create")
    def attach(job: Job) -> None:
        if pictures := pictures_read(config):
            artifacts_pin(pictures)
        request = GenerationRequest.objects.create(owner=owner, job=job, base_model=base_model)
        GenerationLora.objects.bulk_create(
            GenerationLora(request=request, lora_version=version, weight=weight) for version, weight in loras
        )

    return job_submit(
        owner=owner,
        kind=JobKind.GENERATE,
        spec=config.dump(),
        base_model=base_model,
        idempotency_key=idempotency_key,
        request={"base_model": str(base_model.pk), **config.dump()},
        units=generation_units(config),
        batch_key=generation_batch_key(config, base_model, lender),
        spec_version=config.spec_version,
        attach=attach,
    )


def generation_batch_key(config: GenerateConfig, base_model: BaseModel, lender: BaseModel | None) -> str:
    """What two requests must have in common to share a run of `core.generate`; "" for one that runs alone.

    A run has one model, one VAE and one tensor shape. Prompts, seeds, steps, guidance, samplers and LoRAs are each
    picture's own. An exact picture shares its forwards with nobody, so that company would only slow it down.
    """
    if config.count > PICTURES_PER_BATCH or config.exact:
        return ""
    shared: dict[str, Any] = config.model_dump(mode="json", include={"width", "height"})
    shared["hires_scale"] = config.hires.scale if config.hires else None
    shared |= {"base": base_model.fingerprint, "vae": lender and lender.fingerprint}
    return canonical_json_hash(shared)


def base_preparation_submit(*, owner: User, base_model: BaseModel) -> Job:
    """Start (again) the preparation of a base model.

    Raises:
        Conflict: A preparation is under way.
    """
    if base_model.job is not None and base_model.job.state in (JobState.QUEUED, JobState.RUNNING, JobState.UPLOADING):
        raise Conflict(f"base model {base_model.name!r} is being prepared already (job {base_model.job_id})")

    @side_effect("base_model.attach")
    def attach(job: Job) -> None:
        BaseModel.objects.filter(pk=base_model.pk).update(job=job)
        base_model.job = job

    spec = {"source": base_model.source}
    if base_model.vae_source:
        spec["vae_source"] = base_model.vae_source
    return job_submit(owner=owner, kind=JobKind.PREPARE_BASE, spec=spec, base_model=base_model, attach=attach)


def _facts(base_model: BaseModel) -> Any:
    if not base_model.fingerprint:
        state = base_model.job.state if base_model.job else "not started"
        raise NotReady(f"base model {base_model.name!r} is not prepared yet (its preparation is {state})")
    return base_model.base_facts()


def _check_clip_skip(clip_skip: int | None, base_model: BaseModel) -> None:
    layers = base_model.base_facts().text_layers
    if clip_skip is not None and clip_skip > layers:
        raise InvalidInput(
            f"clip_skip {clip_skip} is more than the {layers} text layers of base model {base_model.name!r}"
        )
