"""The gate lets every honest LoRA in, says what it is, and refuses everything else quickly and with its reason."""

import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from core.base_shapes import BaseShapes, shapes_of_folder
from core.errors import BaseModelError, LoraFileError
from core.lora_gate import judge_header, judge_lora
from core.lora_keys import sgm_to_diffusers
from core.lora_values import BLOCK_BYTES, decode_scalar
from tests.core.hostile_loras import DOWN, GOOD, HOSTILE, UP, C, U, changed
from tests.core.lora_samples import ATTENTION, TEXT, kohya, noise, write


@pytest.fixture(scope="module")
def shapes(tiny_base_folder: Path) -> BaseShapes:
    return shapes_of_folder(tiny_base_folder)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_with_its_reason_in_no_time_and_little_memory(
    case: str, tmp_path: Path, shapes: BaseShapes
) -> None:
    make, reason = HOSTILE[case]
    path = tmp_path / "file.safetensors"
    make(path)
    began = time.perf_counter()
    with pytest.raises(LoraFileError, match=reason) as refused:
        judge_lora(path, shapes)
    assert time.perf_counter() - began < 1.0
    assert str(refused.value).startswith("file.safetensors")
    assert len(str(refused.value)) < 700
    tracemalloc.start()
    try:
        with pytest.raises(LoraFileError):
            judge_lora(path, shapes)
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()


def test_there_are_enough_hostile_files() -> None:
    assert len(HOSTILE) >= 60


HONEST: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "kohya": (GOOD, "kohya", ("lora",)),
    "kohya with a text encoder": (GOOD | kohya(TEXT, prefix="lora_te_"), "kohya", ("lora",)),
    "kohya with te1": (GOOD | kohya(TEXT, prefix="lora_te1_"), "kohya", ("lora",)),
    "te1 in a wrapper": (kohya(f"0.transformer.{TEXT}", prefix="lora_te1_"), "kohya", ("lora",)),
    "half precision": ({name: tensor.astype(np.float16) for name, tensor in GOOD.items()}, "kohya", ("lora",)),
    "alpha as a whole number": (changed(alpha=np.array(4, np.int64)), "kohya", ("lora",)),
    "alpha of one dimension": (changed(alpha=np.array([4.0], np.float32)), "kohya", ("lora",)),
    "no alpha": (kohya(alpha=None), "kohya", ("lora",)),
    "DoRA": (changed(dora_scale=noise(32, 1)), "kohya", ("dora",)),
    "a convolution": (
        {f"{C}.lora_down.weight": noise(4, 32, 3, 3), f"{C}.lora_up.weight": noise(32, 4, 1, 1)}, "kohya", ("lora",)),
    "a convolution with a middle": (
        {f"{C}.lora_down.weight": noise(4, 32, 1, 1), f"{C}.lora_mid.weight": noise(4, 4, 3, 3),
         f"{C}.lora_up.weight": noise(32, 4, 1, 1)}, "kohya", ("lora",)),
    "LoHa": (
        {f"{U}.hada_w{i}_{x}": noise(*((32, 4) if x == "a" else (4, 32))) for i in (1, 2) for x in "ab"}, "kohya",
        ("loha",)),
    "LoHa with cores": (
        {f"{C}.hada_w{i}_{x}": noise(4, 32) for i in (1, 2) for x in "ab"}
        | {f"{C}.hada_t{i}": noise(4, 4, 3, 3) for i in (1, 2)}, "kohya", ("loha",)),
    "LoKr": ({f"{U}.lokr_w1": noise(4, 4), f"{U}.lokr_w2_a": noise(8, 2), f"{U}.lokr_w2_b": noise(2, 8)}, "kohya",
             ("lokr",)),
    "a LoKr convolution": ({f"{C}.lokr_w1": noise(4, 4), f"{C}.lokr_w2": noise(8, 8, 3, 3)}, "kohya", ("lokr",)),
    "a full difference": ({f"{U}.diff": noise(32, 32)}, "kohya", ("diff",)),
    "PEFT": ({f"base_model.model.{ATTENTION}.lora_A.weight": noise(4, 32),
              f"base_model.model.{ATTENTION}.lora_B.weight": noise(32, 4)}, "peft", ("lora",)),
    "diffusers": ({f"unet.{ATTENTION}.lora_A.weight": noise(4, 32), f"unet.{ATTENTION}.lora_B.weight": noise(32, 4),
                   f"text_encoder.{TEXT}.lora_A.weight": noise(4, 32),
                   f"text_encoder.{TEXT}.lora_B.weight": noise(32, 4)}, "diffusers", ("lora",)),
    "diffusers with lora.down": ({f"unet.{ATTENTION}.lora.down.weight": noise(4, 32),
                                  f"unet.{ATTENTION}.lora.up.weight": noise(32, 4)}, "diffusers", ("lora",)),
    "old diffusers": (
        {f"{ATTENTION.removesuffix('.to_q')}.processor.{x}_lora.{side}.weight": noise(*shape)
         for x in ("to_q", "to_out") for side, shape in (("down", (4, 32)), ("up", (32, 4)))}, "diffusers", ("lora",)),
}  # fmt: skip


@pytest.mark.parametrize("case", HONEST)
def test_an_honest_file_passes_and_is_recognised(case: str, tmp_path: Path, shapes: BaseShapes) -> None:
    tensors, kind, adapters = HONEST[case]
    facts = judge_lora(write(tmp_path / "file.safetensors", tensors), shapes)
    assert (facts.kind, facts.adapters) == (kind, adapters)
    assert judge_lora(tmp_path / "file.safetensors").modules == facts.modules
    assert judge_header(tmp_path / "file.safetensors", shapes).ranks == facts.ranks


