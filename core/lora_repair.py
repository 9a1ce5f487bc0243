"""Finds the files of a LoRA, gives lost alphas back, proves that two files mean the same. Called by `core.lora_cli`.

A file without its alpha, or with a wrong one, makes the right picture at the wrong strength; nothing else tells.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core.errors import LoraFileError
from core.lora_diffusers import write_diffusers
from core.lora_header import read_header
from core.lora_keys import flat_module, read_key
from core.lora_names import diffusers_module
from core.lora_peft import CONFIG_NAME, WEIGHTS_NAME, write_peft
from core.lora_state import LoraLayer, LoraState, ModuleUpdate, plain_layers
from core.lora_utils import read_lora, write_kohya
from core.tensor_files import load_tensors

ENDING = ".safetensors"
FORMATS_OWN = ("format", "lora_adapter_metadata")
"""Header strings that belong to a format, not to the LoRA."""
MAX_CONFIG_BYTES = 4 << 20
MAX_DIFFERENCE = 1e-5
"""Of a module's largest value. Alpha may go through half precision in a file; a wrong rule is off by far more."""


def find_source(path: Path) -> Path:
    """The LoRA that a person means: a file, or a PEFT folder, which wins over a loose file beside it.

    Args:
        path: A safetensors file; a PEFT folder, or a file in it; or a folder that holds one LoRA.

    Raises:
        LoraFileError: Nothing there, or several.
    """
    if path.is_file():
        return path.parent if path.name == WEIGHTS_NAME and (path.parent / CONFIG_NAME).is_file() else path.resolve()
    if not path.is_dir():
        raise LoraFileError(f"{path} is not there: name a {ENDING} file or a PEFT folder")
    if (path / CONFIG_NAME).is_file():
        return path
    folders = sorted(found.parent for found in path.glob(f"*/{CONFIG_NAME}"))
    files = sorted(path.glob(f"*{ENDING}"))
    found = folders or files
    if len(found) != 1:
        what = ", ".join(item.name for item in found[:5]) or "nothing"
        raise LoraFileError(f"{path} should hold one LoRA and holds {what}: name the file or the PEFT folder itself")
    return found[0]


def peft_beside(file: Path) -> Path | None:
    """The PEFT folder that was exported together with a file: `<name>-peft`, or the file's own folder."""
    for folder in (file.with_name(f"{file.stem}-peft"), file.parent):
        if (folder / CONFIG_NAME).is_file() and (folder / WEIGHTS_NAME).is_file() and folder / WEIGHTS_NAME != file:
            return folder
    return None


def repair(source: Path, *, alpha: float | None = None, config: Path | None = None) -> tuple[LoraState, int]:
    """Give every module its alpha back.

    Args:
        source: A file of any kind that we read, or the weights of a PEFT folder.
        alpha: For every module; None: from the configuration.
        config: An adapter_config.json; None: the one that lies beside.

    Returns:
        The LoRA with its right strength, and how many modules changed.

    Raises:
        LoraFileError: Neither value nor configuration, one that does not fit the ranks, or a damaged file.
    """
    weights = source / WEIGHTS_NAME if source.is_dir() else source
    state = _read_without_config(weights)
    layers = {component: plain_layers(part) for component, part in state.components().items()}
    if alpha is not None:
        if not math.isfinite(alpha) or alpha == 0:
            raise LoraFileError(f"alpha {alpha:g} would make the LoRA useless: give the value that it was trained with")
        values = {component: dict.fromkeys(part, alpha) for component, part in layers.items()}
    else:
        found = _config_of(weights, config)
        values = {component: _alphas_of(found, part) for component, part in layers.items()}
    changed = sum(layer.alpha != values[at][name] for at, part in layers.items() for name, layer in part.items())
    right = {
        at: {name: replace(layer, alpha=values[at][name]) for name, layer in part.items()}
        for at, part in layers.items()
    }
    commonest = Counter(value for part in values.values() for value in part.values()).most_common(1)[0][0]
    metadata = state.metadata | {"ss_network_alpha": f"{commonest:g}"}
    return LoraState(**right, metadata=metadata, notes=state.notes), changed


def write_lora(state: LoraState, destination: Path, to: str) -> None:
    """Write a LoRA as "kohya", "peft" or "diffusers", then prove it by reading it back.

    Raises:
        LoraFileError: The format cannot hold this LoRA, or what was written means something else.
    """
    if (to == "peft") == (destination.suffix == ENDING):
        what = "a folder" if to == "peft" else f"a file that ends in {ENDING}"
        raise LoraFileError(f"{to} is {what}: choose another --out than {destination}")
    metadata = {key: value for key, value in state.metadata.items() if key not in FORMATS_OWN}
    save_dtype = _dtype_of(state)
    if to == "peft":
        write_peft(destination, state, save_dtype=save_dtype)
    elif to == "diffusers":
        # The scale is folded into the matrices, which half precision would round.
        write_diffusers(destination, state, metadata, save_dtype=torch.float32)
    else:
        write_kohya(destination, state, metadata, save_dtype=save_dtype)
    prove_equal(state, read_lora(destination), destination.name)


