"""The LoRAs that one loaded base holds: in slots beside its UNet, and packed in memory.

Called by `gpu_worker.generation`; a base is prepared for slots once and keeps them until it is evicted.
"""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from core.config import LoraUse
from core.denoising import RowLoras
from core.lora_packed import PackedLora, SlotLayout, layout_misfit, pack, rank_class
from core.lora_slots import LoraSlots
from core.lora_state import LoraState
from core.lora_targets import target_modules
from core.lora_utils import read_lora
from core.train_config import TargetPreset

logger = logging.getLogger(__name__)

SLOTS = 8
"""Of each layout: as many as one request may name, and as pictures share a forward."""
SLAB_BYTES = 2 << 30
"""All slots of one base together; LoRAs of layouts beyond it take the slower path."""
RAM_BYTES = 1 << 30
"""Packed LoRAs of one base in memory."""


@dataclass(frozen=True, kw_only=True)
class HeldLora:
    """One LoRA file, read.

    Attributes:
        packed: For slots; None where slots cannot serve it.
        misfit: Why not, as a sentence; empty where they can.
        text: Its layers of the text encoders alone.
    """

    packed: PackedLora | None
    misfit: str
    text: LoraState

    @property
    def changes_text(self) -> bool:
        """Whether prompts mean something else with it."""
        return bool(self.text.text_encoder or self.text.text_encoder_2)

    @property
    def nbytes(self) -> int:
        """Of the packed block."""
        return self.packed.flat.nbytes if self.packed is not None else 0


class ResidentLoras:
    """Of one base. Slot numbers count through all layouts. `core.denoising.Slots`.

    Does not refer to the UNet itself, so that it goes when the pool lets the base go.
    """

    def __init__(self) -> None:
        self._layouts: dict[tuple[str, int], SlotLayout] = {}
        self._groups: dict[str, tuple[int, LoraSlots]] = {}  # by layout: first slot number, slots
        self._held: OrderedDict[str, HeldLora] = OrderedDict()
        self._slots: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._users: Counter[str] = Counter()

    def open(self, unet: Any, sha256: str, path: Path) -> HeldLora:
        """A LoRA as it is served here, read and packed where it is not in memory.

        Raises:
            LoraFileError: The file is damaged.
        """
        held = self._held.pop(sha256, None)
        if held is None:
            held = self._read(unet, path)
        self._held[sha256] = held
        while sum(other.nbytes for other in self._held.values()) > RAM_BYTES and len(self._held) > 1:
            self._held.popitem(last=False)
        return held

    def place(self, unet: Any, uses: Sequence[LoraUse], loras: Sequence[HeldLora]) -> RowLoras | None:
        """Slots of these LoRAs (of `open`), kept until `leave`. None: others need them now."""
        row: list[tuple[int, float]] = []
        for use, held in zip(uses, loras, strict=True):
            slot = self._slots.pop(use.sha256, None)
            if slot is None:
                slot = self._free_slot(unet, held, use.sha256)
            if slot is None:
                self.leave(uses[: len(row)])
                return None
            self._slots[use.sha256] = slot
            self._users[use.sha256] += 1
            row.append((slot, use.weight))
        return row

    def leave(self, uses: Sequence[LoraUse]) -> None:
        """Others may have these slots; until somebody does, the LoRAs stay in them."""
        for use in uses:
            self._users[use.sha256] -= 1

    def has(self, uses: Sequence[LoraUse]) -> bool:
        """Whether all of them are in slots now."""
        return all(use.sha256 in self._slots for use in uses)

    def activate(self, rows: Sequence[RowLoras]) -> None:
        """Set the LoRAs of each row of the forwards that follow."""
        for first, slots in self._groups.values():
            here = range(first, first + SLOTS)
            own = [[(slot - first, weight) for slot, weight in row if slot in here] for row in rows]
            if any(own):
                slots.activate(own)
            else:
                slots.deactivate()

    def deactivate(self) -> None:
        """No LoRA for anybody."""
        for _, slots in self._groups.values():
            slots.deactivate()

    def _read(self, unet: Any, path: Path) -> HeldLora:
        began = time.monotonic()
        state = read_lora(path)
        text = LoraState(unet={}, text_encoder=state.text_encoder, text_encoder_2=state.text_encoder_2)
        layout, misfit = self._layout(unet, state)
        packed = None if layout is None else pack(state.unet, layout, next(unet.parameters()).dtype)
        logger.info(
            "lora read file=%s ms=%.0f slots=%s", path.name[:12], 1000 * (time.monotonic() - began), misfit or "fit"
        )
        return HeldLora(packed=packed, misfit=misfit, text=text)

    def _layout(self, unet: Any, state: LoraState) -> tuple[SlotLayout | None, str]:
        """The smallest layout that serves it, or why none does."""
        rank = rank_class(state.unet)
        if rank is None:
            return None, "its rank is above all slots"
        reason = ""
        presets: tuple[TargetPreset, ...] = ("attention", "all_linear")
        for preset in presets:
            if (preset, rank) not in self._layouts:
                self._layouts[preset, rank] = SlotLayout.of(unet, _linear(unet, preset), rank)
            layout = self._layouts[preset, rank]
            reason = layout_misfit(state.unet, layout) or ""
            if not reason:
                if layout.fingerprint in self._groups or self._has_room(unet, layout):
                    return layout, ""
                reason = "all memory for slots is taken by other kinds of LoRA"
        return None, reason

    def _has_room(self, unet: Any, layout: SlotLayout) -> bool:
        number_bytes: int = next(unet.parameters()).element_size()
        taken = sum(slots.layout.numel for _, slots in self._groups.values()) + layout.numel
        return SLOTS * taken * number_bytes <= SLAB_BYTES

    def _free_slot(self, unet: Any, held: HeldLora, sha256: str) -> int | None:
        """A slot with this LoRA in it; the least recently used one that nobody uses goes."""
        packed = held.packed
        if packed is None:
            raise ValueError(f"LoRA {sha256} does not fit slots ({held.misfit}): apply it")
        fingerprint = packed.layout.fingerprint
        if fingerprint not in self._groups:
            self._groups[fingerprint] = (SLOTS * len(self._groups), LoraSlots(unet, packed.layout, SLOTS))
        first, slots = self._groups[fingerprint]
        here = range(first, first + SLOTS)
        free = set(here) - set(self._slots.values())
        if not free:
            idle = next((name for name, slot in self._slots.items() if slot in here and not self._users[name]), None)
            if idle is None:
                return None
            free = {self._slots.pop(idle)}
        slot = min(free)
        slots.load(slot - first, packed)
        return slot


_resident: WeakKeyDictionary[Any, ResidentLoras] = WeakKeyDictionary()


def resident_loras(unet: Any) -> ResidentLoras:
    """Those of a base, by its UNet."""
    if unet not in _resident:
        _resident[unet] = ResidentLoras()
    return _resident[unet]


def _linear(unet: Any, preset: TargetPreset) -> list[str]:
    return [name for name in target_modules(unet, preset) if isinstance(unet.get_submodule(name), nn.Linear)]
