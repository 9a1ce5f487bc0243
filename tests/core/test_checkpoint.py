"""Step folders are whole or absent, say whose they are, and a torn one never stops a training."""

import errno
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from io import BufferedWriter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from core import failpoints
from core.checkpoint import Checkpoint, RunIdentity, newest_valid, save_checkpoint
from core.errors import CheckpointMismatch
from core.lora_state import LoraLayer, LoraState
from core.lora_utils import read_lora
from tests.core.training_parts import quick_config

IDENTITY = RunIdentity.of(quick_config(), "dataset", "base")
FILES = ["lora.safetensors", "optimizer.safetensors", "state.json"]


def checkpoint_at(step: int) -> Checkpoint:
    numbers = torch.Generator().manual_seed(step)
    layer = LoraLayer(down=torch.randn(2, 8, generator=numbers), up=torch.randn(4, 2, generator=numbers), alpha=1.0)
    return Checkpoint(
        step=step,
        lora=LoraState(unet={"mid.x": layer}),
        optimizer={"exp_avg": torch.randn(24, generator=numbers), "step": torch.tensor(float(step))},
        scaler={"scale": 65536.0, "_growth_tracker": step},
        losses=[0.1 * number for number in range(step)],
        started_at=1234.5,
        seconds=6.7,
    )


def save(folder: Path, *steps: int) -> list[Path]:
    return [save_checkpoint(folder, checkpoint_at(step), IDENTITY, {"ss_steps": str(step)}) for step in steps]


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    (folder,) = save(tmp_path, 5)
    assert folder.name == "step-000005"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    back, original = newest_valid(tmp_path, IDENTITY), checkpoint_at(5)
    assert back is not None
    assert torch.equal(back.lora.unet["mid.x"].down, original.lora.unet["mid.x"].down)
    assert torch.equal(back.optimizer["exp_avg"], original.optimizer["exp_avg"])
    assert (back.step, back.losses, back.scaler) == (5, original.losses, original.scaler)
    assert (back.started_at, back.seconds) == (1234.5, 6.7)
    assert read_lora(folder / "lora.safetensors").metadata["ss_steps"] == "5"


def test_the_last_two_are_kept_and_leftovers_of_a_killed_save_go(tmp_path: Path) -> None:
    (tmp_path / ".partial-dead").mkdir()
    save(tmp_path, 1, 2, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000010"]


def test_no_folder_means_no_checkpoint(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "none", IDENTITY) is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "delete"])
def test_a_torn_checkpoint_is_skipped_for_the_one_before(name: str, damage: str, tmp_path: Path) -> None:
    newest = save(tmp_path, 3, 6)[-1] / name
    data = bytearray(newest.read_bytes())
    if damage == "delete":
        newest.unlink()
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        newest.write_bytes(data)
    else:
        newest.write_bytes(data[: len(data) - 1] if damage == "truncate" else b"")
    back = newest_valid(tmp_path, IDENTITY)
    assert back is not None and back.step == 3
    save(tmp_path, 6)
    assert newest_valid(tmp_path, IDENTITY).step == 6  # type: ignore[union-attr]


