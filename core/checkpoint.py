"""Complete, resumable step folders of a training (`step-000250/`). Called by `core.train`; reads no pickle.

A folder appears whole or not at all, says which run it belongs to, and holds the hash of each of its files.
"""

import json
import logging
import os
import re
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from core.config import canonical_json_hash
from core.durable_folder import sync_folder
from core.errors import CheckpointMismatch, CoreError
from core.failpoints import side_effect
from core.file_hash import hash_file
from core.lora_file import read_lora_file
from core.lora_kohya import write_kohya
from core.lora_state import LoraState
from core.tensor_files import load_tensors, serialize, write_whole
from core.train_config import TrainConfig

logger = logging.getLogger(__name__)

LORA_NAME, OPTIMIZER_NAME, STATE_NAME = "lora.safetensors", "optimizer.safetensors", "state.json"
FORMAT = 1
KEPT = 2
# These change speed, memory or what is kept, never what is learnt. The two batch fields count as their product.
FREE_FIELDS = ("batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "checkpoint_every_steps")

# What reading a folder raises that is not as it was written.
TORN = (CoreError, OSError, ValueError, KeyError, TypeError, RecursionError)
PARTIAL_PREFIX = ".partial-"


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What a checkpoint has to share with the run that continues it.

    Attributes:
        config: Fields that decide the result.
        dataset_hash: `DatasetManifest.content_hash()`.
        base_fingerprint: Of the prepared base model.
    """

    config: dict[str, Any]
    dataset_hash: str
    base_fingerprint: str

    @classmethod
    def of(cls, config: TrainConfig, dataset_hash: str, base_fingerprint: str) -> "RunIdentity":
        """Identity of a run. A smaller micro-batch after running out of memory is still the same run."""
        fields = {key: value for key, value in config.dump().items() if key not in FREE_FIELDS}
        fields["effective_batch"] = config.batch_size * config.gradient_accumulation_steps
        return cls(config=fields, dataset_hash=dataset_hash, base_fingerprint=base_fingerprint)

    @property
    def config_hash(self) -> str:
        """SHA-256 of the fields that decide the result."""
        return canonical_json_hash(self.config)


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """The state of a training after some optimizer steps.

    Attributes:
        step: Steps done.
        lora: Weights, fp32.
        optimizer: AdamW's tensors by name.
        scaler: GradScaler state of fp16 training; empty otherwise.
        losses: Of all steps so far, so that the final curve is whole.
        started_at: When the first try began, seconds since 1970.
        seconds: Time spent in training steps, all tries together.
    """

    step: int
    lora: LoraState
    optimizer: dict[str, Tensor]
    scaler: dict[str, Any]
    losses: list[float]
    started_at: float
    seconds: float


def save_checkpoint(folder: Path, checkpoint: Checkpoint, identity: RunIdentity, metadata: dict[str, str]) -> Path:
    """Write `folder/step-NNNNNN/`, then drop all but it and the newest whole one before it.

    `lora.safetensors` in it is an ordinary kohya file that can be generated with. Nothing whole is deleted before the
    new folder is durable.

    Args:
        folder: Holds all step folders of one run.
        checkpoint: What to keep.
        identity: Of the run, checked when it is continued.
        metadata: Header strings of the LoRA file.

    Raises:
        OSError: It could not be written (disk full ...); what was there is still there, and no part of the new one.
    """
    with side_effect("checkpoint.make_folder"):
        folder.mkdir(parents=True, exist_ok=True)
    sync_folder(folder.parent)
    _drop_partial(folder)  # of a process that was killed while saving
    partial, final = folder / f"{PARTIAL_PREFIX}{uuid.uuid4().hex}", folder / f"step-{checkpoint.step:06d}"
    try:
        write_kohya(partial / LORA_NAME, checkpoint.lora, metadata)
        optimizer = {name: tensor.detach().cpu() for name, tensor in checkpoint.optimizer.items()}
        write_whole(partial / OPTIMIZER_NAME, serialize(optimizer, {}))
        state = {
            "format": FORMAT,
            "step": checkpoint.step,
            "config_hash": identity.config_hash,
            **asdict(identity),
            "files": {name: hash_file(partial / name) for name in (LORA_NAME, OPTIMIZER_NAME)},
            "scaler": checkpoint.scaler,
            "losses": checkpoint.losses,
            "started_at": checkpoint.started_at,
            "seconds": checkpoint.seconds,
        }
        state["state_hash"] = canonical_json_hash(state)
        write_whole(partial / STATE_NAME, json.dumps(state, allow_nan=False).encode())
        if final.exists():  # torn, or the run would have gone on from it; a rename wants an empty place
            with side_effect("checkpoint.set_aside"):
                os.replace(final, folder / f"{PARTIAL_PREFIX}{uuid.uuid4().hex}")  # noqa: PTH105
        with side_effect("checkpoint.rename"):
            os.replace(partial, final)  # noqa: PTH105  (Path.replace cannot say that both are folders)
        sync_folder(folder)
    finally:
        _drop_partial(folder)
    for old in _superseded(folder, final):
        with side_effect("checkpoint.drop_old"):
            shutil.rmtree(old, ignore_errors=True)
    return final


def newest_valid(folder: Path, expect: RunIdentity) -> Checkpoint | None:
    """The newest whole checkpoint, or None where there is none. Torn ones are logged and skipped.

    Raises:
        CheckpointMismatch: The newest whole one belongs to another configuration, dataset or base model.
    """
    for path in _step_folders(folder):
        try:
            state = _read_state(path)
        except TORN as error:
            logger.warning("checkpoint skipped folder=%s reason=%s", path.name, error)
            continue
        _check_identity(path, state, expect)
        try:
            optimizer = load_tensors(path / OPTIMIZER_NAME)[1]
            return Checkpoint(
                step=int(state["step"]),
                lora=read_lora_file(path / LORA_NAME),
                optimizer=optimizer,
                scaler=state["scaler"],
                losses=[float(loss) for loss in state["losses"]],
                started_at=float(state["started_at"]),
                seconds=float(state["seconds"]),
            )
        except TORN as error:
            logger.warning("checkpoint skipped folder=%s reason=%s", path.name, error)
    return None


def _step_folders(folder: Path) -> list[Path]:
    """Step folders, newest first."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6}", path.name)), reverse=True)


