"""How pictures begin: words to embeddings, seeds to noise, and which sampler takes them from there.

Called by `core.generate`, which says when.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.config import GenerateConfig
from core.denoising import RowLoras, Track
from core.errors import ConfigError
from core.image_guidance import keep_unmasked, noisy_start
from core.pipelines import LoadedBase
from core.randomness import generator
from core.samplers import make_scheduler, timesteps_from
from core.text_encoding import TextCondition, added_conditions, encode_prompts


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


def encode_texts(base: LoadedBase, config: GenerateConfig) -> TextCondition:
    """The prompts of a request: (2, tokens, dim) with the negative one first; (1, tokens, dim) for guidance 1."""
    prompts = [config.negative_prompt, config.prompt] if config.guidance > 1 else [config.prompt]
    return encode_prompts(base, prompts, config.clip_skip, negatives=len(prompts) - 1)


def begin_track(
    base: LoadedBase,
    config: GenerateConfig,
    text: TextCondition,
    seeds: Sequence[int],
    *,
    source: Tensor | None = None,
    cells: Tensor | None = None,
    loras: RowLoras = (),
) -> Track:
    """Noise and a sampler for some pictures of a request.

    Args:
        base: Its scheduler configuration shapes the path from noise to picture.
        config: Steps, guidance, sampler, size, and how much of `source` changes.
        text: Of `encode_texts`.
        seeds: n, one per picture; all noise of a picture, also of ancestral steps, comes from its own seed.
        source: (n or 1, c, h, w) fp32, clean latents to begin from; None for noise alone.
        cells: (1, 1, h, w), 1 where `source` may change; None for everywhere.
        loras: Slots and weights.
    """
    facts = base.facts
    scheduler = make_scheduler(base.scheduler_config, config.sampler, config.schedule)
    scheduler.set_timesteps(config.steps, device=base.device)

    # Noise on the CPU: the same numbers on every device and in every batch.
    generators = [generator(seed, "picture") for seed in seeds]
    shape = (facts.latent_channels, config.height // facts.vae_factor, config.width // facts.vae_factor)
    noise = torch.stack([torch.randn(shape, generator=own) for own in generators]).to(base.device)  # (n, c, h, w)

    if source is None:
        start, latents = 0, noise * scheduler.init_noise_sigma  # (n, c, h, w) fp32
    else:
        start = timesteps_from(scheduler, config.denoising_strength)
        latents = noisy_start(scheduler, source, noise, start)  # (n, c, h, w) fp32
    after_step = None
    if source is not None and cells is not None:
        after_step = keep_unmasked(scheduler, source, noise, cells)
    pooled = None if text.pooled is None else text.pooled.repeat_interleave(len(seeds), dim=0)  # (2n or n, dim)
    return Track(
        scheduler=scheduler,
        latents=latents,
        start=start,
        text=text.embeddings.repeat_interleave(len(seeds), dim=0),  # (2n or n, tokens, dim)
        added=added_conditions(base, pooled, config.width, config.height),
        guidance=config.guidance,
        generators=generators,
        loras=loras,
        exact=config.exact,
        after_step=after_step,
    )
