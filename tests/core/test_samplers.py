"""Samplers built from a base's own scheduler configuration."""

import inspect
import typing
from collections.abc import Sequence

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from core.config import Sampler, Schedule
from core.errors import BaseModelError, ConfigError
from core.pipelines import LoadedBase
from core.randomness import generator
from core.sampler_variants import lms_weights
from core.samplers import WEBUI_NAMES, WEBUI_SCHEDULES, make_scheduler, timesteps_from
from core.text_encoding import encode_prompts

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


SAMPLERS: tuple[Sampler, ...] = typing.get_args(Sampler)
PAIRS: list[tuple[Sampler, Schedule]] = [
    *((sampler, "default") for sampler in SAMPLERS),
    *((sampler, "karras") for sampler in SAMPLERS if sampler not in ("default", "ddim", "pndm", "lcm")),
    *((sampler, "exponential") for sampler in ("euler_a", "dpmpp_2m_sde", "unipc")),
    *((sampler, "sgm_uniform") for sampler in ("euler", "ddim", "pndm", "dpmpp_2m")),
    *((sampler, "uniform") for sampler in ("euler_a", "ddim", "dpmpp_2m")),
]


def draw(
    base: LoadedBase, sampler: Sampler, schedule: Schedule, seeds: Sequence[int], *, steps: int = 5, strength: float = 1
) -> Tensor:
    """Latents of some pictures that go through the UNet together, (n, c, h, w)."""
    scheduler = make_scheduler(base.scheduler_config, sampler, schedule)
    scheduler.set_timesteps(steps)
    start = timesteps_from(scheduler, strength)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    generators = [generator(seed, "picture") for seed in seeds]
    latents = torch.stack([torch.randn((4, 8, 8), generator=own) for own in generators]) * scheduler.init_noise_sigma
    takes = "generator" in inspect.signature(scheduler.step).parameters
    text = encode_prompts(base, ["a red apple"], None).embeddings.repeat(len(seeds), 1, 1)
    with torch.no_grad():
        for timestep in scheduler.timesteps[start:]:
            model_input = scheduler.scale_model_input(latents, timestep)
            # Random weights predict anything; a tenth of it keeps latents in the range of a trained model's.
            prediction = 0.1 * base.unet(model_input, timestep, encoder_hidden_states=text).sample
            options = {"generator": generators} if takes else {}
            latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
    return latents


@pytest.mark.parametrize(("sampler", "schedule"), PAIRS)
def test_a_picture_is_finite_repeatable_and_the_same_alone_as_among_others(
    tiny_base: LoadedBase, sampler: Sampler, schedule: Schedule
) -> None:
    three = draw(tiny_base, sampler, schedule, [3, 4, 5])
    again = draw(tiny_base, sampler, schedule, [3, 4, 5])
    alone = draw(tiny_base, sampler, schedule, [4])

    assert torch.isfinite(three).all()
    assert torch.equal(three, again)
    assert (three[1] - alone[0]).abs().max() <= 1e-4 * max(1.0, float(alone.std()))
    assert (three[0] - three[1]).abs().max() > 0.1


@pytest.mark.parametrize(("sampler", "schedule"), PAIRS)
@pytest.mark.parametrize("strength", [0.0, 0.75])
def test_every_sampler_can_begin_on_its_way(
    tiny_base: LoadedBase, sampler: Sampler, schedule: Schedule, strength: float
) -> None:
    assert torch.isfinite(draw(tiny_base, sampler, schedule, [3], strength=strength)).all()


@pytest.mark.parametrize(("strength", "taken"), [(0.0, 1), (0.05, 1), (0.4, 4), (0.75, 7), (1.0, 10)])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "ddim", "unipc"])
def test_strength_is_the_share_of_the_steps_that_are_taken_and_at_least_one(
    sampler: Sampler, strength: float, taken: int
) -> None:
    scheduler = make_scheduler(CONFIG, sampler)
    scheduler.set_timesteps(10)

    assert len(scheduler.timesteps) - timesteps_from(scheduler, strength) == taken


def test_samplers_of_two_forwards_per_step_begin_with_a_whole_step() -> None:
    for sampler in ("heun", "dpm2", "dpm2_a"):
        scheduler = make_scheduler(CONFIG, sampler)
        scheduler.set_timesteps(10)
        assert timesteps_from(scheduler, 0.4) == 12


def test_plms_keeps_its_doubled_first_step_wherever_it_begins() -> None:
    scheduler = make_scheduler(CONFIG | {"timestep_spacing": "leading"}, "pndm")
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == [900, 800, 800, 700, 600, 500, 400, 300, 200, 100, 0]

    assert timesteps_from(scheduler, 0.4) == 0
    assert scheduler.timesteps.tolist() == [300, 200, 200, 100, 0]


def test_all_samplers_and_schedules_have_names_in_webui() -> None:
    assert set(WEBUI_NAMES) == set(SAMPLERS)
    assert set(WEBUI_SCHEDULES) == set(typing.get_args(Schedule))
    assert len(set(WEBUI_NAMES.values())) == len(WEBUI_NAMES)


def test_automatic_is_what_webui_takes_for_the_sampler() -> None:
    assert make_scheduler(CONFIG, "dpmpp_2m", "automatic").config.use_karras_sigmas is True
    assert make_scheduler(CONFIG, "dpmpp_2m_sde", "automatic").config.use_exponential_sigmas is True
    assert make_scheduler(CONFIG, "euler", "automatic").config.use_karras_sigmas is False


def test_euler_a_with_karras_has_the_noise_levels_of_euler_with_karras() -> None:
    ancestral, plain = make_scheduler(CONFIG, "euler_a", "karras"), make_scheduler(CONFIG, "euler", "karras")
    for scheduler in (ancestral, plain):
        scheduler.set_timesteps(8)

    assert torch.equal(ancestral.sigmas, plain.sigmas)
    assert not torch.equal(plain.sigmas, EulerDiscreteScheduler.from_config(CONFIG).sigmas[:9])


def test_a_schedule_that_a_sampler_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="'ddim' knows no schedule 'karras'"):
        make_scheduler(CONFIG, "ddim", "karras")


def test_lms_weights_integrate_a_cubic_exactly_and_begin_as_euler() -> None:
    sigmas = [9.0, 6.5, 4.0, 2.5, 1.0, 0.0]
    (first,) = lms_weights(sigmas, 0, 1)
    weights = lms_weights(sigmas, 3, 4)

    assert first == pytest.approx(6.5 - 9.0)
    got = sum(weight * sigmas[3 - back] ** 3 for back, weight in enumerate(weights))
    assert got == pytest.approx((sigmas[4] ** 4 - sigmas[3] ** 4) / 4)
