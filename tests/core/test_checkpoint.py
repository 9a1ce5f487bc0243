"""Step folders are whole or absent, say whose they are, and a torn one never stops a training."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

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
    assert torch.equal(back.lora.unet["mid_x"].down, original.lora.unet["mid.x"].down)
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
