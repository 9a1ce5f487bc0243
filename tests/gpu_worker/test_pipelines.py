"""The pool reuses what it holds, evicts what was used longest ago, and never a warm base on a CPU."""

import logging
import threading
import time
from pathlib import Path

import pytest
import torch

from gpu_worker import runtime
from gpu_worker.attention import xformers_works
from gpu_worker.errors import RuntimeNotReady
from gpu_worker.idle_release import IdleRelease
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
    assert [r.getMessage().split(" base=")[0] for r in caplog.records if r.name == "gpu_worker.pipelines"] == [
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


def test_the_budget_of_bytes_drops_the_base_used_longest_ago_and_never_the_one_asked_for(
    settings_of_worker: WorkerSettings, bases: list[BaseRef]
) -> None:
    folder_of = runtime.start(settings_of_worker, []).folder_of
    pool = PipelinePool(size=9, device="cpu", folder_of=folder_of, budget_bytes=1)
    pool.get(bases[0])
    one = pool.held_bytes()
    assert one > 100_000
    pool.get(bases[1])
    assert pool.fingerprints() == [bases[1].fingerprint]

    roomy = PipelinePool(size=9, device="cpu", folder_of=folder_of, budget_bytes=2 * one)
    roomy.get(bases[0])
    roomy.get(bases[1])
    assert len(roomy.fingerprints()) == 2


def test_what_is_idle_is_released_but_never_a_warm_base_or_one_just_used(
    settings_of_worker: WorkerSettings, bases: list[BaseRef]
) -> None:
    pool = PipelinePool(size=9, device="cpu", folder_of=runtime.start(settings_of_worker, []).folder_of)
    pool.keep_warm(bases[0])
    working = pool.get(bases[1])

    assert pool.release_idle(60) == 0
    assert pool.release_idle(0) == 1
    assert pool.fingerprints() == [bases[0].fingerprint]
    assert working.unet.conv_in.weight.isfinite().all()  # Whoever works with it goes on.


def test_the_timer_releases_only_while_the_process_is_not_busy(
    settings_of_worker: WorkerSettings, bases: list[BaseRef]
) -> None:
    pool = PipelinePool(size=9, device="cpu", folder_of=runtime.start(settings_of_worker, []).folder_of)
    pool.get(bases[0])
    asked = threading.Semaphore(0)
    busy = threading.Event()
    busy.set()

    def is_busy() -> bool:
        asked.release()
        return busy.is_set()

    timer = IdleRelease(pool, idle_seconds=0.01, busy=is_busy)
    timer.start()
    for _ in range(5):
        assert asked.acquire(timeout=30)
    assert len(pool.fingerprints()) == 1
    busy.clear()
    deadline = time.monotonic() + 30
    while pool.fingerprints() and time.monotonic() < deadline:
        asked.acquire(timeout=1)
    timer.stop()
    assert pool.fingerprints() == []


def test_a_vae_of_another_base_is_used_in_fp32_kept_and_named_in_the_log(
    settings_of_worker: WorkerSettings, bases: list[BaseRef], caplog: pytest.LogCaptureFixture
) -> None:
    pool = pool_of(settings_of_worker, 2)
    with caplog.at_level(logging.INFO, logger="gpu_worker.pipelines"):
        own, lent = pool.get(bases[0]), pool.get(bases[0], vae=bases[1])
    assert lent.unet is own.unet
    assert lent.vae is not own.vae
    assert pool.get(bases[0], vae=bases[1]).vae is lent.vae
    assert pool.get(bases[0]).vae is own.vae
    assert torch.equal(lent.vae.decoder.conv_in.weight, pool.get(bases[1]).vae.decoder.conv_in.weight)
    assert "vae=base1 fp32" in caplog.text
    lent.vae.half()
    assert pool.get(bases[0], vae=bases[1]).vae.dtype == torch.float32


def test_xformers_is_probed_by_a_call_and_sdpa_serves_where_it_does_not_work(
    settings_of_worker: WorkerSettings, bases: list[BaseRef], caplog: pytest.LogCaptureFixture
) -> None:
    pool = PipelinePool(
        size=1, device="cpu", folder_of=runtime.start(settings_of_worker, []).folder_of, attention="xformers"
    )
    with caplog.at_level(logging.INFO, logger="gpu_worker.pipelines"):
        pool.get(bases[0])
    assert "attention=" + ("xformers" if xformers_works("cpu", torch.float32) else "sdpa") in caplog.text
