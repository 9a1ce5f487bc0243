"""The pool reuses what it holds, evicts what was used longest ago, and never a warm base on a CPU."""

import logging
from pathlib import Path

import pytest
import torch

from gpu_worker import runtime
from gpu_worker.errors import RuntimeNotReady
from gpu_worker.pipelines import PipelinePool
from gpu_worker.settings import BaseRef, WorkerSettings


def pool_of(settings: WorkerSettings, size: int) -> PipelinePool:
    return runtime.start(
        WorkerSettings(
            device="cpu", cache_folder=settings.cache_folder, fetch=settings.fetch, pool_size=size, torch_threads=1
        ),
        warm=[],
    ).pool


def test_a_base_is_loaded_once_and_then_reused(
    settings_of_worker: WorkerSettings, bases: list[BaseRef], caplog: pytest.LogCaptureFixture
) -> None:
    pool = pool_of(settings_of_worker, 2)
    with caplog.at_level(logging.INFO, logger="gpu_worker.pipelines"):
        first, second = pool.get(bases[0]), pool.get(bases[0])
    assert first is second
    assert [r.message.split(" base=")[0] for r in caplog.records if r.name == "gpu_worker.pipelines"] == [
        "pipeline loaded",
        "pipeline reused",
    ]


def test_the_base_that_was_used_longest_ago_makes_room(
    settings_of_worker: WorkerSettings, bases: list[BaseRef]
) -> None:
    pool = PipelinePool(size=1, device="cpu", folder_of=runtime.start(settings_of_worker, []).folder_of)
    pool.get(bases[0])
    pool.get(bases[1])
    assert pool.fingerprints() == [bases[1].fingerprint]


def test_a_warm_base_stays_when_others_come_and_when_a_training_asks_for_room(
    settings_of_worker: WorkerSettings, bases: list[BaseRef]
) -> None:
    pool = PipelinePool(size=1, device="cpu", folder_of=runtime.start(settings_of_worker, []).folder_of)
    warm = pool.keep_warm(bases[0])
    pool.get(bases[1])
    pool.make_room()
    assert pool.fingerprints() == [bases[0].fingerprint]
    assert pool.get(bases[0]) is warm


def test_the_start_loads_warm_bases_and_leaves_out_what_cannot_be_loaded(
    settings_of_worker: WorkerSettings, bases: list[BaseRef], caplog: pytest.LogCaptureFixture
) -> None:
    broken = BaseRef(name="broken", fingerprint="0" * 64, files=bases[1].files)
    started = runtime.start(settings_of_worker, [broken, bases[0]])
    assert started.pool.fingerprints() == [bases[0].fingerprint]
    assert "keep-warm base could not be loaded base=broken" in caplog.text
    assert runtime.current() is started
    assert torch.get_num_threads() == 1


def test_a_vae_that_became_half_precision_in_the_pool_is_not_served(
    settings_of_worker: WorkerSettings, bases: list[BaseRef]
) -> None:
    pool = pool_of(settings_of_worker, 1)
    base = pool.get(bases[0])
    base.vae.to(torch.float16)
    again = pool.get(bases[0])
    assert again is not base
    assert {parameter.dtype for parameter in again.vae.parameters()} == {torch.float32}


def test_work_in_a_process_without_a_runtime_says_what_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_runtime", None)
    with pytest.raises(RuntimeNotReady, match="-Q gpu"):
        runtime.current()


def test_the_cache_folder_holds_the_rebuilt_bases(settings_of_worker: WorkerSettings, bases: list[BaseRef]) -> None:
    started = runtime.start(settings_of_worker, [bases[0]])
    assert started.folder_of(bases[0]) == Path(settings_of_worker.cache_folder) / "bases" / bases[0].fingerprint
