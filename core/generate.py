"""Prompts to pictures in one visible sequence: seeds, noise, text, denoising, decoding.

    python -m core.generate --base demo/tiny-sd-emoji --prompt "a red apple" --seed 3 --count 4 --out pictures

Called by the command line, the samples of `core.train` and the GPU worker; it leaves the model as it found it.
"""

import inspect
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from core.base_source import fetch_source
from core.command_line import ProgressBar, add_config_options, parser, read_config, run_command
from core.config import GenerateConfig
from core.errors import ConfigError, Interrupted
from core.file_hash import hash_file
from core.generation_party import NobodyLeft, Party
from core.image_files import infotext, save_png
from core.lora_utils import apply_lora
from core.memory_ladder import GENERATION_RUNGS, GenerationMemory
from core.pipelines import LoadedBase, load_base, pick_device
from core.prepared_base import DEFAULT_CACHE_FOLDER, ensure_prepared
from core.progress import Progress, Report, silent
from core.randomness import generator
from core.samplers import make_scheduler
from core.text_encoding import encode_prompts, resolve_clip_skip
from core.vae import decode_latents

logger = logging.getLogger(__name__)


def generate(
    base: LoadedBase,
    config: GenerateConfig,
    loras: Sequence[tuple[Path, float]] = (),
    report: Report = silent,
    *,
    memory: GenerationMemory = GENERATION_RUNGS[0],
) -> list[Image.Image]:
    """Draw `config.count` pictures.

    Args:
        base: The model; its weights are not changed.
        config: The request; the LoRAs it names are the caller's to find.
        loras: Files and their weights, applied together and taken off again, whatever happens.
        report: Called after each denoising step; may raise `core.errors.Interrupted`, which stops the work.
        memory: How much to save.

    Returns:
        RGB pictures, in the order of `config.seeds()`. A seed gives the same picture, to rounding, whatever
        other seeds are in the request.

    Raises:
        ConfigError: Size or clip skip do not fit the base.
        LoraFileError: A LoRA does not fit the base.
    """
    (pictures,) = generate_together(base, [config], loras, [report], memory=memory)
    if isinstance(pictures, Interrupted):
        raise pictures
    return pictures


def generate_together(
    base: LoadedBase,
    configs: Sequence[GenerateConfig],
    loras: Sequence[tuple[Path, float]],
    reports: Sequence[Report],
    *,
    memory: GenerationMemory = GENERATION_RUNGS[0],
) -> list[list[Image.Image] | Interrupted]:
    """Draw several requests at once that differ in nothing but prompts, seeds and counts.

    Args:
        base: The model; its weights are not changed.
        configs: The requests, >= 1.
        loras: Of all of them alike.
        reports: One per request, called after each step; a request whose report raises `core.errors.Interrupted`
            drops out, the others go on.
        memory: How much to save.

    Returns:
        Per request its pictures in seed order, equal to rounding to those it gets alone; or what its report raised.

    Raises:
        ConfigError: Size or clip skip do not fit the base, or the requests do not fit each other.
        LoraFileError: A LoRA does not fit the base.
    """
    started = time.monotonic()
    shared = configs[0]
    check_size(base, shared.width, shared.height)
    _check_alike(configs)
    party = Party(reports, [config.count for config in configs], shared.steps, memory.pictures_per_forward)
    with apply_lora(base.unet, list(loras), text_encoder=base.text_encoder):
        guided = shared.guidance > 1
        texts = []  # per request (2 or 1, tokens, dim)
        for config in configs:
            prompts = [config.negative_prompt, config.prompt] if guided else [config.prompt]
            texts.append(encode_prompts(base, prompts, config.clip_skip).embeddings)
        while chunk := party.next_chunk():
            seeds = [configs[member].seed + number for member, number in chunk]
            embeddings = torch.stack([texts[member] for member, _ in chunk], dim=1).flatten(0, 1)  # (2n or n, t, d)
            try:
                latents = denoise(base, shared, embeddings, seeds, party.report)  # (n, c, h, w)
            except NobodyLeft:
                continue
            party.add(to_pictures(decode_latents(base, latents, frugal=memory.frugal_vae)))
    results = party.results()
    logger.info(
        "generated requests=%d count=%d size=%dx%d steps=%d sampler=%s loras=%d seconds=%.2f",
        len(configs), sum(config.count for config in configs), shared.width, shared.height, shared.steps,
        shared.sampler, len(loras), time.monotonic() - started,
    )  # fmt: skip
    return results


