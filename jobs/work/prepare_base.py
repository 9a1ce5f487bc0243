"""A prepare_base job: a source folder becomes a prepared base whose files any node can fetch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.failpoints import side_effect
from jobs.artifacts import artifact_put, artifacts_pin
from jobs.heartbeat import DOWNLOAD_SECONDS, Hold
from jobs.models import BaseModel
from jobs.scratch import scratch_open


class PrepareBaseWork:
    """One claimed prepare_base job."""

    def __init__(self, hold: Hold, *, run: Callable[..., Any]) -> None:
        self.hold, self._run = hold, run
        self.base_model = BaseModel.objects.get(job=hold.job)

    def compute(self) -> None:
        """Prepare the source into the scratch folder."""
        self.folder = scratch_open(self.hold) / "base"
        self.hold.alive(
            patience_seconds=DOWNLOAD_SECONDS
        )  # the source may be a hub's: nothing is heard until it is here
        self.prepared = self._run(self.base_model.source, self.folder, self.hold.report, self.base_model.vae_source)

    def files(self) -> list[Path]:
        """The prepared folder's."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def store(self) -> None:
        """All files go to the store under their hashes."""
        self.stored: dict[str, str] = {}
        for path in self.files():
            self.hold.check()
            self.stored[path.relative_to(self.folder).as_posix()] = artifact_put(path)[0]

    def record(self) -> None:
        """From now on jobs may use this base."""
        artifacts_pin(self.stored.values())
        with side_effect("base.record"):
            BaseModel.objects.filter(pk=self.base_model.pk).update(
                fingerprint=self.prepared.fingerprint, facts=self.prepared.facts.dump(), files=self.stored
            )
