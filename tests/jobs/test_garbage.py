"""Blobs that nothing needs go; a blob that something needs never goes, whatever happens at the same time."""

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.files.storage import default_storage
from django.core.management import call_command
from django.db import connection, transaction
from django.test import override_settings
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from core import failpoints
from jobs import garbage
from jobs.artifacts import (
    artifact_announce,
    artifact_name,
    artifact_open,
    artifact_put_stream,
    artifacts_pin,
    blob_store,
    blob_write,
)
from jobs.errors import ArtifactMissing
from jobs.garbage import garbage_sweep, garbage_sweep_whole
from jobs.library import dataset_delete, dataset_image_delete
from jobs.local_storage import PART_PREFIX
from jobs.models import Artifact, BaseModel, DatasetImage, Job, User
from jobs.status import JobState
from tests.factories import make_dataset, make_job
from tests.services import postgres

HERE = Path(__file__).parent
AT_ONCE = -60.0
"""As GARBAGE_AFTER_SECONDS: a row is old even when it was renewed just now; only locks and references protect."""


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.LORASITE, "GARBAGE_AFTER_SECONDS", AT_ONCE)


@pytest.fixture(autouse=True)
def empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store of this test's own, and a listing that begins at the beginning."""
    backend = {"BACKEND": "jobs.local_storage.LocalArtifactStorage", "OPTIONS": {"location": str(tmp_path / "blobs")}}
    monkeypatch.setattr(garbage, "_listed_up_to", "")
    with override_settings(STORAGES={"default": backend}):
        yield tmp_path / "blobs"


def stored_names() -> set[str]:
    return {name.rsplit("/", 1)[1] for name, _ in blob_store().names_after("", 10_000)}


def store(content: bytes = b"") -> str:
    return artifact_put_stream(BytesIO(content or os.urandom(50)))[0]


def record(name: str, shas: list[str]) -> BaseModel:
    """A row that names blobs, as the work of a job records it."""
    with transaction.atomic():
        artifacts_pin(shas)
        return BaseModel.objects.create(name=name, source="x", files={f"{i}": sha for i, sha in enumerate(shas)})


@pytest.mark.django_db
def test_a_young_blob_stays_and_an_old_one_goes() -> None:
    sha256 = store()
    assert garbage_sweep().removed == 0
    assert stored_names() == {sha256}
    Artifact.objects.update(put_at="2000-01-01T00:00:00Z")
    assert garbage_sweep().removed == 1
    assert stored_names() == set()
    assert not Artifact.objects.exists()


@pytest.mark.django_db
def test_storing_the_same_bytes_again_makes_an_old_blob_young() -> None:
    sha256 = store(b"again")
    Artifact.objects.update(put_at="2000-01-01T00:00:00Z")
    store(b"again")
    assert garbage_sweep().removed == 0
    assert stored_names() == {sha256}


@pytest.mark.django_db
def test_what_is_named_stays_however_old_and_goes_to_the_end_of_the_line() -> None:
    sha256 = store()
    record("base", [sha256])
    Artifact.objects.update(put_at="2000-01-01T00:00:00Z")
    result = garbage_sweep()
    assert (result.removed, result.renewed) == (0, 1)
    assert Artifact.objects.get().put_at.year > 2000
    assert stored_names() == {sha256}


@pytest.mark.django_db
@pytest.mark.usefixtures("at_once")
def test_deleting_rows_deletes_no_bytes_but_the_next_sweep_does(owner: User) -> None:
    dataset = make_dataset(owner, pictures=3)
    before = stored_names()
    dataset_image_delete(image=dataset.images.all()[0])
    assert stored_names() == before
    kept = set(DatasetImage.objects.values_list("sha256", flat=True))
    garbage_sweep()
    assert stored_names() == kept
    dataset_delete(dataset=dataset)
    assert stored_names() == kept
    garbage_sweep()
    assert stored_names() == set()


