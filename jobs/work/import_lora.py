"""An import_lora job: an uploaded file in, every number of it judged against the base, a LoRA version out. No torch."""

from pathlib import Path
from typing import cast

from django.db.models import Max

from core.base_shapes import BaseShapes, shapes_of_files
from core.errors import LoraFileError
from core.failpoints import side_effect
from core.lora_gate import judge_lora
from core.lora_header import LoraHeader, parse_header
from jobs.artifacts import artifact_begin, artifact_put, artifacts_pin
from jobs.errors import ArtifactDamaged, ArtifactMissing
from jobs.heartbeat import Hold
from jobs.models import BaseModel, Lora, LoraImport, LoraVersion
from jobs.node_cache import node_cache


class ImportLoraWork:
    """One claimed import_lora job."""

    def __init__(self, hold: Hold) -> None:
        self.hold = hold
        self.lora_import = LoraImport.objects.select_related("base_model").get(job=hold.job)

    def compute(self) -> None:
        """Fetch the file and judge it."""
        files = node_cache().checking(self.hold.heed)
        self.path = self.hold.watched(files.get)(self.lora_import.sha256)
        shapes = stored_shapes(self.lora_import.base_model)
        try:
            self.facts = judge_lora(self.path, shapes, report=self.hold.report)
        except LoraFileError as error:
            raise LoraFileError(str(error).replace(self.path.name, self.lora_import.file_name)) from error

    def files(self) -> list[Path]:
        """The upload itself; it lies in the cache, where nothing may be changed."""
        return []

    def store(self) -> None:
        """The upload stored it; here only what was swept meanwhile is stored again."""
        artifact_put(self.path)

    def record(self) -> None:
        """The LoRA version becomes visible."""
        asked = self.lora_import
        artifacts_pin([asked.sha256])
        with side_effect("lora.import"):
            lora, _ = Lora.objects.get_or_create(
                owner=asked.owner,
                name=asked.lora_name,
                defaults={
                    "base_model": asked.base_model,
                    "trigger_word": asked.trigger_word,
                    "visibility": asked.visibility,
                },
            )
        # The row lock makes the next number ours; SQLite writes one transaction at a time anyway.
        Lora.objects.select_for_update().get(pk=lora.pk)
        newest = lora.versions.aggregate(Max("number"))["number__max"] or 0
        with side_effect("lora_version.import"):
            version = LoraVersion.objects.create(
                owner=asked.owner,
                lora=lora,
                number=newest + 1,
                kohya_sha256=asked.sha256,
                kohya_size_bytes=asked.size_bytes,
                model_hash=self.facts.model_hash,
                facts={"source": "imported", "file_name": asked.file_name, **self.facts.summary()},
            )
            LoraImport.objects.filter(pk=asked.pk).update(lora_version=version)


def stored_shapes(base_model: BaseModel) -> BaseShapes:
    """Shapes of a prepared base's weights, from the first bytes of its stored files: gigabytes stay where they are.

    Raises:
        BaseModelError: The base has no weights, or damaged ones.
        ArtifactDamaged: The store has lost one of them.
    """
    files = cast(dict[str, str], base_model.files)

    def header_of(file: str) -> LoraHeader:
        try:
            return artifact_begin(files[file], lambda stream, size: parse_header(stream, size, file))
        except ArtifactMissing as error:
            raise ArtifactDamaged(
                f"{file} of base model {base_model.name!r} is not in the store: prepare it again"
            ) from error

    return shapes_of_files(sorted(files), header_of, base_model.name)
