"""Gives lost alphas back, writes a LoRA in any format, proves that two files mean the same. Called by `core.lora_cli`.

A file without its alpha, or with a wrong one, makes the right picture at the wrong strength; nothing else tells.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from core.adapter_config import AdapterConfig, read_adapter_config
from core.errors import LoraFileError
from core.lora_diffusers import write_diffusers
from core.lora_file import group_tensors, state_of
from core.lora_header import read_header
from core.lora_keys import flat_module, read_key
from core.lora_lycoris import LycorisUpdate
from core.lora_peft import CONFIG_NAME, TEXT_FOLDERS, WEIGHTS_NAME, write_peft
from core.lora_source import ENDING, is_peft_folder, weights_of
from core.lora_state import LoraLayer, LoraState, ModuleUpdate
from core.lora_utils import read_lora, write_kohya
from core.tensor_files import load_tensors

Scaled = LoraLayer | LycorisUpdate
FORMATS_OWN = ("format", "lora_adapter_metadata")
"""Header strings that belong to a format, not to the LoRA."""
MAX_DIFFERENCE = 1e-5
"""Of a module's largest value. Alpha may go through half precision in a file; a wrong rule is off by far more."""


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
    state = _read_folder_without_config(source) if source.is_dir() else _read_without_config(weights)
    layers = {component: _with_rank(part) for component, part in state.components().items()}
    if alpha is not None:
        if not math.isfinite(alpha) or alpha == 0:
            raise LoraFileError(f"alpha {alpha:g} would make the LoRA useless: give the value that it was trained with")
        values = {component: dict.fromkeys(part, alpha) for component, part in layers.items()}
    else:
        configs = _configs_of(weights, config, {component for component, part in layers.items() if part})
        values = {at: _alphas_of(configs[at], part) if part else {} for at, part in layers.items()}
    changed = sum(alpha_of(layer) != values[at][name] for at, part in layers.items() for name, layer in part.items())
    right = {
        at: dict(part) | {name: _with_alpha(layer, values[at][name]) for name, layer in layers[at].items()}
        for at, part in state.components().items()
    }
    counted = Counter(value for part in values.values() for value in part.values())
    if not counted:
        raise LoraFileError(f"{source.name} has no module with a rank: there is no alpha to give back")
    metadata = state.metadata | {"ss_network_alpha": f"{counted.most_common(1)[0][0]:g}"}
    return _state(right, metadata), changed


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
            if not _same_lengths(layer, theirs[name]):
                raise LoraFileError(f"{label}: {name} has other lengths of DoRA: it makes another picture")
            worst = max(worst, difference)
    return worst


def update_of(layer: ModuleUpdate) -> torch.Tensor:
    """The update in fp32; of DoRA what it is before the lengths, which need the base model's weight."""
    return replace(layer, magnitude=None).delta() if isinstance(layer, LoraLayer | LycorisUpdate) else layer.delta()


def _same_lengths(first: ModuleUpdate, second: ModuleUpdate) -> bool:
    """Whether both have DoRA's lengths, and the same, or both have none."""
    ours, theirs = (getattr(layer, "magnitude", None) for layer in (first, second))
    if ours is None or theirs is None:
        return ours is theirs
    if ours.numel() != theirs.numel():
        return False
    difference = (ours.float().flatten() - theirs.float().flatten()).abs().max()
    return bool(difference <= MAX_DIFFERENCE * ours.float().abs().max())


def _dtype_of(state: LoraState) -> torch.dtype:
    """As the source has its matrices; of several types the one that holds them all."""
    dtypes: set[torch.dtype] = set()
    for part in state.components().values():
        for layer in part.values():
            if isinstance(layer, LoraLayer):
                dtypes |= {layer.down.dtype, layer.up.dtype}
            elif isinstance(layer, LycorisUpdate):
                dtypes |= {tensor.dtype for tensor in layer.parts.values()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


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
    header, tensors = load_tensors(weights)
    groups, naming = group_tensors(weights.name, tensors)
    if naming != "peft":
        return read_lora(weights)
    modules = groups["unet"]
    component = weights.parent.name if weights.parent.name in TEXT_FOLDERS else "unet"
    if all(module.startswith(("text_model.", "encoder.layers.")) for module in modules) and component == "unet":
        component = "text_encoder"
    if component != "unet":
        modules = {module.removeprefix("text_model."): parts for module, parts in modules.items()}
    return state_of(weights.name, {component: modules}, header)


def _read_folder_without_config(folder: Path) -> LoraState:
    """All files of a PEFT folder."""
    states = [_read_without_config(weights) for weights in weights_of(folder).values()]
    layers: dict[str, dict[str, ModuleUpdate]] = {"unet": {}, "text_encoder": {}, "text_encoder_2": {}}
    for state in states:
        for component, part in state.components().items():
            layers[component].update(part)
    metadata = states[0].metadata if states else {}
    return _state(layers, metadata)


def _state(layers: Mapping[str, Mapping[str, ModuleUpdate]], metadata: dict[str, str]) -> LoraState:
    return LoraState(
        unet=layers["unet"],
        text_encoder=layers["text_encoder"],
        text_encoder_2=layers["text_encoder_2"],
        metadata=metadata,
    )


def _with_rank(part: Mapping[str, ModuleUpdate]) -> dict[str, Scaled]:
    """The layers that an alpha belongs to; a whole difference has none."""
    return {name: layer for name, layer in part.items() if isinstance(layer, Scaled) and layer.rank}


def alpha_of(layer: Scaled) -> float:
    """Scale times rank."""
    return layer.alpha if isinstance(layer, LoraLayer) else layer.scale * (layer.rank or 1)


def _with_alpha(layer: Scaled, alpha: float) -> Scaled:
    return (
        replace(layer, alpha=alpha) if isinstance(layer, LoraLayer) else replace(layer, scale=alpha / (layer.rank or 1))
    )


def _configs_of(weights: Path, config: Path | None, components: set[str]) -> dict[str, AdapterConfig]:
    """The configuration of each model: the one that was named counts for all, those that lie beside for their own."""
    if config is not None:
        return dict.fromkeys(components, read_adapter_config(config))
    folders = (weights.parent, weights.with_name(f"{weights.stem}-peft"))
    folder = next((folder for folder in folders if is_peft_folder(folder)), None)
    if folder is None:
        raise LoraFileError(
            f"no {CONFIG_NAME} lies beside {weights.name}: name one with --config, or the trained value with --alpha"
        )
    places = {component: folder if component == "unet" else folder / component for component in components}
    if components == {"text_encoder"} and not (places["text_encoder"] / CONFIG_NAME).is_file():
        places = {"text_encoder": folder}  # a folder made of a text encoder alone
    for component, place in places.items():
        if not (place / CONFIG_NAME).is_file():
            raise LoraFileError(
                f"{folder.name} has no {CONFIG_NAME} of the {component}, which {weights.name} changes: name one with "
                "--config, or the trained value with --alpha"
            )
    return {component: read_adapter_config(place / CONFIG_NAME) for component, place in places.items()}


def _alphas_of(config: AdapterConfig, layers: Mapping[str, Scaled]) -> dict[str, float]:
    """Alpha of each module by PEFT's rule."""
    values = {name: config.alpha_of(name, layer.rank or 1) for name, layer in layers.items()}
    for name, alpha in values.items():
        if not math.isfinite(alpha) or alpha == 0:
            raise LoraFileError(f"{CONFIG_NAME} gives {name} the alpha {alpha:g}: give the trained one as --alpha")
    return values
