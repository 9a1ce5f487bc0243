"""A generate job: a request in, pictures out."""

from collections.abc import Callable
from typing import Any

from core.config import GenerateConfig
from jobs.artifacts import artifact_put
from jobs.heartbeat import Hold
from jobs.models import GeneratedImage, GenerationRequest
from jobs.node_cache import node_cache
from jobs.scratch import scratch_open


class GenerateWork:
    """One claimed generate job."""

    def __init__(self, hold: Hold, *, run: Callable[..., Any]) -> None:
        self.hold, self._run = hold, run
        self.request = GenerationRequest.objects.select_related("base_model").get(job=hold.job)

    def compute(self) -> None:
        """Generate into the scratch folder."""
        base_model = self.request.base_model
        uses = self.request.lora_uses.select_related("lora_version__lora").order_by("id")
        self.pictures = self._run(
            config=GenerateConfig.parse(self.hold.job.spec),
            base_fingerprint=base_model.fingerprint,
            base_files=base_model.files,
            base_name=base_model.name,
            lora_names=[use.lora_version.lora.name for use in uses],
            fetch=node_cache().get,
            folder=scratch_open(self.hold),
            report=self.hold.report,
        )

    def store(self) -> None:
        """Pictures go to the store under their hashes."""
        self.stored = []
        for picture in self.pictures:
            self.hold.check()
            self.stored.append((picture, *artifact_put(picture.path)))

    def record(self) -> None:
        """The pictures become visible."""
        GeneratedImage.objects.bulk_create(
            GeneratedImage(
                owner=self.request.owner,
                request=self.request,
                number=number,
                seed=picture.seed,
                sha256=sha256,
                size_bytes=size_bytes,
                width=picture.width,
                height=picture.height,
            )
            for number, (picture, sha256, size_bytes) in enumerate(self.stored)
        )