@pytest.mark.django_db
@pytest.mark.usefixtures("at_once")
def test_the_same_bytes_in_two_rows_stay_until_both_are_gone() -> None:
    sha256 = store()
    first, second = record("first", [sha256]), record("second", [sha256])
    first.delete()
    garbage_sweep()
    assert stored_names() == {sha256}
    second.delete()
    garbage_sweep()
    assert stored_names() == set()


@pytest.mark.django_db
@pytest.mark.usefixtures("at_once")
def test_checkpoints_go_when_a_newer_one_or_the_end_of_the_job_replaces_them(owner: User) -> None:
    job = make_job(owner, JobState.RUNNING)
    old, new, base = store(), store(), stored_names()
    Job.objects.filter(pk=job.pk).update(checkpoint={"lora.safetensors": old})
    garbage_sweep()
    assert old in stored_names()
    new = store()
    Job.objects.filter(pk=job.pk).update(checkpoint={"lora.safetensors": new})
    garbage_sweep()
    assert {old, new} & stored_names() == {new}
    assert base - stored_names() >= {old}
    Job.objects.filter(pk=job.pk).update(state=JobState.CANCELLED, lease_until=None, finished_at="2026-01-01T00:00:00Z")
    garbage_sweep()
    assert new not in stored_names()


@pytest.mark.django_db
def test_blobs_that_no_row_knows_are_adopted_age_and_go() -> None:
    known = store()
    unknown = hashlib.sha256(b"from before").hexdigest()
    path = Path(default_storage.path(artifact_name(unknown)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"from before")
    (path.parent / "notes.txt").write_text("not ours")
    assert garbage_sweep().adopted == 1
    assert garbage_sweep().adopted == 0
    assert Artifact.objects.get(pk=unknown).size_bytes == 11
    Artifact.objects.filter(pk=unknown).update(put_at="2000-01-01T00:00:00Z")
    assert garbage_sweep().removed == 1
    assert not path.exists()
    assert (path.parent / "notes.txt").exists()
    assert known in stored_names()


@pytest.mark.django_db
def test_listings_go_on_page_by_page_and_begin_anew_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "PAGE", 4)
    shas = {store() for _ in range(10)}
    Artifact.objects.all().delete()
    adopted = [garbage_sweep().adopted for _ in range(3)]
    assert adopted == [4, 4, 2]
    assert set(Artifact.objects.values_list("pk", flat=True)) == shas
    late = store()
    Artifact.objects.filter(pk=late).delete()
    assert sum(garbage_sweep().adopted for _ in range(4)) == 1


@pytest.mark.django_db
def test_half_written_files_go_when_they_are_old(empty_store: Path) -> None:
    store()
    folder = next(path for path in (empty_store / "sha256").iterdir())
    old, young = folder / f"{PART_PREFIX}old", folder / f"{PART_PREFIX}young"
    for part in (old, young):
        part.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000, time.time() - 90_000))
    assert garbage_sweep().leftovers == 1
    assert (old.exists(), young.exists()) == (False, True)


@pytest.mark.django_db
@pytest.mark.usefixtures("at_once")
def test_a_store_that_does_not_answer_ends_the_sweep_and_the_next_one_goes_on() -> None:
    store()

    def fail(point: str) -> None:
        if point == "blob.delete:before":
            raise TimeoutError("the store is silent")

    failpoints.install(fail)
    try:
        assert garbage_sweep().removed == 0
    finally:
        failpoints.install(None)
    assert Artifact.objects.count() == 1
    assert garbage_sweep().removed == 1


@pytest.mark.django_db
@pytest.mark.usefixtures("at_once")
def test_a_blob_that_was_recorded_after_it_was_chosen_stays() -> None:
    """The sweep chooses, a job records, the sweep removes."""
    chosen = [store(), store()]
    record("base", chosen[:1])
    assert garbage.artifacts_remove(chosen) == 1
    assert stored_names() == set(chosen[:1])


