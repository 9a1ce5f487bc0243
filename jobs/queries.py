"""Reads for API and admin: what a person may see, with everything that one answer needs in a few queries.

Rows of others are not there. Nothing here writes.
"""

from collections.abc import Sequence
from typing import Any, TypeVar
from uuid import UUID

from django.db.models import Count, Model, Prefetch, QuerySet

from jobs.errors import NotFound, NotReady
from jobs.models import (
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
    JobEvent,
    Lora,
    LoraVersion,
    Style,
    TrainingRun,
    User,
)

Row = TypeVar("Row", bound=Model)

JOB_RELATIONS = (
    "dataset_version",
    "training_run__lora_version",
    "generation_request",
    "prepared_base",
    "lora_import__lora_version",
)
"""What tells which record a job fills; all one-to-one, so one join each."""


def one(rows: "QuerySet[Row]", row_id: UUID) -> Row:
    """The row of this id among `rows`.

    Raises:
        NotFound: It does not exist, or is not among the rows that this person may see.
    """
    row = rows.filter(pk=row_id).first()
    if row is None:
        raise NotFound(f"there is no {rows.model._meta.verbose_name} {row_id} among yours")
    return row


def jobs_of(user: User) -> "QuerySet[Job]":
    """Jobs with their attempts and the record that each one fills. Tracebacks are for staff and are not read."""
    return (
        Job.objects.owned_by(user)
        .select_related(*JOB_RELATIONS)
        .defer("error_traceback", "spec", "checkpoint", "dataset_version__manifest", "training_run__losses")
        .prefetch_related("attempts")
    )


def job_events(job: Job) -> "QuerySet[JobEvent]":
    """State changes of a job, oldest first."""
    return JobEvent.objects.filter(job=job).order_by("id")


def datasets_of(user: User) -> "QuerySet[Dataset]":
    """Datasets with `image_count` and their versions, newest first."""
    versions = DatasetVersion.objects.defer("manifest", "rejected").order_by("-number")
    return (
        Dataset.objects.owned_by(user)
        .annotate(image_count=Count("images"))
        .prefetch_related(Prefetch("versions", queryset=versions))
    )


def dataset_images_of(user: User) -> "QuerySet[DatasetImage]":
    """Uploaded pictures."""
    return DatasetImage.objects.owned_by(user)


def dataset_versions_of(user: User) -> "QuerySet[DatasetVersion]":
    """Preparations of datasets, with their jobs."""
    return with_jobs(DatasetVersion.objects.owned_by(user).select_related("dataset"))


def trainings_of(user: User) -> "QuerySet[TrainingRun]":
    """Trainings, with their jobs."""
    return with_jobs(
        TrainingRun.objects.owned_by(user)
        .select_related("base_model", "lora_version")
        .defer("base_model__facts", "base_model__files")
    )


def generations_of(user: User) -> "QuerySet[GenerationRequest]":
    """Requests for pictures, with their jobs, LoRAs and pictures."""
    uses = GenerationLora.objects.select_related("lora_version__lora").order_by("id")
    return with_jobs(
        GenerationRequest.objects.owned_by(user)
        .select_related("base_model")
        .defer("base_model__facts", "base_model__files")
        .prefetch_related(
            Prefetch("lora_uses", queryset=uses), Prefetch("images", GeneratedImage.objects.order_by("number"))
        )
    )


def with_jobs(rows: "QuerySet[Any]") -> "QuerySet[Any]":
    """Request rows with what their jobs' answers show."""
    jobs = Job.objects.select_related(*JOB_RELATIONS).defer(
        "error_traceback", "checkpoint", "dataset_version__manifest", "training_run__losses"
    )
    return rows.prefetch_related(
        Prefetch("job", queryset=jobs), Prefetch("job__attempts", queryset=JobAttempt.objects.order_by("token"))
    )


def generated_images_of(user: User) -> "QuerySet[GeneratedImage]":
    """Generated pictures."""
    return GeneratedImage.objects.owned_by(user)


def input_images_of(user: User) -> "QuerySet[InputImage]":
    """Pictures uploaded to begin from."""
    return InputImage.objects.owned_by(user)


def styles_of(user: User) -> "QuerySet[Style]":
    """Named prompt templates."""
    return Style.objects.owned_by(user)


def loras_visible_to(user: User) -> "QuerySet[Lora]":
    """Own and public LoRAs, with their versions, newest first."""
    return (
        Lora.objects.visible_to(user)
        .select_related("owner", "base_model")
        .defer("base_model__facts", "base_model__files")
        .prefetch_related(Prefetch("versions", queryset=LoraVersion.objects.order_by("-number")))
    )


def lora_versions_visible_to(user: User) -> "QuerySet[LoraVersion]":
    """Versions of own and public LoRAs."""
    return LoraVersion.objects.filter(lora__in=Lora.objects.visible_to(user)).select_related("lora__base_model")


def lora_versions_chosen(user: User, ids: Sequence[UUID]) -> list[LoraVersion]:
    """The versions that a request names, in its order: by version id, or by LoRA id, which means the newest version.

    Raises:
        NotFound: Names the id that is neither.
        NotReady: A LoRA has no version yet.
    """
    return [_lora_version_chosen(user, chosen) for chosen in ids]


def _lora_version_chosen(user: User, chosen: UUID) -> LoraVersion:
    versions = lora_versions_visible_to(user)
    version = versions.filter(pk=chosen).first() or versions.filter(lora_id=chosen).order_by("-number").first()
    if version is not None:
        return version
    if Lora.objects.visible_to(user).filter(pk=chosen).exists():
        raise NotReady(f"LoRA {chosen} has no version yet: wait for its training to succeed")
    raise NotFound(f"there is no LoRA or LoRA version {chosen} among your own and the public ones")


def base_models() -> "QuerySet[BaseModel]":
    """All base models; every account may use them."""
    return BaseModel.objects.select_related("job").defer("files", "job__error_traceback", "job__checkpoint")


def base_model_chosen(name_or_id: str) -> BaseModel:
    """The base model that a request names.

    Raises:
        NotFound: Neither an id nor a name of a base model.
    """
    try:
        found = base_models().filter(pk=UUID(name_or_id)).first()
    except ValueError:
        found = None
    found = found or base_models().filter(name=name_or_id).first()
    if found is None:
        names = ", ".join(base_models().values_list("name", flat=True)[:20]) or "none so far"
        raise NotFound(f"there is no base model {name_or_id!r}; registered are: {names}")
    return found
