"""Reads a single LoRA file of any kind; the names of its tensors tell which.

Called by `core.lora_utils` and checkpoints. Whose name means what is `core.lora_keys`' business, which parts make which
update `core.lora_lycoris`'.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from core.adapter_config import AdapterConfig, embedded_configs
from core.errors import LoraFileError
from core.lora_header import LoraHeader
from core.lora_keys import block_counting, dotted_module, read_key
from core.lora_lycoris import build_update
from core.lora_state import LoraLayer, LoraState, ModuleUpdate
from core.tensor_files import load_tensors

AlphaRule = Callable[[str, str, int], float | None]
"""(component, dotted module, rank) -> alpha that stands beside the tensors, None where nothing tells."""


def read_lora_file(path: Path) -> LoraState:
    """Read a file of kohya / WebUI, diffusers (old names too) or LyCORIS; modules come out under diffusers' names.

    A missing alpha means scale 1, as every reader has it, and is noted.

    Raises:
        LoraFileError: The file is damaged or unsafe, holds an adapter that we do not serve, mixes the names of two
            tools, or names a module twice.
    """
    header, tensors = load_tensors(path)
    groups, naming = group_tensors(path.name, tensors)
    configs = embedded_configs(path.name, header.metadata) if naming == "diffusers" else {}
    rule = _config_rule(configs) if configs else None
    return state_of(path.name, groups, header, rule)


Groups = dict[str, dict[str, dict[str, Tensor]]]
"""component -> dotted module -> part -> tensor."""


def group_tensors(label: str, tensors: Mapping[str, Tensor]) -> tuple[Groups, str]:
    """Tensors by model, module and part, and whose names they have.

    Args:
        label: File, for people.
        tensors: By the file's names.

    Raises:
        LoraFileError: Names the first name that we do not know, that is there twice, or that another tool gave.
    """
    groups: Groups = {}
    first: tuple[str, str] | None = None
    counted: dict[str, str] = {}
    for name, tensor in tensors.items():
        try:
            key = read_key(name)
        except LoraFileError as error:
            raise LoraFileError(f"{label}: {error}") from error
        first = first or (key.naming, name)
        if key.naming != first[0]:
            raise LoraFileError(
                f"{label}: {name} is a name of {key.naming}, {first[1]} one of {first[0]}: readers would drop one of "
                "them; export it again"
            )
        counting = block_counting(name) if key.component == "unet" else None
        if counting:
            counted.setdefault(counting, name)
        parts = groups.setdefault(key.component, {}).setdefault(dotted_module(key.module), {})
        if key.part in parts:
            raise LoraFileError(f"{label}: {name} is the second {key.part} of {key.module}: export it again")
        parts[key.part] = tensor
    if len(counted) > 1:
        raise LoraFileError(
            f"{label} counts the UNet's blocks in two ways, {' and '.join(counted.values())}: export it again"
        )
    return groups, first[0] if first else ""


def state_of(label: str, groups: Groups, header: LoraHeader, rule: AlphaRule | None = None) -> LoraState:
    """Layers of grouped tensors.

    Args:
        label: File, for people.
        groups: Of `group_tensors`.
        header: Of the file.
        rule: Where alphas stand that are not among the tensors.
    """
    layers: dict[str, dict[str, ModuleUpdate]] = {"unet": {}, "text_encoder": {}, "text_encoder_2": {}}
    without_alpha, plain = 0, 0
    for component, modules in groups.items():
        for module, parts in sorted(modules.items()):
            where = f"{label}: module {module}"
            update = build_update(where, parts, None)
            if isinstance(update, LoraLayer):
                plain += 1
                told = rule(component, module, update.rank) if rule and "alpha" not in parts else None
                if told is not None:
                    update = build_update(where, parts, told)
                without_alpha += told is None and "alpha" not in parts
            layers[component][module] = update
    notes = []
    if without_alpha:
        notes.append(
            f"{without_alpha} of {plain} modules have no alpha: their strength is taken as 1.0, as every reader does"
        )
    return LoraState(
        unet=layers["unet"],
        text_encoder=layers["text_encoder"],
        text_encoder_2=layers["text_encoder_2"],
        metadata=header.metadata,
        notes=tuple(notes),
    )


def _config_rule(configs: Mapping[str, AdapterConfig]) -> AlphaRule:
    def rule(component: str, module: str, rank: int) -> float | None:
        config = configs.get(component)
        return None if config is None else config.alpha_of(module, rank)

    return rule