@pytest.mark.django_db
@pytest.mark.usefixtures("at_once")
def test_a_blob_without_bytes_is_not_pinned_and_its_row_goes() -> None:
    artifact_announce("a" * 64, 5)
    with pytest.raises(ArtifactMissing), transaction.atomic():
        artifacts_pin(["a" * 64])
    with pytest.raises(ArtifactMissing), transaction.atomic():
        artifacts_pin(["b" * 64])
    assert garbage_sweep().removed == 1
    assert not Artifact.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_pinning_outside_of_a_transaction_is_a_mistake() -> None:
    with pytest.raises(RuntimeError, match="transaction"):
        artifacts_pin(["a" * 64])


@pytest.mark.django_db
def test_the_command_shows_and_removes_only_when_told() -> None:
    kept, young, old = store(), store(), store()
    record("base", [kept])
    Artifact.objects.filter(pk=old).update(put_at="2000-01-01T00:00:00Z")
    out = StringIO()
    call_command("garbage", stdout=out)
    assert "3 blobs known, 2 named by no record" in out.getvalue()
    assert "1 of them old enough" in out.getvalue()
    assert kept not in out.getvalue()
    assert stored_names() == {kept, young, old}
    call_command("garbage", "--remove", stdout=out)
    assert "removed 1 blobs" in out.getvalue()
    assert stored_names() == {kept, young}


class Crash(BaseException):
    """The process is gone: no handler of the product sees it."""


