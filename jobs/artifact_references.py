"""The one list of all columns that name stored blobs. `jobs/garbage.py` removes nothing that is found here.

A new column that holds hashes must be added; `tests/jobs/test_artifact_references.py` fails while one is in no list.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from django.db.models import Model, Q

from jobs.models import (
    BaseModel,
    DatasetImage,
    DatasetVersion,
    GeneratedImage,
    InputImage,
    Job,
    LoraVersion,
    TrainingRun,
)
from jobs.models.record import SHA256_PATTERN
from jobs.status import TERMINAL

QUERY_HASHES = 500
"""Hashes in one IN (...); SQLite takes a bounded number of parameters."""
ROWS_AT_ONCE = 200

LABELS = frozenset({"source_sha256"})
"""Keys inside JSON whose hashes only say where something came from: the person may have deleted the original."""


@dataclass(frozen=True)
class Reference:
    """One column whose hashes keep their blobs.

    Args:
        where: Rows that count; an ended job, for one, keeps no checkpoint.
    """

    model: type[Model]
    column: str
    where: Q = Q()  # noqa: RUF009 - a Q is never changed in place
    is_json: bool = False


UNFINISHED = ~Q(state__in=sorted(TERMINAL))

REFERENCES = (
    Reference(DatasetImage, "sha256"),
    Reference(GeneratedImage, "sha256"),
    Reference(InputImage, "sha256"),
    Reference(LoraVersion, "kohya_sha256"),
    Reference(LoraVersion, "peft_files", is_json=True),
    Reference(LoraVersion, "diffusers_sha256", Q(diffusers_sha256__isnull=False)),
    Reference(DatasetVersion, "manifest", Q(manifest__isnull=False), is_json=True),
    Reference(TrainingRun, "samples", is_json=True),
    Reference(BaseModel, "files", is_json=True),
    Reference(Job, "checkpoint", UNFINISHED & Q(checkpoint__isnull=False), is_json=True),
    Reference(Job, "spec", UNFINISHED, is_json=True),  # the LoRAs that a waiting generation will read
)

NO_REFERENCES = frozenset(
    {
        "Artifact.sha256",  # what is stored, not what is needed
        "LoraImport.sha256",  # its job's spec names it until the version does
        "LoraVersion.model_hash",  # of the tensor bytes alone; nothing is stored under it
        "LoraVersion.facts",
        "BaseModel.facts",
        "DatasetVersion.rejected",
        "TrainingRun.losses",
        "Job.figures",
        "WorkerProcess.queues",
        "WorkerProcess.warm_bases",  # fingerprints of bases, which are no blobs
    }
)
"""Hash and JSON columns that keep nothing."""


def referenced(shas: Iterable[str]) -> set[str]:
    """Those of `shas` that some row names, as of now.

    Costs an indexed or sequential query for each plain column, and one pass over all JSON columns.
    """
    wanted, found = set(shas), set[str]()
    for reference in REFERENCES:
        left = wanted - found
        if not left:
            break
        found |= _in_json(reference, left) if reference.is_json else _in_column(reference, left)
    return found


def hashes_in(value: Any) -> Iterator[str]:
    """Every SHA-256 that occurs as a value anywhere in parsed JSON, but those under `LABELS`."""
    if isinstance(value, str):
        if re.fullmatch(SHA256_PATTERN, value):
            yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in LABELS:
                yield from hashes_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from hashes_in(inner)


def _in_column(reference: Reference, wanted: set[str]) -> set[str]:
    rows = reference.model._default_manager.filter(reference.where)
    found: set[str] = set()
    ordered = sorted(wanted)
    for start in range(0, len(ordered), QUERY_HASHES):
        some = rows.filter(**{f"{reference.column}__in": ordered[start : start + QUERY_HASHES]})
        found |= set(some.values_list(reference.column, flat=True))
    return found


def _in_json(reference: Reference, wanted: set[str]) -> set[str]:
    rows = reference.model._default_manager.filter(reference.where).order_by("pk")
    found: set[str] = set()
    for value in rows.values_list(reference.column, flat=True).iterator(chunk_size=ROWS_AT_ONCE):
        found |= {sha256 for sha256 in hashes_in(value) if sha256 in wanted}
    return found
