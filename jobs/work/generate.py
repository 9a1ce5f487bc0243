"""A generate job: a request in, pictures out; several that fit each other share their forwards."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from django.db.models import Q

from core.config import GenerateConfig
from core.failpoints import side_effect
from core.image_files import ENDINGS
from jobs.artifacts import artifact_put, artifacts_pin
from jobs.errors import NotReady
from jobs.heartbeat import Hold
from jobs.models import BaseModel, GeneratedImage, GenerationRequest
from jobs.node_cache import node_cache
from jobs.previews import preview_drop
from jobs.scratch import scratch_open

IMAGE_FORMATS = {ending: image_format for image_format, ending in ENDINGS.items()}


class GenerateWork:
    """One claimed generate job."""

    def __init__(self, hold: Hold, *, run: Callable[..., Any], order: Callable[..., Any]) -> None:
        self.hold, self.run, self._order = hold, run, order
        self.pictures: Sequence[Any] = ()
        self.request = GenerationRequest.objects.select_related("base_model").get(job=hold.job)

    def compute(self) -> None:
        """Generate into the scratch folder."""
        errors: list[Exception | None] = []
        compute_as_they_come([self], lambda room: (), lambda work, error: errors.append(error))
        if (error := errors[0]) is not None:
            raise error

    def files(self) -> list[Path]:
        """The pictures."""
        return [picture.path for picture in self.pictures]

    def order(self, *, company: Sequence[Hold] = ()) -> Any:
        """The request by value.

        Args:
            company: Holds that wait while its files are fetched.
        """
        files = node_cache().checking(self.hold.heed)
        uses = self.request.lora_uses.select_related("lora_version__lora").order_by("id")
        return self._order(
            config=GenerateConfig.parse(self.hold.job.spec),
            lora_names=[use.lora_version.lora.name for use in uses],
            folder=scratch_open(self.hold),
            report=self.hold.report,
            fetch=self.hold.watched(files.get, company=company),
        )

    def vae(self) -> dict[str, Any] | None:
        """The base whose VAE was asked for, by value; None for the model's own.

        Raises:
            NotReady: No prepared base has this name or fingerprint.
        """
        wanted = self.hold.job.spec.get("vae")
        if wanted is None:
            return None
        named = BaseModel.objects.filter(Q(name=wanted) | Q(fingerprint=wanted)).exclude(fingerprint="")
        other = named.order_by("name").first()
        if other is None:
            raise NotReady(f"no prepared base model is called {wanted!r}: its VAE cannot be used")
        return {"name": other.name, "fingerprint": other.fingerprint, "files": other.files}

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
                    image_format=IMAGE_FORMATS.get(picture.path.suffix, "png"),
                )
                for number, (picture, sha256, size_bytes) in enumerate(self.stored)
            )
        if self.hold.has_preview:
            preview_drop(job_id=self.hold.job.pk)


def compute_as_they_come(
    works: Sequence[GenerateWork],
    join: Callable[[int], Sequence[GenerateWork]],
    on_done: Callable[[GenerateWork, Exception | None], None],
) -> None:
    """Generate requests of one batch key that come and go; `jobs.company.Together`."""
    first, base_model = works[0], works[0].request.base_model
    under_way: dict[Any, GenerateWork] = {}
    holds: list[Hold] = []  # of all of them: while the files of one come, the others wait for them, too

    def order_of(work: GenerateWork) -> Any:
        order = work.order(company=holds)
        under_way[order] = work
        holds.append(work.hold)
        return order

    def done(order: Any, result: Sequence[Any] | Exception) -> None:
        work = under_way.pop(order)
        holds.remove(work.hold)
        if isinstance(result, Exception):
            on_done(work, result)
        else:
            work.pictures = result
            on_done(work, None)

    first.run(
        orders=[order_of(work) for work in works],
        base_fingerprint=base_model.fingerprint,
        base_files=base_model.files,
        base_name=base_model.name,
        memory_rung=max(work.hold.job.memory_rung for work in works),
        vae=first.vae(),
        join=lambda room: [order_of(work) for work in join(room)],
        on_done=done,
    )
