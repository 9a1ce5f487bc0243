"""Submits jobs through the product's own rules until told to stop, cancels some, and journals what it was promised.

`python -m tests.chaos.workload SEED BACKLOG AT_LEAST`. Runs behind the database's fault proxy: a submission whose
answer was lost is repeated under its idempotency key. SIGTERM stops it once `AT_LEAST` jobs were submitted.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chaos import expected, journal

PEOPLE = 4


class Workload:
    """Keeps a backlog of waiting jobs; everything is drawn from the seed."""

    def __init__(self, seed: int, journals: Path) -> None:
        self._random = random.Random(f"workload/{seed}")
        self.journal = journal.Journal(journals / "workload.jsonl")
        self.submitted = 0
        self._prepare()

    def _prepare(self) -> None:
        from django.db import transaction

        from jobs.models import User
        from tests.factories import make_base_model, make_dataset, make_dataset_version, store_bytes

        self._people = [User.objects.create_user(f"person{number}") for number in range(PEOPLE)]
        self._base = make_base_model(name="chaos base")
        weights, _ = store_bytes(expected.base_weights())
        self._base.files |= {"unet/diffusion_pytorch_model.safetensors": weights}
        self._base.save()
        self._datasets = [make_dataset(person, pictures=2) for person in self._people]
        with transaction.atomic():  # the factories end these first jobs themselves
            self._versions = [
                make_dataset_version(person, dataset=dataset)
                for person, dataset in zip(self._people, self._datasets, strict=True)
            ]
        self.journal.write("ready")

    def submit(self) -> None:
        """One job, of a random kind, by a random person."""
        number, draw = self.submitted, self._random.random()
        index = self._random.randrange(PEOPLE)
        request: dict[str, Any] = {"number": number, "key": f"chaos-{number}", "owner": index}
        if draw < 0.6:
            values = {
                "prompt": f"picture {number} {self._random.getrandbits(32):08x}",
                "seed": self._random.randrange(1_000_000),
                "count": self._random.randint(1, 3),
                "steps": self._random.randint(2, 9),
            }
            request |= {"kind": "generate", **values}
            call = lambda: self._generate(index, values, request["key"])  # noqa: E731
        elif draw < 0.88:
            values = {
                "steps": self._random.randint(8, 40),
                "seed": self._random.randrange(1_000_000),
                "checkpoint_every_steps": self._random.randint(4, 12),
            }
            request |= {"kind": "train", "lora_name": f"lora {number}", **values}
            call = lambda: self._train(index, values, request["lora_name"], request["key"])  # noqa: E731
        elif draw < 0.94:
            seed = self._random.randrange(1_000_000)
            request |= {"kind": "import_lora", "lora_name": f"brought {number}", "seed": seed}
            call = lambda: self._import(index, seed, request["lora_name"], request["key"])  # noqa: E731
        else:
            request |= {"kind": "preprocess"}
            call = lambda: self._preprocess(index, request["key"])  # noqa: E731
        job = self._insist(call)
        self.submitted += 1
        self.journal.write("submitted", job=job.pk.hex, **request)

    def cancel_one(self) -> None:
        """Somebody stops a random job that has not ended, or has this very moment."""
        from jobs.errors import Conflict
        from jobs.lifecycle import job_cancel
        from jobs.models import Job

        def call() -> tuple[str, str] | None:
            ids = list(Job.objects.active().order_by("pk").values_list("pk", flat=True))
            if not ids:
                return None
            job = Job.objects.get(pk=self._random.choice(ids))
            try:
                return job.pk.hex, str(job_cancel(job=job))
            except Conflict:
                return job.pk.hex, "conflict"

        asked = self._insist(call)
        if asked is not None:
            self.journal.write("cancel", job=asked[0], answer=asked[1])

    def waiting(self) -> int:
        """Jobs that have not ended."""
        from jobs.models import Job

        count: int = self._insist(lambda: Job.objects.active().count())
        return count

    def _generate(self, index: int, values: dict[str, Any], key: str) -> Any:
        from jobs.submission import generation_submit

        return generation_submit(
            owner=self._people[index], base_model=self._base, loras=[], values=values, idempotency_key=key
        )

    def _train(self, index: int, values: dict[str, Any], lora_name: str, key: str) -> Any:
        from core.train_config import TrainConfig
        from jobs.submission import training_submit

        return training_submit(
            owner=self._people[index],
            dataset_version=self._versions[index],
            base_model=self._base,
            lora_name=lora_name,
            config=TrainConfig(**values),
            idempotency_key=key,
        )

    def _preprocess(self, index: int, key: str) -> Any:
        from core.config import PreprocessConfig
        from jobs.submission import preprocess_submit

        config = PreprocessConfig(resolution=64, bucket_step_px=16)
        return preprocess_submit(
            owner=self._people[index], dataset=self._datasets[index], config=config, idempotency_key=key
        )

    def _import(self, index: int, seed: int, lora_name: str, key: str) -> Any:
        from jobs.lora_imports import lora_import_submit
        from tests.factories import lora_file

        return lora_import_submit(
            owner=self._people[index],
            base_model=self._base,
            lora_name=lora_name,
            file=lora_file(f"{lora_name}.safetensors", expected.uploaded_bytes(seed)),
            idempotency_key=key,
        )

    def _insist(self, call: Callable[[], Any]) -> Any:
        """Until it is answered; database and store may be cut off at any moment."""
        from botocore.exceptions import BotoCoreError, ClientError
        from django.db import DatabaseError, connection

        from jobs.backoff import is_transient

        while True:
            try:
                return call()
            except DatabaseError as error:
                self.journal.write("database_error", error=str(error)[:200])
                connection.close()
            except (OSError, BotoCoreError, ClientError) as error:
                if not is_transient(error):
                    raise
                self.journal.write("store_error", error=str(error)[:200])
            time.sleep(0.2)


def main() -> None:
    """Submit until SIGTERM."""
    import django

    django.setup()
    seed, backlog, at_least = (int(word) for word in sys.argv[1:4])
    stop = False

    def on_term(*_: Any) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, on_term)
    workload = Workload(seed, Path(os.environ[journal.FOLDER_VARIABLE]))
    dice = random.Random(f"cancels/{seed}")
    while not stop or workload.submitted < at_least:
        if workload.waiting() < backlog:
            for _ in range(5):
                workload.submit()
        if dice.random() < 0.025:
            workload.cancel_one()
        time.sleep(0.15)
    workload.journal.write("done", submitted=workload.submitted)


if __name__ == "__main__":
    main()
