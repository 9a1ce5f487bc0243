"""Injects trainable LoRA layers into a UNet through PEFT and lays all their weights out as one flat parameter.

Called by `core.train`; knows nothing of files or steps.
"""

import math
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer as PeftLayer
from torch import Tensor, nn

from core.errors import LoraFileError
from core.lora_state import LoraLayer, LoraState, flat_name, plain_layers
from core.randomness import generator

ADAPTER = "default"
# Each matrix starts at a multiple of 16 floats (64 bytes), as a tensor of its own would, so kernels stay fast.
ALIGNMENT = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraWeights:
    """The trainable weights of one LoRA.

    AdamW, clipping and zeroing over one tensor cost a twelfth of the same over some hundred small ones on a CPU.

    Attributes:
        flat: The one parameter for the optimizer, fp32 (n,). All matrices are views into it; the padding between them
            stays zero.
        gradient: `flat.grad`, (n,); backward adds every matrix's gradient into it, so zero it before a step.
        down, up: By dotted module name: (rank, in[, k, k]) and (out, rank[, 1, 1]).
        alpha: Scale times rank, the same for all modules.
    """

    flat: nn.Parameter
    gradient: Tensor
    down: dict[str, nn.Parameter]
    up: dict[str, nn.Parameter]
    alpha: float

    def state(self) -> LoraState:
        """A copy of all layers on the CPU, fp32."""
        return LoraState(
            unet={
                name: LoraLayer(down=_copy(self.down[name]), up=_copy(self.up[name]), alpha=self.alpha)
                for name in self.down
            }
        )

    def load(self, state: LoraState) -> None:
        """Set the weights from layers of exactly these modules and shapes.

        Raises:
            LoraFileError: The layers are those of another LoRA.
        """
        layers = {flat_name(name): layer for name, layer in plain_layers(state.unet).items()}
        if layers.keys() != {flat_name(name) for name in self.down}:
            raise LoraFileError("these weights are of other modules than the LoRA in training: check the target preset")
        with torch.no_grad():
            for name in self.down:
                layer = layers[flat_name(name)]
                for view, values in ((self.down[name], layer.down), (self.up[name], layer.up)):
                    if view.shape != values.shape:
                        raise LoraFileError(f"{name}: shape {tuple(values.shape)}, expected {tuple(view.shape)}")
                    view.copy_(values)

    @property
    def parameter_count(self) -> int:
        """Trained numbers, without padding."""
        return sum(weight.numel() for weight in (*self.down.values(), *self.up.values()))


def inject_lora(unet: nn.Module, rank: int, alpha: float, targets: list[str], seed: int) -> LoraWeights:
    """Wrap modules of a UNet with LoRA layers, fp32 whatever the UNet's dtype.

    A is drawn uniformly within 1 / sqrt(fan_in), as PEFT and kohya do, as a pure function of (seed, module name);
    B is zero, so the model's output is unchanged at first.

    Args:
        unet: Changed in place; its own parameters get `requires_grad = False`.
        rank, alpha: Of every layer; the update is scaled by alpha / rank.
        targets: Full dotted names of Linear and Conv2d modules.
        seed: Of the training.
    """
    unet.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)  # type: ignore[arg-type]
    # On the meta device no weights are made, so none are drawn from the global generator.
    inject_adapter_in_model(config, unet, adapter_name=ADAPTER, low_cpu_mem_usage=True)

    owners: list[tuple[str, nn.Module, bool]] = []  # (module name, owner of one matrix, is it A)
    for name in targets:
        layer = unet.get_submodule(name)
        if not isinstance(layer, PeftLayer):
            raise LoraFileError(f"PEFT left module {name} ({type(layer).__name__}) without a LoRA layer")
        owners += [(name, layer.lora_A[ADAPTER], True), (name, layer.lora_B[ADAPTER], False)]
    shapes = [owner.get_parameter("weight").shape for _, owner, _ in owners]
    starts = [0]
    for shape in shapes:
        starts.append(starts[-1] + math.ceil(shape.numel() / ALIGNMENT) * ALIGNMENT)

    device = next(unet.parameters()).device
    flat = nn.Parameter(torch.zeros(starts[-1], device=device))  # (n,) fp32
    gradient = torch.zeros_like(flat)
    flat.grad = gradient
    down: dict[str, nn.Parameter] = {}
    up: dict[str, nn.Parameter] = {}
    for (name, owner, is_down), shape, start in zip(owners, shapes, starts, strict=False):
        span = slice(start, start + shape.numel())
        weight = nn.Parameter(flat.data[span].view(shape))
        # Backward adds into a gradient that is there already, so every gradient lands in the flat one.
        weight.grad = gradient[span].view(shape)
        owner.register_parameter("weight", weight)
        if is_down:
            bound = 1 / math.sqrt(math.prod(shape[1:]))
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator(seed, "lora_A", name))
            weight.data.copy_(drawn)
        (down if is_down else up)[name] = weight
    return LoraWeights(flat=flat, gradient=gradient, down=down, up=up, alpha=alpha)


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True)