class World:
    """Writers and a sweeper on one store, whose steps are mixed by a seed at the named side effects.

    Each writer holds bytes and goes through announce, write, record. At any point of one actor another actor may do
    its next step: any step where no transaction is open, and only the step outside of the database (write) inside one,
    since the row locks keep the others out.
    """

    def __init__(self, seed: int, crash_rate: float) -> None:
        self.rng, self.crash_rate = random.Random(seed), crash_rate
        self.contents = [b"content %d" % number for number in range(3)]
        self.writers: list[tuple[bytes, str]] = []
        self.bases, self.depth, self.records, self.crashes = 0, 0, 0, 0

    def run(self, steps: int) -> None:
        failpoints.install(self._at)
        try:
            for _ in range(steps):
                self._act(inside=False)
                self.check()
        finally:
            failpoints.install(None)
        garbage_sweep_whole(leftover_seconds=-5)
        self.check()

    def check(self) -> None:
        """No referenced blob is ever missing."""
        for files in BaseModel.objects.values_list("files", flat=True):
            for sha256 in files.values():
                path = Path(default_storage.path(artifact_name(sha256)))
                assert path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256

    def _at(self, point: str) -> None:
        if self.depth < 3 and self.rng.random() < 0.25:
            self._act(inside=self._in_transaction())
        if self.rng.random() < self.crash_rate:
            self.crashes += 1
            raise Crash(point)

    def _in_transaction(self) -> bool:
        return connection.in_atomic_block

    def _act(self, *, inside: bool) -> None:
        actions: list[Callable[[], Any]] = [self._write] if inside else [
            self._announce, self._write, self._record, self._delete, self._sweep
        ]  # fmt: skip
        self.depth += 1
        try:
            self.rng.choice(actions)()
        except (Crash, ArtifactMissing):
            pass
        finally:
            self.depth -= 1

    def _announce(self) -> None:
        content = self.rng.choice(self.contents)
        artifact_announce(hashlib.sha256(content).hexdigest(), len(content))
        self.writers.append((content, "announced"))

    def _take(self, state: str) -> bytes | None:
        waiting = [writer for writer in self.writers if writer[1] == state]
        if not waiting:
            return None
        writer = self.rng.choice(waiting)
        self.writers.remove(writer)
        return writer[0]

    def _write(self) -> None:
        if (content := self._take("announced")) is not None:
            blob_write(BytesIO(content), hashlib.sha256(content).hexdigest(), len(content))
            self.writers.append((content, "written"))

    def _record(self) -> None:
        if (content := self._take("written")) is not None:
            self.bases += 1
            record(f"base {self.bases}", [hashlib.sha256(content).hexdigest()])
            self.records += 1

    def _delete(self) -> None:
        if (base := BaseModel.objects.order_by("?").first()) is not None:
            base.delete()

    def _sweep(self) -> None:
        garbage_sweep()  # half-written files of this history are young; the whole sweep at its end takes them


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("at_once")
@given(seed=st.integers(0, 2**48), crash_rate=st.sampled_from([0.0, 0.02, 0.1]))
@hypothesis_settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_in_no_history_of_writers_sweeps_and_crashes_is_a_needed_blob_missing_or_garbage_kept(
    seed: int, crash_rate: float
) -> None:
    BaseModel.objects.all().delete()
    world = World(seed, crash_rate)
    world.run(30)
    needed = {sha256 for files in BaseModel.objects.values_list("files", flat=True) for sha256 in files.values()}
    assert stored_names() == needed
    assert set(Artifact.objects.values_list("pk", flat=True)) == needed
    assert not list(Path(default_storage.path("")).rglob(f"{PART_PREFIX}*"))


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("at_once")
def test_histories_really_mix_records_sweeps_and_crashes() -> None:
    records = crashes = 0
    for seed in range(20):
        BaseModel.objects.all().delete()
        world = World(seed, 0.02)
        world.run(30)
        records, crashes = records + world.records, crashes + world.crashes
    assert records > 15
    assert crashes > 15


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("at_once")
def test_writers_and_sweeps_at_the_same_time_on_a_server() -> None:
    """Six threads store and record the same few contents while two threads sweep as if nothing were ever young."""
    if connection.vendor != "postgresql":
        pytest.skip("row locks are PostgreSQL's; run by the test below")
    contents = [b"shared %d" % number for number in range(3)]
    end, figures, errors = time.monotonic() + 12, {"records": 0, "again": 0, "removed": 0}, list[BaseException]()
    lock = threading.Lock()

    def count(what: str, by: int = 1) -> None:
        with lock:
            figures[what] += by

    def write(number: int) -> None:
        rng, turn = random.Random(number), 0
        while time.monotonic() < end:
            turn += 1
            chosen = rng.sample(contents, rng.randint(1, 3))
            try:
                shas = [artifact_put_stream(BytesIO(content))[0] for content in chosen]
                base = record(f"{number}-{turn}", shas)
            except ArtifactMissing:
                count("again")
                continue
            for sha256 in shas:
                with artifact_open(sha256) as stream:
                    assert hashlib.sha256(stream.read()).hexdigest() == sha256
            count("records")
            base.delete()

    def sweep() -> None:
        while time.monotonic() < end:
            count("removed", garbage_sweep(seconds=1).removed)

    def guarded(target: Callable[[], None]) -> None:
        try:
            target()
        except Exception as error:  # noqa: BLE001 - of any thread, shown below
            errors.append(error)
        finally:
            connection.close()

    targets = [lambda number=number: write(number) for number in range(6)] + [sweep, sweep]  # type: ignore[misc]
    threads = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert figures["records"] > 50, figures
    assert figures["removed"] > 20, figures
    garbage_sweep_whole(leftover_seconds=-5)
    assert stored_names() == set()
    sys.stdout.write(f"race {figures}\n")


@pytest.mark.slow
def test_the_rules_hold_on_postgresql(tmp_path: Path) -> None:
    with postgres(tmp_path) as url:
        files = [str(HERE / "test_garbage.py"), str(HERE / "test_artifact_references.py")]
        command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "-k", "not hold_on_postgresql and not histor", *files],
            env=os.environ | {"LORASITE_DATABASE_URL": url},
            cwd=HERE.parents[1],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "race {" in done.stdout
