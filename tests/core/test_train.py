"""A training learns, and its outputs are complete and leave the base model as it was."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from core.config import GenerateConfig
from core.errors import ConfigError, TrainingDiverged
from core.generate import generate
from core.latent_cache import cache_latents
from core.lora_utils import apply_lora, read_lora, sshs_model_hash
from core.manifest import PreparedDataset
from core.pipelines import LoadedBase
from core.progress import Progress
from core.text_cache import cache_texts
from core.text_encoding import encode_prompts
from core.train import train
from core.train_config import TrainConfig
from core.vae import encode_to_posterior
from tests.core.training_parts import SQUARE, make_dataset, quick_config


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return make_dataset(tmp_path_factory.mktemp("pictures"))


def losses_of(config: TrainConfig, base: LoadedBase, dataset: PreparedDataset, folder: Path) -> list[float]:
    return train(config, base, dataset, folder).losses


def test_the_loss_falls_on_one_picture(tiny_base: LoadedBase, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "pictures", [SQUARE])
    config = quick_config(
        steps=60, batch_size=8, targets="with_conv", rank=8, alpha=8.0, lr_schedule="constant", caption_dropout=0.0,
        checkpoint_every_steps=1000,
    )  # fmt: skip
    losses = losses_of(config, tiny_base, dataset, tmp_path / "run")
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize("split", [(4, 1), (2, 2), (1, 4)])
def test_the_split_into_micro_batches_does_not_change_the_losses(
    split: tuple[int, int], tiny_base: LoadedBase, dataset: PreparedDataset, tmp_path: Path
) -> None:
    batch_size, accumulation = split
    config = quick_config(
        batch_size=batch_size, gradient_accumulation_steps=accumulation, targets="with_conv", noise_offset=0.1,
        min_snr_gamma=5.0,
    )  # fmt: skip
    whole = quick_config(batch_size=4, targets="with_conv", noise_offset=0.1, min_snr_gamma=5.0)
    ours = losses_of(config, tiny_base, dataset, tmp_path / "split")
    assert ours == pytest.approx(losses_of(whole, tiny_base, dataset, tmp_path / "whole"), abs=1e-6)


def test_gradient_checkpointing_gives_the_same_losses(
    tiny_base: LoadedBase, dataset: PreparedDataset, tmp_path: Path
) -> None:
    plain = losses_of(quick_config(), tiny_base, dataset, tmp_path / "plain")
    saving = losses_of(quick_config(gradient_checkpointing=True), tiny_base, dataset, tmp_path / "saving")
    assert saving == pytest.approx(plain, abs=1e-6)


def test_every_option_reaches_the_loss(tiny_base: LoadedBase, dataset: PreparedDataset, tmp_path: Path) -> None:
    options: list[dict[str, object]] = [
        {},
        {"min_snr_gamma": 1.0},
        {"noise_offset": 0.3},
        {"caption_dropout": 1.0},
        {"clip_skip": 1},
        {"seed": 8},
        {"mixed_precision": "bf16"},
        {"shuffle_captions": True, "caption_separator": " ", "caption_dropout": 0.0},
        {"caption_dropout": 0.0},
    ]
    first_losses = [
        losses_of(quick_config(steps=1, **option), tiny_base, dataset, tmp_path / str(number))[0]
        for number, option in enumerate(options)
    ]
    assert len(set(first_losses)) == len(options)
    v_base = replace(tiny_base, facts=tiny_base.facts.model_copy(update={"prediction_type": "v_prediction"}))
    v_loss = losses_of(quick_config(steps=1), v_base, dataset, tmp_path / "v")[0]
    zero_snr_loss = losses_of(quick_config(steps=1, zero_terminal_snr=True), v_base, dataset, tmp_path / "zero snr")[0]
    assert len({v_loss, zero_snr_loss, *first_losses}) == len(options) + 2


def test_fp16_on_a_cpu_is_refused(tiny_base: LoadedBase, dataset: PreparedDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="CUDA"):
        train(quick_config(mixed_precision="fp16"), tiny_base, dataset, tmp_path)


def test_the_base_and_the_global_generator_come_back_untouched(
    tiny_base: LoadedBase, dataset: PreparedDataset, tmp_path: Path
) -> None:
    state = {key: value.clone() for key, value in tiny_base.unet.state_dict().items()}
    modules = [id(module) for module in tiny_base.unet.modules()]
    random_state = torch.get_rng_state()
    train(quick_config(steps=2, sample_prompts=["a cat"], sample_steps=2), tiny_base, dataset, tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [id(module) for module in tiny_base.unet.modules()] == modules
    after = tiny_base.unet.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)
    assert not any(parameter.requires_grad for parameter in tiny_base.unet.parameters())


def test_a_finished_training_leaves_files_samples_and_figures(
    tiny_base: LoadedBase, dataset: PreparedDataset, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    kept: list[tuple[str, int]] = []
    config = quick_config(sample_prompts=["a red cat", "a house"], sample_steps=3, sample_every_steps=5)
    result = train(
        config, tiny_base, dataset, tmp_path, seen.append, lambda folder, step: kept.append((folder.name, step)),
        name="cats",
    )  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {
        "cats.safetensors",
        "cats-peft",
        "cats-diffusers",
        "samples",
        "checkpoints",
    }
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == [
        "step-000000", "step-000005", "step-000008",
    ]  # fmt: skip
    assert len(result.samples) == 6 and all(sample.path.is_file() for sample in result.samples)
    assert len(result.sample_files) == len(result.samples_before) == 2
    before, after = (Image.open(files[0]).tobytes() for files in (result.samples_before, result.sample_files))
    assert before != after
    assert kept == [("step-000003", 3), ("step-000006", 6), ("step-000008", 8)]
    training = [progress for progress in seen if progress.stage == "training"]
    assert [progress.step for progress in training] == list(range(1, 9))
    assert [progress.figures["loss"] for progress in training] == result.losses
    assert result.facts["sshs_model_hash"] == sshs_model_hash(result.kohya_file)
    assert (result.steps, result.facts["modules"]) == (8, len(read_lora(result.kohya_file).unet))


def test_the_exported_file_draws_the_after_picture(
    tiny_base: LoadedBase, dataset: PreparedDataset, tmp_path: Path
) -> None:
    config = quick_config(steps=4, targets="with_conv", sample_prompts=["a red cat"], sample_steps=3)
    result = train(config, tiny_base, dataset, tmp_path)
    request = GenerateConfig(
        prompt="a red cat", seed=result.samples[-1].seed, width=32, height=32, steps=3, guidance=config.sample_guidance
    )
    for lora in (result.kohya_file, result.peft_folder):
        with apply_lora(tiny_base.unet, [(lora, 1.0)]):
            picture = generate(tiny_base, request)[0]
        assert picture.tobytes() == Image.open(result.sample_files[0]).tobytes()


def test_the_metadata_is_what_kohya_and_webui_look_for(
    tiny_base: LoadedBase, dataset: PreparedDataset, tmp_path: Path
) -> None:
    result = train(quick_config(steps=2, targets="with_conv"), tiny_base, dataset, tmp_path, name="cats")
    with safe_open(result.kohya_file, "pt") as file:
        metadata = file.metadata()
    expected = {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2",
        "ss_network_args": '{"conv_dim": "4", "conv_alpha": "2"}',
        "ss_steps": "2",
        "ss_seed": "7",
        "ss_clip_skip": "2",
        "ss_mixed_precision": "no",
        "ss_num_train_images": "6",
        "ss_output_name": "cats",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.encoder_layer": "2",
    }
    assert expected.items() <= metadata.items()
    for key in ("ss_tag_frequency", "ss_dataset_dirs", "ss_bucket_info", "ss_session_id", "ss_training_started_at"):
        assert key in metadata
    assert '"style 0": 2' in metadata["ss_tag_frequency"]


def test_a_diverging_training_fails_and_publishes_nothing(
    tiny_base: LoadedBase, dataset: PreparedDataset, tmp_path: Path
) -> None:
    import copy

    broken = copy.deepcopy(tiny_base.unet)
    broken.conv_out.weight.data[0, 0, 0, 0] = math.inf
    with pytest.raises(TrainingDiverged, match="learning rate"):
        train(quick_config(), replace(tiny_base, unet=broken), dataset, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_cached_latents_are_the_posterior_of_each_picture(tiny_base: LoadedBase, dataset: PreparedDataset) -> None:
    cache = cache_latents(tiny_base, dataset)
    assert len(cache.means) == 6
    picture = Image.open(dataset.files[dataset.manifest.images[5].sha256])
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(24, 48, 3).permute(2, 0, 1)
    mean, std = encode_to_posterior(tiny_base, pixels[None].float() / 127.5 - 1)
    assert torch.equal(cache.means[5], mean[0]) and torch.equal(cache.stds[5], std[0])
    noise = torch.randn(2, 4, 6, 12)
    latents = cache.sample([5, 4], noise)
    torch.testing.assert_close(latents[0], mean[0] + std[0] * noise[0])


def test_each_caption_is_encoded_once_and_the_empty_one_is_there(tiny_base: LoadedBase) -> None:
    cache = cache_texts(tiny_base, ["a cat", "a house", "a cat"], 2, torch.float32)
    assert set(cache.rows) == {"", "a cat", "a house"}
    rows = cache.lookup(["a house", "", "a cat"])
    assert torch.equal(cache.lookup(["cat a", "a cat"])[0], encode_prompts(tiny_base, ["cat a"], 2).embeddings[0])
    assert torch.equal(cache.lookup(["cat a", "a cat"])[1], rows[2])
    assert torch.equal(rows[1:2], encode_prompts(tiny_base, [""], 2).embeddings)
    assert torch.equal(rows[2:3], encode_prompts(tiny_base, ["a cat"], 2).embeddings)


def test_a_changed_picture_is_noticed(tiny_base: LoadedBase, tmp_path: Path) -> None:
    from core.errors import DatasetError

    dataset = make_dataset(tmp_path / "pictures", [SQUARE])
    path = next(iter(dataset.files.values()))
    Image.new("RGB", SQUARE).save(path)
    with pytest.raises(DatasetError, match="has changed"):
        cache_latents(tiny_base, dataset)
