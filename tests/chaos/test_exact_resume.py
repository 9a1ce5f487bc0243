"""A training that is killed anywhere, any number of times, on any worker, ends with the bytes of an unkilled one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from core.lora_header import read_header
from core.lora_metadata import TIME_AND_SESSION_KEYS
from core.lora_utils import sshs_model_hash
from core.pipelines import load_base
from core.prepared_base import prepare_base
from core.train import train
from tests.chaos.forked_training import BASE_NAME, NAME, Ending, Stop, Training, attempt, in_forks, kill_me, pause
from tests.core.training_parts import SQUARE, WIDE, make_dataset, quick_config
from tests.tiny_models import make_tiny_pipeline

# Minutes where other work takes both cores; half a minute for the longest one where nothing does.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).resolve().parents[2]
KILLS, KILLS_IN_ONE_RUN, LONG_RUNS, SEED = 50, 5, 4, 20_240
CONFIG = quick_config(
    steps=8, checkpoint_every_steps=2, gradient_accumulation_steps=2, noise_offset=0.05, lr_warmup_steps=2,
    sample_prompts=["a red cat"], sample_steps=1, sample_every_steps=4,
)  # fmt: skip
IN_A_SAVE = ("checkpoint.", "file.", "folder.")
IN_A_STEP = ("forward.", "backward.", "optimizer.")
# Shares of the kills: between two steps, in the middle of one, while a checkpoint is written, anywhere else.
KINDS = {("report.training",): 12, IN_A_STEP: 14, IN_A_SAVE: 18, ("report.",): 6}

Story = Callable[[Path], None]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return prepare_base(make_tiny_pipeline(folder / "source"), folder / "prepared").folder


@pytest.fixture(scope="module")
def training(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    torch.set_num_threads(1)
    dataset = make_dataset(tmp_path_factory.mktemp("pictures"), [SQUARE] * 3 + [WIDE] * 2)
    return Training(config=CONFIG, base=load_base(prepared), dataset=dataset)


@pytest.fixture(scope="module")
def unkilled(training: Training, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Folder of an uninterrupted run, and every moment of it in order."""
    folder = tmp_path_factory.mktemp("unkilled")
    ending = attempt(training, folder)
    assert ending.how == "finished", ending.error
    return folder, ending.moments


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def data_of(file: Path) -> bytes:
    """What follows the header."""
    content = file.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def files_of(folder: Path, pattern: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob(pattern))}


def assert_same(folder: Path, whole: Path) -> None:
    """Every byte but times and sessions."""
    file, expected = folder / f"{NAME}.safetensors", whole / f"{NAME}.safetensors"
    assert sshs_model_hash(file) == sshs_model_hash(expected)
    assert data_of(file) == data_of(expected)
    header, other = read_header(file), read_header(expected)
    assert header.tensors == other.tensors
    assert header.metadata.keys() == other.metadata.keys()
    different = {key for key in header.metadata if header.metadata[key] != other.metadata[key]}
    assert different <= set(TIME_AND_SESSION_KEYS)
    for pattern, count in ((f"{NAME}-peft/*", 2), ("samples/*/*.png", 3)):  # pictures of steps 0, 4, 8
        files = files_of(folder, pattern)
        assert files == files_of(whole, pattern) and len(files) == count
    last = f"checkpoints/step-{CONFIG.steps:06d}"
    states = [json.loads((run / last / "state.json").read_text()) for run in (folder, whole)]
    assert states[0]["losses"] == states[1]["losses"]
    assert files_of(folder, f"{last}/optimizer.*") == files_of(whole, f"{last}/optimizer.*")
    assert len(steps_in(folder)) == 2 and steps_in(folder)[-1] == CONFIG.steps
    assert not list((folder / "checkpoints").glob(".*"))


def finish(training: Training, folder: Path, whole: Path) -> Ending:
    """The last try: it goes on from the newest checkpoint and ends as the uninterrupted run did."""
    saved = steps_in(folder)
    ending = attempt(training, folder)
    assert ending.how == "finished", ending.error
    assert ending.resumed_from == (saved[-1] if saved else 0)
    assert_same(folder, whole)
    return ending


