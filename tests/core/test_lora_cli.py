"""The commands for LoRA files: what they show, what they write, and what they give back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from core.lora_cli import main
from core.lora_names import diffusers_module
from core.lora_peft import read_peft, write_peft
from core.lora_repair import prove_equal
from core.lora_source import find_source
from core.lora_state import LoraLayer, LoraState, plain_layers
from core.lora_utils import read_lora, write_kohya
from tests.core.lora_samples import ATTENTION, CONVOLUTION, noise, write


@pytest.fixture
def trained() -> LoraState:
    """Rank 32, alpha 32: its scale is 1; a file that says alpha 1 is 32 times too weak."""
    noise = torch.Generator().manual_seed(5)

    def layer(rank: int = 32) -> LoraLayer:
        down, up = torch.randn(rank, 32, generator=noise), torch.randn(32, rank, generator=noise)
        return LoraLayer(down=down, up=up, alpha=float(rank))

    return LoraState(unet={ATTENTION: layer(), ATTENTION.replace("to_q", "to_out.0"): layer()})


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0), capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    code, text = run(capsys, *arguments, "--json")
    return code, json.loads(text)


def weakened(path: Path, trained: LoraState) -> Path:
    """As a converter leaves it that writes alpha 1 for everything."""
    layers = {name: replace(layer, alpha=1.0) for name, layer in plain_layers(trained.unet).items()}
    write_kohya(path, LoraState(unet=layers), {"ss_output_name": "ink"})
    return path


def test_a_file_that_came_out_32_times_too_weak_is_as_trained_after_repair(
    tmp_path: Path, trained: LoraState, capsys: pytest.CaptureFixture[str]
) -> None:
    weak, right = weakened(tmp_path / "weak.safetensors", trained), tmp_path / "right.safetensors"
    ratio = trained.unet[ATTENTION].delta().norm() / read_lora(weak).unet[ATTENTION].delta().norm()
    assert float(ratio) == pytest.approx(32.0)
    code, answer = run_json(capsys, "repair", weak, "--alpha", 32, "--out", right)
    assert (code, answer["ok"]) == (0, True)
    assert "2 of 2 modules" in answer["notes"][0]
    assert prove_equal(trained, read_lora(right), "repaired") < 1e-6
    assert read_lora(right).metadata["ss_network_alpha"] == "32"
    assert read_lora(right).metadata["ss_output_name"] == "ink"


def test_the_configuration_that_lies_beside_gives_the_alphas_back(
    tmp_path: Path, trained: LoraState, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = LoraLayer(down=torch.ones(4, 32), up=torch.ones(32, 4), alpha=7.0)
    mixed = replace(trained, unet={**trained.unet, ATTENTION.replace("to_q", "to_k"): odd})
    weak = weakened(tmp_path / "ink.safetensors", mixed)
    write_peft(tmp_path / "ink-peft", mixed)
    code, _ = run(capsys, "verify", weak)
    assert code == 1
    code, _ = run(capsys, "repair", weak, "--out", tmp_path / "right.safetensors")
    assert code == 0
    assert prove_equal(mixed, read_lora(tmp_path / "right.safetensors"), "repaired") < 1e-6
    code, _ = run(
        capsys, "repair", weak, "--config", tmp_path / "ink-peft/adapter_config.json", "--out", tmp_path / "p"
    )
    assert code == 0
    assert prove_equal(mixed, read_peft(tmp_path / "p"), "repaired") < 1e-6


def test_a_peft_folder_that_lost_its_configuration_is_given_one(
    tmp_path: Path, trained: LoraState, capsys: pytest.CaptureFixture[str]
) -> None:
    write_peft(tmp_path / "peft", trained)
    (tmp_path / "peft/adapter_config.json").unlink()
    lost = tmp_path / "peft/adapter_model.safetensors"
    code, text = run(capsys, "verify", lost)
    assert code == 1
    assert "its alpha is lost" in text
    code, _ = run(capsys, "repair", lost, "--alpha", 32, "--out", tmp_path / "again")
    assert code == 0
    assert prove_equal(trained, read_peft(tmp_path / "again"), "again") < 1e-6


@pytest.mark.parametrize("problem", ["no value", "alpha 0", "another rank", "same place", "no configuration's words"])
def test_a_repair_that_would_guess_is_refused(
    problem: str, tmp_path: Path, trained: LoraState, capsys: pytest.CaptureFixture[str]
) -> None:
    weak, config = weakened(tmp_path / "weak.safetensors", trained), tmp_path / "c.json"
    out: Path = tmp_path / "out.safetensors"
    config.write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8}))
    options: list[object] = []
    if problem == "alpha 0":
        options = ["--alpha", 0]
    elif problem == "another rank":
        options = ["--config", config]
    elif problem == "same place":
        out, options = weak, ["--alpha", 32]
    elif problem == "no configuration's words":
        config.write_text("[" * 100_000)
        options = ["--config", config]
    before = weak.read_bytes()
    code, text = run(capsys, "repair", weak, *options, "--out", out)
    assert code == 1
    assert text.startswith("WRONG")
    assert weak.read_bytes() == before
    assert out == weak or not out.exists()


def test_inspect_shows_what_a_person_asks_first(
    tmp_path: Path, trained: LoraState, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ink.safetensors"
    write_kohya(path, trained, {"ss_output_name": "ink\x1b[31m", "modelspec.trigger_phrase": "sks", "ss_steps": "250"})
    code, text = run(capsys, "inspect", path)
    assert code == 0
    shown = {line[:14].strip(): line[15:] for line in text.splitlines()}
    assert (shown["kind"], shown["ranks"], shown["alphas"]) == ("kohya file", "32 (2 modules)", "32 (2 modules)")
    assert (shown["trigger"], shown["steps"], shown["trained as"]) == ("sks", "250", "ink?[31m")
    _, answer = run_json(capsys, "inspect", path)
    whole = torch.stack([layer.delta() for layer in trained.unet.values()]).norm()
    assert answer["strength"]["unet"] == pytest.approx(float(whole), rel=1e-5)
    assert answer["scales"] == {"1": 2}


def test_inspect_of_a_peft_folder_takes_its_alphas_from_the_configuration(
    tmp_path: Path, trained: LoraState, capsys: pytest.CaptureFixture[str]
) -> None:
    write_peft(tmp_path / "ink-peft", trained)
    weakened(tmp_path / "ink.safetensors", trained)
    assert find_source(tmp_path) == tmp_path / "ink-peft"  # it wins over the loose file
    code, answer = run_json(capsys, "inspect", tmp_path)
    assert (code, answer["kind"], answer["alphas"]) == (0, "peft folder", {"32": 2})
    assert run_json(capsys, "inspect", tmp_path / "ink-peft/adapter_model.safetensors")[1] == answer


def test_a_lora_goes_from_format_to_format_and_stays_the_same(
    tmp_path: Path, trained: LoraState, capsys: pytest.CaptureFixture[str]
) -> None:
    write_peft(tmp_path / "a", trained)
    assert run(capsys, "convert", tmp_path / "a", "--to", "kohya", "--out", tmp_path / "b.safetensors")[0] == 0
    assert run(capsys, "convert", tmp_path / "b.safetensors", "--to", "peft", "--out", tmp_path / "c")[0] == 0
    assert read_peft(tmp_path / "c").unet.keys() == trained.unet.keys()
    assert prove_equal(trained, read_peft(tmp_path / "c"), "c") < 1e-6
    assert len(load_file(tmp_path / "b.safetensors")) == 3 * 2
    folded = tmp_path / "e.safetensors"
    assert run(capsys, "convert", tmp_path / "b.safetensors", "--to", "diffusers", "--out", folded)[0] == 0
    assert prove_equal(trained, read_lora(folded), "e") < 1e-5
    assert run(capsys, "convert", tmp_path / "a", "--to", "peft", "--out", tmp_path / "d.safetensors")[0] == 1


def test_verify_says_everything_that_is_wrong(
    tmp_path: Path, trained: LoraState, tiny_base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ink.safetensors"
    write_kohya(path, trained, {})
    code, answer = run_json(capsys, "verify", path, "--base", tiny_base_folder)
    assert (code, answer["problems"]) == (0, [])
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(".alpha")}
    write(path, tensors, {"sshs_model_hash": "0" * 64})
    code, answer = run_json(capsys, "verify", path)
    assert code == 1
    assert [problem[:12] for problem in answer["problems"]] == ["sshs_model_h", "2 modules ha"]
    large = LoraLayer(down=torch.ones(2, 9), up=torch.ones(9, 2), alpha=1.0)
    write_kohya(path, LoraState(unet={CONVOLUTION: large}), {})
    code, answer = run_json(capsys, "verify", path, "--base", tiny_base_folder)
    assert code == 1
    assert "does not fit base model" in answer["problems"][0]


def test_a_damaged_file_and_a_missing_one_end_with_1_and_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x02}q\x00.")
    for source in (tmp_path / "x.safetensors", tmp_path / "nothing.safetensors"):
        code, text = run(capsys, "inspect", source)
        assert code == 1
        assert text.startswith("WRONG")


def test_the_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "--help")
    assert code == 0
    assert "32 times too weak" in text


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
        "mid_block.attentions.0.proj_in",
        "up_blocks.3.resnets.2.time_emb_proj",
        "up_blocks.1.upsamplers.0.conv",
        "down_blocks.2.resnets.0.conv_shortcut",
        "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "time_embedding.linear_1",
        "conv_in",
    ],
)
def test_a_flat_name_gets_its_dots_back(name: str) -> None:
    assert diffusers_module("unet", name.replace(".", "_")) == name


def test_lycoris_kinds_go_to_kohya_as_they_are_and_nowhere_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, conv = (f"lora_unet_{module.replace('.', '_')}" for module in (ATTENTION, CONVOLUTION))
    tensors: dict[str, Any] = {
        f"{name}.hada_w{i}_{x}": noise(*((32, 4) if x == "a" else (4, 32)), seed=i) for i in (1, 2) for x in "ab"
    }
    tensors |= {f"{conv}.lokr_w1": noise(4, 4), f"{conv}.lokr_w2": noise(8, 8, 3, 3)}
    tensors[f"{name}.alpha"] = (noise(1) * 0 + 2.0).reshape(())
    source, out = write(tmp_path / "odd.safetensors", tensors), tmp_path / "out.safetensors"
    assert run(capsys, "convert", source, "--to", "kohya", "--out", out)[0] == 0
    assert prove_equal(read_lora(source), read_lora(out), "converted") == 0
    code, answer = run_json(capsys, "inspect", out)
    assert (code, answer["scales"]) == (0, {"0.5": 1})
    for to, place in (("peft", "folder"), ("diffusers", "d.safetensors")):
        code, text = run(capsys, "convert", source, "--to", to, "--out", tmp_path / place)
        assert code == 1
        assert "not a product of two matrices" in text
    code, answer = run_json(capsys, "repair", source, "--alpha", 64, "--out", tmp_path / "right.safetensors")
    assert (code, read_lora(tmp_path / "right.safetensors").unet[ATTENTION].scale) == (0, 16.0)  # type: ignore[attr-defined]
