"""LoRAs in slots: the bits of PEFT, no trace when off, and rows that do not see each other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from core.errors import LoraFileError
from core.lora_packed import PackedLora, SlotLayout, layout_misfit, pack, text_encoder_modules
from core.lora_slots import LoraSlots
from core.lora_state import LoraLayer, LoraState, plain_layers
from core.lora_targets import target_modules
from core.lora_utils import apply_lora
from tests.core.training_parts import sd15_shaped_unet, trained_state, unet_output

DIM = 64
EMPTY: tuple[tuple[int, float], ...] = ()


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return sd15_shaped_unet()


@pytest.fixture(scope="module")
def states(unet: nn.Module) -> list[LoraState]:
    """A plain one, one of another rank and alpha, and one of mixed ranks and alphas that leaves modules out."""
    one, two = trained_state(unet, "attention"), trained_state(unet, "attention", rank=8, alpha=5.0)
    mixed = {
        name: layer if number % 3 else replace(plain_layers(two.unet)[name], alpha=3.0 + number)
        for number, (name, layer) in enumerate(one.unet.items())
        if number % 5
    }
    return [one, two, LoraState(unet=mixed)]


@pytest.fixture(scope="module")
def slots(unet: nn.Module, states: list[LoraState]) -> LoraSlots:
    layout = SlotLayout.of(unet, target_modules(unet, "attention"), 8)
    slots = LoraSlots(unet, layout, slots=4)
    for number, state in enumerate(states):
        slots.load(number, pack(state.unet, layout, torch.float32))
    return slots


@pytest.fixture(autouse=True)
def nothing_active(slots: LoraSlots) -> None:
    slots.deactivate()


def through_peft(unet: nn.Module, loras: list[tuple[LoraState, float]]) -> torch.Tensor:
    with apply_lora(unet, loras):
        return unet_output(unet, DIM)


def test_prepared_layers_keep_names_weights_and_bits() -> None:
    fresh = sd15_shaped_unet()
    before, names, keys = unet_output(fresh, DIM), [n for n, _ in fresh.named_modules()], list(fresh.state_dict())
    own = LoraSlots(fresh, SlotLayout.of(fresh, target_modules(fresh, "all_linear"), 8), slots=2)
    assert [n for n, _ in fresh.named_modules()] == names
    assert list(fresh.state_dict()) == keys
    assert torch.equal(unet_output(fresh, DIM), before)
    own.remove()
    assert not any(type(module).__name__ == "_SlotLinear" for module in fresh.modules())


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("weight", [1.0, -0.6])
def test_one_lora_has_the_bits_of_peft(
    unet: nn.Module, slots: LoraSlots, states: list[LoraState], number: int, weight: float
) -> None:
    expected = through_peft(unet, [(states[number], weight)])
    slots.activate([[(number, weight)]] * 2)
    assert torch.equal(unet_output(unet, DIM), expected)


def test_several_loras_have_the_bits_of_peft(unet: nn.Module, slots: LoraSlots, states: list[LoraState]) -> None:
    expected = through_peft(unet, [(states[0], 0.7), (states[2], -0.4)])
    slots.activate([[(0, 0.7), (2, -0.4)]] * 2)
    assert torch.equal(unet_output(unet, DIM), expected)


def test_rows_with_different_loras_equal_their_single_runs(
    unet: nn.Module, slots: LoraSlots, states: list[LoraState]
) -> None:
    rows = ([(0, 1.0), (2, 0.5)], EMPTY, [(1, -0.8)])
    alone = []
    for row in rows:
        slots.activate([row] * 2)
        alone.append(unet_output(unet, DIM))
    for first, second in ((0, 1), (2, 0), (1, 2)):
        slots.activate([rows[first], rows[second]])
        both = unet_output(unet, DIM)
        torch.testing.assert_close(both[0], alone[first][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(both[1], alone[second][1], atol=1e-5, rtol=0)


def test_styles_do_not_bleed(unet: nn.Module, slots: LoraSlots) -> None:
    base = unet_output(unet, DIM)
    for number in (0, 1):
        slots.activate([[(number, 1.0)]] * 2)
        assert not torch.equal(unet_output(unet, DIM), base)
    slots.activate([EMPTY, EMPTY])
    assert torch.equal(unet_output(unet, DIM), base)


row_strategy = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.0, 1.0, -0.5])), max_size=2)
act = st.one_of(
    st.tuples(st.just("activate"), st.lists(row_strategy, min_size=2, max_size=2)),
    st.tuples(st.just("load"), st.tuples(st.integers(0, 2), st.integers(0, 2))),
    st.tuples(st.just("deactivate"), st.none()),
)


@settings(max_examples=15, deadline=None)
@given(acts=st.lists(act, max_size=6))
def test_the_base_is_untouched_after_any_sequence(acts: list[tuple[str, Any]]) -> None:
    unet, slots, packed, base, weights = shared()
    for what, value in acts:
        if what == "activate":
            slots.activate(value)
        elif what == "load":
            slots.load(value[0], packed[value[1]])
        else:
            slots.deactivate()
        assert torch.isfinite(unet_output(unet, DIM)).all()
    slots.deactivate()
    assert torch.equal(unet_output(unet, DIM), base)
    assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), weights, strict=True))


_shared: list[tuple[nn.Module, LoraSlots, list[PackedLora], torch.Tensor, list[torch.Tensor]]] = []


def shared() -> tuple[nn.Module, LoraSlots, list[PackedLora], torch.Tensor, list[torch.Tensor]]:
    """Made once: Hypothesis calls its test many times."""
    if not _shared:
        unet = sd15_shaped_unet()
        base, weights = unet_output(unet, DIM), [weight.clone() for weight in unet.state_dict().values()]
        layout = SlotLayout.of(unet, target_modules(unet, "attention"), 8)
        ranks = ((4, 2.0), (8, 5.0), (1, 1.0))
        packed = [
            pack(trained_state(unet, "attention", rank=rank, alpha=alpha).unet, layout, torch.float32)
            for rank, alpha in ranks
        ]
        slots = LoraSlots(unet, layout, slots=3)
        for number, lora in enumerate(packed):
            slots.load(number, lora)
        _shared.append((unet, slots, packed, base, weights))
    return _shared[0]


def test_a_slot_that_is_active_serves_its_new_lora(unet: nn.Module, slots: LoraSlots, states: list[LoraState]) -> None:
    for rows in ([[(3, 1.0)]] * 2, [[(3, 1.0)], EMPTY]):
        slots.load(3, pack(states[0].unet, slots.layout, torch.float32))
        slots.activate(rows)
        slots.load(3, pack(states[2].unet, slots.layout, torch.float32))
        changed = unet_output(unet, DIM)
        slots.activate(rows)
        assert torch.equal(changed, unet_output(unet, DIM))


def test_a_second_layout_comes_later_and_adds_up(unet: nn.Module, slots: LoraSlots, states: list[LoraState]) -> None:
    other = trained_state(unet, "all_linear", rank=12, alpha=6.0)
    layout = SlotLayout.of(unet, target_modules(unet, "all_linear"), 16)
    expected = through_peft(unet, [(states[0], 1.0), (other, 0.5)])
    first_alone = through_peft(unet, [(states[0], 1.0)])
    more = LoraSlots(unet, layout, slots=1)
    more.load(0, pack(other.unet, layout, torch.float32))
    more.activate([[(0, 0.5)]] * 2)
    slots.activate([[(0, 1.0)]] * 2)
    assert torch.equal(unet_output(unet, DIM), expected)
    more.activate([[(0, 0.5)], EMPTY])
    unet_output(unet, DIM)
    more.remove()
    assert torch.equal(unet_output(unet, DIM), first_alone)


def test_fixed_shapes_change_low_bits_only(unet: nn.Module, slots: LoraSlots, states: list[LoraState]) -> None:
    expected = through_peft(unet, [(states[2], 1.0)])
    fixed = LoraSlots(unet, slots.layout, slots=1, fixed_shapes=True)
    fixed.load(0, pack(states[2].unet, slots.layout, torch.float32))
    fixed.activate([[(0, 1.0)]] * 2)
    torch.testing.assert_close(unet_output(unet, DIM), expected, atol=1e-5, rtol=0)
    fixed.remove()


def test_packed_files_come_back_and_damaged_ones_empty_the_slot(
    unet: nn.Module, slots: LoraSlots, states: list[LoraState], tmp_path: Path
) -> None:
    packed = pack(states[2].unet, slots.layout, torch.float32)
    path = tmp_path / "lora.packed"
    packed.save(path)
    again = PackedLora.open(path, slots.layout, torch.float32)
    assert torch.equal(again.flat, packed.flat)
    assert (again.ranks, again.alphas) == (packed.ranks, packed.alphas)
    slots.load(3, path)
    slots.activate([[(3, 1.0)]] * 2)
    assert torch.equal(unet_output(unet, DIM), through_peft_alone(unet, slots, states[2]))
    with pytest.raises(LoraFileError, match="another layout or dtype"):
        PackedLora.open(path, SlotLayout.of(unet, slots.layout.names[::-1], 8), torch.float32)
    slots.activate([[(3, 1.0)]] * 2)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(LoraFileError, match="pack it again"):
        slots.load(3, path)
    with pytest.raises(LoraFileError, match="slot 3 of 4 holds no LoRA"):
        slots.activate([[(3, 1.0)]] * 2)


def through_peft_alone(unet: nn.Module, slots: LoraSlots, state: LoraState) -> torch.Tensor:
    slots.deactivate()
    return through_peft(unet, [(state, 1.0)])


def test_a_lora_of_the_first_modules_has_a_short_file_and_leaves_nothing_of_the_one_before(
    unet: nn.Module, slots: LoraSlots, states: list[LoraState], tmp_path: Path
) -> None:
    path = tmp_path / "few.packed"
    few = LoraState(unet={name: states[0].unet[name] for name in slots.layout.names[:5]})
    packed = pack(few.unet, slots.layout, torch.float32)
    packed.save(path)
    assert packed.used == slots.layout.starts[5][0]
    assert path.stat().st_size < 0.2 * packed.flat.nbytes
    assert torch.equal(PackedLora.open(path, slots.layout, torch.float32).flat, packed.flat)
    expected = through_peft(unet, [(few, 1.0)])
    for source in (packed, path):
        slots.load(3, pack(states[1].unet, slots.layout, torch.float32))
        slots.load(3, source)
        slots.activate([[(3, 1.0)]] * 2)
        assert torch.equal(unet_output(unet, DIM), expected)
        slots.deactivate()
    path.write_bytes(path.read_bytes() + bytes(64))
    with pytest.raises(LoraFileError, match="pack it again"):
        slots.load(3, path)


def test_what_slots_cannot_serve_is_said(unet: nn.Module, slots: LoraSlots, states: list[LoraState]) -> None:
    layout = slots.layout
    name = layout.names[0]
    layer = states[0].unet[name]
    assert isinstance(layer, LoraLayer)
    conv = trained_state(unet, "with_conv").unet
    wide = LoraLayer(down=torch.ones(9, 32), up=torch.ones(32, 9), alpha=1.0)
    other = LoraLayer(down=torch.ones(2, 48), up=torch.ones(48, 2), alpha=1.0)
    assert layout_misfit(states[0].unet, layout) is None
    assert "none of the 128 modules" in str(layout_misfit(conv, layout))
    assert "rank 9" in str(layout_misfit({name: wide}, layout))
    assert "(48, 48)" in str(layout_misfit({name: other}, layout))
    assert "DoRA" in str(layout_misfit({name: replace(layer, magnitude=torch.ones(32))}, layout))
    with pytest.raises(LoraFileError, match="does not fit the slots"):
        pack(conv, layout, torch.float32)
    with pytest.raises(LoraFileError, match="no linear layer"):
        SlotLayout.of(unet, ["conv_in"], 8)


def test_half_precision_slots_serve_a_half_precision_model(states: list[LoraState]) -> None:
    half = sd15_shaped_unet().to(torch.bfloat16)
    layout = SlotLayout.of(half, target_modules(half, "attention"), 8)  # type: ignore[arg-type]
    slots = LoraSlots(half, layout, slots=1)
    slots.load(0, pack(states[1].unet, layout, torch.bfloat16))
    linear = half.get_submodule(layout.names[0])
    drawn = torch.randn(2, 3, layout.shapes[0][1], dtype=torch.bfloat16)
    plain = linear(drawn)
    slots.activate([[(0, 1.0)], EMPTY])
    mixed = linear(drawn)
    assert mixed.dtype == torch.bfloat16
    assert not torch.equal(mixed[0], plain[0])
    assert torch.equal(mixed[1], plain[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_slots_on_a_gpu_load_from_ram_and_file(states: list[LoraState], tmp_path: Path) -> None:
    unet = sd15_shaped_unet().to("cuda", torch.float16)
    layout = SlotLayout.of(unet, target_modules(unet, "attention"), 8)  # type: ignore[arg-type]
    slots = LoraSlots(unet, layout, slots=2)
    packed = pack(states[2].unet, layout, torch.float16)
    packed.save(tmp_path / "lora.packed")
    slots.load(0, replace(packed, flat=packed.flat.pin_memory()))
    slots.load(1, tmp_path / "lora.packed")
    linear = unet.get_submodule(layout.names[1])
    drawn = torch.randn(2, 3, layout.shapes[1][1], dtype=torch.float16, device="cuda")
    slots.activate([[(0, 1.0)]] * 2)
    first = linear(drawn)
    slots.activate([[(1, 1.0)]] * 2)
    assert torch.equal(linear(drawn), first)


def test_a_text_encoder_has_slots_too(tiny_base: object) -> None:
    encoder: nn.Module = tiny_base.text_encoder  # type: ignore[attr-defined]
    names = text_encoder_modules(encoder)
    layout = SlotLayout.of(encoder, names, 8)
    own = torch.Generator().manual_seed(0)
    layers = {
        f"text_model_{name.replace('.', '_')}": LoraLayer(
            down=torch.randn(2, inputs, generator=own), up=torch.randn(outputs, 2, generator=own), alpha=2.0
        )
        for name, (outputs, inputs) in zip(names, layout.shapes, strict=True)
    }
    ids = torch.arange(24)[None]
    with torch.no_grad():
        before = encoder(ids).last_hidden_state
        slots = LoraSlots(encoder, layout, slots=1)
        slots.load(0, pack(layers, layout, torch.float32))
        slots.activate([[(0, 1.0)]])
        assert not torch.equal(encoder(ids).last_hidden_state, before)
        slots.deactivate()
        assert torch.equal(encoder(ids).last_hidden_state, before)
        slots.remove()
