"""Noise levels, targets and min-SNR weights against diffusers' own and against the algebra they come from."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from core.errors import ConfigError
from core.noise_schedule import NoiseSchedule, PredictionType, add_noise, min_snr_weights, noise_schedule, target

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "skip_prk_steps": True}
STEPS = torch.tensor([0, 10, 500, 999])


def schedule_of(prediction: PredictionType, **changes: object) -> NoiseSchedule:
    return noise_schedule(SD15 | changes, prediction, torch.device("cpu"))


def test_noising_and_velocity_equal_those_of_diffusers() -> None:
    theirs: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    ours = schedule_of("v_prediction")
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(add_noise(ours, latents, noise, STEPS), theirs.add_noise(latents, noise, STEPS))
    torch.testing.assert_close(target(ours, latents, noise, STEPS), theirs.get_velocity(latents, noise, STEPS))


def test_an_epsilon_model_is_asked_for_the_noise() -> None:
    latents, noise = torch.randn(2, 4, 4, 8, 8)
    assert torch.equal(target(schedule_of("epsilon"), latents, noise, STEPS), noise)


def test_min_snr_weighs_epsilon_and_v_as_the_same_x0_loss() -> None:
    """An x0 error d shows up as d * signal / level in epsilon and as d / level in v, so weighted losses must agree."""
    error = 0.3
    weighted = []
    for prediction in ("epsilon", "v_prediction"):
        schedule = schedule_of(prediction)
        signal, level = schedule.signal[STEPS], schedule.noise[STEPS]
        predicted_error = error * signal / level if prediction == "epsilon" else error / level
        weighted.append(min_snr_weights(schedule, STEPS, 5.0) * predicted_error**2)
    snr = (schedule.signal[STEPS] / schedule.noise[STEPS]) ** 2
    torch.testing.assert_close(weighted[0], weighted[1])
    torch.testing.assert_close(weighted[0], error**2 * snr.clamp(max=5.0))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_weights_stay_finite_at_zero_terminal_snr(prediction: PredictionType) -> None:
    schedule = schedule_of(prediction, rescale_betas_zero_snr=True)
    assert float(schedule.signal[999]) < 1e-3
    assert torch.isfinite(min_snr_weights(schedule, torch.tensor([999]), 5.0)).all()


def test_zero_terminal_snr_ends_in_pure_noise_and_begins_as_before() -> None:
    theirs: Any = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    plain = schedule_of("v_prediction")
    ours = noise_schedule(SD15, "v_prediction", torch.device("cpu"), zero_terminal_snr=True)
    torch.testing.assert_close(ours.signal, theirs.alphas_cumprod.sqrt())
    assert float(ours.signal[999]) < 1e-3 < float(plain.signal[999])
    torch.testing.assert_close(ours.signal[0], plain.signal[0])


def test_a_base_that_predicts_noise_has_no_zero_terminal_snr() -> None:
    with pytest.raises(ConfigError, match="predict v"):
        noise_schedule(SD15, "epsilon", torch.device("cpu"), zero_terminal_snr=True)
