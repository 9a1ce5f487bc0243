"""What a picture under way looks like, for a thousandth of the cost of decoding it: a linear map from latent to RGB.

The map is fitted once per VAE on colour patches; `core.generate` calls it between steps.
"""

import io
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.pipelines import LoadedBase
from core.vae import encode_to_posterior

MAX_BYTES = 16 * 1024
LONGEST_SIDE_PX = 256
_PATCHES, _CELLS = 8, 4  # patches per side of the fitted picture; latent cells per side of a patch
_GREY_LEVELS = (0.0, 85.0, 170.0, 255.0)

_fitted: WeakKeyDictionary[torch.nn.Module, Tensor] = WeakKeyDictionary()


def preview_factors(base: LoadedBase) -> Tensor:
    """The map of this base's VAE, (c + 1, 3) fp32 on the CPU: rows for the channels, the last for the constant.

    Kept as long as the VAE is; the first call encodes one picture (0.1 s on a CPU for a small VAE).
    """
    factors = _fitted.get(base.vae)
    if factors is None:
        factors = _fitted[base.vae] = _fit(base)
    return factors


def denoised_estimate(scheduler: Any, model_input: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
    """What the model thinks that the clean latents are: far clearer than the noisy ones.

    Args:
        scheduler: Knows the noise schedule (`alphas_cumprod`) and the kind of prediction.
        model_input: (n, c, h, w) fp32, the scaled latents that the UNet saw (half of `Track.model_input` under
            guidance).
        prediction: (n, c, h, w) fp32, its answer after guidance.
        timestep: 0-dim, may be fractional.

    Returns:
        (n, c, h, w) fp32.
    """
    alphas: Tensor = scheduler.alphas_cumprod  # (1000,)
    position = float(timestep)
    below = min(max(int(position), 0), len(alphas) - 1)
    above = min(below + 1, len(alphas) - 1)
    # Between two steps of the schedule the logarithm is nearly straight.
    log_alpha = torch.lerp(alphas[below].log(), alphas[above].log(), min(max(position - below, 0.0), 1.0))
    alpha: float = log_alpha.exp().item()
    if scheduler.config.prediction_type == "v_prediction":
        estimate: Tensor = alpha**0.5 * model_input - (1 - alpha) ** 0.5 * prediction  # (n, c, h, w)
    else:
        estimate = (model_input - (1 - alpha) ** 0.5 * prediction) / alpha**0.5  # (n, c, h, w)
    return estimate


def preview_jpeg(factors: Tensor, latents: Tensor) -> bytes:
    """A small JPEG of one picture.

    Args:
        factors: Of `preview_factors`.
        latents: (c, h, w), any device and float dtype; best those of `denoised_estimate`.

    Returns:
        At most 16 KiB; the longest side is 256 px.
    """
    cells = latents.detach().float().cpu()  # (c, h, w)
    rgb = torch.einsum("chw,cr->hwr", cells, factors[:-1]) + factors[-1]  # (h, w, 3) in about [0, 255]
    small = Image.fromarray(torch.nan_to_num(rgb).clamp(0, 255).round().to(torch.uint8).numpy())
    scale = LONGEST_SIDE_PX / max(small.size)
    picture = small.resize((max(1, round(small.width * scale)), max(1, round(small.height * scale))))
    for quality in (75, 50, 25, 10):
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=quality)
        if file.tell() <= MAX_BYTES:
            break
    return file.getvalue()


def _fit(base: LoadedBase) -> Tensor:
    """Least squares from the latents of colour patches to their colours."""
    # All 64 colours of four levels per channel, in an order that puts unlike ones beside each other.
    colours = np.array([(r, g, b) for r in _GREY_LEVELS for g in _GREY_LEVELS for b in _GREY_LEVELS], dtype=np.float32)
    colours = colours[np.arange(64) * 37 % 64].reshape(_PATCHES, _PATCHES, 3)
    cells = torch.from_numpy(colours).repeat_interleave(_CELLS, 0).repeat_interleave(_CELLS, 1)  # (h, w, 3)
    factor = base.facts.vae_factor
    pixels = cells.repeat_interleave(factor, 0).repeat_interleave(factor, 1)  # (h * factor, w * factor, 3)
    latents, _ = encode_to_posterior(base, pixels.permute(2, 0, 1)[None] / 127.5 - 1)  # (1, c, h, w)
    inputs = latents[0].flatten(1).T.cpu().double()  # (cells, c)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)  # (cells, c + 1)
    factors: Tensor = torch.linalg.lstsq(inputs, cells.reshape(-1, 3).double()).solution  # (c + 1, 3)
    return factors.float()
