"""How many worker seconds a request will probably take: numbers of its configuration times what such work took lately.

Called by `jobs/submission.py`; quotas and the job's answers use the figure, nothing depends on its being right.
"""

from collections.abc import Mapping
from statistics import median
from typing import Any
from uuid import UUID

from django.core.cache import cache

from core.config import GenerateConfig
from core.errors import CoreError
from core.train_config import TrainConfig
from jobs.models import Job
from jobs.status import JobKind, JobState

SECONDS_PER_UNIT: Mapping[str, float] = {
    JobKind.PREPROCESS: 0.2,
    JobKind.IMPORT_LORA: 0.01,
    JobKind.PREPARE_BASE: 60.0,
    JobKind.TRAIN: 0.5,
    JobKind.GENERATE: 0.2,
}
"""Until an installation has figures of its own: a guess for SD 1.5 on a mid-range GPU. Units as the functions say."""

LATELY_JOBS = 50
FEWEST_JOBS = 3
REMEMBERED_SECONDS = 60


def preprocess_units(pictures: int) -> float:
    """Units of a dataset's preparation: its pictures."""
    return float(pictures)


def import_units(size_bytes: int) -> float:
    """Units of an import: mebibytes to read."""
    return size_bytes / 2**20


def training_units(config: TrainConfig) -> float:
    """Units of a training: pictures shown to the model; a third more where activations are computed twice."""
    shown = config.steps * config.batch_size * config.gradient_accumulation_steps
    return shown * (4 / 3 if config.gradient_checkpointing else 1.0)


def generation_units(config: GenerateConfig) -> float:
    """Units of a generation: megapixels through the model; guidance sends every picture through it twice."""
    passes = 2 if config.guidance > 1 else 1
    return pixel_steps(config) * passes / 1e6


def pixel_steps(config: GenerateConfig) -> int:
    """Pixels x steps x pictures of a generation, both passes: what its budget counts."""
    pixels = config.width * config.height
    steps = max(1.0, config.steps * (config.denoising_strength if config.init_image else 1))
    if config.hires is not None:
        second = (config.hires.steps or config.steps) * config.hires.denoising_strength
        steps += max(1.0, second) * config.hires.scale**2
    return round(pixels * steps * config.count)


def estimated_seconds(kind: JobKind, units: float, base_model_id: UUID | None = None) -> float:
    """Worker seconds of a request.

    Args:
        units: From the function of its kind above.
        base_model_id: The base model's speed is its own; None for work without one.
    """
    return units * _seconds_per_unit(kind, base_model_id)


def _seconds_per_unit(kind: JobKind, base_model_id: UUID | None) -> float:
    """The median of the last successes of this kind and base; the constant while there are fewer than three.

    One query of at most 50 rows by index, once a minute and process: a burst of requests pays for it once.
    """
    key = f"seconds-per-unit:{kind}:{base_model_id}"
    known = cache.get(key)
    if known is None:
        rates = _recent_rates(kind, base_model_id)
        known = median(rates) if len(rates) >= FEWEST_JOBS else SECONDS_PER_UNIT[kind]
        cache.set(key, known, REMEMBERED_SECONDS)
    return float(known)


def _recent_rates(kind: JobKind, base_model_id: UUID | None) -> list[float]:
    # The base is compared here, not in SQL: a base without history would otherwise make it read all of the others'.
    newest = (
        Job.objects.filter(kind=kind, state=JobState.SUCCEEDED)
        .order_by("-created_at")
        .values_list("base_model_id", "used_worker_seconds", "spec", "dataset_version__image_count")[:LATELY_JOBS]
    )
    rates = []
    for its_base_id, seconds, spec, pictures in newest:
        if its_base_id == base_model_id and seconds > 0:
            units = _units_of(kind, spec, pictures or 0)
            if units > 0:
                rates.append(seconds / units)
    return rates


def _units_of(kind: JobKind, spec: dict[str, Any], pictures: int) -> float:
    """Units of a job that has run; 0 where its specification cannot be read by this version."""
    try:
        if kind == JobKind.GENERATE:
            return generation_units(GenerateConfig.parse(spec))
        if kind == JobKind.TRAIN:
            return training_units(TrainConfig.parse(spec))
        if kind == JobKind.IMPORT_LORA:
            return import_units(spec["size_bytes"])
    except (CoreError, KeyError):
        return 0.0
    return preprocess_units(pictures) if kind == JobKind.PREPROCESS else 1.0
