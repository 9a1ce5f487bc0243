"""Small pictures of latents under way."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from core.latent_preview import MAX_BYTES, denoised_estimate, preview_factors, preview_jpeg
from core.pipelines import LoadedBase
from core.randomness import generator
from core.samplers import make_scheduler


def test_the_map_is_fitted_once_and_always_the_same(tiny_base: LoadedBase) -> None:
    first = preview_factors(tiny_base)

    assert first.shape == (5, 3)
    assert torch.isfinite(first).all()
    assert preview_factors(tiny_base) is first


def test_a_linear_vae_is_found_exactly(tiny_base: LoadedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    from core import latent_preview

    to_latent = torch.randn((4, 3), generator=generator(1, "map"))

    def encode(base: LoadedBase, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cells = torch.nn.functional.avg_pool2d(pixels, base.facts.vae_factor)
        return torch.einsum("nrhw,cr->nchw", cells, to_latent) + 0.3, torch.zeros(1)

    monkeypatch.setattr(latent_preview, "encode_to_posterior", encode)
    factors = latent_preview._fit(tiny_base)
    colour = torch.tensor([200.0, 40.0, 90.0])
    latents = (to_latent @ (colour / 127.5 - 1) + 0.3)[:, None, None].expand(4, 8, 8)

    picture = np.asarray(Image.open(io.BytesIO(preview_jpeg(factors, latents))))

    assert np.abs(picture.astype(int).mean((0, 1)) - [200, 40, 90]).max() <= 3


@pytest.mark.parametrize("shape", [(4, 16, 16), (4, 96, 64), (4, 128, 128), (4, 4, 250)])
def test_previews_are_small_jpegs_that_are_longest_at_256_px(tiny_base: LoadedBase, shape: tuple[int, ...]) -> None:
    noise = torch.randn(shape, generator=generator(2, "noise")) * 5

    file = preview_jpeg(preview_factors(tiny_base), noise)

    with Image.open(io.BytesIO(file)) as picture:
        assert (picture.format, max(picture.size)) == ("JPEG", 256)
    assert len(file) <= MAX_BYTES


def test_latents_that_are_no_numbers_give_a_picture_all_the_same(tiny_base: LoadedBase) -> None:
    assert preview_jpeg(preview_factors(tiny_base), torch.full((4, 8, 8), float("nan")))


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_estimate_of_the_clean_latents_is_right_where_the_noise_is_known(
    tiny_base: LoadedBase, sampler: str, prediction_type: str
) -> None:
    config = tiny_base.scheduler_config | {"prediction_type": prediction_type}
    scheduler = make_scheduler(config, sampler)  # type: ignore[arg-type]
    scheduler.set_timesteps(10)
    clean, noise = (torch.randn((1, 4, 8, 8), generator=generator(3, word)) for word in ("clean", "noise"))
    timestep = scheduler.timesteps[4]
    alpha = scheduler.alphas_cumprod[int(timestep)]
    noisy = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
    velocity = alpha**0.5 * noise - (1 - alpha) ** 0.5 * clean

    estimate = denoised_estimate(scheduler, noisy, noise if prediction_type == "epsilon" else velocity, timestep)

    assert torch.allclose(estimate, clean, atol=1e-3)
