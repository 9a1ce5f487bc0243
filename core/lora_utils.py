"""LoRA files only: read any kind we know, apply, write, and prove that what was written means what was trained.

Called by training, generation and the command line; layouts live in `core.lora_file` and its neighbours.
"""

import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from core.errors import LoraFileError
from core.lora_apply import AppliedLoras, apply_states
from core.lora_diffusers import FILE_NAME, write_diffusers
from core.lora_file import read_lora_file
from core.lora_keys import flat_module
from core.lora_kohya import sshs_model_hash, write_kohya
from core.lora_peft import CONFIG_NAME, WEIGHTS_NAME, read_peft, write_peft
from core.lora_state import LoraLayer, LoraState, plain_layers

__all__ = [
    "AppliedLoras",
    "LoraExport",
    "LoraLayer",
    "LoraState",
    "apply_lora",
    "export_lora",
    "file_stem",
    "read_lora",
    "sshs_model_hash",
    "verify_files_agree",
    "write_diffusers",
    "write_kohya",
    "write_peft",
]


# Alpha is rounded to fp32 in the file and the products to fp32 here; any wrong scaling rule is off by far more.
MAX_RELATIVE_DIFFERENCE = 1e-6


def read_lora(path: Path) -> LoraState:
    """Read a file of kohya / WebUI, diffusers or LyCORIS, or a PEFT folder (or the weights in one).

    Raises:
        LoraFileError: It is neither, or damaged, or unsafe.
    """
    if path.is_file() and path.name == WEIGHTS_NAME and (path.parent / CONFIG_NAME).is_file():
        path = path.parent  # the alphas stand in the configuration
    return read_peft(path) if path.is_dir() else read_lora_file(path)


def apply_lora(
    unet: nn.Module,
    loras: Sequence[tuple[LoraState | Path, float]],
    *,
    text_encoder: nn.Module | None = None,
    text_encoder_2: nn.Module | None = None,
) -> AppliedLoras:
    """Put LoRAs on a UNet with their weights, several together if given.

    Args:
        unet: Gets the layers; its own weights stay untouched.
        loras: Files, folders or states, each with its multiplier on top of alpha / rank.
        text_encoder: Needed when a LoRA has text-encoder layers.
        text_encoder_2: Needed when an SDXL LoRA has layers of the second one.

    Returns:
        A handle (also a context manager) whose `remove()` restores the model bit for bit.

    Raises:
        LoraFileError: A file is damaged, or its first misfitting layer by name.
    """
    states = [(read_lora(lora) if isinstance(lora, Path) else lora, weight) for lora, weight in loras]
    return apply_states(unet, states, text_encoder, text_encoder_2)


@dataclass(frozen=True)
class LoraExport:
    """One LoRA in three formats that mean the same.

    Attributes:
        kohya_file: For WebUI, ComfyUI and kohya's scripts.
        peft_folder: For PEFT.
        diffusers_file: For diffusers' `load_lora_weights`.
    """

    kohya_file: Path
    peft_folder: Path
    diffusers_file: Path


def export_lora(
    state: LoraState,
    metadata: dict[str, str],
    folder: Path,
    name: str,
    base_model: str = "",
    *,
    save_dtype: torch.dtype = torch.float32,
) -> LoraExport:
    """Write `<name>.safetensors` (kohya), `<name>-peft/` and `<name>-diffusers/pytorch_lora_weights.safetensors`.

    They come to their places only after all were read back and agree.

    Args:
        state: The trained weights.
        metadata: Header of the kohya and the diffusers file; its `ss_base_model_version` decides the names.
        folder: Where all go.
        name: A person's words; the files are named by `file_stem(name)`.
        base_model: A label in the PEFT configuration.
        save_dtype: Of the written tensors.

    Raises:
        LoraFileError: An export would change the model otherwise than the training did, or has no finite values.
    """
    unverified = folder / ".unverified"
    shutil.rmtree(unverified, ignore_errors=True)
    stem = file_stem(name)
    there = _export_in(folder, stem)
    written = _export_in(unverified, stem)
    write_kohya(written.kohya_file, state, metadata, save_dtype=save_dtype)
    write_peft(written.peft_folder, state, base_model=base_model, save_dtype=save_dtype)
    write_diffusers(written.diffusers_file, state, metadata, save_dtype=save_dtype)
    verify_files_agree(state, written.kohya_file, written.peft_folder, written.diffusers_file, save_dtype=save_dtype)
    for old, new in (
        (there.peft_folder, written.peft_folder),
        (there.diffusers_file.parent, written.diffusers_file.parent),
    ):
        shutil.rmtree(old, ignore_errors=True)
        new.rename(old)
    written.kohya_file.replace(there.kohya_file)
    unverified.rmdir()
    return there


