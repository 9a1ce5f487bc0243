"""A training that is stopped, paused or killed at any point ends with the bytes of an uninterrupted one."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from core.errors import Cancelled, CheckpointMismatch, Paused, TrainingDiverged
from core.lora_utils import sshs_model_hash
from core.manifest import PreparedDataset
from core.pipelines import LoadedBase
from core.progress import Progress, Report
from core.train import TrainResult, train
from core.train_config import TrainConfig
from tests.core.training_parts import WIDE, make_dataset, quick_config

CONFIG = quick_config(
    steps=10, targets="with_conv", gradient_accumulation_steps=2, noise_offset=0.05, lr_warmup_steps=2,
    sample_prompts=["a red cat"], sample_steps=2, sample_every_steps=4,
    lr_schedule="cosine_with_restarts", lr_cycles=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return make_dataset(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def uninterrupted(
    tiny_base: LoadedBase, dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory
) -> TrainResult:
    return train(CONFIG, tiny_base, dataset, tmp_path_factory.mktemp("whole"))


def stop_at(step: int, kind: type[Exception], stage: str = "training") -> Report:
    """A report that interrupts once at a step of a stage."""

    def report(progress: Progress) -> None:
        if progress.stage == stage and progress.step == step:
            raise kind(f"{stage} {step}")

    return report


def samples_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("samples/**/*.png"))}


def assert_same(result: TrainResult, whole: TrainResult) -> None:
    assert sshs_model_hash(result.kohya_file) == sshs_model_hash(whole.kohya_file)
    assert result.losses == whole.losses
    assert samples_of(result.kohya_file.parent) == samples_of(whole.kohya_file.parent)
    assert len(samples_of(result.kohya_file.parent)) == 4  # steps 0, 4, 8, 10


@pytest.mark.parametrize(
    ("step", "kind"), [*((step, Paused) for step in range(1, 11)), *((step, Cancelled) for step in (1, 4, 6, 10))]
)
def test_an_interruption_at_any_step_changes_no_bit(
    step: int, kind: type[Exception], tiny_base: LoadedBase, dataset: PreparedDataset, uninterrupted: TrainResult,
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(kind):
        train(CONFIG, tiny_base, dataset, tmp_path, stop_at(step, kind))
    assert_same(train(CONFIG, tiny_base, dataset, tmp_path), uninterrupted)


def test_many_interruptions_in_one_run_change_no_bit(
    tiny_base: LoadedBase, dataset: PreparedDataset, uninterrupted: TrainResult, tmp_path: Path
) -> None:
    stops: list[tuple[int, type[Exception], str]] = [
        (2, Cancelled, "caching latents"), (2, Paused, "training"), (2, Paused, "encoding captions"),
        (1, Paused, "drawing samples"), (5, Cancelled, "training"), (5, Paused, "training"), (9, Paused, "training"),
        (2, Paused, "drawing samples"), (1, Cancelled, "drawing samples"),
    ]  # fmt: skip
    happened = 0
    for step, kind, stage in stops:
        try:
            train(CONFIG, tiny_base, dataset, tmp_path, stop_at(step, kind, stage))
        except kind:
            happened += 1
    assert happened >= 8
    assert_same(train(CONFIG, tiny_base, dataset, tmp_path), uninterrupted)


def test_a_training_with_shuffled_captions_goes_on_with_the_same_words(
    tiny_base: LoadedBase, dataset: PreparedDataset, tmp_path: Path
) -> None:
    config = quick_config(steps=4, shuffle_captions=True, caption_separator=" ")
    with pytest.raises(Paused):
        train(config, tiny_base, dataset, tmp_path / "paused", stop_at(2, Paused))
    whole = train(config, tiny_base, dataset, tmp_path / "whole")
    resumed = train(config, tiny_base, dataset, tmp_path / "paused")
    assert sshs_model_hash(resumed.kohya_file) == sshs_model_hash(whole.kohya_file)
    assert resumed.losses == whole.losses


def test_a_pause_saves_the_current_step_and_says_so(
    tiny_base: LoadedBase, dataset: PreparedDataset, tmp_path: Path
) -> None:
    kept: list[tuple[str, int]] = []

    def keep(folder: Path, step: int) -> None:
        assert (folder / "state.json").is_file()
        kept.append((folder.name, step))

    with pytest.raises(Paused):
        train(CONFIG, tiny_base, dataset, tmp_path, stop_at(5, Paused), keep)
    assert kept == [("step-000003", 3), ("step-000005", 5)]


def test_a_cancelled_training_keeps_only_what_was_saved(
    tiny_base: LoadedBase, dataset: PreparedDataset, tmp_path: Path
) -> None:
    with pytest.raises(Cancelled):
        train(CONFIG, tiny_base, dataset, tmp_path, stop_at(5, Cancelled))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    assert not (tmp_path / "lora.safetensors").exists()


def test_the_newest_checkpoint_torn_the_older_one_carries_on(
    tiny_base: LoadedBase, dataset: PreparedDataset, uninterrupted: TrainResult, tmp_path: Path
) -> None:
    with pytest.raises(Cancelled):
        train(CONFIG, tiny_base, dataset, tmp_path, stop_at(8, Cancelled))
    torn = tmp_path / "checkpoints" / "step-000006" / "optimizer.safetensors"
    torn.write_bytes(torn.read_bytes()[:-3])
    seen: list[Progress] = []
    assert_same(train(CONFIG, tiny_base, dataset, tmp_path, seen.append), uninterrupted)
    assert next(progress.step for progress in seen if progress.stage == "training") == 4


def test_a_smaller_micro_batch_goes_on_with_the_same_run(
    tiny_base: LoadedBase, dataset: PreparedDataset, uninterrupted: TrainResult, tmp_path: Path
) -> None:
    with pytest.raises(Paused):
        train(CONFIG, tiny_base, dataset, tmp_path, stop_at(4, Paused))
    smaller = CONFIG.model_copy(update={"batch_size": 1, "gradient_accumulation_steps": 4})
    result = train(smaller, tiny_base, dataset, tmp_path)
    assert result.losses == pytest.approx(uninterrupted.losses, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda config, data, folder: (config.model_copy(update={"steps": 20}), data), "steps was 10, is 20"),
        (lambda config, data, folder: (config, make_dataset(folder, [WIDE] * 3)), "another dataset"),
        (lambda config, data, folder: (config, make_dataset(folder, caption="a blue cat")), "another dataset"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_reason(
    change: Callable[[TrainConfig, PreparedDataset, Path], tuple[TrainConfig, PreparedDataset]],
    reason: str,
    tiny_base: LoadedBase,
    dataset: PreparedDataset,
    tmp_path: Path,
) -> None:
    with pytest.raises(Paused):
        train(CONFIG, tiny_base, dataset, tmp_path / "run", stop_at(4, Paused))
    config, other = change(CONFIG, dataset, tmp_path / "other")
    with pytest.raises(CheckpointMismatch, match=reason):
        train(config, tiny_base, other, tmp_path / "run")


def test_samples_of_a_run_that_never_saved_are_not_taken_over(
    tiny_base: LoadedBase, dataset: PreparedDataset, uninterrupted: TrainResult, tmp_path: Path
) -> None:
    other = CONFIG.model_copy(update={"sample_guidance": 9.0})
    with pytest.raises(Cancelled):
        train(other, tiny_base, dataset, tmp_path, stop_at(1, Cancelled))
    assert len(samples_of(tmp_path)) == 1
    assert_same(train(CONFIG, tiny_base, dataset, tmp_path), uninterrupted)


def test_kills_at_random_moments_change_no_bit(
    tiny_base: LoadedBase, dataset: PreparedDataset, uninterrupted: TrainResult, tmp_path: Path
) -> None:
    """A checkpoint at every step, so that many kills hit one being written."""
    config = CONFIG.model_copy(update={"checkpoint_every_steps": 1})
    moments = random.Random(0)
    kills = 0
    for _ in range(12):
        process = multiprocessing.get_context("fork").Process(target=train, args=(config, tiny_base, dataset, tmp_path))
        process.start()
        process.join(timeout=moments.uniform(0.15, 0.6))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
    assert kills >= 3
    assert_same(train(config, tiny_base, dataset, tmp_path), uninterrupted)


def test_a_wild_learning_rate_fails_the_training_and_nothing_is_published(
    tiny_base: LoadedBase, dataset: PreparedDataset, tmp_path: Path
) -> None:
    wild = quick_config(checkpoint_every_steps=1).model_copy(update={"learning_rate": 1e9})
    with pytest.raises(TrainingDiverged, match="lower the learning rate"):
        train(wild, tiny_base, dataset, tmp_path)
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*-peft"))
    for file in tmp_path.rglob("lora.safetensors"):  # checkpoints of the steps before
        assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values())


# --- the command line, in processes of its own ---


def write_run(folder: Path, base: Path, dataset: PreparedDataset, output: str) -> Path:
    """A prepared dataset folder and a YAML file that trains on it."""
    images = folder / "dataset" / "images"
    images.mkdir(parents=True, exist_ok=True)
    for path in dataset.files.values():
        shutil.copy(path, images)
    (folder / "dataset" / "manifest.json").write_text(json.dumps(dataset.manifest.to_json()))
    values = CONFIG.model_copy(update={"steps": 60, "checkpoint_every_steps": 10, "sample_every_steps": 0}).dump()
    values |= {"base_model": str(base), "dataset": str(folder / "dataset"), "output": str(folder / output)}
    file = folder / f"{output}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def command(file: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "core.train", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_the_command_goes_on_after_kill_minus_nine_and_ends_with_the_same_bytes(
    tiny_base_folder: Path, dataset: PreparedDataset, tmp_path: Path
) -> None:
    whole = command(write_run(tmp_path, tiny_base_folder, dataset, "whole"))
    killed_file = write_run(tmp_path, tiny_base_folder, dataset, "killed")
    killed, checkpoints = command(killed_file), tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert list(checkpoints.glob("step-*")) and not (tmp_path / "killed" / "killed.safetensors").exists()

    again = command(killed_file)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0
    assert whole.wait(timeout=120) == 0
    assert re.search(r"trained 60 steps", output) and str(tmp_path / "killed" / "killed.safetensors") in output
    hashes = {sshs_model_hash(tmp_path / name / f"{name}.safetensors") for name in ("whole", "killed")}
    assert len(hashes) == 1
    assert samples_of(tmp_path / "whole") == samples_of(tmp_path / "killed") != {}


def test_a_wrong_file_is_one_sentence_and_help_teaches(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("base_model: x\noutput: y\npictures: z\nrank: 0\nlearning_rat: 1\n")
    run = subprocess.run([sys.executable, "-m", "core.train", str(file)], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("error: ") and "rank" in run.stderr and "learning_rat:" in run.stderr
    assert "Traceback" not in run.stderr
    text = subprocess.run(
        [sys.executable, "-m", "core.train", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for word in ("kill -9", "base_model", "learning_rate", "sample_prompts", "example file"):
        assert word in text
