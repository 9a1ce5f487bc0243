"""Preparing a base model: facts, dtypes, refusals, fingerprint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import core.prepared_base as prepared_base
from core.errors import BaseModelError
from core.prepared_base import ensure_prepared, open_prepared, prepare_base
from tests.tiny_models import (
    BUCKET_STEP_PX,
    MAX_TOKENS,
    NATIVE_SIZE_PX,
    VAE_FACTOR,
    make_tiny_pipeline,
    make_tiny_sdxl_pipeline,
)


@pytest.fixture
def source(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that a test may damage."""
    return Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "source"))


def _edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _dtypes(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def test_facts_are_read_from_the_configuration_files(source: Path, tmp_path: Path) -> None:
    facts = prepare_base(source, tmp_path / "out").facts

    assert facts.dump() == {
        "family": "sd1",
        "default_clip_skip": 2,
        "prediction_type": "epsilon",
        "max_tokens": MAX_TOKENS,
        "vae_factor": VAE_FACTOR,
        "bucket_step_px": BUCKET_STEP_PX,
        "native_size_px": NATIVE_SIZE_PX,
        "latent_channels": 4,
        "text_layers": 3,
    }


def test_v_prediction_and_a_clip_skip_override_are_read(tmp_path: Path) -> None:
    source = make_tiny_pipeline(tmp_path / "v", prediction_type="v_prediction")
    (source / "lorasite.json").write_text('{"default_clip_skip": 1}')

    facts = prepare_base(source, tmp_path / "out").facts

    assert facts.prediction_type == "v_prediction"
    assert facts.default_clip_skip == 1


def test_the_default_clip_skip_never_passes_the_text_encoders_layers(tmp_path: Path) -> None:
    source = make_tiny_pipeline(tmp_path / "one", text_layers=1)

    assert prepare_base(source, tmp_path / "out").facts.default_clip_skip == 1


def test_half_precision_is_kept_and_the_vae_is_fp32(tmp_path: Path) -> None:
    source = make_tiny_pipeline(tmp_path / "half", dtype=torch.float16)
    vae = source / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(vae).items()}, vae)

    folder = prepare_base(source, tmp_path / "out").folder

    assert _dtypes(folder / "unet" / "diffusion_pytorch_model.safetensors") == {"F16"}
    assert _dtypes(folder / "text_encoder" / "model.safetensors") == {"F16"}
    assert _dtypes(folder / "vae" / "diffusion_pytorch_model.safetensors") == {"F32"}


def test_a_prepared_base_is_an_ordinary_pipeline_folder_with_the_same_weights(source: Path, tmp_path: Path) -> None:
    folder = prepare_base(source, tmp_path / "out").folder

    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)

    ours = pipeline.unet.state_dict()
    theirs = load_file(source / "unet" / "diffusion_pytorch_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_fp16_variant_is_taken_where_there_is_no_other(source: Path, tmp_path: Path) -> None:
    for folder, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (source / folder / f"{stem}.safetensors").rename(source / folder / f"{stem}.fp16.safetensors")

    prepared = prepare_base(source, tmp_path / "out")

    assert "unet/diffusion_pytorch_model.safetensors" in prepared.files


def test_an_sdxl_folder_is_prepared_with_both_its_text_encoders(tmp_path: Path) -> None:
    source = make_tiny_sdxl_pipeline(tmp_path / "xl", dtype=torch.float16)

    prepared = prepare_base(source, tmp_path / "out")

    assert (prepared.facts.family, prepared.facts.default_clip_skip, prepared.facts.text_layers) == ("sdxl", 2, 3)
    assert prepared.facts.max_tokens == MAX_TOKENS
    assert _dtypes(prepared.folder / "text_encoder_2" / "model.safetensors") == {"F16"}
    assert _dtypes(prepared.folder / "vae" / "diffusion_pytorch_model.safetensors") == {"F32"}
    pipeline = StableDiffusionXLPipeline.from_pretrained(prepared.folder, local_files_only=True)
    theirs = load_file(source / "text_encoder_2" / "model.safetensors")
    assert torch.equal(pipeline.text_encoder_2.text_projection.weight.half(), theirs["text_projection.weight"])


def test_an_sdxl_unet_that_takes_no_sizes_is_refused(tmp_path: Path) -> None:
    source = make_tiny_sdxl_pipeline(tmp_path / "xl")
    _edit_json(source / "unet" / "config.json", addition_embed_type=None)

    with pytest.raises(BaseModelError, match="instead of sizes"):
        prepare_base(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "tokenizer_2 is None"),
        ("model_index.json", {"_class_name": ["pipeline", "MyPipeline"]}, "only StableDiffusionPipeline"),
        ("model_index.json", {"unet": ["my_unet", "MyUNet"]}, "not from diffusers or transformers"),
        ("model_index.json", {"safety_checker": ["evil", "Checker"]}, "not from diffusers or transformers"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae is"),
        ("unet/config.json", {"in_channels": 9}, "inpainting"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "SDXL"),
        ("unet/config.json", {"use_linear_projection": True}, "SD 2.x"),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "code.Model"}}, "own code"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type"),
        ("lorasite.json", {"default_clip_skip": 0}, "may hold only"),
        ("lorasite.json", {"something": 1}, "may hold only"),
    ],
)
def test_what_is_no_plain_sd1_pipeline_is_refused_with_the_reason(
    source: Path, tmp_path: Path, file: str, changes: dict[str, Any], reason: str
) -> None:
    if not (source / file).exists():
        (source / file).write_text("{}")
    _edit_json(source / file, **changes)

    with pytest.raises(BaseModelError, match=reason):
        prepare_base(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_refused_and_never_read(source: Path, tmp_path: Path) -> None:
    weights = source / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))

    with pytest.raises(BaseModelError, match="a pickle, which can run code"):
        prepare_base(source, tmp_path / "out")


