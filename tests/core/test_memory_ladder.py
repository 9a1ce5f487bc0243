"""Every rung of the memory ladder needs less and gives the same; memory errors are injected, since a CPU has plenty."""

import numpy as np
import pytest
import torch
from PIL import Image

from core.checkpoint import RunIdentity
from core.config import GenerateConfig
from core.generate import generate
from core.memory_ladder import (
    FRUGAL,
    GENERATION_RUNGS,
    NO_SAVING,
    VaeSaving,
    generation_memory,
    training_at,
    training_rungs,
)
from core.pipelines import LoadedBase
from core.randomness import normal
from core.train_config import TrainConfig
from core.vae import decode_latents

CONFIG = GenerateConfig(prompt="a red apple", width=64, height=64, steps=2, sampler="ddim", seed=5, count=9)


def _pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def test_every_rung_draws_the_same_pictures_in_smaller_forwards(tiny_base: LoadedBase) -> None:
    sizes: list[list[int]] = []
    pictures = []
    for memory in GENERATION_RUNGS:
        sizes.append([])
        hook = tiny_base.unet.register_forward_pre_hook(lambda module, inputs: sizes[-1].append(len(inputs[0])))
        try:
            pictures.append(_pixels(generate(tiny_base, CONFIG, memory=memory)))
        finally:
            hook.remove()
    assert [max(seen) for seen in sizes] == [16, 16, 8, 4, 2]
    for drawn in pictures[1:]:
        assert np.abs(drawn - pictures[0]).max() <= 1


@pytest.mark.parametrize(("fits", "rung"), [(16, 0), (8, 2), (5, 3), (2, 4)])
def test_a_request_that_does_not_fit_succeeds_on_the_first_rung_that_does(
    tiny_base: LoadedBase, fits: int, rung: int
) -> None:
    def run_out(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    whole = _pixels(generate(tiny_base, CONFIG))
    hook = tiny_base.unet.register_forward_pre_hook(run_out)
    try:
        for tried in range(len(GENERATION_RUNGS)):
            try:
                drawn = _pixels(generate(tiny_base, CONFIG, memory=generation_memory(tried)))
                break
            except torch.OutOfMemoryError:
                continue
    finally:
        hook.remove()
    assert tried == rung
    assert np.abs(drawn - whole).max() <= 1
    assert np.array_equal(_pixels(generate(tiny_base, CONFIG)), whole), "nothing of the failed tries is left behind"


def test_slices_decode_the_same_and_tiles_nearly_the_same_and_neither_stays_switched_on(tiny_base: LoadedBase) -> None:
    native = normal((3, 4, 16, 16), 1, "latents")  # 64 px, the native size: sliced only
    large = normal((1, 4, 32, 32), 1, "latents")  # 128 px: sliced and tiled
    assert torch.allclose(
        decode_latents(tiny_base, native, saving=FRUGAL), decode_latents(tiny_base, native), atol=1e-5
    )
    tiled, whole = decode_latents(tiny_base, large, saving=FRUGAL), decode_latents(tiny_base, large)
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.05
    assert not torch.equal(tiled, whole), "the tiles are really there"
    assert not tiny_base.vae.use_slicing
    assert not tiny_base.vae.use_tiling


def test_slices_and_tiles_can_be_switched_on_and_off_whatever_the_rung() -> None:
    assert generation_memory(0).vae == NO_SAVING
    assert generation_memory(1).vae == FRUGAL
    assert generation_memory(0, slicing="on").vae == VaeSaving(slicing=True)
    assert generation_memory(0, tiling="on").vae == VaeSaving(tiling=True)
    assert generation_memory(4, tiling="off").vae == VaeSaving(slicing=True)
    assert generation_memory(4, slicing="off", tiling="off").vae == NO_SAVING
    assert generation_memory(4, tiling="off").pictures_per_forward == 1


def test_each_saving_alone_does_only_its_own(tiny_base: LoadedBase) -> None:
    large = normal((2, 4, 32, 32), 1, "latents")
    whole = decode_latents(tiny_base, large)
    assert torch.allclose(decode_latents(tiny_base, large, saving=VaeSaving(slicing=True)), whole, atol=1e-5)
    tiled = decode_latents(tiny_base, large, saving=VaeSaving(tiling=True))
    assert (tiled - whole).abs().max() > 1e-3


def test_a_training_saves_memory_first_by_checkpointing_and_then_by_halves() -> None:
    rungs = training_rungs(TrainConfig(batch_size=8, gradient_accumulation_steps=2))
    assert [(c.gradient_checkpointing, c.batch_size, c.gradient_accumulation_steps) for c, _ in rungs] == [
        (False, 8, 2),
        (True, 8, 2),
        (True, 4, 4),
        (True, 2, 8),
        (True, 1, 16),
    ]


def test_a_batch_without_a_half_goes_to_single_pictures() -> None:
    rungs = training_rungs(TrainConfig(batch_size=6, gradient_checkpointing=True))
    assert [(config.batch_size, config.gradient_accumulation_steps) for config, _ in rungs] == [(6, 1), (3, 2), (1, 6)]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 64])
def test_no_rung_changes_what_a_checkpoint_belongs_to(batch_size: int) -> None:
    config = TrainConfig(batch_size=batch_size, gradient_accumulation_steps=3)
    hashes = {RunIdentity.of(each, "dataset", "base").config_hash for each, _ in training_rungs(config)}
    assert len(hashes) == 1


def test_beyond_the_last_rung_there_is_no_other_way() -> None:
    config = TrainConfig(batch_size=2)
    assert training_at(config, 99) == training_rungs(config)[-1][0]
    assert generation_memory(99) == GENERATION_RUNGS[-1]
