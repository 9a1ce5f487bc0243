"""Stories in which something goes wrong by itself: errors of a person, of a device, of a program, and whole subsystems
that no ordinary job walks through (garbage, checkpoints of the real trainer, uploads).
"""

import contextlib
import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from django.core.files.base import ContentFile

from tests.chaos import expected, import_story, look_story, scenarios
from tests.chaos.cache_story import crowded_cache, crowded_cache_check
from tests.chaos.scenarios import Scenario, during, generate, lora_is_right, person, picture_is_right, train

CHECKPOINTS = 4
S3_VARIABLE = "CHAOS_S3"
S3_BODIES = (b"small", b"in parts" * (7 << 17))


def install() -> None:
    """Let the fake pipeline misbehave where a prompt says so. Call after `fakes.install`."""
    import gpu_worker.generation as fake
    from jobs import preemption

    well = fake.run_generations

    def run(*, orders: Sequence[Any], memory_rung: int = 0, **rest: Any) -> Any:
        for order in orders:
            _misbehave(order.config.prompt, first_try=order.folder.name == "1", memory_rung=memory_rung)
        return well(orders=orders, memory_rung=memory_rung, **rest)

    fake.run_generations = run
    preemption.BETWEEN_YIELDS_SECONDS = preemption.PATIENCE_SECONDS = 0.0


def furnish() -> None:
    """A real prepared base, small."""
    from django.conf import settings

    from core.prepared_base import prepare_base
    from jobs.artifacts import artifact_put
    from jobs.models import BaseModel
    from tests.tiny_models import make_tiny_pipeline

    work = Path(settings.LORASITE["DATA"]) / "furnish"
    prepared = prepare_base(make_tiny_pipeline(work / "source"), work / "prepared")
    files = {name: artifact_put(prepared.folder / name)[0] for name in [*prepared.files, "manifest.json"]}
    facts = prepared.facts.dump()
    BaseModel.objects.create(name="tiny", source="tiny", fingerprint=prepared.fingerprint, facts=facts, files=files)
    shutil.rmtree(work)


def _misbehave(prompt: str, *, first_try: bool, memory_rung: int) -> None:
    from core.errors import TrainingDiverged

    if prompt == "never works":
        raise TrainingDiverged("the loss is not a number")
    if prompt == "needs little memory" and memory_rung == 0:
        raise MemoryError
    if first_try and prompt == "hangs at first":
        time.sleep(60)
    if first_try and prompt == "device fails at first":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if first_try and prompt == "surprises at first":
        raise ZeroDivisionError
    if first_try and prompt == "disk is full at first":
        raise OSError(28, "No space left on device")


def _newcomer() -> None:
    from jobs.models import BaseModel, User
    from jobs.submission import generation_submit

    newcomer, _ = User.objects.get_or_create(username="newcomer")
    values = {"prompt": "a picture", "seed": 7, "count": 1, "steps": 2}
    base = BaseModel.objects.get(name="base")
    generation_submit(owner=newcomer, base_model=base, loras=[], values=values, idempotency_key="first")


def _joined() -> None:
    """A request comes while another is drawn, joins its run, and leaves first."""
    from jobs import drain

    drain.JOIN_SECONDS = 0.05
    during(generate("first", steps=40), 1, lambda _: generate("second", prompt="another picture"))


def _joined_check() -> list[str]:
    return [*picture_is_right("first"), *picture_is_right("second", "another picture")]


def _worker_goes_down() -> None:
    """SIGTERM in the middle of a training; the flag falls again once the job was given back."""
    from jobs import worker_context
    from jobs.models import Job
    from jobs.status import JobState

    def shut_down(job: Any) -> None:
        flag = worker_context.current().shutdown
        flag.raise_flag()
        end = time.monotonic() + 5
        while time.monotonic() < end and Job.objects.get(pk=job.pk).state == JobState.RUNNING:
            time.sleep(0.02)
        flag._byte[0] = 0

    during(train("lora", steps=24), 6, shut_down)


