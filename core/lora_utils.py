"""LoRA files only: read any kind we know, apply, write, and prove that what was written means what was trained.

Called by training, generation and the command line; layouts live in `core.lora_kohya` and `core.lora_peft`.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from core.errors import LoraFileError
from core.lora_apply import AppliedLoras, apply_states
from core.lora_kohya import read_kohya, sshs_model_hash, write_kohya
from core.lora_peft import read_peft, write_peft
from core.lora_state import LoraLayer, LoraState, flat_name, plain_layers

__all__ = [
    "AppliedLoras",
    "LoraLayer",
    "LoraState",
    "apply_lora",
    "export_lora",
    "file_stem",
    "read_lora",
    "sshs_model_hash",
    "verify_files_agree",
    "write_kohya",
    "write_peft",
]


# Alpha is rounded to fp32 in the file and the products to fp32 here; any wrong scaling rule is off by far more.
MAX_RELATIVE_DIFFERENCE = 1e-6


def read_lora(path: Path) -> LoraState:
    """Read a kohya / WebUI file or a PEFT folder.

    Raises:
        LoraFileError: It is neither, or damaged, or unsafe.
    """
    return read_peft(path) if path.is_dir() else read_kohya(path)


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


def export_lora(
    state: LoraState,
    metadata: dict[str, str],
    folder: Path,
    name: str,
    base_model: str = "",
    *,
    save_dtype: torch.dtype = torch.float32,
) -> tuple[Path, Path]:
    """Write `<name>.safetensors` (kohya) and `<name>-peft/`, in their places only after both were read back and agree.

    Args:
        state: The trained weights.
        metadata: Header of the kohya file.
        folder: Where both go.
        name: A person's words; the files are named by `file_stem(name)`.
        base_model: A label in the PEFT configuration.
        save_dtype: Of the written tensors.

    Raises:
        LoraFileError: An export would change the model otherwise than the training did, or has no finite values.
    """
    unverified = folder / ".unverified"
    shutil.rmtree(unverified, ignore_errors=True)
    stem = file_stem(name)
    kohya_file, peft_folder = folder / f"{stem}.safetensors", folder / f"{stem}-peft"
    write_kohya(unverified / kohya_file.name, state, metadata, save_dtype=save_dtype)
    write_peft(unverified / peft_folder.name, state, base_model=base_model, save_dtype=save_dtype)
    verify_files_agree(state, unverified / kohya_file.name, unverified / peft_folder.name, save_dtype=save_dtype)
    shutil.rmtree(peft_folder, ignore_errors=True)
    (unverified / peft_folder.name).rename(peft_folder)
    (unverified / kohya_file.name).replace(kohya_file)
    unverified.rmdir()
    return kohya_file, peft_folder


def file_stem(name: str) -> str:
    """A file name for any name: letters of any script, digits, `-_.`; never hidden, never a path, <= 80 characters."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:80] or "lora"


def verify_files_agree(
    trained: LoraState, kohya_file: Path, peft_folder: Path, *, save_dtype: torch.dtype = torch.float32
) -> float:
    """Reload each export by its own reader's rule and compare every module's delta W with the trained one.

    Args:
        trained: What the training ended with.
        kohya_file: Scaled by `.alpha` / rank of each module.
        peft_folder: Scaled by `lora_alpha` / `r` of its configuration and patterns.
        save_dtype: What the files were written in; the trained matrices are rounded to it before they are compared.

    Returns:
        The largest difference relative to its module's largest value.

    Raises:
        LoraFileError: A module is missing, extra, or differs; the files must not be published.
    """
    expected = {
        flat_name(name): replace(layer, down=layer.down.to(save_dtype), up=layer.up.to(save_dtype)).delta()
        for name, layer in plain_layers(trained.unet).items()
    }
    worst = 0.0
    for label, state in ((kohya_file.name, read_kohya(kohya_file)), (peft_folder.name, read_peft(peft_folder))):
        layers = {flat_name(name): layer for name, layer in state.unet.items()}
        if layers.keys() != expected.keys():
            odd = sorted(layers.keys() ^ expected.keys())[0]
            raise LoraFileError(f"export {label} has other modules than were trained, first {odd}: do not publish it")
        for name, layer in layers.items():
            delta = expected[name]  # (out, in[, k, k])
            largest = max(float(delta.abs().max()), torch.finfo(torch.float32).tiny)
            difference = float((layer.delta().cpu() - delta.cpu()).abs().max()) / largest
            if difference > MAX_RELATIVE_DIFFERENCE:
                raise LoraFileError(
                    f"export {label} changes module {name} by {difference:.2e} of its size: do not publish it"
                )
            worst = max(worst, difference)
    return worst


if __name__ == "__main__":
    from core.lora_cli import main  # it imports this module

    main()
