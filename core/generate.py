"""Prompts to pictures in one visible sequence: seeds, noise, text, denoising, decoding.

    python -m core.generate --base demo/tiny-sd-emoji --prompt "a red apple" --seed 3 --count 4 --out pictures

Called by the command line, the samples of `core.train` and the GPU worker; it leaves the model as it found it.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from core.config import GenerateConfig
from core.denoising import DenoisingRun, RowLoras, Slots, Track
from core.drawing import Drawing, Outcome, Request
from core.errors import ConfigError, CoreError, Interrupted
from core.lora_utils import apply_lora
from core.memory_ladder import GENERATION_RUNGS, GenerationMemory
from core.pipelines import LoadedBase
from core.progress import Progress, Report, silent
from core.randomness import generator
from core.samplers import make_scheduler
from core.text_encoding import TextCondition, encode_prompts
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
    (outcome,) = generate_together(base, [Request(config=config, report=report)], loras, memory=memory)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def generate_together(
    base: LoadedBase,
    requests: Sequence[Request],
    loras: Sequence[tuple[Path, float]] = (),
    *,
    memory: GenerationMemory = GENERATION_RUNGS[0],
) -> list[Outcome]:
    """Draw several requests of one base at once.

    Args:
        base: The model; its weights are not changed.
        requests: They may differ in everything.
        loras: Of all of them alike, beside those in slots that each has of its own.
        memory: How much to save.

    Returns:
        Per request its pictures in seed order, equal to rounding to those it gets alone; or what stopped it alone.

    Raises:
        LoraFileError: A LoRA does not fit the base.
    """
    outcomes: dict[Request, Outcome] = {}
    with apply_lora(base.unet, list(loras), text_encoder=base.text_encoder):
        generate_as_they_come(base, requests, outcomes.__setitem__, memory=memory)
    return [outcomes[request] for request in requests]


def nobody(room: int) -> Sequence[Request]:
    """A `join` for a run that nobody joins."""
    return ()


def generate_as_they_come(
    base: LoadedBase,
    requests: Iterable[Request],
    on_done: Callable[[Request, Outcome], None],
    *,
    join: Callable[[int], Sequence[Request]] = nobody,
    memory: GenerationMemory = GENERATION_RUNGS[0],
    slots: Slots | None = None,
) -> None:
    """Draw requests that come and go: each begins as soon as there is room and is handed out when it is done.

    Args:
        base: The model; its weights are not changed.
        requests: The first ones.
        on_done: Called once per request, with its pictures or with what stopped it alone.
        join: Asked before each step, with the number of pictures that there is room for; returns who joins.
        memory: Pictures per forward, and how they are decoded.
        slots: Holds the LoRAs that requests name.
    """
    run = DenoisingRun(base, slots)
    drawings: list[Drawing] = []  # in the order in which they came

    def admit(request: Request) -> None:
        try:
            check_size(base, request.config.width, request.config.height)
            text = request.text or encode_texts(base, request.config)
        except CoreError as error:
            on_done(request, error)
        else:
            drawings.append(Drawing(request, text, memory.pictures_per_forward))

    def finish(drawing: Drawing, outcome: Outcome) -> None:
        drawings.remove(drawing)
        for track in set(drawing.tracks) & set(run.tracks):
            run.leave(track)
        on_done(drawing.request, outcome)

    for request in requests:
        admit(request)
    try:
        while True:
            room = memory.pictures_per_forward - sum(drawing.unfinished for drawing in drawings)
            for request in join(max(0, room)):
                admit(request)
            if not drawings:
                return
            _begin_what_fits(base, run, drawings, memory.pictures_per_forward)
            run.step()
            for drawing in tuple(drawings):
                try:
                    drawing.tell()
                    for track in drawing.ended():
                        pixels = decode_latents(base, track.latents, frugal=memory.frugal_vae)  # (n, 3, h, w)
                        drawing.end(track, to_pictures(pixels))
                except Interrupted as interruption:
                    finish(drawing, interruption)
                else:
                    if pictures := drawing.pictures():
                        finish(drawing, pictures)
    finally:
        if slots is not None:
            slots.deactivate()


def _begin_what_fits(base: LoadedBase, run: DenoisingRun, drawings: Iterable[Drawing], at_most: int) -> None:
    """First come, first served: pictures begin as far as the forward has room."""
    room = at_most - sum(len(track.latents) for track in run.tracks)
    for drawing in drawings:
        while room and (seeds := drawing.next_seeds(room)):
            request = drawing.request
            track = begin_track(base, request.config, drawing.text, seeds, loras=request.loras)
            drawing.begin(track)
            run.join(track)
            room -= len(seeds)


def encode_texts(base: LoadedBase, config: GenerateConfig) -> TextCondition:
    """The prompts of a request: (2, tokens, dim) with the negative one first; (1, tokens, dim) for guidance 1."""
    prompts = [config.negative_prompt, config.prompt] if config.guidance > 1 else [config.prompt]
    return encode_prompts(base, prompts, config.clip_skip)


def begin_track(
    base: LoadedBase, config: GenerateConfig, text: TextCondition, seeds: Sequence[int], *, loras: RowLoras = ()
) -> Track:
    """Noise and a sampler for some pictures of a request.

    Args:
        base: Its scheduler configuration shapes the path from noise to picture.
        config: Steps, guidance, sampler, size.
        text: Of `encode_texts`.
        seeds: n, one per picture; all noise of a picture, also of ancestral steps, comes from its own seed.
        loras: Slots and weights.
    """
    facts = base.facts
    scheduler = make_scheduler(base.scheduler_config, config.sampler)
    scheduler.set_timesteps(config.steps, device=base.device)

    # Noise on the CPU: the same numbers on every device and in every batch.
    generators = [generator(seed, "picture") for seed in seeds]
    shape = (facts.latent_channels, config.height // facts.vae_factor, config.width // facts.vae_factor)
    noise = torch.stack([torch.randn(shape, generator=own) for own in generators])  # (n, c, h, w)
    return Track(
        scheduler=scheduler,
        latents=noise.to(base.device) * scheduler.init_noise_sigma,  # (n, c, h, w) fp32
        text=text.embeddings.repeat_interleave(len(seeds), dim=0),  # (2n or n, tokens, dim)
        guidance=config.guidance,
        generators=generators,
        loras=loras,
        exact=config.exact,
    )


def denoise(
    base: LoadedBase, config: GenerateConfig, embeddings: Tensor, seeds: Sequence[int], report: Report = silent
) -> Tensor:
    """From noise to latents for some pictures, without decoding them.

    Args:
        base: Its UNet predicts.
        config: Steps, guidance, sampler, size.
        embeddings: (2, tokens, dim) with the unconditional prompt first; (1, tokens, dim) for guidance 1.
        seeds: n, one per picture.
        report: Called after each step.

    Returns:
        (n, c, h / factor, w / factor) fp32 on the base's device.
    """
    run = DenoisingRun(base)
    track = begin_track(base, config, TextCondition(embeddings=embeddings, pooled=None), seeds)
    run.join(track)
    while not track.is_done:
        run.step()
        report(Progress(stage="denoising", step=track.steps_done, total=track.steps))
    return track.latents


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


if __name__ == "__main__":
    # Here and not at the top: the command imports this module.
    from core.command_line import run_command
    from core.generate_cli import main

    run_command(main)
