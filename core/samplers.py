"""The samplers a request may name, as diffusers schedulers built from the base model's own configuration."""

from typing import Any

import diffusers
from diffusers import SchedulerMixin

from core.config import Sampler
from core.errors import BaseModelError

# What makes each scheduler the sampler of that name, whatever else the base's configuration says.
SAMPLERS: dict[Sampler, tuple[str, dict[str, Any]]] = {
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    # Its class clips x0 to [-1, 1] by default, which suits pixels, not latents.
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
}


def make_scheduler(base_scheduler_config: dict[str, Any], sampler: Sampler) -> Any:
    """A fresh scheduler; it keeps state from step to step, so each micro-batch needs its own.

    Args:
        base_scheduler_config: `scheduler_config.json` of the base: noise schedule, prediction type, time spacing.
        sampler: "default" keeps the base's own class, named under "_class_name".

    Returns:
        A diffusers scheduler.

    Raises:
        BaseModelError: The base names a scheduler that diffusers does not have.
    """
    changes: dict[str, Any]
    if sampler == "default":
        name, changes = str(base_scheduler_config.get("_class_name")), {}
    else:
        name, changes = SAMPLERS[sampler]
    scheduler_class = getattr(diffusers, name, None)
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)):
        raise BaseModelError(f"the base model names the scheduler {name!r}, which diffusers lacks: choose a sampler")
    return scheduler_class.from_config(base_scheduler_config, **changes)