def prove_equal(first: LoraState, second: LoraState, label: str) -> float:
    """Compare the updates of all modules.

    Returns:
        The largest difference, relative to its module's largest value.

    Raises:
        LoraFileError: A module is missing, extra, or changes the weights otherwise.
    """
    worst = 0.0
    for component, part in first.components().items():
        ours = {flat_module(component, name): layer for name, layer in part.items()}
        theirs = {flat_module(component, name): layer for name, layer in second.components()[component].items()}
        if odd := sorted(ours.keys() ^ theirs.keys()):
            raise LoraFileError(f"{label}: {len(odd)} modules of the {component} are in one only, first {odd[0]}")
        for name, layer in ours.items():
            delta, other = update_of(layer), update_of(theirs[name])
            largest = max(float(delta.abs().max()), torch.finfo(torch.float32).tiny)
            difference = float((delta - other.reshape(delta.shape)).abs().max()) / largest
            if difference > MAX_DIFFERENCE:
                factor = float(other.norm() / delta.norm()) if float(delta.norm()) else math.inf
                raise LoraFileError(
                    f"{label}: {name} differs by {difference:.1e} of its size ({factor:.3g} times as strong)"
                )
            worst = max(worst, difference)
    return worst


def update_of(layer: ModuleUpdate) -> torch.Tensor:
    """The update in fp32; of DoRA what it is before the lengths, which need the base model's weight."""
    return replace(layer, magnitude=None).delta() if isinstance(layer, LoraLayer) else layer.delta()


def _dtype_of(state: LoraState) -> torch.dtype:
    """As the source has its matrices; fp32 for kinds without."""
    layers = [layer for part in state.components().values() for layer in part.values()]
    plain = next((layer for layer in layers if isinstance(layer, LoraLayer)), None)
    return torch.float32 if plain is None else plain.down.dtype


def modules_without_alpha(file: Path) -> int:
    """How many modules of a file have weights but no alpha."""
    with_weights: set[tuple[str, str]] = set()
    with_alpha: set[tuple[str, str]] = set()
    for name in read_header(file).tensors:
        key = read_key(name)
        (with_alpha if key.part == "alpha" else with_weights).add((key.component, key.module))
    return len(with_weights - with_alpha)


def _read_without_config(weights: Path) -> LoraState:
    """As `read_lora`; the weights of a PEFT folder are read without their configuration, which may be what was lost."""
    header = read_header(weights)
    if not all(read_key(name).naming == "peft" for name in header.tensors):
        return read_lora(weights)
    _, tensors = load_tensors(weights)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        key = read_key(name)
        parts.setdefault(diffusers_module("unet", key.module), {})[key.part] = tensor
    layers = {}
    for module, pair in parts.items():
        if set(pair) != {"down", "up"}:
            raise LoraFileError(f"{weights.name}: {module} has {', '.join(sorted(pair))}; lora_A and lora_B are needed")
        layers[module] = LoraLayer(down=pair["down"], up=pair["up"], alpha=float(pair["down"].shape[0]))
    return LoraState(unet=layers, metadata=header.metadata)


def _config_of(weights: Path, config: Path | None) -> dict[str, Any]:
    beside = (weights.with_name(CONFIG_NAME), weights.with_name(f"{weights.stem}-peft") / CONFIG_NAME)
    path = config or next((path for path in beside if path.is_file()), None)
    if path is None:
        raise LoraFileError(
            f"no {CONFIG_NAME} lies beside {weights.name}: name one with --config, or the trained value with --alpha"
        )
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise LoraFileError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes: it is no adapter's configuration")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoraFileError(f"{path} cannot be read ({error!s:.120})") from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise LoraFileError(f"{path} does not describe a LoRA (peft_type LORA)")
    return found


def _alphas_of(config: dict[str, Any], layers: Mapping[str, LoraLayer]) -> dict[str, float]:
    """Alpha of each module by PEFT's rule: lora_alpha or alpha_pattern, over r or rank_pattern."""
    values: dict[str, float] = {}
    for name, layer in layers.items():
        flat = name.replace(".", "_")
        try:
            rank = int(_matching(config.get("rank_pattern"), flat, config.get("r", 8)))
            alpha = float(_matching(config.get("alpha_pattern"), flat, config.get("lora_alpha", 8)))
        except (TypeError, ValueError, OverflowError) as error:
            raise LoraFileError(f"{CONFIG_NAME}: r, lora_alpha and their patterns must be numbers ({error})") from error
        if rank != layer.rank:
            raise LoraFileError(f"{name} has rank {layer.rank}, {CONFIG_NAME} says {rank}: it belongs to another LoRA")
        values[name] = alpha * (rank**0.5 if config.get("use_rslora") else 1.0)
        if not math.isfinite(values[name]) or values[name] == 0:
            raise LoraFileError(
                f"{CONFIG_NAME} gives {name} the alpha {values[name]:g}: give the trained one as --alpha"
            )
    return values


def _matching(patterns: object, flat: str, default: Any) -> Any:
    """A pattern names a module or its end; a stranger's regular expression is never run."""
    for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
        literal = str(pattern).removeprefix("^").replace("\\", "").replace(".", "_")
        if flat == literal or (not str(pattern).startswith("^") and flat.endswith("_" + literal)):
            return value
    return default
