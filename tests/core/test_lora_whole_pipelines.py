"""LoRAs of UNet and text encoders in whole pipelines: diffusers and peft see what we see, and we what they wrote."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from core.lora_keys import flat_module
from core.lora_state import LoraLayer, LoraState, ModuleUpdate
from core.lora_utils import apply_lora, read_lora, write_diffusers, write_kohya, write_peft
from core.pipelines import LoadedBase
from tests.core.lora_samples import ATTENTION, CONVOLUTION

Outputs = dict[str, Tensor]
TEXT_ENDS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
UNET_ENDS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_in", "conv1", "downsamplers.0.conv", "conv_shortcut")
STRENGTH = 0.3
"""Of the random updates: enough to change every output by more than a hundred times the tolerance."""


@dataclass(frozen=True)
class Whole:
    """A base and a LoRA that changes all of it."""

    base: LoadedBase
    state: LoraState
    family: str

    def models(self) -> dict[str, Any]:
        found = {"unet": self.base.unet, "text_encoder": self.base.text_encoder}
        return found if self.family == "sd1" else found | {"text_encoder_2": self.base.text_encoder_2}

    def copies(self) -> dict[str, Any]:
        return {name: copy.deepcopy(model) for name, model in self.models().items()}

    def pipeline(self) -> Any:
        rest: dict[str, Any] = {"vae": None, "tokenizer": None, "scheduler": None}
        if self.family == "sdxl":
            return StableDiffusionXLPipeline(**self.copies(), **rest, tokenizer_2=None)
        return StableDiffusionPipeline(
            **self.copies(), **rest, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )


def random_layers(model: nn.Module, ends: tuple[str, ...], *, dora: bool = False) -> dict[str, LoraLayer]:
    """Ranks 2 and 3 in turn, for modules whose names end so."""
    source = torch.Generator().manual_seed(7)
    layers: dict[str, LoraLayer] = {}
    for name, module in model.named_modules():
        if not name.endswith(ends) or not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        weight, rank = module.weight, 2 + len(layers) % 2
        ones = [1] * (weight.dim() - 2)
        layers[name.removeprefix("text_model.")] = LoraLayer(
            down=torch.randn(rank, *weight.shape[1:], generator=source) * STRENGTH,
            up=torch.randn(weight.shape[0], rank, *ones, generator=source) * STRENGTH,
            alpha=3.0,  # where alphas differ, diffusers 0.42 misreads some of a kohya file's (`get_peft_kwargs`)
            magnitude=weight.flatten(1).norm(dim=1) * 1.5 if dora else None,
        )
    assert layers
    return layers


@pytest.fixture(scope="module")
def sdxl_unet() -> nn.Module:
    """SDXL's module tree, a tenth as wide and with shallower transformers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet: Any = UNet2DConditionModel(
            block_out_channels=(16, 32, 64), layers_per_block=2, norm_num_groups=8, sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 2), attention_head_dim=(2, 4, 8), cross_attention_dim=48,
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
        )  # fmt: skip
    unet.eval().requires_grad_(False)
    narrow: nn.Module = unet
    return narrow


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def whole(request: pytest.FixtureRequest) -> Whole:
    base: LoadedBase = request.getfixturevalue("tiny_base" if request.param == "sd1" else "tiny_sdxl_base")
    texts: dict[str, Any] = {"text_encoder": random_layers(base.text_encoder, TEXT_ENDS)}
    second = base.text_encoder_2
    if second is not None:
        # Names of SDXL files count two layers a block, which the tiny pipeline has not.
        base = replace(base, unet=request.getfixturevalue("sdxl_unet"))
        texts["text_encoder_2"] = random_layers(second, TEXT_ENDS)
    version = "sd_v1" if request.param == "sd1" else "sdxl_base_v1-0"
    state = LoraState(unet=random_layers(base.unet, UNET_ENDS), **texts, metadata={"ss_base_model_version": version})
    return Whole(base, state, request.param)


@torch.no_grad()
def outputs(models: dict[str, Any]) -> Outputs:
    """What each model makes of fixed inputs; the layers before the last too, which prompts use."""
    source = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 100, (1, 24), generator=source)
    made: Outputs = {}
    for name in models.keys() - {"unet"}:
        answer = models[name](tokens, output_hidden_states=True)
        made[f"{name} last"], made[f"{name} before"] = answer.hidden_states[-1], answer.hidden_states[-2]
        if name == "text_encoder_2":
            made["pooled"] = answer.text_embeds
    unet = models["unet"]
    added = {}
    if unet.config.addition_embed_type == "text_time":
        times = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
        wide = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(1, wide, generator=source), "time_ids": times}
    noise = torch.randn(1, 4, 8, 8, generator=source)
    words = torch.randn(1, 24, unet.config.cross_attention_dim, generator=source)
    made["unet"] = unet(noise, 500, words, added_cond_kwargs=added).sample
    return made


def ours(whole: Whole, lora: LoraState | Path) -> Outputs:
    models = whole.models()
    texts = {name: model for name, model in models.items() if name != "unet"}
    with apply_lora(models["unet"], [(lora, 1.0)], **texts):
        return outputs(models)


def assert_same(found: Outputs, expected: Outputs, untouched: Outputs) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((value - untouched[name]).abs().max()) > 1e-2, f"{name} does not depend on the LoRA"
        torch.testing.assert_close(
            found[name],
            value,
            atol=2e-5 * float(value.abs().max()),
            rtol=1e-4,
            msg=name,
        )


