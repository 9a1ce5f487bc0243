"""The samplers and schedules a request may name, as diffusers schedulers built from the base's own configuration."""

from typing import Any

import diffusers
import torch
from diffusers import PNDMScheduler, SchedulerMixin

from core.config import Sampler, Schedule
from core.errors import BaseModelError, ConfigError
from core.quiet_libraries import quiet_libraries
from core.sampler_variants import LinearMultistep, SpacedEulerAncestral
from core.webui_names import WEBUI_NAMES, WEBUI_SCHEDULES

__all__ = ["SAMPLERS", "SCHEDULES", "WEBUI_NAMES", "WEBUI_SCHEDULES", "make_scheduler", "timesteps_from"]

# What makes each scheduler the sampler of that name, whatever else the base's configuration says.
SAMPLERS: dict[Sampler, tuple[str, dict[str, Any]]] = {
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    # diffusers' DPMSolverSDE wants torchsde, whose Brownian tree ties a picture's noise to its batch.
    "dpmpp_sde": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LinearMultistep", {}),
    # Its class clips x0 to [-1, 1] by default, which suits pixels, not latents.
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
}

SCHEDULES: dict[Schedule, dict[str, Any]] = {
    "default": {},
    "uniform": {"timestep_spacing": "linspace"},
    "sgm_uniform": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
}

# The schedule that WebUI takes for these when asked for "Automatic" (its modules/sd_samplers_kdiffusion.py).
AUTOMATIC: dict[Sampler, Schedule] = {
    "dpmpp_2m": "karras",
    "dpmpp_sde": "karras",
    "dpmpp_2m_sde": "exponential",
    "dpmpp_3m_sde": "exponential",
    "dpm2": "karras",
    "dpm2_a": "karras",
}

_VARIANTS = {"LinearMultistep": LinearMultistep}


def make_scheduler(base_scheduler_config: dict[str, Any], sampler: Sampler, schedule: Schedule = "default") -> Any:
    """A fresh scheduler; it keeps state from step to step, so each micro-batch needs its own.

    Args:
        base_scheduler_config: `scheduler_config.json` of the base: noise schedule, prediction type, time spacing.
        sampler: "default" keeps the base's own class, named under "_class_name".
        schedule: "default" keeps the base's own spacing.

    Returns:
        A diffusers scheduler. Where its `step` takes a generator, give it one per picture.

    Raises:
        BaseModelError: The base names a scheduler that diffusers does not have.
        ConfigError: The sampler knows no such schedule.
    """
    quiet_libraries()
    if schedule == "automatic":
        schedule = AUTOMATIC.get(sampler, "default")
    changes: dict[str, Any]
    if sampler == "default":
        name, changes = str(base_scheduler_config.get("_class_name")), {}
    else:
        name, changes = SAMPLERS[sampler]
    spacing = SCHEDULES[schedule]
    if sampler == "euler_a" and schedule in ("karras", "exponential"):
        spaced = SpacedEulerAncestral.from_config(base_scheduler_config)
        spaced.spacing = spacing
        return spaced
    scheduler_class = _VARIANTS.get(name) or getattr(diffusers, name, None)
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)):
        raise BaseModelError(f"the base model names the scheduler {name!r}, which diffusers lacks: choose a sampler")
    scheduler = scheduler_class.from_config(base_scheduler_config, **changes, **spacing)
    if any(scheduler.config.get(key) != value for key, value in spacing.items()) or (spacing and sampler == "lcm"):
        raise ConfigError(
            f"sampler {sampler!r} knows no schedule {schedule!r}: choose schedule default or another sampler"
        )
    return scheduler


def timesteps_from(scheduler: Any, strength: float) -> int:
    """Where to begin on a picture instead of on noise.

    Args:
        scheduler: After `set_timesteps`.
        strength: 0-1, the share of its steps to take; at least one is taken.

    Returns:
        Index into `scheduler.timesteps` of the first one to take, for `Track(start=...)`.

    Raises:
        ConfigError: The base's own sampler can begin on noise alone.
    """
    steps = int(scheduler.num_inference_steps)
    skipped = steps - max(1, min(int(steps * strength), steps))
    counts = isinstance(scheduler, PNDMScheduler)
    if counts and not scheduler.config.skip_prk_steps:
        raise ConfigError(
            "the base's own sampler (PNDM with Runge-Kutta steps) cannot begin on a picture: name another"
        )
    if counts:
        # It takes its first step twice, and finds the second half of it by counting.
        timesteps = scheduler.timesteps
        once = torch.cat([timesteps[:1], timesteps[2:]])[skipped:]  # (steps - skipped,)
        scheduler.timesteps = torch.cat([once[:2], once[1:]])
        return 0
    return skipped * int(scheduler.order)
