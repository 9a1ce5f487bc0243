"""What makes a picture begin from another one: img2img, inpainting, the second pass at a larger size.

Pure functions, called where `core.generate` begins a track; they know nothing of requests under way.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.nn import functional

from core.config import GenerateConfig
from core.errors import BaseModelError, ConfigError
from core.image_gate import normalise, open_image
from core.memory_ladder import NO_SAVING, VaeSaving
from core.pipelines import LoadedBase
from core.vae import decode_latents, encode_to_posterior

MASK_BLUR_PX = 4
"""Radius by which the border of a mask is softened where the picture is put together (WebUI's default)."""


def read_init_picture(path: Path, width: int, height: int) -> Image.Image:
    """An RGB picture of exactly that size: scaled to cover it, the rest cut off evenly at both ends.

    Raises:
        ImageRejected: The file is no picture that may be opened.
    """
    return ImageOps.fit(normalise(open_image(path)), (width, height), Image.Resampling.LANCZOS)


def read_mask(path: Path, width: int, height: int) -> Image.Image:
    """A grey picture ("L"): 255 where the picture may change; fitted as its picture is.

    Raises:
        ImageRejected: The file is no picture that may be opened.
        ConfigError: Nothing of it is white.
    """
    mask = ImageOps.fit(normalise(open_image(path)).convert("L"), (width, height), Image.Resampling.BILINEAR)
    if mask.point(lambda value: 255 if value >= 128 else 0).getbbox() is None:
        raise ConfigError("the mask has no white part, so nothing may change: paint white what is to be drawn anew")
    return mask


def picture_latents(base: LoadedBase, picture: Image.Image) -> Tensor:
    """(1, c, h / factor, w / factor) fp32 on the base's device: the mean of the VAE's posterior, free of chance.

    Args:
        base: Its VAE encodes.
        picture: RGB; sides multiples of `base.facts.vae_factor`.
    """
    pixels = torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32))  # (h, w, 3) in [0, 255]
    mean, _ = encode_to_posterior(base, pixels.permute(2, 0, 1)[None] / 127.5 - 1)
    return mean


def mask_cells(base: LoadedBase, mask: Image.Image) -> Tensor:
    """(1, 1, h / factor, w / factor) fp32 on the base's device, 1 for each cell that holds any white, else 0.

    Args:
        base: Gives the size of a cell.
        mask: Of `read_mask`; sides multiples of `base.facts.vae_factor`.
    """
    white = torch.from_numpy(np.array(mask, dtype=np.float32))[None, None] >= 128  # (1, 1, h, w)
    return functional.max_pool2d(white.float(), base.facts.vae_factor).to(base.device)


def noisy_start(scheduler: Any, latents: Tensor, noise: Tensor, start: int) -> Tensor:
    """Latents as they would look on their way before step `start`.

    Args:
        scheduler: After `set_timesteps` and `core.samplers.timesteps_from`, which says where to start.
        latents: (n or 1, c, h, w) fp32, clean: of `picture_latents` or a first pass.
        noise: (n, c, h, w) fp32 of unit variance, each picture's from its own seed; not yet multiplied by
            `init_noise_sigma`.
        start: Index into `scheduler.timesteps`.

    Returns:
        (n, c, h, w) fp32, ready for `Track.latents` with `Track.start = start`.
    """
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    timestep = scheduler.timesteps[start : start + 1].to(noise.device)  # (1,)
    noisy: Tensor = scheduler.add_noise(latents.expand_as(noise), noise, timestep)  # (n, c, h, w)
    return noisy


