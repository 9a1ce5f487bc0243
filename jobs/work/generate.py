"""A generate job: a request in, pictures out; several that fit each other in one forward."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core.config import GenerateConfig
from core.errors import Interrupted
from core.failpoints import side_effect
from jobs.artifacts import artifact_put, artifacts_pin
from jobs.heartbeat import Hold
from jobs.models import GeneratedImage, GenerationRequest
from jobs.node_cache import node_cache
from jobs.scratch import scratch_open


class GenerateWork:
    """One claimed generate job."""

    def __init__(self, hold: Hold, *, run: Callable[..., Any], order: Callable[..., Any]) -> None:
        self.hold, self._run, self._order = hold, run, order
        self.pictures: Sequence[Any] = ()
        self.request = GenerationRequest.objects.select_related("base_model").get(job=hold.job)

    def compute(self) -> None:
        """Generate into the scratch folder."""
        (error,) = compute_together([self])
        if error is not None:
            raise error

    def files(self) -> list[Path]:
        """The pictures."""
        return [picture.path for picture in self.pictures]

    def order(self) -> Any:
        """The request by value."""
        uses = self.request.lora_uses.select_related("lora_version__lora").order_by("id")
        return self._order(
            config=GenerateConfig.parse(self.hold.job.spec),
            lora_names=[use.lora_version.lora.name for use in uses],
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
        artifacts_pin(sha256 for _, sha256, _ in self.stored)
        with side_effect("pictures.record"):
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


def compute_together(works: Sequence[GenerateWork]) -> list[Exception | None]:
    """Generate requests of the same batch key at once. Returns for each what stopped it alone."""
    base_model = works[0].request.base_model

    def heed() -> None:
        """While files are fetched for all, nobody can leave alone: stop only when nobody wants to go on."""
        stopped: Interrupted | None = None
        for work in works:
            try:
                work.hold.heed()
            except Interrupted as interruption:
                stopped = interruption
            else:
                return
        if stopped is not None:
            raise stopped

    results = works[0]._run(
        orders=[work.order() for work in works],
        base_fingerprint=base_model.fingerprint,
        base_files=base_model.files,
        base_name=base_model.name,
        fetch=works[0].hold.watched(node_cache().checking(heed).get, company=[work.hold for work in works[1:]]),
        memory_rung=max(work.hold.job.memory_rung for work in works),
    )
    errors: list[Exception | None] = []
    for work, result in zip(works, results, strict=True):
        errors.append(result if isinstance(result, Interrupted) else None)
        if not isinstance(result, Interrupted):
            work.pictures = result
    return errors
