"""Short stories of one or two jobs. Each may be told again from the start after a death, and must end the same.

A story is told by one process (`tests/chaos/small_site.py`) and, where that died, once more by another.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.chaos import expected

SUCCEEDED = frozenset({"succeeded"})


@dataclass(frozen=True)
class Scenario:
    """One story.

    Attributes:
        begin: Submits; called again after a death, so it uses idempotency keys.
        ends: Allowed final states of its jobs by idempotency key; SUCCEEDED where a key is not named.
        check: Further findings once everything has ended, as sentences.
        dies: The telling process is replaced on the way, as the product wants it.
    """

    name: str
    begin: Callable[[], None]
    ends: dict[str, frozenset[str]] = field(default_factory=dict)
    check: Callable[[], list[str]] = list
    dies: bool = False


def furnish() -> None:
    """What every story begins with: a person, a base, a dataset with a prepared version."""
    from jobs.models import User
    from tests.factories import make_base_model, make_dataset, make_dataset_version

    person = User.objects.create_user("person")
    make_base_model(name="base")
    make_dataset_version(person, dataset=make_dataset(person, pictures=2, name="pictures"))


def person() -> Any:
    """Who submits."""
    from jobs.models import User

    return User.objects.get(username="person")


def generate(key: str, prompt: str = "a picture", steps: int = 3) -> Any:
    """A generation of one picture."""
    from jobs.models import BaseModel
    from jobs.submission import generation_submit

    values = {"prompt": prompt, "seed": 7, "count": 1, "steps": steps}
    base = BaseModel.objects.get(name="base")
    return generation_submit(owner=person(), base_model=base, loras=[], values=values, idempotency_key=key)


def train(key: str, steps: int = 12) -> Any:
    """A training with three checkpoints."""
    from core.train_config import TrainConfig
    from jobs.models import BaseModel, DatasetVersion
    from jobs.submission import training_submit

    return training_submit(
        owner=person(),
        dataset_version=DatasetVersion.objects.exclude(manifest_hash="").earliest("number"),
        base_model=BaseModel.objects.get(name="base"),
        lora_name=key,
        config=TrainConfig(steps=steps, seed=3, checkpoint_every_steps=4),
        idempotency_key=key,
    )


def preprocess(key: str) -> Any:
    """A preparation of the dataset."""
    from core.config import PreprocessConfig
    from jobs.models import Dataset
    from jobs.submission import preprocess_submit

    config = PreprocessConfig(resolution=64, bucket_step_px=16)
    dataset = Dataset.objects.get(name="pictures")
    return preprocess_submit(owner=person(), dataset=dataset, config=config, idempotency_key=key)


def during(job: Any, step: int, act: Callable[[Any], None]) -> None:
    """Do something to the job once a worker told that it reached `step`; from a thread, as another process would."""
    from django.db import DatabaseError, connection

    from jobs.models import Job
    from jobs.status import JobState

    def watch() -> None:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                now = Job.objects.get(pk=job.pk)
                if now.state == JobState.RUNNING and now.progress_step >= step:
                    act(now)
                    break
                if now.finished_at is not None:
                    break
            except DatabaseError:
                pass
            time.sleep(0.02)
        connection.close()

    threading.Thread(target=watch, daemon=True).start()


def lora_is_right(key: str, steps: int = 12) -> list[str]:
    """One version with the bytes of an uninterrupted training."""
    from jobs.models import LoraVersion

    right = expected.sha256(expected.kohya_bytes(expected.chain(3, steps, key, steps)))
    found = list(LoraVersion.objects.filter(lora__name=key).values_list("kohya_sha256", flat=True))
    return [] if found == [right] else [f"LoRA {key} has versions {found}, not one of {right}"]


def picture_is_right(key: str, prompt: str = "a picture", count: int = 1) -> list[str]:
    """The pictures of an uninterrupted generation, once."""
    from jobs.models import GeneratedImage

    right = expected.sha256(expected.picture_bytes(prompt, 7))
    found = GeneratedImage.objects.filter(request__job__idempotency_key=key)
    hashes = list(found.values_list("sha256", flat=True))
    return [] if hashes == [right] * count else [f"job {key} has pictures {hashes}, not {count} of {right}"]


def _generate() -> None:
    generate("one")
    generate("two", prompt="another picture")


def _train() -> None:
    train("lora")


def _cancel_waiting() -> None:
    from jobs.errors import Conflict
    from jobs.lifecycle import job_cancel

    job = generate("gone")
    with contextlib.suppress(Conflict):  # Told a second time: it has ended already.
        job_cancel(job=job)


def _cancel_running() -> None:
    from jobs.lifecycle import job_cancel

    during(train("gone", steps=60), 5, lambda job: job_cancel(job=job))


def _expire() -> None:
    from django.utils import timezone

    from jobs.models import Job

    job = generate("late")
    Job.objects.filter(pk=job.pk, started_at__isnull=True).update(deadline=timezone.now())
    time.sleep(0.01)


def _preprocess_check() -> list[str]:
    from jobs.models import DatasetVersion

    versions = list(DatasetVersion.objects.order_by("number").values_list("image_count", flat=True))
    return [] if versions == [2, 2] else [f"dataset versions hold {versions} pictures, not [2, 2]"]


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in [
        Scenario(
            "generate",
            _generate,
            check=lambda: [*picture_is_right("one"), *picture_is_right("two", "another picture")],
        ),
        Scenario("train", _train, check=lambda: lora_is_right("lora")),
        Scenario("preprocess", lambda: preprocess("again") and None, check=_preprocess_check),
        Scenario("cancel waiting", _cancel_waiting, {"gone": frozenset({"cancelled"})}),
        Scenario("cancel running", _cancel_running, {"gone": frozenset({"cancelled", "succeeded"})}),
        Scenario("expire", _expire, {"late": frozenset({"expired"})}),
    ]
}