def keep_unmasked(scheduler: Any, latents: Tensor, noise: Tensor, cells: Tensor) -> Callable[[Tensor, int], Tensor]:
    """What to do after each step so that only the masked part changes; for `Track.after_step`.

    Args:
        scheduler: The track's own.
        latents: (n or 1, c, h, w) fp32, the clean latents of the picture.
        noise: (n, c, h, w) fp32, the same as in `noisy_start`.
        cells: (1, 1, h, w) of `mask_cells`.

    Returns:
        A function of the latents after a step (n, c, h, w) and the position of the next step, giving latents of the
        same shape.
    """

    def blend(changed: Tensor, position: int) -> Tensor:
        kept = latents.expand_as(changed)  # (n, c, h, w)
        if position < len(scheduler.timesteps):
            if not getattr(scheduler, "state_in_first_order", True):
                return changed  # Half a step: the sampler itself goes back from here.
            timestep = scheduler.timesteps[position : position + 1].to(changed.device)  # (1,)
            kept = scheduler.add_noise(kept, noise, timestep)  # (n, c, h, w)
        return torch.where(cells > 0, changed, kept)

    return blend


def paste_masked(drawn: Image.Image, original: Image.Image, mask: Image.Image) -> Image.Image:
    """The drawn picture inside the mask, the original pixels outside: the VAE shifts even what did not change.

    Args:
        drawn: RGB.
        original: RGB of the same size.
        mask: Of `read_mask`, the same size.
    """
    return Image.composite(drawn, original, mask.filter(ImageFilter.GaussianBlur(MASK_BLUR_PX)))


def second_pass(config: GenerateConfig, step_px: int) -> GenerateConfig:
    """The request of the second pass of `config.hires`: same prompts and seeds, larger, begun from the first pass.

    Args:
        config: With `hires`.
        step_px: `base.facts.bucket_step_px`; sides are rounded to multiples of it.

    Returns:
        A configuration without `hires`, with its `denoising_strength` and steps. Sides may pass the 2048 px of a
        first pass.
    """
    if config.hires is None:
        raise ConfigError("this request asks for no second pass (hires is null)")
    width, height = (
        max(1, round(side * config.hires.scale / step_px)) * step_px for side in (config.width, config.height)
    )
    return config.model_copy(
        update={
            "width": width,
            "height": height,
            "steps": config.hires.steps or config.steps,
            "denoising_strength": config.hires.denoising_strength,
            "hires": None,
        }
    )


def enlarge_latents(
    base: LoadedBase, latents: Tensor, config: GenerateConfig, *, saving: VaeSaving = NO_SAVING
) -> Tensor:
    """Latents of the first pass at the size of the second.

    Args:
        base: Its VAE decodes and encodes where the upscaler works on pixels.
        latents: (n, c, h, w) fp32, the end of the first pass.
        config: The request with `hires`.
        saving: As in `core.vae.decode_latents`.

    Returns:
        (n, c, H, W) fp32 on the base's device, clean: what `noisy_start` takes.
    """
    larger = second_pass(config, base.facts.bucket_step_px)
    factor = base.facts.vae_factor
    if config.hires is not None and config.hires.upscaler == "latent":
        size = (larger.height // factor, larger.width // factor)
        return functional.interpolate(latents, size=size, mode="bilinear", antialias=False)  # (n, c, H, W)
    rows = []
    for latent in latents:
        pixels = decode_latents(base, latent[None], saving=saving)[0]  # (3, h, w) in [0, 1]
        bytes_ = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()  # (h, w, 3)
        picture = Image.fromarray(bytes_).resize((larger.width, larger.height), Image.Resampling.LANCZOS)
        rows.append(picture_latents(base, picture))  # (1, c, H, W)
    return torch.cat(rows)


def refuse_inpainting_unet(base: LoadedBase) -> None:
    """Only UNets that see latents and nothing else are run here.

    Raises:
        BaseModelError: It wants the mask and the masked picture as further channels (inpainting checkpoints, 9).
    """
    channels = int(base.unet.config.in_channels)
    if channels != base.facts.latent_channels:
        raise BaseModelError(
            f"this base model's UNet takes {channels} channels instead of {base.facts.latent_channels}: it is an "
            "inpainting (9) or editing (8) checkpoint. Use the ordinary checkpoint of the same model: a mask works "
            "with any of those"
        )