def _somebody_waits() -> None:
    """A generation comes while a training runs."""
    from jobs.preemption import trainings_ask_to_yield

    def interrupt(_: Any) -> None:
        generate("urgent")
        trainings_ask_to_yield()

    during(train("lora", steps=24), 3, interrupt)


def _upload() -> None:
    from jobs.input_images import input_images_upload
    from jobs.models import Dataset
    from jobs.uploads import dataset_images_upload
    from tests.factories import picture_bytes, picture_file

    dataset, _ = Dataset.objects.get_or_create(owner=person(), name="uploaded")
    files = [picture_file(f"{seed}.png", picture_bytes(seed=seed)) for seed in (1, 2)]
    dataset_images_upload(dataset=dataset, owner=person(), files=files)
    input_images_upload(owner=person(), files=[picture_file("3.png", picture_bytes(seed=3))])


def _upload_check() -> list[str]:
    from jobs.models import DatasetImage, InputImage

    count = DatasetImage.objects.filter(dataset__name="uploaded").count() + InputImage.objects.count()
    return [] if count == 3 else [f"{count} of 3 uploaded pictures are there"]


def _prepare_base() -> None:
    """The real preparation needs torch; what counts here is how its files are stored and published."""
    from types import SimpleNamespace

    import gpu_worker.base_preparation as fake
    from core.base_facts import BaseFacts
    from jobs.models import BaseModel
    from jobs.submission import base_preparation_submit
    from tests.factories import DEMO_FACTS

    def run(source: str, destination: Path, report: Any, vae_source: str) -> Any:
        destination.mkdir(parents=True)
        (destination / "manifest.json").write_text("{}")
        (destination / "unet.safetensors").write_bytes(b"weights")
        return SimpleNamespace(fingerprint=expected.sha256(b"weights"), facts=BaseFacts.parse(DEMO_FACTS))

    fake.run_base_preparation = run
    base, made = BaseModel.objects.get_or_create(name="new base", defaults={"source": "/models/new"})
    if made or base.job is None:
        base_preparation_submit(owner=person(), base_model=base)


def _prepare_base_check() -> list[str]:
    from jobs.models import BaseModel

    files = sorted(BaseModel.objects.get(name="new base").files)
    return [] if files == ["manifest.json", "unet.safetensors"] else [f"the base has files {files}"]


def _rebuild_base_folder() -> None:
    """As a GPU process does for a base that its machine has not yet."""
    from django.conf import settings

    from gpu_worker.base_folders import base_folder
    from gpu_worker.settings import BaseRef
    from gpu_worker.zygote import warm_bases_tell
    from jobs.models import BaseModel
    from jobs.node_cache import node_cache

    base = BaseModel.objects.get(name="tiny")
    ref = BaseRef(name=base.name, fingerprint=base.fingerprint, files=base.files)
    cache_folder = Path(settings.LORASITE["DATA"]) / "cache"
    base_folder(ref, cache_folder, node_cache().get)
    warm_bases_tell(cache_folder, [ref])
    generate("one")


def _garbage() -> None:
    """An orphan that is old, a blob that no row knows, a leftover of a killed writer, and a job meanwhile."""
    from django.core.files.storage import default_storage

    from jobs.artifacts import artifact_name, artifact_put_stream
    from jobs.garbage import garbage_sweep_whole
    from jobs.models import Artifact

    orphan, _ = artifact_put_stream(BytesIO(b"nobody needs this"))
    Artifact.objects.filter(pk=orphan).update(put_at="2001-01-01T00:00:00Z")
    unknown = Path(default_storage.path(artifact_name(expected.sha256(b"unknown"))))
    unknown.parent.mkdir(parents=True, exist_ok=True)
    unknown.write_bytes(b"unknown")
    torn = Path(default_storage.path(artifact_name(expected.sha256(b"once torn"))))
    torn.parent.mkdir(parents=True, exist_ok=True)
    torn.write_bytes(b"once")
    artifact_put_stream(BytesIO(b"once torn"))
    leftover = unknown.parent / ".part-left"
    leftover.write_bytes(b"half")
    os.utime(leftover, (1, 1))
    generate("one")
    garbage_sweep_whole()


