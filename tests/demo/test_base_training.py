"""Pieces of the base model's training that decide whether a stop costs anything."""

from pathlib import Path

import numpy as np
import pytest
import torch

from demo import base_vae
from demo.base_checkpoint import Trained
from demo.base_denoiser import make_unet, training_loss
from demo.base_latents import LatentTable
from demo.base_pictures import BACKGROUNDS, HUES, Thing


def steps(trained: Trained, layer: torch.nn.Linear, count: int) -> None:
    for _ in range(count):
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(trained.step))
        trained.update(layer(inputs).square().mean(), 0.01)


def a_layer() -> torch.nn.Linear:
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    return layer


def test_a_training_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole = a_layer()
    straight = Trained(dict(whole.named_parameters()), average_decay=0.9, weight_decay=0.01)
    steps(straight, whole, 6)

    first = a_layer()
    stopped = Trained(dict(first.named_parameters()), average_decay=0.9, weight_decay=0.01)
    steps(stopped, first, 3)
    stopped.save(tmp_path / "checkpoint.safetensors")
    second = a_layer()
    resumed = Trained(dict(second.named_parameters()), average_decay=0.9, weight_decay=0.01)
    resumed.load(tmp_path / "checkpoint.safetensors")
    steps(resumed, second, 3)

    assert torch.equal(whole.weight, second.weight)
    assert torch.equal(straight.average["weight"], resumed.average["weight"])


def test_weights_and_their_average_change_places_and_back() -> None:
    layer = a_layer()
    trained = Trained(dict(layer.named_parameters()), average_decay=0.9, weight_decay=0)
    steps(trained, layer, 3)
    before, average = layer.weight.detach().clone(), trained.average["weight"].clone()

    trained.swap()

    assert torch.equal(layer.weight, average)
    trained.swap()
    assert torch.equal(layer.weight, before)


def test_a_batch_of_latents_depends_on_seed_and_step_alone() -> None:
    things = [
        Thing(words=(name,), rgba=np.zeros((64, 64, 4), np.float32), hue=hue)
        for name, hue in (("apple", 0), ("owl", None))
    ]
    variants = [(0, colour, ground) for colour in (None, *HUES) for ground in BACKGROUNDS]
    variants += [(1, None, ground) for ground in BACKGROUNDS]
    table = LatentTable(torch.arange(len(variants)).float().view(-1, 1, 1, 1).expand(-1, 4, 2, 2), variants)

    latents, captions = table.batch(things, 0, 7, 64)
    again, same = table.batch(things, 0, 7, 64)
    other, _ = table.batch(things, 0, 8, 64)

    assert torch.equal(latents, again)
    assert captions == same
    assert not torch.equal(latents, other)
    for row, words in zip(latents[:, 0, 0, 0].long().tolist(), captions, strict=True):
        number, colour, ground = variants[row]
        assert not words or things[number].words[0] in words
        assert not words or colour is None or colour in words
        assert not words or ground == "white" or ground in words


@pytest.mark.parametrize("step", [0, 1])
def test_a_fresh_vae_draws_colours_before_any_training(step: int) -> None:
    rgba = torch.zeros(1, 4, 64, 64)
    rgba[:, 0, 16:48, 16:48] = 0.9
    rgba[:, 3, 16:48, 16:48] = 1
    sprites = base_vae.Sprites(rgba=rgba)
    vae = base_vae.make_vae()

    _, psnr_db = base_vae.loss(vae, base_vae.batch(sprites, 0, step), 0, step)

    assert psnr_db > 15


def test_the_unet_learns_to_tell_two_captions_apart() -> None:
    torch.manual_seed(0)
    unet = make_unet(16)
    trained = Trained(dict(unet.named_parameters()), average_decay=0.9, weight_decay=0)
    latents = torch.stack([torch.ones(4, 16, 16), -torch.ones(4, 16, 16)] * 2)
    text = torch.stack([torch.ones(4, 16), -torch.ones(4, 16)] * 2)
    alpha_bar = torch.linspace(0.99, 0.001, 1000)
    for step in range(12):
        trained.update(training_loss(unet, latents, text, alpha_bar, 0, step), 2e-3)
    with torch.no_grad():
        right = float(training_loss(unet, latents, text, alpha_bar, 1, 0))
        wrong = float(training_loss(unet, latents, text.flip(0), alpha_bar, 1, 0))

    assert right < wrong
