"""Samplers built from a base's own scheduler configuration."""

import pytest

from core.config import Sampler
from core.errors import BaseModelError
from core.samplers import make_scheduler

CONFIG = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.001,
    "beta_end": 0.015,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "skip_prk_steps": True,
    "timestep_spacing": "trailing",
}


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        ("default", "PNDMScheduler"),
        ("dpmpp_2m", "DPMSolverMultistepScheduler"),
        ("euler", "EulerDiscreteScheduler"),
        ("euler_a", "EulerAncestralDiscreteScheduler"),
        ("ddim", "DDIMScheduler"),
    ],
)
def test_every_sampler_keeps_the_bases_noise_schedule_and_prediction_type(sampler: Sampler, name: str) -> None:
    scheduler = make_scheduler(CONFIG, sampler)

    assert type(scheduler).__name__ == name
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.beta_end == 0.015
    assert scheduler.config.timestep_spacing == "trailing"


def test_ddim_does_not_clip_latents() -> None:
    assert make_scheduler(CONFIG, "ddim").config.clip_sample is False


@pytest.mark.parametrize("name", ["NoSuchScheduler", "StableDiffusionPipeline", None])
def test_an_unknown_scheduler_of_a_base_is_refused(name: str | None) -> None:
    with pytest.raises(BaseModelError, match="which diffusers lacks"):
        make_scheduler(CONFIG | {"_class_name": name}, "default")