def _garbage_check() -> list[str]:
    from django.core.files.storage import default_storage

    from jobs.artifacts import artifact_name
    from jobs.garbage import garbage_sweep_whole
    from jobs.models import Artifact

    found = []
    # Whoever told the story last may just have stored it anew.
    Artifact.objects.filter(pk=expected.sha256(b"nobody needs this")).update(put_at="2001-01-01T00:00:00Z")
    garbage_sweep_whole()
    if default_storage.exists(artifact_name(expected.sha256(b"nobody needs this"))):
        found.append("the orphan is still there")
    if not Artifact.objects.filter(pk=expected.sha256(b"unknown")).exists():
        found.append("the unknown blob was not adopted")
    if Path(default_storage.path(artifact_name(expected.sha256(b"once torn")))).read_bytes() != b"once torn":
        found.append("the torn blob was not made whole")
    return found + picture_is_right("one")


def _no_hard_links() -> None:
    """A data folder on a file system that has none."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOTSUP, "no hard links here")

    link, os.link = os.link, refuse
    try:
        artifact = BytesIO(b"stored without links")
        from jobs.artifacts import artifact_put_stream

        artifact_put_stream(artifact)
    finally:
        os.link = link
    generate("one")


def _full_for_a_moment() -> None:
    """Bytes that end in the middle of their way leave no half blob."""
    from jobs.artifacts import artifact_put_stream

    class Breaking(BytesIO):
        reads = 0

        def read(self, size: int | None = -1) -> bytes:
            self.reads += 1
            if self.reads == 3:  # hashed in two reads; this is the first one of the write
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().read(size)

    with contextlib.suppress(OSError):
        artifact_put_stream(Breaking(b"never whole"))
    generate("one")


def _store_away() -> None:
    """The store does not answer while a training makes six checkpoints."""
    from jobs import artifacts

    write, back_at = artifacts.blob_write, time.monotonic() + 1.0

    def away(*arguments: Any) -> None:
        if time.monotonic() < back_at:
            raise ConnectionError("the store is away")
        write(*arguments)

    artifacts.blob_write = away
    train("lora", steps=24)


def _rebooted() -> None:
    """The lock of a worker from before the machine's last start."""
    from jobs.life_locks import _folder

    (_folder() / f"{uuid.uuid4()}.an-earlier-boot").touch()
    generate("one")


def _s3() -> None:
    """Small and multipart blobs in a real S3 server, one of them torn before."""
    store = _s3_store()
    for body in S3_BODIES:
        name = f"sha256/{expected.sha256(body)[:2]}/{expected.sha256(body)}"
        store.save(name, ContentFile(body))
    torn = expected.sha256(b"healed")
    store.client.put_object(
        Bucket=store.bucket_name, Key=store._normalize_name(f"sha256/{torn[:2]}/{torn}"), Body=b"he"
    )
    store.replace(f"sha256/{torn[:2]}/{torn}", ContentFile(b"healed"))
    store.client.create_multipart_upload(Bucket=store.bucket_name, Key=store._normalize_name("sha256/left/over"))
    time.sleep(0.01)
    store.leftovers_remove(0, 100)
    store.save("sha256/go/ne", ContentFile(b"gone"))
    store.delete("sha256/go/ne")
    generate("one")


def _s3_check() -> list[str]:
    store = _s3_store()
    found = []
    for body in (*S3_BODIES, b"healed"):
        name = f"sha256/{expected.sha256(body)[:2]}/{expected.sha256(body)}"
        with store.open(name) as stored:
            if stored.read() != body:
                found.append(f"blob {name} holds other bytes")
    if store.leftovers_remove(0, 100) and store.leftovers_remove(0, 100):
        found.append("a multipart upload stays")
    if [name for name, _ in store.names_after("", 100) if name == "sha256/go/ne"]:
        found.append("a deleted blob is still there")
    return found + picture_is_right("one")


