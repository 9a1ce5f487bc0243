"""One micro-batch and its loss, every draw a pure function of (seed, step, sample). Called by `core.train`.

`sample` counts within the effective batch, so another split into micro-batches trains on the same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.caption_variants import caption_at
from core.latent_cache import LatentCache
from core.noise_schedule import NoiseSchedule, add_noise, min_snr_weights, target
from core.randomness import normal, uniform
from core.text_cache import TextCache
from core.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """What one forward pass needs, on the training device.

    Attributes:
        latents, noise: (n, c, h, w) fp32.
        timesteps: (n,) int64.
        embeddings: (n, tokens, dim) in the text encoder's dtype.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    embeddings: Tensor


def draw_micro_batch(
    config: TrainConfig,
    step: int,
    plan: Sequence[int],
    samples: Sequence[int],
    captions: Sequence[str],
    latent_cache: LatentCache,
    text_cache: TextCache,
    timestep_count: int,
) -> MicroBatch:
    """Draw latents, noise, timesteps and captions of some samples of an effective batch.

    Timesteps are stratified: sample i of N draws from the i-th N-th of the range, which lowers the variance of the
    batch's loss and is uniform over the range all the same, since pictures come in shuffled order.

    Args:
        config: Seed, noise offset and what concerns captions are read.
        step: Optimizer step, 0-based.
        plan: Picture of each sample of the effective batch.
        samples: Which samples of it make up this micro-batch.
        captions: Of all pictures.
        latent_cache, text_cache: Of all pictures and captions.
        timestep_count: Noise levels of the base, 1000 in Stable Diffusion.
    """
    seed = config.seed
    pictures = [plan[sample] for sample in samples]
    shape = latent_cache.means[pictures[0]].shape  # (c, h, w)
    device = latent_cache.means[pictures[0]].device

    posterior_noise = torch.stack([normal(shape, seed, "posterior", step, sample) for sample in samples])
    noise = torch.stack([normal(shape, seed, "noise", step, sample) for sample in samples])  # (n, c, h, w)
    if config.noise_offset:
        offset = torch.stack([normal((shape[0], 1, 1), seed, "noise offset", step, sample) for sample in samples])
        noise = noise + config.noise_offset * offset  # (n, c, h, w) + (n, c, 1, 1)
    places = [(sample + uniform(seed, "timestep", step, sample)) / len(plan) for sample in samples]  # 0..1
    timesteps = torch.tensor([min(int(place * timestep_count), timestep_count - 1) for place in places])  # (n,)
    spoken = [
        caption_at(captions[picture], config, step, sample) for sample, picture in zip(samples, pictures, strict=True)
    ]
    return MicroBatch(
        latents=latent_cache.sample(pictures, posterior_noise.to(device)),
        noise=noise.to(device),
        timesteps=timesteps.to(device),
        embeddings=text_cache.lookup(spoken),
    )


def diffusion_loss(unet: nn.Module, schedule: NoiseSchedule, batch: MicroBatch, min_snr_gamma: float | None) -> Tensor:
    """Mean squared error of each sample, (n,) fp32, weighted by min-SNR if asked."""
    noisy = add_noise(schedule, batch.latents, batch.noise, batch.timesteps)  # (n, c, h, w)
    predicted = unet(noisy, batch.timesteps, encoder_hidden_states=batch.embeddings).sample  # (n, c, h, w)
    wanted = target(schedule, batch.latents, batch.noise, batch.timesteps)  # (n, c, h, w)
    # fp32 from here: a squared error in half precision loses the small ones.
    loss: Tensor = (predicted.float() - wanted).square().mean(dim=(1, 2, 3))  # (n,)
    if min_snr_gamma is not None:
        loss = loss * min_snr_weights(schedule, batch.timesteps, min_snr_gamma)
    return loss
