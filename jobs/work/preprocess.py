"""A preprocess job: rows in, `core.preprocess` by way of the worker, a frozen DatasetVersion out."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from core.config import PreprocessConfig
from core.failpoints import side_effect
from core.preprocess import PreprocessResult, SourceImage
from jobs.artifacts import artifact_put, artifacts_pin
from jobs.errors import LeaseLost
from jobs.heartbeat import Hold
from jobs.models import DatasetVersion
from jobs.node_cache import node_cache
from jobs.scratch import scratch_open


class PreprocessWork:
    """One claimed preprocess job."""

    def __init__(self, hold: Hold, *, run: Callable[..., PreprocessResult]) -> None:
        self.hold, self._run = hold, run
        self.version = DatasetVersion.objects.select_related("dataset").get(job=hold.job)

    def compute(self) -> None:
        """Fetch the originals, prepare them into the scratch folder."""
        self.images_folder = scratch_open(self.hold) / "images"
        images = self.version.dataset.images.order_by("created_at", "id")
        fetch = self.hold.watched(node_cache().checking(self.hold.heed).get)
        sources = [
            SourceImage(
                name=image.name,
                path=fetch(image.sha256),
                sha256=image.sha256,
                caption=image.caption or None,
            )
            for image in images
        ]
        self.result = self._run(
            sources, PreprocessConfig.parse(self.hold.job.spec), self.images_folder, self.hold.report
        )

    def files(self) -> list[Path]:
        """The prepared pictures."""
        return [self.images_folder / f"{image.sha256}.png" for image in self.result.manifest.images]

    def store(self) -> None:
        """Prepared pictures go to the store under their hashes."""
        for path in self.files():
            self.hold.check()
            artifact_put(path)

    def record(self) -> None:
        """Freeze the version."""
        manifest = self.result.manifest
        artifacts_pin(image.sha256 for image in manifest.images)
        with side_effect("dataset_version.freeze"):
            frozen = DatasetVersion.objects.filter(pk=self.version.pk, manifest_hash="").update(
                manifest=manifest.to_json(),
                manifest_hash=manifest.content_hash(),
                image_count=len(manifest.images),
                rejected=[asdict(rejected) for rejected in self.result.rejected],
            )
        if not frozen:
            raise LeaseLost(f"dataset version {self.version.pk} is frozen already")
