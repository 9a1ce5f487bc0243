"""Requests in one GPU process: files for each, one model, one forward; memory is given back after a failure."""

from pathlib import Path

import pytest
from PIL import Image

from core.config import GenerateConfig, TrainConfig
from core.errors import Cancelled
from core.memory_ladder import training_at
from core.progress import Progress, Report, silent
from gpu_worker import runtime
from gpu_worker.generation import Order, Result, run_generations
from gpu_worker.settings import BaseRef, Fetch, WorkerSettings

SHARED = GenerateConfig(prompt="a red apple", width=32, height=32, steps=2, sampler="ddim")


def no_files(sha256: str) -> Path:
    raise AssertionError(f"nobody needs {sha256}")


def order(folder: Path, report: Report = silent, fetch: Fetch = no_files, **changes: object) -> Order:
    folder.mkdir()
    config = SHARED.model_copy(update=changes)
    return Order(config=config, lora_names=[], folder=folder, report=report, fetch=fetch)


def cancelling(progress: Progress) -> None:
    raise Cancelled("stop")


def generate(base: BaseRef, orders: list[Order]) -> list[Result]:
    results: dict[Order, Result] = {}
    run_generations(
        orders=orders,
        base_fingerprint=base.fingerprint,
        base_files=base.files,
        base_name=base.name,
        memory_rung=0,
        on_done=results.__setitem__,
    )
    return [results[order] for order in orders]


def test_each_request_gets_its_files_with_its_own_words_in_them(
    settings_of_worker: WorkerSettings, bases: list[BaseRef], tmp_path: Path
) -> None:
    runtime.start(settings_of_worker, [bases[0]])
    orders = [order(tmp_path / "a", seed=4, count=2), order(tmp_path / "b", prompt="a blue house", seed=9)]
    first, second = generate(bases[0], orders)
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert [(picture.seed, picture.path) for picture in first] == [
        (4, tmp_path / "a" / "0000.png"),
        (5, tmp_path / "a" / "0001.png"),
    ]
    with Image.open(second[0].path) as image:
        assert image.info["parameters"].startswith("a blue house\n")
        assert "Seed: 9" in image.info["parameters"]


def test_one_that_stops_leaves_no_files_and_does_not_stop_the_other(
    settings_of_worker: WorkerSettings, bases: list[BaseRef], tmp_path: Path
) -> None:
    runtime.start(settings_of_worker, [bases[0]])
    orders = [order(tmp_path / "a", report=cancelling), order(tmp_path / "b", seed=9)]
    stopped, done = generate(bases[0], orders)
    assert isinstance(stopped, Cancelled)
    assert list((tmp_path / "a").iterdir()) == []
    assert isinstance(done, list)
    assert done[0].path.is_file()


def test_a_model_that_is_about_to_be_loaded_is_announced(
    settings_of_worker: WorkerSettings, bases: list[BaseRef], tmp_path: Path
) -> None:
    runtime.start(settings_of_worker, [])
    stages: list[str] = []
    generate(bases[0], [order(tmp_path / "a", report=lambda p: stages.append(p.stage))])
    assert stages == ["loading the model", "denoising", "denoising"]


def test_freed_memory_includes_what_only_a_cycle_kept_alive() -> None:
    class Node:
        freed = 0

        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            Node.freed += 1

    Node()
    runtime.free_memory()
    assert Node.freed == 1


@pytest.mark.parametrize(("rung", "batch"), [(0, 4), (1, 4), (2, 2), (3, 1)])
def test_a_rung_sets_the_micro_batch_of_a_training(rung: int, batch: int) -> None:
    assert training_at(TrainConfig(batch_size=4), rung).batch_size == batch
