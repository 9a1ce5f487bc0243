"""Pixels to latents and back."""

import dataclasses
from copy import deepcopy

import pytest
import torch

from core.errors import BaseModelError
from core.pipelines import LoadedBase
from core.vae import decode_latents, encode_to_posterior


def test_the_posterior_is_that_of_the_vae_times_its_scaling_factor(tiny_base: LoadedBase) -> None:
    pixels = torch.rand(2, 3, 48, 64) * 2 - 1

    mean, std = encode_to_posterior(tiny_base, pixels)

    theirs = tiny_base.vae.encode(pixels).latent_dist
    assert mean.shape == std.shape == (2, 4, 12, 16)
    assert mean.dtype == std.dtype == torch.float32
    assert torch.allclose(mean, theirs.mean * 0.18215)
    assert torch.allclose(std, theirs.std * 0.18215)
    assert (std > 0).all()


def test_half_precision_latents_are_decoded_in_fp32(tiny_base: LoadedBase) -> None:
    latents = torch.randn(2, 4, 8, 16).half()

    pixels = decode_latents(tiny_base, latents)

    assert pixels.shape == (2, 3, 32, 64)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, decode_latents(tiny_base, latents.float()))
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert pixels.std() > 0.01


def test_a_half_precision_vae_is_refused_instead_of_giving_wrong_colours(tiny_base: LoadedBase) -> None:
    spoilt = dataclasses.replace(tiny_base, vae=deepcopy(tiny_base.vae).half())

    with pytest.raises(BaseModelError, match="shifts colours"):
        decode_latents(spoilt, torch.randn(1, 4, 8, 8))
    with pytest.raises(BaseModelError, match="shifts colours"):
        encode_to_posterior(spoilt, torch.zeros(1, 3, 32, 32))