def _export_in(folder: Path, stem: str) -> LoraExport:
    return LoraExport(folder / f"{stem}.safetensors", folder / f"{stem}-peft", folder / f"{stem}-diffusers" / FILE_NAME)


def file_stem(name: str) -> str:
    """A file name for any name: letters of any script, digits, `-_.`; never hidden, never a path, <= 80 characters."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:80] or "lora"


def verify_files_agree(trained: LoraState, *written: Path, save_dtype: torch.dtype = torch.float32) -> float:
    """Reload each export by its own reader's rule and compare every module's delta W with the trained one.

    Args:
        trained: What the training ended with.
        written: Files and PEFT folders: kohya's are scaled by `.alpha` / rank, PEFT's and diffusers' by `lora_alpha` /
            `r` of their configuration and its patterns.
        save_dtype: What the files were written in; the trained matrices are rounded to it before they are compared.

    Returns:
        The largest difference relative to its module's largest value.

    Raises:
        LoraFileError: A module is missing, extra, or differs; the files must not be published.
    """
    expected: dict[tuple[str, str], LoraLayer] = {}
    for component, layers in trained.components().items():
        for name, layer in plain_layers(layers).items():
            expected[component, flat_module(component, name)] = replace(
                layer, down=layer.down.to(save_dtype), up=layer.up.to(save_dtype)
            )
    worst = 0.0
    for path in written:
        found = {
            (component, flat_module(component, name)): layer
            for component, layers in read_lora(path).components().items()
            for name, layer in plain_layers(layers).items()
        }
        if odd := sorted(found.keys() ^ expected.keys()):
            raise LoraFileError(
                f"export {path.name} has other modules than were trained, first {odd[0][1]}: do not publish it"
            )
        # diffusers' file has the scale in its matrices, which rounds them once more.
        folded = path.name == FILE_NAME
        allowed = max(MAX_RELATIVE_DIFFERENCE, 2 * torch.finfo(save_dtype).eps if folded else 0.0)
        for (component, name), layer in found.items():
            difference = _difference(expected[component, name], layer)
            if not difference <= allowed:
                raise LoraFileError(
                    f"export {path.name} changes module {name} by {difference:.2e} of its size: do not publish it"
                )
            worst = max(worst, difference)
    return worst


def _difference(trained: LoraLayer, written: LoraLayer) -> float:
    """Largest difference of two updates, relative to the first one's largest value; DoRA's lengths count too."""
    pairs = [(replace(trained, magnitude=None).delta(), replace(written, magnitude=None).delta())]
    if (trained.magnitude is None) != (written.magnitude is None):
        return math.inf
    if trained.magnitude is not None and written.magnitude is not None:
        dtype = written.magnitude.dtype
        pairs.append((trained.written_magnitude(dtype).float(), written.written_magnitude(dtype).float()))
    worst = 0.0
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            return math.inf
        largest = max(float(ours.abs().max()), torch.finfo(torch.float32).tiny)
        worst = max(worst, float((theirs.cpu() - ours.cpu()).abs().max()) / largest)
    return worst