def test_a_pickle_beside_safetensors_is_not_copied(source: Path, tmp_path: Path) -> None:
    (source / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")

    folder = prepare_base(source, tmp_path / "out").folder

    assert not list(folder.rglob("*.bin"))


def test_code_in_the_folder_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "unet" / "my_unet.py").write_text("raise SystemExit")

    with pytest.raises(BaseModelError, match="brings its own code"):
        prepare_base(source, tmp_path / "out")


def test_a_single_file_and_a_missing_folder_are_refused_with_what_to_do(tmp_path: Path) -> None:
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"")

    with pytest.raises(BaseModelError, match="convert it to a diffusers folder first"):
        prepare_base(single, tmp_path / "out")
    with pytest.raises(BaseModelError, match="is a pickle, which can run code"):
        prepare_base(single.rename(tmp_path / "model.ckpt"), tmp_path / "out")
    with pytest.raises(BaseModelError, match=r"model_index\.json is missing"):
        prepare_base(tmp_path / "nowhere", tmp_path / "out")


def test_missing_weights_and_damaged_weights_are_refused(source: Path, tmp_path: Path) -> None:
    path = source / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: tensor for name, tensor in weights.items() if name != "conv_in.weight"}, path)
    with pytest.raises(BaseModelError, match=r"conv_in\.weight"):
        prepare_base(source, tmp_path / "out")

    path.write_bytes(b"not safetensors at all")
    with pytest.raises(BaseModelError, match="not a safetensors file"):
        prepare_base(source, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_the_fingerprint_is_the_same_for_the_same_inputs_and_differs_with_any_of_them(
    source: Path, tmp_path: Path, tiny_base_folder: Path
) -> None:
    first = prepare_base(source, tmp_path / "one").fingerprint
    assert first == open_prepared(tiny_base_folder).fingerprint

    _edit_json(source / "scheduler" / "scheduler_config.json", steps_offset=0)
    assert prepare_base(source, tmp_path / "two").fingerprint != first


def test_a_base_of_other_library_versions_or_code_is_stale(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare_base(source, tmp_path / "out").folder
    monkeypatch.setattr(prepared_base, "version", lambda name: "99.0" if name == "diffusers" else "1.0")
    with pytest.raises(BaseModelError, match=r"stale: library_versions was .* prepare the base again"):
        open_prepared(folder)
    monkeypatch.undo()

    monkeypatch.setattr(prepared_base, "CODE_VERSION", prepared_base.CODE_VERSION + 1)
    with pytest.raises(BaseModelError, match="stale: code_version was 1, is now 2"):
        open_prepared(folder)


def test_a_manifest_with_changed_inputs_is_refused(source: Path, tmp_path: Path) -> None:
    folder = prepare_base(source, tmp_path / "out").folder
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["inputs"]["files"]["unet/config.json"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(BaseModelError, match="fingerprint does not fit"):
        open_prepared(folder)


def test_a_changed_file_is_found_by_its_size_and_by_its_hash_when_asked(source: Path, tmp_path: Path) -> None:
    folder = prepare_base(source, tmp_path / "out").folder
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    open_prepared(folder)
    with pytest.raises(BaseModelError, match="SHA-256 differs"):
        open_prepared(folder, verify=True)

    path.write_bytes(content[:-1])
    with pytest.raises(BaseModelError, match="is damaged"):
        open_prepared(folder)
    path.unlink()
    with pytest.raises(BaseModelError, match="is damaged"):
        open_prepared(folder)


def test_a_folder_with_other_files_is_never_overwritten_and_a_prepared_one_is_replaced(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(BaseModelError, match="holds other files"):
        prepare_base(source, tmp_path / "mine")
    assert (tmp_path / "mine" / "diary.txt").read_text() == "dear diary"

    first = prepare_base(source, tmp_path / "out")
    _edit_json(source / "scheduler" / "scheduler_config.json", steps_offset=0)
    second = prepare_base(source, tmp_path / "out")
    assert open_prepared(tmp_path / "out").fingerprint == second.fingerprint != first.fingerprint


def test_ensure_prepared_prepares_once_and_repairs_a_damaged_copy(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = ensure_prepared(source, cache)
    assert first.folder == cache / first.fingerprint
    made_at = (first.folder / "manifest.json").stat().st_mtime_ns

    assert ensure_prepared(source, cache) == first
    assert (first.folder / "manifest.json").stat().st_mtime_ns == made_at
    assert ensure_prepared(first.folder, cache) == first

    (first.folder / "unet" / "config.json").unlink()
    assert ensure_prepared(source, cache) == first
    assert (first.folder / "unet" / "config.json").is_file()


def test_the_command_prints_the_facts(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared_base.main([str(source), str(tmp_path / "out")])

    printed = capsys.readouterr().out
    assert open_prepared(tmp_path / "out").fingerprint in printed
    assert f"max_tokens {MAX_TOKENS}" in printed
