"""Trains the demo's base model from nothing: pictures, tokenizer, VAE, then text encoder and UNet together, export.

    python -m demo.train_base vae       --work var/base-training --steps 15000
    python -m demo.train_base diffusion --work var/base-training --steps 20000

Run by hand when the model changes; hours on one CPU core. Every stage goes on from its checkpoint, written every 3
minutes, and its data depends on (seed, step) alone. The learning rate is flat for three quarters of `--steps`, then
falls to zero. The newest model lies in `model/` of the work folder, an ordinary pipeline folder.
"""

import argparse
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from demo import base_text, base_vae
from demo.base_checkpoint import Trained
from demo.base_denoiser import make_unet, training_loss
from demo.base_latents import build_table
from demo.base_pictures import fetch_emoji, read_things

logger = logging.getLogger("demo.train_base")

SEED = 0
SAVE_SECONDS = 180.0
SHEET_SECONDS = 1800.0
BATCH = 32
LEARNING_RATE = 1e-3
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    # Twice the usual: less of the picture's mean is left at the last step, so that backgrounds follow the words.
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "steps_offset": 1,
}


def train_vae(work: Path, steps: int) -> None:
    """Stage 1: pictures to latents and back."""
    sprites = base_vae.Sprites(rgba=_all_emoji(fetch_emoji(work)))
    vae = base_vae.make_vae()
    trained = Trained(dict(vae.named_parameters()), average_decay=0.999, weight_decay=1e-3)

    def step_loss(step: int) -> tuple[Tensor, float]:
        return base_vae.loss(vae, base_vae.batch(sprites, SEED, step), SEED, step)

    _run(trained, step_loss, work / "vae.safetensors", steps, base_vae.LEARNING_RATE, "psnr_db")
    trained.swap()
    white = sprites.rgba[:, :3] + 1 - sprites.rgba[:, 3:]
    base_vae.standardise(vae, white[::4] * 2 - 1)
    vae.save_pretrained(work / "vae")


def train_diffusion(work: Path, steps: int) -> None:
    """Stage 2: words to latents."""
    things = read_things(fetch_emoji(work))
    tokenizer = base_text.make_tokenizer(things, work)
    vae: Any = AutoencoderKL.from_pretrained(work / "vae")
    table = build_table(vae, things, work / "latents.safetensors")
    text_encoder = base_text.make_text_encoder(tokenizer, things, table)
    unet = make_unet(text_encoder.config.hidden_size)
    parameters = {f"unet.{name}": p for name, p in unet.named_parameters()}
    parameters |= {f"text.{name}": p for name, p in text_encoder.named_parameters()}
    trained = Trained(parameters, average_decay=0.9995, weight_decay=0.01)
    scheduler: Any = DPMSolverMultistepScheduler(**SCHEDULE)
    alpha_bar: Tensor = scheduler.alphas_cumprod

    def step_loss(step: int) -> tuple[Tensor, float]:
        latents, captions = table.batch(things, SEED, step, BATCH)
        ids = torch.tensor(tokenizer(captions, padding="max_length", truncation=True).input_ids)
        loss = training_loss(unet, latents, text_encoder(ids)[0], alpha_bar, SEED, step)
        return loss, float(loss.detach())

    def look(step: int) -> None:
        trained.swap()
        export(work, work / "model", unet, text_encoder, tokenizer)
        trained.swap()
        logger.info("exported step=%d samples=%d folder=%s", step, step * BATCH, work / "model")

    _run(trained, step_loss, work / "diffusion.safetensors", steps, LEARNING_RATE, "loss", look)


def export(work: Path, folder: Path, unet: Any, text_encoder: Any, tokenizer: Any) -> None:
    """An ordinary pipeline folder: UNet, text encoder and VAE in fp16, `lorasite.json` with the default CLIP skip."""
    vae: Any = AutoencoderKL.from_pretrained(work / "vae")
    scheduler = DPMSolverMultistepScheduler(
        **SCHEDULE, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing"
    )
    with torch.random.fork_rng():  # copies, since .half() works in place
        halves = [type(part).from_config(part.config) for part in (unet, vae)]
        text_half = type(text_encoder)(text_encoder.config)
    for half, part in zip([*halves, text_half], [unet, vae, text_encoder], strict=True):
        half.load_state_dict(part.state_dict())
        half.half()
    pipeline: Any = StableDiffusionPipeline(
        vae=halves[1], text_encoder=text_half, tokenizer=tokenizer, unet=halves[0], scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    base_text.save_plain_files(tokenizer, partial / "tokenizer")
    (partial / "lorasite.json").write_text(json.dumps({"default_clip_skip": 1}) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _run(
    trained: Trained,
    step_loss: Callable[[int], tuple[Tensor, float]],
    checkpoint: Path,
    steps: int,
    learning_rate: float,
    figure: str,
    look: Callable[[int], None] | None = None,
) -> None:
    """Step from the checkpoint to `steps`: loss, update, log, save."""
    if checkpoint.is_file():
        trained.load(checkpoint)
        logger.info("going on stage=%s step=%d", checkpoint.stem, trained.step)
    saved = looked = logged = time.monotonic()
    figures: list[float] = []
    while trained.step < steps:
        part = trained.step / steps
        fall = 1.0 if part < 0.75 else 0.5 * (1 + math.cos(math.pi * (part - 0.75) / 0.25))
        loss, value = step_loss(trained.step)
        trained.update(loss, learning_rate * min(1, (trained.step + 1) / 200) * fall)
        figures.append(value)
        now = time.monotonic()
        if now - logged > 30:
            logger.info(
                "stage=%s step=%d/%d %s=%.4f steps_per_second=%.2f",
                checkpoint.stem, trained.step, steps, figure, np.mean(figures), len(figures) / (now - logged),
            )  # fmt: skip
            figures, logged = [], now
        if now - saved > SAVE_SECONDS:
            trained.save(checkpoint)
            saved = now
        if look and now - looked > SHEET_SECONDS:
            look(trained.step)
            looked = now
    trained.save(checkpoint)
    if look:
        look(trained.step)


def _all_emoji(package: Path) -> Tensor:
    """(n, 4, 64, 64) in [0, 1], colours multiplied by alpha: all pictures of the package, for the VAE alone."""
    entries = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
    pictures = []
    for entry in entries:
        if entry["has_img_google"]:
            with Image.open(package / "img" / "google" / "64" / entry["image"]) as picture:
                pictures.append(np.asarray(picture.convert("RGBA")))
    rgba = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    rgba[:, :3] *= rgba[:, 3:]
    return rgba


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m demo.train_base", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=["vae", "diffusion"])
    parser.add_argument(
        "--work", type=Path, default=Path("var/base-training"), help="checkpoints and data (%(default)s)"
    )
    parser.add_argument("--steps", type=int, required=True, help="steps in all, those of earlier runs included")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    given.work.mkdir(parents=True, exist_ok=True)
    {"vae": train_vae, "diffusion": train_diffusion}[given.stage](given.work, given.steps)


if __name__ == "__main__":
    main()