def _s3_store() -> Any:
    """The store of this site: a folder of its own in the server that the parent started."""
    from django.conf import settings

    from jobs import s3_storage

    s3_storage.MULTIPART_FROM_BYTES, s3_storage.PART_BYTES = 6 << 20, 5 << 20
    prefix = Path(settings.LORASITE["DATA"]).name
    return s3_storage.S3ArtifactStorage(**json.loads(os.environ[S3_VARIABLE]), location=prefix)


def _checkpoints() -> None:
    """The real trainer's step folders: written, superseded, and gone on from."""
    from django.conf import settings

    from core.checkpoint import newest_valid, save_checkpoint
    from tests.core.test_checkpoint import IDENTITY, checkpoint_at

    folder = Path(settings.LORASITE["DATA"]) / "checkpoints"
    before = newest_valid(folder, IDENTITY)
    if before is None:
        for left in (".partial-of-a-killed-save", "step-000001"):  # the second one is torn
            (folder / left).mkdir(parents=True, exist_ok=True)
            (folder / left / "state.json").write_text("{")
    for step in range(1 + (before.step if before else 0), CHECKPOINTS + 1):
        save_checkpoint(folder, checkpoint_at(step), IDENTITY, {"ss_steps": str(step)})
    generate("one")


def _checkpoints_check() -> list[str]:
    from django.conf import settings

    from core.checkpoint import newest_valid
    from tests.core.test_checkpoint import IDENTITY, checkpoint_at

    folder = Path(settings.LORASITE["DATA"]) / "checkpoints"
    newest = newest_valid(folder, IDENTITY)
    if newest is None or newest.step != CHECKPOINTS:
        return [f"the newest checkpoint is {newest and newest.step}, not {CHECKPOINTS}"]
    same = newest.optimizer["exp_avg"].equal(checkpoint_at(CHECKPOINTS).optimizer["exp_avg"])
    return [] if same else ["the newest checkpoint holds other numbers"]


def _story(prompt: str) -> Scenario:
    return Scenario(
        prompt,
        lambda: generate("one", prompt=prompt) and None,
        check=lambda: picture_is_right("one", prompt),
        dies=prompt in ("hangs at first", "device fails at first"),
    )


STORIES = [
    Scenario("never works", lambda: generate("nan", prompt="never works") and None, {"nan": frozenset({"failed"})}),
    _story("needs little memory"),
    _story("hangs at first"),
    _story("device fails at first"),
    _story("surprises at first"),
    _story("disk is full at first"),
    Scenario("newcomer", _newcomer, check=lambda: picture_is_right("first")),
    Scenario("joined", _joined, check=_joined_check),
    Scenario("worker goes down", _worker_goes_down, check=lambda: lora_is_right("lora", 24)),
    Scenario(
        "somebody waits",
        _somebody_waits,
        check=lambda: [*lora_is_right("lora", 24), *picture_is_right("urgent")],
    ),
    Scenario("upload", _upload, check=_upload_check),
    Scenario("import a LoRA", import_story.tell, check=import_story.check),
    Scenario("prepare base", _prepare_base, check=_prepare_base_check),
    Scenario("crowded cache", crowded_cache, check=crowded_cache_check),
    Scenario("rebuild base folder", _rebuild_base_folder, check=lambda: picture_is_right("one")),
    Scenario("garbage", _garbage, check=_garbage_check),
    Scenario("looked at", look_story.tell, check=look_story.check),
    Scenario("no hard links", _no_hard_links, check=lambda: picture_is_right("one")),
    Scenario("full for a moment", _full_for_a_moment, check=lambda: picture_is_right("one")),
    Scenario("store away", _store_away, check=lambda: lora_is_right("lora", 24)),
    Scenario("rebooted", _rebooted, check=lambda: picture_is_right("one")),
    Scenario("s3", _s3, check=_s3_check),
    Scenario("checkpoints", _checkpoints, check=_checkpoints_check),
]

scenarios.SCENARIOS.update({story.name: story for story in STORIES})