def moment_of(kind: tuple[str, ...], moments: list[str], numbers: random.Random) -> tuple[str, int]:
    """A random moment of a kind, as its name and the how-manieth of this name it is."""
    index = numbers.choice([index for index, name in enumerate(moments) if name.startswith(kind)])
    return moments[index], moments[: index + 1].count(moments[index])


def test_every_point_of_a_checkpoint_is_among_the_moments(unkilled: tuple[Path, list[str]]) -> None:
    seen = Counter(unkilled[1])
    for name in ("file.write", "file.fsync", "file.rename", "folder.fsync", "checkpoint.rename", "checkpoint.drop_old"):
        assert seen[f"{name}:before"] == seen[f"{name}:after"] > 0
    assert seen["report.training"] == seen["optimizer.after"] == CONFIG.steps
    assert seen["backward.mid_block"] == CONFIG.steps * CONFIG.gradient_accumulation_steps


def test_fifty_kills_at_random_moments_change_no_bit(
    training: Training, unkilled: tuple[Path, list[str]], tmp_path: Path
) -> None:
    whole, moments = unkilled
    numbers = random.Random(SEED)

    def story(stop: Stop, folder: Path) -> None:
        assert attempt(training, folder, stop).how == "killed"
        assert not (folder / f"{NAME}.safetensors").exists() or stop.moment.startswith(IN_A_SAVE)
        finish(training, folder, whole)

    stories: dict[str, Story] = {}
    for kind, share in KINDS.items():
        for _ in range(share):
            name, occurrence = moment_of(kind, moments, numbers)
            stories[f"{len(stories):02d}-{name}-{occurrence}"] = partial(story, Stop(name, occurrence, kill_me))
    assert len(stories) == KILLS == sum(KINDS.values())
    in_forks(stories, tmp_path)


def test_five_kills_in_one_run_change_no_bit(
    training: Training, unkilled: tuple[Path, list[str]], tmp_path: Path
) -> None:
    whole, moments = unkilled
    one_save = moments[: moments.index("checkpoint.rename:after") + 1]
    every_step = replace(training, config=CONFIG.model_copy(update={"checkpoint_every_steps": 1}))

    def story(numbers: random.Random, folder: Path) -> None:
        for _ in range(KILLS_IN_ONE_RUN):  # each gains one step at most, so that the last one is not reached
            kind = numbers.choice([("report.training",), IN_A_STEP, IN_A_SAVE])
            stop = Stop(*moment_of(kind, one_save, numbers), kill_me)
            assert attempt(every_step, folder, stop).how == "killed", stop
        finish(every_step, folder, whole)

    in_forks({str(number): partial(story, random.Random(SEED + number)) for number in range(LONG_RUNS)}, tmp_path)


def test_pauses_between_kills_keep_every_step_and_change_no_bit(
    training: Training, unkilled: tuple[Path, list[str]], tmp_path: Path
) -> None:
    whole, moments = unkilled
    first_step = moments[: moments.index("report.training") + 1]

    def story(numbers: random.Random, folder: Path) -> None:
        for _ in range(3):
            before = (steps_in(folder) or [0])[-1]
            gained = numbers.choice([1, 2])
            ending = attempt(training, folder, Stop("report.training", gained, pause))
            assert ending.how == "paused" and steps_in(folder)[-1] == before + gained
            stop = Stop(*moment_of(IN_A_STEP, first_step, numbers), kill_me)
            assert attempt(training, folder, stop).how == "killed"
        finish(training, folder, whole)

    in_forks({str(number): partial(story, random.Random(SEED + number)) for number in range(LONG_RUNS)}, tmp_path)


