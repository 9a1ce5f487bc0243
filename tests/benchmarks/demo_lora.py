"""How much the demo's LoRA moves pictures to its style, and whether its file means the same in diffusers and LyCORIS.

    python -m tests.benchmarks.demo_lora [--steps N]

Trains with `demo/train.yaml` (minutes on one thread), draws the 16 prompts with and without the LoRA from the
same seeds. The last line is one JSON object.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from core.config import GenerateConfig
from core.generate import generate
from core.lora_header import read_header
from core.lora_utils import apply_lora
from core.manifest import read_dataset
from core.pipelines import LoadedBase, load_base
from core.prepared_base import ensure_prepared
from core.preprocess import preprocess_folder
from core.progress import Progress
from core.quiet_libraries import quiet_libraries
from core.train import train
from core.train_config import TrainConfig
from demo.colour_layout import distance_to_dataset, fall_percent
from demo.recipe import DEMO, Recipe, read_recipe

GOAL_FALL_PERCENT = 40.0
GOAL_DIFFERENCE = 1e-5


def main() -> None:
    """Train, draw, compare, print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, help="shorter runs for trying this script; default: as the demo")
    given = options.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    logging.disable(logging.WARNING)
    recipe = read_recipe()
    config = TrainConfig.parse(recipe.train.dump() | ({"steps": given.steps} if given.steps else {}))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        preprocess_folder(DEMO / "pictures", folder / "dataset", recipe.preprocess)
        prepared = ensure_prepared(DEMO / "tiny-sd-emoji", folder / "bases")
        base = load_base(prepared.folder)
        began = time.process_time()
        result = train(config, base, read_dataset(folder / "dataset"), folder, _say)
        train_seconds = time.process_time() - began
        plain, styled = draw(base, recipe, None), draw(base, recipe, result.kohya_file)
        pictures = [Image.open(path).convert("RGB") for path in recipe.pictures]
        before, after = distance_to_dataset(plain, pictures), distance_to_dataset(styled, pictures)
        diffusers_difference, effect = compare_with_diffusers(base, prepared.folder, result.kohya_file)
        lycoris_difference = compare_with_lycoris(base, result.kohya_file)
        names = read_header(result.kohya_file).tensors
        modules = [name.removesuffix(".lora_down.weight") for name in names if name.endswith(".lora_down.weight")]
        with_alpha = sum(f"{module}.alpha" in names for module in modules)
    worst = max(diffusers_difference, lycoris_difference)
    checks = [
        ("fall of the mean 4x4 colour-layout distance, percent", fall_percent(before.mean, after.mean), 40.0, "higher"),
        ("difference to diffusers in fp32 outputs", diffusers_difference, GOAL_DIFFERENCE, "lower"),
        ("difference to lycoris-lora in fp32 outputs", lycoris_difference, GOAL_DIFFERENCE, "lower"),
        ("share of modules with .alpha, percent", 100 * with_alpha / len(modules), 100.0, "higher"),
        ("training, CPU seconds on one thread", train_seconds, 180.0, "lower"),
    ]
    result_line = {
        "name": "demo_lora",
        "correct": worst <= GOAL_DIFFERENCE and effect > 100 * worst and with_alpha == len(modules),
        "max_diff": worst,
        "lora_effect": effect,
        "distance": {"before": before.mean, "after": after.mean, "nearest": [before.nearest, after.nearest]},
        "checks": [
            {"what": what, "value": value, "goal": goal, "better": better} for what, value, goal, better in checks
        ],
    }
    sys.stdout.write(json.dumps(result_line) + "\n")


def draw(base: LoadedBase, recipe: Recipe, lora: Path | None) -> list[Image.Image]:
    """The demo's fixed prompts, one picture each."""
    size = {"width": base.facts.native_size_px, "height": base.facts.native_size_px}
    loras = [(lora, recipe.lora_weight)] if lora else []
    pictures = []
    for fixed in recipe.prompts:
        config = GenerateConfig.parse({"prompt": fixed.prompt, "seed": fixed.seed, **size, **recipe.drawing})
        pictures += generate(base, config, loras)
    return pictures


def probe(base: LoadedBase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A fixed input of the UNet: latents (2, c, h, w), timesteps (2,), text (2, tokens, dim)."""
    own = torch.Generator().manual_seed(1)
    side = base.facts.native_size_px // base.facts.vae_factor
    latents = torch.randn(2, base.facts.latent_channels, side, side, generator=own)
    text = torch.randn(2, base.facts.max_tokens, base.unet.config.cross_attention_dim, generator=own)
    return latents, torch.tensor([900, 100]), text


@torch.no_grad()
def compare_with_diffusers(base: LoadedBase, folder: Path, lora: Path) -> tuple[float, float]:
    """(largest output difference between our reader and diffusers', largest output change by the LoRA)."""
    latents, timesteps, text = probe(base)
    plain = base.unet(latents, timesteps, encoder_hidden_states=text).sample
    with apply_lora(base.unet, [(lora, 1.0)]):
        ours = base.unet(latents, timesteps, encoder_hidden_states=text).sample
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.load_lora_weights(lora)
    theirs = pipeline.unet(latents, timesteps, encoder_hidden_states=text).sample
    return float((ours - theirs).abs().max()), float((ours - plain).abs().max())


@torch.no_grad()
def compare_with_lycoris(base: LoadedBase, lora: Path) -> float:
    """Largest output difference between our reader and LyCORIS'."""
    from lycoris import create_lycoris_from_weights
    from lycoris.wrapper import LycorisNetwork

    latents, timesteps, text = probe(base)
    with apply_lora(base.unet, [(lora, 1.0)]):
        ours = base.unet(latents, timesteps, encoder_hidden_states=text).sample
    LycorisNetwork.LORA_PREFIX = "lora_unet"
    network, _ = create_lycoris_from_weights(1.0, str(lora), base.unet)
    network.apply_to()
    try:
        theirs = base.unet(latents, timesteps, encoder_hidden_states=text).sample
    finally:
        network.restore()
    return float((ours - theirs).abs().max())


def _say(progress: Progress) -> None:
    if progress.step % 25 == 0:
        sys.stderr.write(f"{progress.stage} {progress.step}/{progress.total}\n")


if __name__ == "__main__":
    main()
