"""Four pictures with four LoRAs in one forward: against one after another, and against PEFT's `adapter_names`.

    python -m tests.benchmarks.mixed_batch [--rounds N] [--side N]

Narrow SD 1.5, rank 8, CPU time of one thread per forward of four pictures; changing the composition is in our time.
The last line is one JSON object.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor

from core.lora_packed import SlotLayout, pack
from core.lora_slots import LoraSlots
from core.lora_state import LoraLayer
from core.lora_targets import target_modules
from tests.benchmarks.narrow_sd15 import narrow_unet, unet_inputs

LORAS, RANK, ALPHA, STEPS = 4, 8, 4, 20


def main() -> None:
    """Measure, compare, print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--side", type=int, default=16, help="of the latents")
    given = options.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    ours, theirs = narrow_unet(), narrow_unet()
    names = target_modules(ours, "attention")
    layout = SlotLayout.of(ours, names, RANK)
    slots = LoraSlots(ours, layout, slots=LORAS)
    for number in range(LORAS):
        layers = _layers(layout, number)
        slots.load(number, pack(layers, layout, torch.float32))
        _to_peft(theirs, f"lora{number}", layers)
    latents, timesteps, text = unet_inputs(ours, LORAS, given.side)
    sides: dict[str, Callable[[], Tensor]] = {
        "ours": partial(_ours, ours, slots, latents, timesteps, text),
        "sequential": partial(_sequential, theirs, latents, timesteps, text),
        "adapter_names": partial(_adapter_names, theirs, latents, timesteps, text),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    outputs: dict[str, Tensor] = {}
    activations = []
    with torch.no_grad():
        for number in range(given.rounds + 1):
            for name, work in sides.items():
                began = time.process_time()
                outputs[name] = work()
                times[name].append(time.process_time() - began)
            began = time.process_time()
            slots.deactivate()
            slots.activate([[(slot, 1.0)] for slot in range(LORAS)])
            activations.append(time.process_time() - began)
            if number == 0:
                for own in times.values():
                    own.clear()
    # A composition lasts for many steps; a picture has 20 here.
    mine = [took + median(activations) / STEPS for took in times["ours"]]
    difference = float((outputs["ours"] - outputs["sequential"]).abs().max())
    for name, own in times.items():
        sys.stderr.write(f"{name}: {1e3 * median(own) / LORAS:.1f} ms a picture and step\n")
    sys.stderr.write(f"a new composition: {1e3 * median(activations):.1f} ms\n")
    checks = [
        ("times sequential set_adapter", [a / b for a, b in zip(times["sequential"], mine, strict=True)], 2.2),
        ("times peft adapter_names", [a / b for a, b in zip(times["adapter_names"], mine, strict=True)], 1.4),
    ]
    line = {
        "name": "mixed_batch",
        "correct": difference <= 1e-5,
        "max_diff": difference,
        "checks": [
            {"what": what, "value": median(ratios), "goal": goal, "better": "higher"} for what, ratios, goal in checks
        ],
    }
    sys.stdout.write(json.dumps(line) + "\n")


def _layers(layout: SlotLayout, seed: int) -> dict[str, LoraLayer]:
    own = torch.Generator().manual_seed(seed)
    return {
        name: LoraLayer(
            down=torch.randn(RANK, inputs, generator=own) / inputs**0.5,
            up=0.05 * torch.randn(outputs, RANK, generator=own),
            alpha=ALPHA,
        )
        for name, (outputs, inputs) in zip(layout.names, layout.shapes, strict=True)
    }


def _to_peft(unet: Any, adapter: str, layers: dict[str, LoraLayer]) -> None:
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(layers)), adapter_name=adapter)
    for name, layer in layers.items():
        module = unet.get_submodule(name)
        module.lora_A[adapter].weight.data.copy_(layer.down)
        module.lora_B[adapter].weight.data.copy_(layer.up)
    unet.requires_grad_(False)


def _ours(unet: Any, slots: LoraSlots, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    slots.activate([[(slot, 1.0)] for slot in range(LORAS)])
    output: Tensor = unet(latents, timesteps, encoder_hidden_states=text).sample
    return output


def _sequential(unet: Any, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    rows = []
    for number in range(LORAS):
        unet.set_adapter(f"lora{number}")
        part = slice(number, number + 1)
        rows.append(unet(latents[part], timesteps[part], encoder_hidden_states=text[part]).sample)
    return torch.cat(rows)


def _adapter_names(unet: Any, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """PEFT's mixed batch; diffusers' own call has no way to say it, so hooks say it to each layer."""
    named = {"adapter_names": [f"lora{number}" for number in range(LORAS)]}

    def name_adapters(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | named

    layers = [module for module in unet.modules() if isinstance(module, PeftLinear)]
    hooks = [layer.register_forward_pre_hook(name_adapters, with_kwargs=True) for layer in layers]
    output: Tensor = unet(latents, timesteps, encoder_hidden_states=text).sample
    for hook in hooks:
        hook.remove()
    return output


if __name__ == "__main__":
    main()