Writer = Callable[[Path, LoraState], None]
WRITERS: dict[str, Writer] = {
    "kohya": lambda path, state: write_kohya(path, state, dict(state.metadata)),
    "diffusers": lambda path, state: write_diffusers(path, state, dict(state.metadata)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_whole_pipeline_of_diffusers_reads_what_we_write(writer: str, whole: Whole, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    WRITERS[writer](file, whole.state)
    pipeline = whole.pipeline()
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    found = outputs({name: getattr(pipeline, name) for name in whole.models()})
    untouched = outputs(whole.models())
    assert_same(found, ours(whole, whole.state), untouched)
    assert_same(ours(whole, file), found, untouched)


@pytest.mark.parametrize("dora", [False, True])
def test_peft_reads_every_model_of_our_folder(dora: bool, whole: Whole, tmp_path: Path) -> None:
    state = whole.state
    if dora:
        texts = {
            name: random_layers(model, TEXT_ENDS, dora=True) for name, model in whole.models().items() if name != "unet"
        }
        layers: dict[str, Any] = {"unet": random_layers(whole.base.unet, UNET_ENDS, dora=True), **texts}
        state = LoraState(**layers)
    write_peft(tmp_path / "peft", state)
    models = whole.copies()
    for name in models:
        folder = tmp_path / "peft" / ("" if name == "unet" else name)
        models[name] = PeftModel.from_pretrained(models[name], str(folder)).merge_and_unload()
    untouched = outputs(whole.models())
    assert_same(outputs(models), ours(whole, state), untouched)
    assert_same(ours(whole, tmp_path / "peft"), ours(whole, state), untouched)


@pytest.mark.parametrize("with_metadata", [True, False])
def test_we_read_what_a_whole_pipeline_of_diffusers_saves(with_metadata: bool, whole: Whole, tmp_path: Path) -> None:
    parts, extra = {}, {}
    for name, layers in whole.state.components().items():
        if not layers:
            continue
        prefix = (
            ""
            if name == "unet"
            else "text_model."
            if f"text_model.{next(iter(layers))}" in dict(whole.models()[name].named_modules())
            else ""
        )
        named = {prefix + module: layer for module, layer in layers.items() if isinstance(layer, LoraLayer)}
        parts[f"{name}_lora_layers"] = {
            f"{module}.lora_{side}.weight": matrix
            for module, layer in named.items()
            for side, matrix in (("A", layer.down), ("B", layer.up))
        }
        if with_metadata:
            extra[f"{name}_lora_adapter_metadata"] = {
                "r": 2, "lora_alpha": 3.0, "target_modules": sorted(named),
                "rank_pattern": {module: layer.rank for module, layer in named.items()},
                "alpha_pattern": {module: layer.alpha for module, layer in named.items()},
            }  # fmt: skip
    kind: Any = StableDiffusionPipeline if whole.family == "sd1" else StableDiffusionXLPipeline
    kind.save_lora_weights(tmp_path, **parts, **extra)
    pipeline = whole.pipeline()
    pipeline.load_lora_weights(tmp_path)
    theirs = outputs({name: getattr(pipeline, name) for name in whole.models()})
    assert_same(ours(whole, tmp_path / "pytorch_lora_weights.safetensors"), theirs, outputs(whole.models()))


@pytest.mark.parametrize("style", ["processor.to_q_lora", "to_q_lora", "lora.down", "lora_linear_layer"])
def test_the_names_of_old_diffusers_files_mean_the_same_to_us(
    style: str, tiny_base: LoadedBase, tmp_path: Path
) -> None:
    stem = ATTENTION.removesuffix(".to_q")
    text = "text_model.encoder.layers.1.self_attn"
    layers: dict[str, dict[str, ModuleUpdate]] = {
        "unet": dict(
            random_layers(tiny_base.unet, (f"{stem}.to_q", f"{stem}.to_k", f"{stem}.to_v", f"{stem}.to_out.0"))
        ),
        "text_encoder": dict(random_layers(tiny_base.text_encoder, TEXT_ENDS[:4])),
    }
    old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    tensors = {}
    for component, part in layers.items():
        for module, layer in part.items():
            assert isinstance(layer, LoraLayer)
            name = module if component == "unet" else f"text_model.{module}"
            if style.endswith("to_q_lora"):
                parent, _, last = name.removesuffix(".0").rpartition(".")
                processor = ".processor" if style.startswith("processor") and component == "unet" else ""
                name = f"{parent}{processor}.{old.get(last, last)}_lora"
            else:
                name = f"{name}.{style.removesuffix('.down')}"
            tensors[f"{component}.{name}.down.weight"] = layer.down
            tensors[f"{component}.{name}.up.weight"] = layer.up
    save_file(tensors, tmp_path / "old.safetensors")
    back = read_lora(tmp_path / "old.safetensors")
    assert text.endswith("self_attn") and CONVOLUTION not in back.unet
    for component, part in layers.items():
        read = {flat_module(component, name): layer for name, layer in back.components()[component].items()}
        assert read.keys() == {flat_module(component, name) for name in part}
        for module, layer in part.items():
            assert isinstance(layer, LoraLayer)
            torch.testing.assert_close(read[flat_module(component, module)].delta(), layer.delta() / layer.scale)
    models = {"text_encoder": tiny_base.text_encoder}
    apply_lora(tiny_base.unet, [(back, 1.0)], **models).remove()
