"""What it costs until the next request's LoRA is on the model: slots against diffusers' loading, unloading and hotswap.

    python -m tests.benchmarks.lora_swap [--rounds N] [--width narrow|full|both]

CPU times of one thread, both sides in turns. The last line is one JSON object.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from diffusers import StableDiffusionPipeline
from torch import Tensor

from core.lora_packed import PackedLora, SlotLayout, pack, text_encoder_modules
from core.lora_slots import LoraSlots
from core.lora_state import LoraLayer, LoraState
from core.lora_targets import target_modules
from core.lora_utils import read_lora, write_kohya
from tests.benchmarks.narrow_sd15 import full_width_unet, narrow_pipeline_folder, unet_inputs

RANK = 16
SWAPS = 20  # of ours per round, the last of them to the LoRA that diffusers loads: an even number


@dataclass
class Side:
    """Packed LoRAs of one model in memory and as files, and the slots they go to."""

    slots: LoraSlots
    packed: list[PackedLora]
    files: list[Path]

    def swap(self, number: int, *, from_file: bool) -> None:
        """The LoRA of that number becomes active."""
        self.slots.load(0, self.files[number] if from_file else self.packed[number])
        self.slots.activate([[(0, 1.0)]])


def main() -> None:
    """Measure, compare, print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--width", choices=["narrow", "full", "both"], default="both")
    given = options.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    checks: list[tuple[str, float, float]] = []
    correct = True
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        pipeline = StableDiffusionPipeline.from_pretrained(
            narrow_pipeline_folder(Path(scratch) / "narrow"), dtype=torch.float32
        )
        pipeline.set_progress_bar_config(disable=True)
        if given.width != "full":
            correct = _width(pipeline, "narrow", 1000.0, given.rounds, Path(scratch), checks) and correct
        if given.width != "narrow":
            pipeline.unet = full_width_unet()
            correct = _width(pipeline, "full width", 200.0, given.rounds, Path(scratch), checks) and correct
    line = {
        "name": "lora_swap",
        "correct": correct,
        "max_diff": 0.0 if correct else 1.0,
        "load_average": Path("/proc/loadavg").read_text().split()[0],
        "checks": [{"what": what, "value": value, "goal": goal, "better": "higher"} for what, value, goal in checks],
    }
    sys.stdout.write(json.dumps(line) + "\n")


def _width(
    pipeline: Any, name: str, goal: float, rounds: int, folder: Path, checks: list[tuple[str, float, float]]
) -> bool:
    for with_text in (False, True):
        kind = f"{name}{', text encoder included' if with_text else ''}"
        loras = [lora_file(pipeline, folder / f"{kind}{number}.safetensors", number, with_text) for number in range(2)]
        # The outputs by diffusers, each from a fresh load.
        expected = []
        for path in loras:
            pipeline.load_lora_weights(path)
            expected.append(output(pipeline, with_text))
            pipeline.unload_lora_weights()
        untouched = output(pipeline, with_text)

        sides = _sides(pipeline, loras, folder / kind, with_text)
        correct = torch.equal(output(pipeline, with_text), untouched)
        theirs: list[float] = []
        hot: list[float] = []
        ours: dict[str, list[float]] = {"RAM": [], "a warm local file": []}
        for number in range(rounds):
            this = number % 2
            theirs.append(_seconds(partial(_reload, pipeline, loras[this])))
            if not with_text:  # diffusers refuses to hotswap text encoders
                pipeline.load_lora_weights(loras[1 - this], adapter_name="one")
                hotswap = partial(pipeline.load_lora_weights, loras[this], adapter_name="one", hotswap=True)
                hot.append(_seconds(hotswap))
                pipeline.unload_lora_weights()
            for source, times in ours.items():
                _swap(sides, 1 - this, from_file=source != "RAM")
                began = time.process_time()
                for turn in range(SWAPS):
                    _swap(sides, (this + turn + 1) % 2, from_file=source != "RAM")
                times.append((time.process_time() - began) / SWAPS)
                correct = correct and torch.equal(output(pipeline, with_text), expected[this])
            for side in sides:
                side.slots.deactivate()
        for source, times in ours.items():
            label = f"swap from {source}, {kind}"
            ratio = median(slow / quick for slow, quick in zip(theirs, times, strict=True))
            checks.append((f"{label}: times load_lora_weights + unload_lora_weights", ratio, goal))
            if hot:
                ratio = median(slow / quick for slow, quick in zip(hot, times, strict=True))
                checks.append((f"{label}: times hotswap=True", ratio, 30.0))
            hot_ms = f", hotswap {1e3 * median(hot):.0f} ms" if hot else ""
            sys.stderr.write(
                f"{label}: ours {1e3 * median(times):.3f} ms, load + unload {1e3 * median(theirs):.0f} ms{hot_ms}\n"
            )
        for side in sides:
            side.slots.deactivate()
        correct = correct and torch.equal(output(pipeline, with_text), untouched)
        for side in sides:
            side.slots.remove()
    return correct