@torch.no_grad()
def denoise(
    base: LoadedBase, config: GenerateConfig, embeddings: Tensor, seeds: Sequence[int], report: Report = silent
) -> Tensor:
    """From noise to latents for one micro-batch.

    Args:
        base: Its UNet predicts, its scheduler configuration shapes the path.
        config: Steps, guidance, sampler, size.
        embeddings: Of one prompt, (2, tokens, dim) with the unconditional one first, (1, tokens, dim) for guidance 1;
            or of one prompt per seed, (2n, tokens, dim) with all unconditional ones first, (n, tokens, dim).
        seeds: n, one per picture; all noise of a picture, also of ancestral steps, comes from its own seed.
        report: Called after each step.

    Returns:
        (n, c, h / factor, w / factor) fp32 on the base's device.
    """
    facts = base.facts
    scheduler = make_scheduler(base.scheduler_config, config.sampler)
    scheduler.set_timesteps(config.steps, device=base.device)
    guided = config.guidance > 1
    if len(embeddings) == (2 if guided else 1):
        embeddings = embeddings.repeat_interleave(len(seeds), dim=0)
    text = embeddings.to(base.dtype)  # (2n or n, tokens, dim)

    # Noise on the CPU: the same numbers on every device and in every batch.
    generators = [generator(seed, "picture") for seed in seeds]
    shape = (facts.latent_channels, config.height // facts.vae_factor, config.width // facts.vae_factor)
    noise = torch.stack([torch.randn(shape, generator=own) for own in generators])  # (n, c, h, w)
    latents: Tensor = noise.to(base.device) * scheduler.init_noise_sigma  # (n, c, h, w) fp32

    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    step_options = {"generator": generators} if takes_generator else {}
    total = len(scheduler.timesteps)
    for step, timestep in enumerate(scheduler.timesteps, start=1):
        model_input = scheduler.scale_model_input(latents, timestep)  # (n, c, h, w)
        model_input = torch.cat([model_input, model_input]) if guided else model_input  # (2n or n, c, h, w)
        prediction = base.unet(model_input.to(base.dtype), timestep, encoder_hidden_states=text).sample.float()
        if guided:
            unconditional, conditional = prediction.chunk(2)  # (n, c, h, w) each
            prediction = unconditional + config.guidance * (conditional - unconditional)
        latents = scheduler.step(prediction, timestep, latents, **step_options).prev_sample
        report(Progress(stage="denoising", step=step, total=total))
    return latents


def check_size(base: LoadedBase, width: int, height: int) -> None:
    """Refuse sizes that the UNet cannot halve evenly.

    Raises:
        ConfigError: Names the nearest sizes that fit.
    """
    step = base.facts.bucket_step_px
    for name, value in (("width", width), ("height", height)):
        if value % step:
            below, above = value // step * step, (value // step + 1) * step
            nearest = f"{below} or {above}" if below else f"{above}"
            raise ConfigError(f"{name} {value} is no multiple of {step}, as this base model needs: use {nearest}")


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """RGB pictures of (n, 3, h, w) in [0, 1]."""
    bytes_ = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # (n, h, w, 3)
    return [Image.fromarray(picture) for picture in bytes_]


def _check_alike(configs: Sequence[GenerateConfig]) -> None:
    fields = ("width", "height", "steps", "guidance", "sampler", "clip_skip", "loras")
    for name in fields:
        if len({getattr(config, name) for config in configs}) > 1:
            raise ConfigError(f"requests that are drawn together differ in {name}: draw them one by one")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module; `--help` explains it."""
    options = parser(
        "core.generate",
        "Draw pictures with a base model, with or without LoRAs. Each picture is written as PNG with its parameters "
        "in it; a seed gives the same picture again.",
        example='python -m core.generate --base demo/tiny-sd-emoji --prompt "a red apple" --seed 3 --out pictures',
    )
    options.add_argument("--base", required=True, help="pipeline folder (prepared or not), or a Hugging Face id")
    options.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    options.add_argument("--lora", type=Path, action="append", default=[], help="LoRA file; may be given several times")
    options.add_argument(
        "--lora-weight", type=float, action="append", default=[], help="weight of each --lora in order; 1 where missing"
    )
    options.add_argument("--device", help="cpu, cuda, cuda:1 ...; the first GPU where there is one by default")
    options.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE_FOLDER, help="folder of prepared bases (%(default)s)"
    )
    native = "the base's native size"
    add_config_options(options, GenerateConfig, skip={"loras"}, defaults={"width": native, "height": native})
    given = options.parse_args(arguments)
    if len(given.lora_weight) > len(given.lora):
        raise ConfigError(f"{len(given.lora_weight)} --lora-weight for {len(given.lora)} --lora: give each LoRA one")
    missing = [path for path in given.lora if not path.is_file()]
    if missing:
        raise ConfigError(f"--lora {missing[0]} is no file: give the path of a LoRA file (.safetensors)")
    weights = given.lora_weight + [1.0] * (len(given.lora) - len(given.lora_weight))
    prepared = ensure_prepared(fetch_source(given.base), given.cache)
    size = prepared.facts.native_size_px
    given.width, given.height = given.width or size, given.height or size
    uses = [{"sha256": hash_file(path), "weight": weight} for path, weight in zip(given.lora, weights, strict=True)]
    config = read_config(GenerateConfig, given, loras=uses)

    base = load_base(prepared.folder, device=given.device or pick_device())
    bar = ProgressBar()
    try:
        pictures = generate(base, config, list(zip(given.lora, weights, strict=True)), bar)
    finally:
        bar.close()
    names = [path.name for path in given.lora]
    clip_skip = resolve_clip_skip(base, config.clip_skip)
    for seed, picture in zip(config.seeds(), pictures, strict=True):
        path = given.out / f"{config.content_hash()[:8]}-seed-{seed}.png"
        save_png(picture, path, infotext(config, seed, Path(given.base).name, names, clip_skip=clip_skip))
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    run_command(main)
