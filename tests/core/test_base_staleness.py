"""A prepared base is served only while everything that it was made from is as it was; one test per input."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import core.prepared_base as prepared_base
from core.base_source import input_files
from core.config import canonical_json_hash
from core.errors import BaseModelError
from core.prepared_base import LIBRARIES, ensure_prepared, open_prepared, prepare_base
from tests.tiny_models import make_tiny_pipeline, make_tiny_sdxl_pipeline

SOURCE_FILES = [
    "lorasite.json",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source, the cache that holds its prepared form)."""
    folder = tmp_path_factory.mktemp("stale")
    source = make_tiny_pipeline(folder / "source")
    (source / "lorasite.json").write_text('{"default_clip_skip": 2}')
    ensure_prepared(source, folder / "cache")
    return source, folder / "cache"


def _change(path: Path) -> None:
    """Another content that still makes sense."""
    if path.suffix == ".safetensors":
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    else:
        path.write_text(path.read_text() + "\n")


def test_the_inputs_are_exactly_the_files_that_are_changed_here(made: tuple[Path, Path]) -> None:
    assert set(SOURCE_FILES) <= set(input_files(made[0]))
    assert {name for name in input_files(made[0]) if not name.startswith("tokenizer/")} <= set(SOURCE_FILES)


@pytest.mark.parametrize("name", SOURCE_FILES)
def test_a_changed_source_file_is_prepared_anew(made: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    source, cache = Path(shutil.copytree(made[0], tmp_path / "source")), shutil.copytree(made[1], tmp_path / "cache")
    before = ensure_prepared(source, cache)
    _change(source / name)

    after = ensure_prepared(source, cache)

    assert after.fingerprint != before.fingerprint
    manifest = json.loads((after.folder / "manifest.json").read_text())
    changed = json.loads((before.folder / "manifest.json").read_text())["inputs"]["files"].items()
    assert [file for file, sha256 in changed if manifest["inputs"]["files"][file] != sha256] == [name]


@pytest.mark.parametrize("name", SOURCE_FILES)
def test_a_record_of_another_source_file_is_refused(made: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    folder = _copy(made, tmp_path)
    _edit_inputs(folder, lambda inputs: inputs["files"].update({name: "0" * 64}))

    with pytest.raises(BaseModelError, match="fingerprint does not fit the recorded inputs: prepare the base again"):
        open_prepared(folder)


@pytest.mark.parametrize("library", LIBRARIES)
def test_another_version_of_one_library_makes_it_stale(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    folder = _copy(made, tmp_path)
    monkeypatch.setattr(prepared_base, "version", lambda name: "99.0" if name == library else version(name))

    with pytest.raises(BaseModelError, match=rf"stale: library_versions was .*, is now .*{library}.: .99\.0.*again"):
        open_prepared(folder)


@pytest.mark.parametrize(("constant", "name"), [("CODE_VERSION", "code_version"), ("DTYPE_POLICY", "dtype_policy")])
def test_other_code_or_another_dtype_policy_makes_it_stale(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constant: str, name: str
) -> None:
    folder = _copy(made, tmp_path)
    monkeypatch.setattr(prepared_base, constant, "another")

    with pytest.raises(BaseModelError, match=f"stale: {name} was .*, is now another: prepare the base again"):
        open_prepared(folder)
    before = json.loads((folder / "manifest.json").read_text())["fingerprint"]
    assert ensure_prepared(made[0], tmp_path / "cache").fingerprint != before


@pytest.mark.parametrize("name", ["code_version", "dtype_policy", "library_versions"])
def test_a_manifest_that_lacks_an_input_is_stale_even_if_its_hash_fits(
    made: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    folder = _copy(made, tmp_path)
    _edit_inputs(folder, lambda inputs: inputs.pop(name), rehash=True)

    with pytest.raises(BaseModelError, match=f"stale: {name} was None"):
        open_prepared(folder)


def test_another_revision_of_a_hub_model_is_another_base(made: tuple[Path, Path], tmp_path: Path) -> None:
    snapshots = tmp_path / "models--owner--tiny" / "snapshots"
    one, two = (Path(shutil.copytree(made[0], snapshots / (digit * 40))) for digit in "ab")

    first = prepare_base(one, tmp_path / "one")

    inputs = json.loads((first.folder / "manifest.json").read_text())["inputs"]
    assert inputs["revision"] == "a" * 40
    assert prepare_base(two, tmp_path / "two").fingerprint != first.fingerprint
    _edit_inputs(first.folder, lambda inputs: inputs.update(revision="b" * 40))
    with pytest.raises(BaseModelError, match="fingerprint does not fit"):
        open_prepared(first.folder)


@pytest.mark.parametrize("alone", [False, True])
def test_another_folders_vae_takes_the_place_of_the_own_one_and_is_part_of_the_fingerprint(
    made: tuple[Path, Path], tmp_path: Path, alone: bool
) -> None:
    other = make_tiny_pipeline(tmp_path / "other", seed=1)
    lender = other / "vae" if alone else other

    with_other = prepare_base(made[0], tmp_path / "out", vae=lender)

    own = ensure_prepared(made[0], made[1])
    assert with_other.fingerprint != own.fingerprint
    weights = "vae/diffusion_pytorch_model.safetensors"
    theirs, ours = load_file(other / weights), load_file(with_other.folder / weights)
    assert all(torch.equal(theirs[name].float(), ours[name]) for name in theirs)
    assert (
        with_other.files["unet/diffusion_pytorch_model.safetensors"]
        == own.files["unet/diffusion_pytorch_model.safetensors"]
    )
    _change(other / weights)
    assert prepare_base(made[0], tmp_path / "again", vae=lender).fingerprint != with_other.fingerprint


def test_a_vae_of_another_family_or_class_is_refused_with_the_difference(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(BaseModelError, match=r"has scaling_factor 0\.13025, .* was trained with 0\.18215"):
        prepare_base(made[0], tmp_path / "out", vae=make_tiny_sdxl_pipeline(tmp_path / "xl"))
    other = make_tiny_pipeline(tmp_path / "other")
    config = other / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "AutoencoderTiny"}))
    with pytest.raises(BaseModelError, match="give a folder with an AutoencoderKL"):
        prepare_base(made[0], tmp_path / "out", vae=other)
    assert not (tmp_path / "out").exists()


def _copy(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(ensure_prepared(*made).folder, tmp_path / "prepared"))


def _edit_inputs(folder: Path, edit: Any, *, rehash: bool = False) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest["inputs"])
    if rehash:
        manifest["fingerprint"] = canonical_json_hash(manifest["inputs"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
