"""How much noise each timestep holds, and what the UNet should answer. Pure tensor functions, called by the loss."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from core.errors import ConfigError

PredictionType = Literal["epsilon", "v_prediction"]

# What defines the noise levels; a scheduler's other settings are about sampling.
LEVEL_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSchedule:
    """Noise levels of a base model.

    Attributes:
        signal: (timesteps,) fp32, sqrt(alpha_bar): how much of the picture is left.
        noise: (timesteps,) fp32, sqrt(1 - alpha_bar): how much noise is in it.
        prediction_type: What the UNet predicts.
    """

    signal: Tensor
    noise: Tensor
    prediction_type: PredictionType

    @property
    def timesteps(self) -> int:
        """Number of noise levels, 1000 in Stable Diffusion."""
        return self.signal.shape[0]


def noise_schedule(
    scheduler_config: dict[str, Any],
    prediction_type: PredictionType,
    device: torch.device,
    zero_terminal_snr: bool = False,
) -> NoiseSchedule:
    """The levels that a base model was trained with, from its scheduler's configuration.

    Args:
        scheduler_config: Of the base.
        prediction_type: What its UNet predicts.
        device: Of the result.
        zero_terminal_snr: Rescale the levels so that the last one is pure noise (arXiv 2305.08891, algorithm 1).

    Raises:
        ConfigError: `zero_terminal_snr` for a base that predicts the noise: from pure noise it would learn nothing.
    """
    if zero_terminal_snr and prediction_type == "epsilon":
        raise ConfigError("zero_terminal_snr is for bases that predict v, this one predicts the noise: leave it out")
    levels = {key: scheduler_config[key] for key in LEVEL_KEYS if key in scheduler_config}
    if zero_terminal_snr:
        levels["rescale_betas_zero_snr"] = True
    scheduler: Any = DDPMScheduler(**levels)
    alpha_bar: Tensor = scheduler.alphas_cumprod  # (timesteps,)
    return NoiseSchedule(
        signal=alpha_bar.sqrt().to(device, torch.float32),
        noise=(1 - alpha_bar).sqrt().to(device, torch.float32),
        prediction_type=prediction_type,
    )


def add_noise(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """signal(t) * latents + noise(t) * noise: (n, c, h, w) from twice (n, c, h, w) and (n,) int64."""
    signal, level = _levels(schedule, timesteps)
    return signal * latents + level * noise


def target(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet should predict, (n, c, h, w): the noise, or v = signal * noise - level * latents (2202.00512)."""
    if schedule.prediction_type == "epsilon":
        return noise
    signal, level = _levels(schedule, timesteps)
    return signal * noise - level * latents


def min_snr_weights(schedule: NoiseSchedule, timesteps: Tensor, gamma: float) -> Tensor:
    """Loss weights of min-SNR (arXiv 2303.09556), (n,) fp32.

    The paper weighs an x0 loss by min(SNR, gamma). The same in terms of what is predicted here: an epsilon loss is
    SNR times an x0 loss, a v loss SNR + 1 times.
    """
    signal, level = schedule.signal[timesteps], schedule.noise[timesteps]  # (n,), (n,)
    # A schedule rescaled to zero terminal SNR would divide 0 by 0 at its last step; the limit there is 1 for epsilon.
    snr = (signal / level).square().clamp(min=1e-8)
    return snr.clamp(max=gamma) / (snr if schedule.prediction_type == "epsilon" else snr + 1)


def _levels(schedule: NoiseSchedule, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    shape = (-1, 1, 1, 1)
    return schedule.signal[timesteps].view(shape), schedule.noise[timesteps].view(shape)  # (n, 1, 1, 1) each
