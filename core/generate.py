"""Prompts to pictures in one visible sequence: seeds, noise, text, denoising, decoding.

    python -m core.generate --base demo/tiny-sd-emoji --prompt "a red apple" --seed 3 --count 4 --out pictures

Called by the command line, the samples of `core.train` and the GPU worker; it leaves the model as it found it.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from core.config import GenerateConfig
from core.denoising import DenoisingRun, Slots, Track
from core.drawing import Drawing, Outcome, Request
from core.errors import CoreError, Interrupted
from core.image_guidance import (
    enlarge_latents,
    mask_cells,
    paste_masked,
    picture_latents,
    refuse_inpainting_unet,
    second_pass,
)
from core.latent_preview import preview_factors, preview_jpeg
from core.lora_utils import apply_lora
from core.memory_ladder import GENERATION_RUNGS, GenerationMemory, VaeSaving
from core.pipelines import LoadedBase
from core.progress import Progress, Report, silent
from core.text_encoding import TextCondition
from core.track_start import begin_track, check_size, encode_texts
from core.vae import decode_latents


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
    encoders = {"text_encoder": base.text_encoder, "text_encoder_2": base.text_encoder_2}
    with apply_lora(base.unet, list(loras), **encoders):
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
            drawings.append(_prepare(base, request, memory.pictures_per_forward))
        except CoreError as error:
            on_done(request, error)

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
                        _go_on(base, run, drawing, track, saving=memory.vae)
                except Interrupted as interruption:
                    finish(drawing, interruption)
                else:
                    if pictures := drawing.pictures():
                        finish(drawing, pictures)
    finally:
        if slots is not None:
            slots.deactivate()


def _prepare(base: LoadedBase, request: Request, pictures_per_forward: int) -> Drawing:
    """Everything that the tracks of a request share: text, and the picture that it begins from."""
    check_size(base, request.config.width, request.config.height)
    refuse_inpainting_unet(base)
    return Drawing(
        request,
        request.text or encode_texts(base, request.config),
        source=None if request.init_picture is None else picture_latents(base, request.init_picture),
        cells=None if request.mask is None else mask_cells(base, request.mask),
        pictures_per_forward=pictures_per_forward,
    )


def _begin_what_fits(base: LoadedBase, run: DenoisingRun, drawings: Iterable[Drawing], at_most: int) -> None:
    """First come, first served: pictures begin as far as the forward has room."""
    room = at_most - sum(len(track.latents) for track in run.tracks)
    for drawing in drawings:
        while room and (seeds := drawing.next_seeds(room)):
            track = _track_of(base, drawing, drawing.request.config, seeds, source=drawing.source)
            drawing.begin(track)
            run.join(track)
            room -= len(seeds)


def _go_on(base: LoadedBase, run: DenoisingRun, drawing: Drawing, track: Track, *, saving: VaeSaving) -> None:
    """After the last step of a track: a second pass at a larger size where one is asked for, else pictures."""
    config, mask, original = drawing.request.config, drawing.request.mask, drawing.request.init_picture
    if drawing.wants_second_pass(track):
        source = enlarge_latents(base, track.latents, config, saving=saving)  # (n, c, H, W)
        larger = second_pass(config, base.facts.bucket_step_px)
        second = _track_of(base, drawing, larger, drawing.seeds_of(track), source=source)
        drawing.go_on(track, second)
        run.join(second)
        return
    pictures = to_pictures(decode_latents(base, track.latents, saving=saving))  # from (n, 3, h, w)
    if mask is not None and original is not None:
        pictures = [paste_masked(picture, original, mask) for picture in pictures]
    drawing.end(track, pictures)


def _track_of(
    base: LoadedBase, drawing: Drawing, config: GenerateConfig, seeds: Sequence[int], *, source: Tensor | None
) -> Track:
    request = drawing.request
    track = begin_track(base, config, drawing.text, seeds, source=source, cells=drawing.cells, loras=request.loras)
    if config.preview_every_steps and seeds[0] == config.seed:

        def watch(latents: Tensor) -> None:
            drawing.preview = preview_jpeg(preview_factors(base), latents)

        track.watch, track.watch_every = watch, config.preview_every_steps
    return track


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


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """RGB pictures of (n, 3, h, w) in [0, 1]."""
    bytes_ = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # (n, h, w, 3)
    return [Image.fromarray(picture) for picture in bytes_]


if __name__ == "__main__":
    # Here and not at the top: the command imports this module.
    from core.command_line import run_command
    from core.generate_cli import main

    run_command(main)
