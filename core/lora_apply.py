"""Puts LoRAs on a model for inference and takes them off again without a trace. Called through `core.lora_utils`."""

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft.tuners.lora import Conv2d as LoraConv2d
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraConfig
from torch import Tensor, nn

from core.errors import LoraFileError
from core.lora_state import LoraLayer, LoraState, ModuleUpdate, flat_name

logger = logging.getLogger(__name__)

PeftLayer = LoraLinear | LoraConv2d


@dataclass
class AppliedLoras:
    """Which modules were replaced; `remove` puts the originals back."""

    replaced: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)

    def remove(self) -> None:
        """Restore the module tree; outputs are bit-equal to those before. Safe to call twice."""
        for parent, child, original in reversed(self.replaced):
            setattr(parent, child, original)
        self.replaced.clear()

    def __enter__(self) -> "AppliedLoras":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def apply_states(
    unet: nn.Module,
    loras: Sequence[tuple[LoraState, float]],
    text_encoder: nn.Module | None = None,
    text_encoder_2: nn.Module | None = None,
) -> AppliedLoras:
    """Put LoRAs on a UNet (and a text encoder) together: W + sum of weight * alpha / rank * up @ down.

    All files are checked against the model before the first module is replaced. A weight of 0 is skipped.

    Args:
        unet: Its modules are wrapped, its weights stay untouched.
        loras: LoRAs with their weights.
        text_encoder: Needed by LoRAs that have text-encoder layers.
        text_encoder_2: Needed by SDXL LoRAs that have layers of the second one.

    Raises:
        LoraFileError: A module or shape does not fit; names the first misfit.
    """
    plan: dict[tuple[nn.Module, str], list[tuple[str, ModuleUpdate, float]]] = {}
    for number, (state, weight) in enumerate(loras):
        if weight == 0:
            continue
        if (state.text_encoder and text_encoder is None) or (state.text_encoder_2 and text_encoder_2 is None):
            raise LoraFileError(
                "this LoRA also changes the text encoder, which was not given here: pass text_encoder, "
                "or train and export the LoRA for the UNet alone"
            )
        fitting = [(unet, name, layer) for name, layer in fit(unet, state.unet).items()]
        for encoder, layers in ((text_encoder, state.text_encoder), (text_encoder_2, state.text_encoder_2)):
            if encoder is not None:
                found = fit(encoder, layers, drop_prefix="text_model_")
                fitting += [(encoder, name, layer) for name, layer in found.items()]
        for model, name, layer in fitting:
            plan.setdefault((model, name), []).append((f"lora{number}", layer, weight))
    applied = AppliedLoras()
    with ExitStack() as undo:  # running out of memory half way must not leave half a LoRA on a shared model
        undo.callback(applied.remove)
        for (model, name), updates in plan.items():
            plain = [(adapter, layer, weight) for adapter, layer, weight in updates if _is_plain(layer)]
            if len(plain) < len(updates):
                _change_weight(applied, model, name, updates)
                continue
            for adapter, layer, weight in plain:
                _attach(applied, model, name, adapter, cast(LoraLayer, layer), weight)
        undo.pop_all()
    logger.debug("lora applied count=%d modules=%d", len(loras), len(applied.replaced))
    return applied


def fit(model: nn.Module, layers: Mapping[str, ModuleUpdate], *, drop_prefix: str = "") -> dict[str, ModuleUpdate]:
    """Layers under the model's own dotted names.

    Args:
        model: The one that they are meant for.
        layers: Keys dotted or with underscores.
        drop_prefix: Ignored at the start of names on both sides (wrappers come and go between library versions).

    Raises:
        LoraFileError: The model has no such module, or one of another shape.
    """
    by_flat_name = {flat_name(name).removeprefix(drop_prefix): name for name, _ in model.named_modules()}
    fitting: dict[str, ModuleUpdate] = {}
    for key, layer in layers.items():
        name = by_flat_name.get(flat_name(key).removeprefix(drop_prefix))
        module = model.get_submodule(name) if name else None
        if name is None or not isinstance(module, nn.Linear | nn.Conv2d):
            raise LoraFileError(
                f"LoRA layer {key} has no counterpart in this base model: the LoRA is for another model family"
            )
        weight_shape = tuple(module.weight.shape)  # (out, in[, kh, kw])
        update_shape = layer.shape
        # A 1x1 convolution and a linear layer are the same map; both kinds of file exist for proj_in and proj_out.
        # LyCORIS flattens the kernel of a convolution into the inputs.
        flattened = (weight_shape[0], math.prod(weight_shape[1:]))
        if weight_shape != update_shape != flattened and _without_ones(update_shape) != _without_ones(weight_shape):
            raise LoraFileError(
                f"LoRA layer {key} is made for a weight of shape {update_shape}, this base model's is {weight_shape}: "
                "the LoRA is for another base model"
            )
        fitting[name] = layer
    return fitting


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape


def _is_plain(layer: ModuleUpdate) -> bool:
    return isinstance(layer, LoraLayer) and layer.magnitude is None


def _change_weight(
    applied: AppliedLoras, model: nn.Module, name: str, updates: Sequence[tuple[str, ModuleUpdate, float]]
) -> None:
    """Stand a copy of the module with a changed weight in its place: for updates that are no product of two matrices.

    Costs one weight of memory a module; the sum is taken in fp32 and rounded once.
    """
    original = model.get_submodule(name)
    weight = original.get_parameter("weight")
    changed = weight.detach().float()
    for _, layer, strength in updates:
        changed = changed + strength * layer.delta(weight).reshape(weight.shape).to(weight.device)
    stand_in = copy.copy(original)
    stand_in._parameters = dict(original._parameters)  # a shallow copy shares the dictionary with the original
    stand_in.register_parameter("weight", nn.Parameter(changed.to(weight.dtype), requires_grad=False))
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, child, stand_in)
    applied.replaced.append((parent, child, original))


def _attach(applied: AppliedLoras, model: nn.Module, name: str, adapter: str, layer: LoraLayer, weight: float) -> None:
    """Add one layer to the PEFT wrapper of a module, wrapping the module if no LoRA has done so yet."""
    module = model.get_submodule(name)
    # PEFT types alpha as int and uses it as a number.
    settings: dict[str, Any] = {"r": layer.rank, "lora_alpha": layer.alpha}
    config = LoraConfig(**settings, init_lora_weights=False)
    with torch.device("meta"):  # PEFT's own matrices would be drawn from the global generator: never make them
        if isinstance(module, PeftLayer):
            wrapper = module
            wrapper.update_layer(adapter, **settings, config=config)
        else:
            kind = LoraLinear if isinstance(module, nn.Linear) else LoraConv2d
            wrapper = kind(module, adapter, config=config, **settings)
    base_weight: Tensor = wrapper.get_base_layer().get_parameter("weight")
    for matrices, values in ((wrapper.lora_A, layer.down), (wrapper.lora_B, layer.up)):
        shape = matrices[adapter].get_parameter("weight").shape
        placed = values.to(base_weight.device, base_weight.dtype).reshape(shape)
        matrices[adapter].register_parameter("weight", nn.Parameter(placed, requires_grad=False))
    wrapper.set_scale(adapter, weight)
    wrapper.set_adapter(list(wrapper.lora_A), inference_mode=True)
    if wrapper is not module:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, child, wrapper.eval())
        applied.replaced.append((parent, child, module))