def test_a_training_moves_from_worker_to_worker_and_no_bit_changes(
    training: Training, unkilled: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Only what the storage keeps goes along: the newest checkpoint and the sample pictures made by then."""
    whole, _ = unkilled
    stored, worker = tmp_path / "stored", tmp_path / "worker-0"

    def keep(checkpoint: Path, step: int) -> None:
        work_folder = checkpoint.parents[1]
        shutil.rmtree(stored, ignore_errors=True)
        for path in (*checkpoint.iterdir(), *work_folder.glob("samples/*/*.png")):
            copy = stored / path.relative_to(work_folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)

    stops = [("report.training", 3), ("backward.mid_block", 5), ("checkpoint.rename:before", 2)]
    for number, (moment, occurrence) in enumerate(stops, start=1):
        assert attempt(training, worker, Stop(moment, occurrence, kill_me), keep).how == "killed"
        worker = tmp_path / f"worker-{number}"
        shutil.copytree(stored, worker)
        assert len(steps_in(worker)) == 1
    assert steps_in(worker) == [6]
    finish(training, worker, whole)


def truncate(file: Path, numbers: random.Random) -> None:
    size = file.stat().st_size
    os.truncate(file, size - numbers.randint(1, size // 2))


def flip_a_bit(file: Path, numbers: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_skipped_with_a_reason_and_the_older_one_goes_on(
    training: Training, unkilled: tuple[Path, list[str]], tmp_path: Path
) -> None:
    whole, _ = unkilled

    def story(name: str, damage: Callable[[Path, random.Random], None], folder: Path) -> None:
        assert attempt(training, folder, Stop("report.training", 7, kill_me)).how == "killed"
        assert steps_in(folder) == [4, 6]
        damage(folder / "checkpoints" / "step-000006" / name, random.Random(f"{name}{damage.__name__}"))
        ending = attempt(training, folder)
        assert ending.how == "finished", ending.error
        assert ending.resumed_from == 4
        assert any(line.startswith("checkpoint skipped folder=step-000006 reason=") for line in ending.log)
        assert_same(folder, whole)

    names = ("lora.safetensors", "optimizer.safetensors", "state.json")
    cases = [(name, damage) for name in names for damage in (truncate, flip_a_bit)]
    in_forks({f"{damage.__name__}-{name}": partial(story, name, damage) for name, damage in cases}, tmp_path)


def test_both_checkpoints_damaged_the_training_begins_anew_and_ends_the_same(
    training: Training, unkilled: tuple[Path, list[str]], tmp_path: Path
) -> None:
    assert attempt(training, tmp_path, Stop("report.training", 7, kill_me)).how == "killed"
    for step in steps_in(tmp_path):
        truncate(tmp_path / "checkpoints" / f"step-{step:06d}" / "lora.safetensors", random.Random(step))
    ending = attempt(training, tmp_path, Stop("checkpoint.rename:after", 1, kill_me))
    assert ending.how == "killed"  # right after its first checkpoint, with two torn ones of later steps beside it
    assert steps_in(tmp_path) == [2, 4, 6]
    ending = attempt(training, tmp_path)
    assert (ending.how, ending.resumed_from) == ("finished", 2)
    assert_same(tmp_path, unkilled[0])


def test_a_checkpoint_of_another_run_is_refused_with_the_reason(training: Training, tmp_path: Path) -> None:
    assert attempt(training, tmp_path, Stop("report.training", 3, kill_me)).how == "killed"
    other_config = CONFIG.model_copy(update={"learning_rate": 0.02})
    ending = attempt(replace(training, config=other_config), tmp_path)
    assert ending.how == "failed" and "learning_rate was 0.01, is 0.02" in ending.error
    other_pictures = make_dataset(tmp_path / "other", [SQUARE] * 3 + [WIDE])
    ending = attempt(replace(training, dataset=other_pictures), tmp_path)
    assert ending.how == "failed" and ending.error.startswith("CheckpointMismatch") and "dataset" in ending.error
    assert steps_in(tmp_path) == [2]


def test_a_smaller_micro_batch_goes_on_within_rounding(
    training: Training, unkilled: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Not the same bits: a gradient summed in other groups rounds otherwise. Noise, data and order are the same."""
    assert attempt(training, tmp_path, Stop("report.training", 5, pause)).how == "paused"
    halves = CONFIG.model_copy(update={"batch_size": 1, "gradient_accumulation_steps": 4})
    ending = attempt(replace(training, config=halves), tmp_path)
    assert (ending.how, ending.resumed_from) == ("finished", 5)
    whole = load_file(unkilled[0] / f"{NAME}.safetensors")
    tensors = load_file(tmp_path / f"{NAME}.safetensors")
    assert tensors.keys() == whole.keys()
    largest = max(float(tensor.abs().max()) for name, tensor in whole.items() if "alpha" not in name)
    difference = max(float((tensors[name] - whole[name]).abs().max()) for name in whole)
    assert difference <= 1e-3 * largest
    last = f"checkpoints/step-{CONFIG.steps:06d}/state.json"
    losses, expected = (json.loads((run / last).read_text())["losses"] for run in (tmp_path, unkilled[0]))
    assert losses[:5] == expected[:5]
    assert losses == pytest.approx(expected, rel=1e-4)


# --- disk full ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 32 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["/bin/mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root and CAP_SYS_ADMIN")
    yield disk
    subprocess.run(["/bin/umount", "-l", str(disk)], check=True)


def fill(disk: Path, free_bytes: int = 0) -> None:
    """Take all blocks of a file system but some."""
    status = os.statvfs(disk)
    descriptor = os.open(disk / "ballast", os.O_CREAT | os.O_WRONLY)
    os.posix_fallocate(descriptor, 0, max(1, status.f_bavail * status.f_frsize - free_bytes))
    os.close(descriptor)


def test_a_full_disk_at_each_write_of_a_checkpoint_fails_the_try_and_keeps_the_older_one(
    training: Training, unkilled: tuple[Path, list[str]], small_disk: Path
) -> None:
    whole, moments = unkilled
    saved = [index for index, name in enumerate(moments) if name == "checkpoint.make_folder:before"]
    third_save = [i for i in range(saved[2], saved[3]) if moments[i].startswith(("file.", "checkpoint."))]
    writes = [i for i in third_save if moments[i] in ("file.make_folder:before", "file.write:before")]
    assert len(writes) == 6  # folder and bytes of three files

    def story(index: int, folder: Path) -> None:
        stop = Stop(moments[index], moments[: index + 1].count(moments[index]), partial(fill, small_disk))
        ending = attempt(training, folder, stop)
        assert ending.how == "failed" and "No space left on device" in ending.error
        assert steps_in(folder) == [2, 4]
        assert not list((folder / "checkpoints").glob(".*"))
        (small_disk / "ballast").unlink()
        finish(training, folder, whole)
        shutil.rmtree(folder / "checkpoints")

    # One after the other: they share the disk.
    in_forks({f"{index}-{moments[index]}": partial(story, index) for index in writes}, small_disk, at_once=1)


# --- the command line, in processes of its own ---


def test_three_kills_of_the_command_change_no_bit(training: Training, prepared: Path, tmp_path: Path) -> None:
    """Whole processes with hash seeds, imports and memory of their own.

    Compared with a run of this process: the hooks inside the forks' UNet change the order of sums in its last bits.
    """
    images = tmp_path / "dataset" / "images"
    images.mkdir(parents=True)
    for path in training.dataset.files.values():
        shutil.copy(path, images)
    (tmp_path / "dataset" / "manifest.json").write_text(json.dumps(training.dataset.manifest.to_json()))
    (tmp_path / BASE_NAME).symlink_to(prepared)
    runs = [tmp_path / str(number) for number in range(3)]
    for run in runs:
        own = {"base_model": BASE_NAME, "dataset": "dataset", "output": str(run / NAME)}
        run.with_suffix(".yaml").write_text(yaml.safe_dump(CONFIG.dump() | own))

    def start(run: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "core.train", f"{run}.yaml", "--device", "cpu"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen(
            command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    # As soon as: the first checkpoint is being written, it is there, the second one is there.
    signs = [".partial-*", "step-000002", "step-000004"]
    processes = dict(zip(signs, map(start, runs), strict=True))
    killed, deadline = set[str](), time.monotonic() + 400
    while len(killed) < len(signs) and time.monotonic() < deadline:
        for sign, run in zip(signs, runs, strict=True):
            if sign not in killed and list((run / NAME / "checkpoints").glob(sign)):
                processes[sign].send_signal(signal.SIGKILL)
                killed.add(sign)
        time.sleep(0.001)
    for process in processes.values():
        assert process.communicate(timeout=60) and process.returncode == -signal.SIGKILL
    assert not any((run / NAME / f"{NAME}.safetensors").exists() for run in runs)
    for process in [start(run) for run in runs]:
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
    whole = tmp_path / "whole"
    train(training.config, training.base, training.dataset, whole, name=NAME, base_name=BASE_NAME)
    for run in runs:
        assert_same(run / NAME, whole)
