"""Pixels to latents and back, always in fp32. Called by training, generation and the latent cache."""

import torch
from torch import Tensor

from core.memory_ladder import NO_SAVING, VaeSaving
from core.pipelines import LoadedBase, assert_vae_fp32


@torch.no_grad()
def encode_to_posterior(base: LoadedBase, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The posterior that the VAE gives each picture; a latent is `mean + std * noise`.

    Args:
        base: Its VAE encodes.
        pixels: (n, 3, h, w) in [-1, 1]; h and w multiples of `base.facts.vae_factor`.

    Returns:
        Mean and standard deviation, both (n, c, h / factor, w / factor) fp32 on the base's device,
        already multiplied by the VAE's scaling factor, so that latents have about unit variance.
    """
    assert_vae_fp32(base)
    posterior = base.vae.encode(pixels.to(base.device, torch.float32)).latent_dist
    scale = float(base.vae.config.scaling_factor)
    return posterior.mean * scale, posterior.std * scale


@torch.no_grad()
def decode_latents(base: LoadedBase, latents: Tensor, *, saving: VaeSaving = NO_SAVING) -> Tensor:
    """Pictures of latents.

    Args:
        base: Its VAE decodes.
        latents: (n, c, h, w), any float dtype; cast to the VAE's dtype here, so a half-precision UNet cannot
            pull the decoder down to half precision, which shifts colours and gives black pictures.
        saving: Of memory, for time.

    Returns:
        (n, 3, h * factor, w * factor) fp32 in [0, 1] on the base's device.
    """
    assert_vae_fp32(base)
    latents = latents.to(base.device, base.vae.dtype) / float(base.vae.config.scaling_factor)  # (n, c, h, w)
    if saving.slicing:
        base.vae.enable_slicing()
    if saving.tiling:
        base.vae.enable_tiling()
    try:
        pixels: Tensor = base.vae.decode(latents).sample  # (n, 3, H, W) in about [-1, 1]
    finally:  # The model is shared: the next request may have the memory.
        base.vae.disable_slicing()
        base.vae.disable_tiling()
    return (pixels / 2 + 0.5).clamp(0, 1)
