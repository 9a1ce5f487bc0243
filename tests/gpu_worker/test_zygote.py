"""A child forked from a parent that has mapped the warm bases has them at once, without its parent asking anybody."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from core.config import GenerateConfig
from core.file_hash import hash_file
from core.generate import generate
from core.pipelines import load_base
from gpu_worker import runtime, zygote
from gpu_worker.settings import BaseRef, WorkerSettings


@pytest.fixture(autouse=True)
def nothing_mapped() -> Iterator[None]:
    """Before and after: the list belongs to a process, and tests share one."""
    zygote._mapped.clear()
    zygote._seen = None
    yield
    zygote._mapped.clear()
    zygote._seen = None


def in_a_child(work: Callable[[], bool]) -> bool:
    """Whether `work` returned true in a forked process."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_child_takes_over_the_mapped_base_and_draws_the_same_picture(
    settings_of_worker: WorkerSettings, bases: list[BaseRef]
) -> None:
    runtime.start(settings_of_worker, [bases[0]])  # The first child: rebuilds the folder and tells the parent.
    config = GenerateConfig(prompt="a cat", width=64, height=64, steps=2)
    folder = settings_of_worker.cache_folder / "bases" / bases[0].fingerprint
    expected = generate(load_base(folder), config)[0].tobytes()
    zygote.map_warm_bases(settings_of_worker.cache_folder, torch.float32)
    inherited = zygote._mapped[bases[0].fingerprint]

    def successor() -> bool:
        started = runtime.start(settings_of_worker, [bases[0]])
        base = started.pool.get(bases[0])
        return base is inherited and generate(base, config)[0].tobytes() == expected

    assert in_a_child(successor)


def test_a_write_in_a_child_reaches_neither_its_sibling_nor_the_file(
    settings_of_worker: WorkerSettings, bases: list[BaseRef]
) -> None:
    runtime.start(settings_of_worker, [bases[0]])
    zygote.map_warm_bases(settings_of_worker.cache_folder, torch.float32)
    path = settings_of_worker.cache_folder / "bases" / bases[0].fingerprint / "unet"
    before = hash_file(path / "diffusion_pytorch_model.safetensors")
    weight = zygote._mapped[bases[0].fingerprint].unet.conv_in.weight
    value = weight.clone()

    def vandal() -> bool:
        with torch.no_grad():
            weight.zero_()
        return float(weight.abs().max()) == 0

    assert in_a_child(vandal)
    assert in_a_child(lambda: torch.equal(weight, value))
    assert hash_file(path / "diffusion_pytorch_model.safetensors") == before


def test_a_base_that_became_warm_later_is_mapped_before_the_next_fork_and_one_that_is_not_any_more_goes(
    settings_of_worker: WorkerSettings, bases: list[BaseRef]
) -> None:
    started = runtime.start(settings_of_worker, [])
    for ref in bases:
        started.folder_of(ref)
    for warm in ([bases[0]], bases, [bases[1]], []):
        zygote.warm_bases_tell(settings_of_worker.cache_folder, warm)
        zygote.map_warm_bases(settings_of_worker.cache_folder, torch.float32)
        assert zygote._mapped.keys() == {ref.fingerprint for ref in warm}


def test_a_fork_never_fails_for_a_list_or_a_base_that_is_damaged(
    settings_of_worker: WorkerSettings, bases: list[BaseRef], caplog: pytest.LogCaptureFixture
) -> None:
    folder = settings_of_worker.cache_folder
    zygote.map_warm_bases(folder, torch.float32)  # No list yet.
    (folder / "bases").mkdir(parents=True)
    for damaged in ("[", '[{"name": 1}]', '{"a": 1}'):
        (folder / "bases" / zygote.WARM_NAME).write_text(damaged)
        zygote.map_warm_bases(folder, torch.float32)
    zygote.warm_bases_tell(folder, bases)  # Their folders are not here.
    zygote.map_warm_bases(folder, torch.float32)

    assert zygote._mapped == {}
    assert "warm base is not mapped" in caplog.text


def test_a_list_that_cannot_be_written_costs_only_speed(tmp_path: Path, bases: list[BaseRef]) -> None:
    (tmp_path / "bases").write_text("a file where the folder should be")

    zygote.warm_bases_tell(tmp_path, bases)

    assert zygote.take(bases[0].fingerprint) is None