def test_the_facts_are_those_of_the_file(tmp_path: Path, shapes: BaseShapes) -> None:
    tensors = GOOD | kohya(ATTENTION.replace("to_q", "to_k"), rank=8, alpha=None) | kohya(TEXT, prefix="lora_te_")
    path = write(tmp_path / "a.safetensors", tensors, {"ss_output_name": "ink"})
    facts = judge_lora(path, shapes)
    assert facts.ranks == {4: 2, 8: 1}
    assert facts.alphas == {2.0: 2}
    assert facts.modules == {"unet": 2, "text_encoder": 1}
    assert (facts.dtype, facts.size_bytes) == ("F32", path.stat().st_size)
    assert facts.parameters == 2 * (4 * 64) + 8 * 64
    assert any("1 of 3 modules have no alpha" in note for note in facts.notes)
    assert facts.summary()["trained_as"] == {"ss_output_name": "ink"}
    assert facts.summary()["rank"] == 4


def test_the_hash_is_the_one_that_kohya_shows_and_a_stale_one_is_said(tmp_path: Path) -> None:
    from core.lora_kohya import sshs_model_hash

    path = write(tmp_path / "a.safetensors", GOOD, {"sshs_model_hash": "0" * 64})
    facts = judge_lora(path)
    assert facts.model_hash == sshs_model_hash(path)
    assert any("edited after training" in note for note in facts.notes)


def test_a_file_of_many_blocks_is_read_with_one_block_of_memory(tmp_path: Path) -> None:
    rows = 5 * BLOCK_BYTES // (4 * 1024)
    tensors = {DOWN: noise(1024, 8), UP: np.zeros((rows, 1024), np.float32)}
    path = write(tmp_path / "large.safetensors", tensors)
    steps: list[int] = []
    tracemalloc.start()
    try:
        judge_lora(path, report=lambda progress: steps.append(progress.step))
        assert tracemalloc.get_traced_memory()[1] < 5 * BLOCK_BYTES
    finally:
        tracemalloc.stop()
    assert steps == [1, 2, 3, 4, 5]
    tensors[UP][-1, -1] = np.nan
    write(path, tensors)
    with pytest.raises(LoraFileError, match="holds NaN"):
        judge_lora(path)


@pytest.mark.parametrize(
    ("dtype", "data", "value"),
    [
        ("BF16", b"\x80\x42", 64.0),
        ("F16", np.float16(0.5).tobytes(), 0.5),
        ("F64", np.float64(3.25).tobytes(), 3.25),
        ("I64", np.int64(-2).tobytes(), -2.0),
        ("I32", np.int32(7).tobytes(), 7.0),
    ],
)
def test_a_number_is_read_in_every_type(dtype: str, data: bytes, value: float) -> None:
    assert decode_scalar(data, dtype) == value


@pytest.mark.parametrize(
    ("sgm", "diffusers"),
    [
        ("input_blocks_4_1_transformer_blocks_0_ff_net_2", "down_blocks_1_attentions_0_transformer_blocks_0_ff_net_2"),
        ("input_blocks_8_1_proj_in", "down_blocks_2_attentions_1_proj_in"),
        ("input_blocks_3_0_op", "down_blocks_0_downsamplers_0_conv"),
        ("input_blocks_1_0_in_layers_2", "down_blocks_0_resnets_0_conv1"),
        ("middle_block_1_transformer_blocks_9_ff_net_2", "mid_block_attentions_0_transformer_blocks_9_ff_net_2"),
        ("middle_block_2_emb_layers_1", "mid_block_resnets_1_time_emb_proj"),
        ("output_blocks_0_1_transformer_blocks_0_ff_net_2", "up_blocks_0_attentions_0_transformer_blocks_0_ff_net_2"),
        ("output_blocks_2_2_conv", "up_blocks_0_upsamplers_0_conv"),
        ("output_blocks_5_0_skip_connection", "up_blocks_1_resnets_2_conv_shortcut"),
        ("down_blocks_1_attentions_0_proj_in", "down_blocks_1_attentions_0_proj_in"),
    ],
)  # fmt: skip
def test_stabilitys_counting_is_brought_to_diffusers_names(sgm: str, diffusers: str) -> None:
    assert sgm_to_diffusers(sgm) == diffusers


def test_a_folder_without_weights_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="has no unet"):
        shapes_of_folder(tmp_path)


WHOLE = save(GOOD, metadata={"ss_network_dim": "4"})


@settings(max_examples=400, deadline=1000)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_are_refused_or_still_a_lora_of_this_base(
    tmp_path_factory: pytest.TempPathFactory, shapes: BaseShapes, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(WHOLE)
    for position, value in changes:
        data[position] = value
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(data)
    try:
        facts = judge_lora(path, shapes)
    except LoraFileError as error:
        assert str(error).startswith("mutated.safetensors")
    else:
        assert facts.modules.get("unet") == 1


PART = st.sampled_from(["lora_down.weight", "lora_up.weight", "alpha", "lora_mid.weight", "dora_scale", "diff"])
SHAPE = st.lists(st.sampled_from([1, 3, 4, 32, 33]), max_size=4)


@settings(max_examples=400, deadline=1000)
@given(st.dictionaries(PART, SHAPE, min_size=1))
def test_any_mixture_of_parts_is_refused_or_fits_the_base(
    tmp_path_factory: pytest.TempPathFactory, shapes: BaseShapes, parts: dict[str, list[int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "parts.safetensors"
    write(path, {f"{U}.{part}": np.ones(shape, np.float32) for part, shape in parts.items()})
    try:
        facts = judge_lora(path, shapes)
    except LoraFileError as error:
        assert str(error).startswith("parts.safetensors")
    else:
        assert facts.parameters >= 32
        assert "diff" in parts or {"lora_down.weight", "lora_up.weight"} <= set(parts)