def test_a_renamed_folder_does_not_pass_for_another_step(tmp_path: Path) -> None:
    (folder,) = save(tmp_path, 3)
    shutil.copytree(folder, tmp_path / "step-000009")
    assert newest_valid(tmp_path, IDENTITY).step == 3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (replace(IDENTITY, dataset_hash="other"), "another dataset"),
        (replace(IDENTITY, base_fingerprint="other"), "another base model"),
        (RunIdentity.of(quick_config(steps=9), "dataset", "base"), "steps was 8, is 9"),
        (RunIdentity.of(quick_config(learning_rate=0.5, rank=8), "dataset", "base"), "learning_rate was 0.01, is 0.5"),
        (RunIdentity.of(quick_config(batch_size=3), "dataset", "base"), "effective_batch was 2, is 3"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_reason(
    changed: RunIdentity, reason: str, tmp_path: Path
) -> None:
    save(tmp_path, 3)
    with pytest.raises(CheckpointMismatch, match=reason):
        newest_valid(tmp_path, changed)


def test_another_split_of_the_batch_is_still_the_same_run(tmp_path: Path) -> None:
    save(tmp_path, 3)
    split = quick_config(batch_size=1, gradient_accumulation_steps=2, gradient_checkpointing=True)
    assert newest_valid(tmp_path, RunIdentity.of(split, "dataset", "base")) is not None


def test_the_state_names_what_it_belongs_to(tmp_path: Path) -> None:
    (folder,) = save(tmp_path, 2)
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == 2
    assert state["config_hash"] == IDENTITY.config_hash
    assert (state["dataset_hash"], state["base_fingerprint"]) == ("dataset", "base")
    assert set(state["files"]) == {"lora.safetensors", "optimizer.safetensors"}


@pytest.mark.parametrize("name", FILES)
def test_any_cut_and_any_flipped_bit_is_found_and_said(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = save(tmp_path, 3, 6)[-1] / name
    whole, numbers = file.read_bytes(), random.Random(name)
    for _ in range(40):
        caplog.clear()
        if numbers.random() < 0.5:
            damaged = bytearray(whole[: len(whole) - numbers.randint(1, len(whole) // 2)])
        else:
            damaged = bytearray(whole)
            damaged[numbers.randrange(len(whole))] ^= 1 << numbers.randrange(8)
        file.write_bytes(damaged)
        back = newest_valid(tmp_path, IDENTITY)
        assert back is not None and back.step == 3
        assert "checkpoint skipped folder=step-000006 reason=" in caplog.text
    file.write_bytes(whole)
    assert newest_valid(tmp_path, IDENTITY).step == 6  # type: ignore[union-attr]


def tear(*folders: Path) -> None:
    for folder in folders:
        os.truncate(folder / "optimizer.safetensors", 5)


def test_torn_ones_never_push_out_a_whole_one(tmp_path: Path) -> None:
    tear(*save(tmp_path, 9, 12))
    save(tmp_path, 4)
    assert newest_valid(tmp_path, IDENTITY).step == 4  # type: ignore[union-attr]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]
    tear(*save(tmp_path, 6))
    save(tmp_path, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000008"]


@pytest.mark.parametrize("torn", [False, True])
def test_at_every_point_of_a_save_the_last_whole_checkpoint_is_there(torn: bool, tmp_path: Path) -> None:
    """Also when a torn one of the same step is in the way."""
    save(tmp_path, 2, 4)
    if torn:
        tear(*save(tmp_path, 6))
    newest: list[tuple[str, int]] = []

    def look(point: str) -> None:
        back = newest_valid(tmp_path, IDENTITY)
        assert back is not None, point
        newest.append((point, back.step))

    failpoints.install(look)
    try:
        save(tmp_path, 6)
    finally:
        failpoints.install(None)
    renamed = [point for point, _ in newest].index("checkpoint.rename:after")
    assert {step for _, step in newest[:renamed]} == {4}
    assert {step for _, step in newest[renamed:]} == {6}


def test_bytes_are_durable_before_their_name_and_names_before_anything_is_deleted(tmp_path: Path) -> None:
    """What a power cut needs, and no kill can show: the order of the calls to the operating system."""
    save(tmp_path, 2, 4)
    order: list[str] = []
    calls = {"fsync", "replace", "rename", "rmdir"}

    def listen(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and called.__module__ == "posix" and called.__name__ in calls:
            order.append(called.__name__.replace("replace", "rename"))
        elif event == "c_call" and called.__name__ == "write" and isinstance(called.__self__, BufferedWriter):
            order.append("write")

    failpoints.install(lambda point: order.append(point) if point.endswith(":before") else None)
    sys.setprofile(listen)
    try:
        save(tmp_path, 6)
    finally:
        sys.setprofile(None)
        failpoints.install(None)
    one_file = ["file.make_folder:before", "file.write:before", "write", "file.fsync:before", "fsync"]
    one_file += ["file.rename:before", "rename", "file.drop_partial:before", "folder.fsync:before", "fsync"]
    end = ["checkpoint.rename:before", "rename", "folder.fsync:before", "fsync"]
    end += ["checkpoint.drop_old:before"]
    first = order.index("rmdir")
    assert order[:first] == ["checkpoint.make_folder:before", "folder.fsync:before", "fsync", *one_file * 3, *end]
    assert set(order[first:]) == {"rmdir"}


def test_a_save_that_fails_leaves_no_part_and_keeps_what_was_there(tmp_path: Path) -> None:
    save(tmp_path, 2, 4)
    failpoints.install(fail_at("file.fsync:before", 3))
    try:
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 6)
    finally:
        failpoints.install(None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000004"]


def fail_at(point: str, occurrence: int) -> Callable[[str], None]:
    """A hook that raises what a full disk raises."""
    seen = 0

    def hook(name: str) -> None:
        nonlocal seen
        seen += name == point
        if name == point and seen == occurrence:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return hook