def _superseded(folder: Path, newest: Path) -> list[Path]:
    """What the folder no longer needs: all but `newest` and the whole ones next before it, `KEPT` together.

    One of a later step was found torn when this run began, or the run would have gone on from it. Torn ones never
    count as kept: names alone would let two of them push out the one that was just written.
    """
    kept, superseded = 1, []
    for path in _step_folders(folder):
        if path == newest:
            continue
        if path.name < newest.name and kept < KEPT and _is_whole(path):
            kept += 1
        else:
            superseded.append(path)
    return superseded


def _is_whole(path: Path) -> bool:
    try:
        _read_state(path)
    except TORN:
        return False
    return True


def _drop_partial(folder: Path) -> None:
    for path in folder.glob(f"{PARTIAL_PREFIX}*"):
        with side_effect("checkpoint.drop_partial"):
            shutil.rmtree(path, ignore_errors=True)


def _read_state(path: Path) -> dict[str, Any]:
    """state.json of a folder whose files are all as they were written.

    Raises:
        ValueError: Something is torn.
    """
    state = json.loads((path / STATE_NAME).read_text(encoding="utf-8"))
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{STATE_NAME} is not of format {FORMAT}")
    if state.pop("state_hash", None) != canonical_json_hash(state):
        raise ValueError(f"{STATE_NAME} is not as it was written")
    for name in (LORA_NAME, OPTIMIZER_NAME):
        if hash_file(path / name) != state["files"][name]:
            raise ValueError(f"{name} is not as it was written")
    if len(state["losses"]) != state["step"] or path.name != f"step-{state['step']:06d}":
        raise ValueError(f"{STATE_NAME} contradicts itself or its folder's name")
    return state


def _check_identity(path: Path, state: dict[str, Any], expect: RunIdentity) -> None:
    reasons = []
    if state["config_hash"] != expect.config_hash:
        names = sorted(state["config"].keys() | expect.config.keys())
        changed = [
            f"{name} was {state['config'].get(name)!r}, is {expect.config.get(name)!r}"
            for name in names
            if state["config"].get(name) != expect.config.get(name)
        ]
        reasons.append(f"another configuration ({'; '.join(changed)})")
    if state["dataset_hash"] != expect.dataset_hash:
        reasons.append("another dataset (pictures, sizes or captions changed)")
    if state["base_fingerprint"] != expect.base_fingerprint:
        reasons.append("another base model (or one prepared by other library versions)")
    if reasons:
        raise CheckpointMismatch(
            f"checkpoint {path} belongs to {' and '.join(reasons)}: go on with the old one, "
            "or start afresh in another output folder"
        )
