"""PEFT's LoraConfig as data: written and read, in a folder's `adapter_config.json` or in a diffusers file's header.

Called by the readers and writers of PEFT folders and diffusers files. No regular expression of a stranger is ever run.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import LoraFileError
from core.lora_state import LoraLayer

CONFIG_NAME = "adapter_config.json"
EMBEDDED_KEY = "lora_adapter_metadata"
MAX_CONFIG_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class AdapterConfig:
    """A checked configuration.

    Attributes:
        label: Where it stands, for people.
        values: As in the JSON.
    """

    label: str
    values: dict[str, Any]

    def alpha_of(self, module: str, rank: int) -> float:
        """Alpha in our sense (scale times rank) of a module.

        PEFT scales by the rank that the configuration states, so that one has to be the tensors' own.

        Raises:
            LoraFileError: The ranks differ, or a number is none.
        """
        try:
            stated = int(_by_pattern(self.values.get("rank_pattern") or {}, module, self.values.get("r", 8)))
            alpha = float(_by_pattern(self.values.get("alpha_pattern") or {}, module, self.values.get("lora_alpha", 8)))
        except (TypeError, ValueError, OverflowError) as error:
            raise LoraFileError(f"{self.label}: r, lora_alpha and their patterns must be numbers ({error})") from error
        if stated != rank:
            raise LoraFileError(f"{self.label}: {module} has rank {rank}, its configuration says {stated}")
        # rsLoRA scales by alpha / sqrt(rank); our alpha is always divided by the rank.
        return alpha * (math.sqrt(rank) if self.values.get("use_rslora") else 1.0)


def read_adapter_config(path: Path) -> AdapterConfig:
    """A folder's `adapter_config.json`.

    Raises:
        LoraFileError: It does not load, or describes something else than a LoRA that we serve.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise LoraFileError(
                f"{path} is larger than {MAX_CONFIG_BYTES} bytes: this is not an adapter's configuration"
            )
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoraFileError(f"{path} cannot be read ({error}): a PEFT folder needs a valid {CONFIG_NAME}") from error
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        kind = values.get("peft_type") if isinstance(values, dict) else None
        raise LoraFileError(f"{path} does not describe a LoRA (peft_type {kind!r:.40}): LoRA and DoRA are served")
    return _checked(str(path), values)


def embedded_configs(label: str, metadata: Mapping[str, str]) -> dict[str, AdapterConfig]:
    """The configurations in a diffusers file's header, by component; empty where it has none.

    Raises:
        LoraFileError: It is no JSON object, or asks for something that we do not serve.
    """
    if EMBEDDED_KEY not in metadata:
        return {}
    try:
        flat = json.loads(metadata[EMBEDDED_KEY])
    except (ValueError, RecursionError) as error:
        raise LoraFileError(f"{label}: its {EMBEDDED_KEY} is no JSON ({error!s:.80}): export it again") from error
    if not isinstance(flat, dict):
        raise LoraFileError(f"{label}: its {EMBEDDED_KEY} is no JSON object: export it again")
    values: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        component, _, field = name.partition(".")
        values.setdefault(component, {})[field] = value
    return {component: _checked(f"{label}: {component}", config) for component, config in values.items()}


def adapter_config(layers: Mapping[str, LoraLayer], base_model: str = "") -> dict[str, Any]:
    """The configuration that gives each layer its own rank and scale.

    Args:
        layers: Of one model, by the dotted names that PEFT will look for at the end of its modules' names.
        base_model: A label.

    Raises:
        LoraFileError: No layers, or DoRA on some only, which PEFT has no word for.
    """
    if not layers:
        raise LoraFileError("this LoRA has no layers: nothing to write")
    with_magnitude = sum(layer.magnitude is not None for layer in layers.values())
    if with_magnitude not in (0, len(layers)):
        raise LoraFileError(
            f"{with_magnitude} of {len(layers)} layers are DoRA: PEFT knows all or none; write a kohya file"
        )
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": bool(with_magnitude),
        "modules_to_save": None,
        "target_modules": sorted(layers),
        # PEFT matches these keys as regular expressions at the end of a module's name.
        "rank_pattern": {_pattern(name): layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {_pattern(name): layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
    }


def _checked(label: str, values: dict[str, Any]) -> AdapterConfig:
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(values.get(name) or {}, dict):
            raise LoraFileError(f"{label}: {name} must be an object of module names")
    if values.get("modules_to_save") or values.get("bias", "none") != "none" or values.get("lora_bias"):
        raise LoraFileError(
            f"{label} also trained biases or whole modules (bias, modules_to_save), which is not served"
        )
    return AdapterConfig(label, values)


def _pattern(module: str) -> str:
    return re.escape(module)


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule (a pattern matches a name or its end) for literal patterns; a stranger's regex is never run."""
    for pattern, value in patterns.items():
        literal = pattern.removeprefix("^").replace("\\", "").removeprefix("text_model.")
        if module == literal or (not pattern.startswith("^") and module.endswith("." + literal)):
            return value
    return default
