"""Uploads of LoRA files from elsewhere: judged by their header, stored, and a job that reads every number.

Called by the API and the admin. Loads no ML library.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from django.conf import settings
from django.core.files.uploadedfile import TemporaryUploadedFile, UploadedFile
from django.core.files.uploadhandler import TemporaryFileUploadHandler
from django.db.models import QuerySet

from core.errors import LoraFileError
from core.failpoints import side_effect
from core.lora_gate import judge_header
from jobs.artifacts import artifact_put_stream, artifacts_pin, hash_stream
from jobs.errors import Conflict, InvalidInput, NotReady
from jobs.estimates import import_units
from jobs.models import BaseModel, Job, LoraImport, User
from jobs.queries import with_jobs
from jobs.status import JobKind, Visibility
from jobs.submission import job_submit
from jobs.uploads import FileRejected, label_of


class LoraUploadHandler(TemporaryFileUploadHandler):
    """Writes every upload to a temporary file, whatever its size, and stops one piece beyond the cap."""

    def receive_data_chunk(self, raw_data: bytes, start: int) -> None:
        """Keep the piece, or drop it; the file that is kept is larger than the cap, which it is refused for."""
        if start <= settings.LORASITE["LORA_MAX_BYTES"]:
            super().receive_data_chunk(raw_data, start)


def lora_imports_of(user: User) -> "QuerySet[LoraImport]":
    """Imports with their jobs, newest first."""
    rows = LoraImport.objects.owned_by(user).select_related("base_model", "lora_version")
    return with_jobs(rows.defer("base_model__facts", "base_model__files"))


def lora_import_submit(
    *,
    owner: User,
    base_model: BaseModel,
    lora_name: str,
    file: UploadedFile,
    trigger_word: str = "",
    visibility: str = Visibility.PRIVATE,
    idempotency_key: str | None = None,
) -> Job:
    """Judge an uploaded file's header, store the file, and start the job that judges the rest.

    Args:
        file: As `LoraUploadHandler` left it: a temporary file of ours.

    Raises:
        InvalidInput: Too large, or without a name.
        LoraFileError: Not a LoRA that we can serve; says why.
        NotReady: The base model is not prepared.
        Conflict: The name belongs to a LoRA of another base model.
        TooBusy: Too much work waits.
    """
    limit = settings.LORASITE["LORA_MAX_BYTES"]
    if (file.size or 0) > limit:
        raise InvalidInput(f"the file is larger than {limit} bytes, the most for one LoRA: save it in half precision")
    try:
        name = label_of(file.name)
    except FileRejected as reason:
        raise InvalidInput(reason.reason) from reason
    _judge_upload(file, name)
    sha256, size_bytes = hash_stream(cast(BinaryIO, file.file))
    return _submit(
        owner=owner,
        base_model=base_model,
        spec={
            "lora_name": lora_name,
            "trigger_word": trigger_word,
            "visibility": visibility,
            "file_name": name,
            "sha256": sha256,
            "size_bytes": size_bytes,
        },
        idempotency_key=idempotency_key,
        store=lambda: artifact_put_stream(cast(BinaryIO, file.file)),
    )


def lora_import_again(job: Job) -> Job:
    """Judge the stored file of an ended import once more.

    Raises:
        ArtifactMissing: The file was removed meanwhile: upload it again.
        NotReady, Conflict, TooBusy: As `lora_import_submit`.
    """
    asked = job.lora_import
    return _submit(owner=job.owner, base_model=asked.base_model, spec=job.spec, store=lambda: None)


def _submit(
    *,
    owner: User,
    base_model: BaseModel,
    spec: dict[str, Any],
    store: Callable[[], object],
    idempotency_key: str | None = None,
) -> Job:
    def refuse() -> None:
        if not base_model.fingerprint:
            raise NotReady(f"base model {base_model.name!r} is not prepared yet: wait for its preparation")
        other = owner.loras.filter(name=spec["lora_name"]).exclude(base_model=base_model).first()
        if other is not None:
            raise Conflict(
                f"your LoRA {spec['lora_name']!r} belongs to base model {other.base_model.name!r}: choose another name"
            )
        store()

    @side_effect("lora_import.create")
    def attach(job: Job) -> None:
        artifacts_pin([spec["sha256"]])
        LoraImport.objects.create(owner=owner, job=job, base_model=base_model, **spec)

    return job_submit(
        owner=owner,
        kind=JobKind.IMPORT_LORA,
        spec=spec,
        base_model=base_model,
        idempotency_key=idempotency_key,
        request={"base_model": str(base_model.pk), **spec},
        units=import_units(spec["size_bytes"]),
        refuse=refuse,
        attach=attach,
    )


def _judge_upload(file: UploadedFile, name: str) -> None:
    """Rubbish is refused at once; milliseconds for any file.

    Raises:
        LoraFileError: By the name that the person gave the file.
    """
    with _on_disk(file) as path:
        try:
            facts = judge_header(path)
        except LoraFileError as error:
            raise LoraFileError(str(error).replace(path.name, name)) from error
    if facts.kind == "peft":
        raise LoraFileError(
            f"{name} is the weights of a PEFT folder, whose alpha is in adapter_config.json: convert the folder first, "
            "`python -m core.lora_utils convert FOLDER --to kohya --out FILE.safetensors`"
        )


@contextmanager
def _on_disk(file: UploadedFile) -> Iterator[Path]:
    """Where the upload lies; a small one of the admin's form lies in memory."""
    if isinstance(file, TemporaryUploadedFile):
        yield Path(file.temporary_file_path())
        return
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as copy:
        with side_effect("upload.spill"):
            for chunk in file.chunks():
                copy.write(chunk)
            copy.flush()
        yield Path(copy.name)