def lora_file(pipeline: Any, path: Path, seed: int, with_text: bool) -> Path:
    """A kohya file of rank 16 for the 128 attention layers, and for the text encoder's if wanted."""
    own = torch.Generator().manual_seed(seed)

    def layers(model: Any, names: list[str], prefix: str = "") -> dict[str, LoraLayer]:
        found = {}
        for name in names:
            outputs, inputs = model.get_submodule(name).weight.shape
            down = torch.randn(RANK, inputs, generator=own) / inputs**0.5
            up = 0.05 * torch.randn(outputs, RANK, generator=own)
            found[prefix + name] = LoraLayer(down=down, up=up, alpha=8.0 + seed)
        return found

    unet = layers(pipeline.unet, target_modules(pipeline.unet, "attention"))
    names = [name for name in text_encoder_modules(pipeline.text_encoder) if "self_attn" in name]
    text = layers(pipeline.text_encoder, names, "text_model.") if with_text else {}
    write_kohya(path, LoraState(unet=unet, text_encoder=text), {})
    return path


def _sides(pipeline: Any, loras: list[Path], prefix: Path, with_text: bool) -> list[Side]:
    states = [read_lora(path) for path in loras]
    unet, encoder = pipeline.unet, pipeline.text_encoder
    parts = [(unet, target_modules(unet, "attention"), [state.unet for state in states])]
    if with_text:
        parts.append((encoder, text_encoder_modules(encoder), [state.text_encoder for state in states]))
    sides = []
    for part, (model, names, layers) in enumerate(parts):
        layout = SlotLayout.of(model, names, RANK)
        packed = [pack(own, layout, torch.float32) for own in layers]
        files = [prefix.with_name(f"{prefix.name}-{part}-{number}.packed") for number in range(len(packed))]
        for lora, path in zip(packed, files, strict=True):
            lora.save(path)
        sides.append(Side(LoraSlots(model, layout, slots=2), packed, files))
    return sides


def output(pipeline: Any, with_text: bool) -> Tensor:
    """What the UNet and, if wanted, the text encoder answer to fixed inputs, as one vector."""
    latents, timesteps, text = unet_inputs(pipeline.unet, 1, 8)
    answer = pipeline.unet(latents, timesteps, encoder_hidden_states=text).sample.flatten()
    if not with_text:
        return answer
    hidden = pipeline.text_encoder(torch.arange(77)[None]).last_hidden_state
    return torch.cat([answer, hidden.flatten()])


def _seconds(work: Callable[[], None]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _reload(pipeline: Any, path: Path) -> None:
    pipeline.load_lora_weights(path)
    pipeline.unload_lora_weights()


def _swap(sides: list[Side], number: int, *, from_file: bool) -> None:
    for side in sides:
        side.swap(number, from_file=from_file)


if __name__ == "__main__":
    main()
