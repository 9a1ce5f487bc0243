"""LoRA slots: a model's linear layers are prepared once; afterwards a LoRA goes on with one copy and off with none.

Called by generation in GPU processes. Without an active LoRA a layer does exactly what it did before; rows of one batch
may have different LoRAs, or several with weights.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from core.errors import LoraFileError
from core.lora_packed import PackedLora, SlotLayout, read_packed

RowLoras = Sequence[tuple[int, float]]
"""Slots and weights of one row of a forward; empty for no LoRA."""

Pair = tuple[Tensor, Tensor]


class _Update:
    """What one set of slots adds to one layer now; changed in place by `LoraSlots`, read by `_SlotLinear`."""

    __slots__ = ("same", "stacked")

    def __init__(self) -> None:
        self.same: tuple[tuple[Tensor, Tensor, float], ...] = ()  # (down, up, scale) for all rows alike
        self.stacked: Pair | None = None  # (rows, in, ranks), (rows, ranks, out)


class _SlotLinear(nn.Linear):
    """A linear layer that asks its slots what to add.

    Layers get this class instead of a wrapper: names, weights and `isinstance` stay what they were, and PEFT or another
    set of slots may come on top.
    """

    slot_updates: tuple[_Update, ...]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear calls it so
        """(..., in) to (..., out); the first dimension is rows."""
        result = super().forward(input)
        for update in self.slot_updates:
            for down, up, scale in update.same:
                # In PEFT's order of operations, so that the bits are PEFT's.
                result = result + nn.functional.linear(nn.functional.linear(input, down), up) * scale
            if update.stacked is not None:
                down, up = update.stacked
                rows = down.shape[0]
                inner = torch.bmm(input.reshape(rows, -1, input.shape[-1]), down)  # (rows, tokens, ranks)
                added = torch.baddbmm(result.reshape(rows, -1, result.shape[-1]), inner, up)
                result = added.reshape(result.shape)
        return result


class LoraSlots:
    """Slots of one layout on one model. Several layouts may share a model; their updates add up.

    Args:
        model: Its layers are prepared; weights, names and outputs stay as they are.
        layout: Which layers, and the largest rank.
        slots: How many LoRAs are held at once.
        dtype: Of the slots; None for the model's own.
        fixed_shapes: Rows are always stacked, at `layout.rank` for each of `loras_per_row` LoRAs: compiled graphs stay
            valid whatever LoRAs come, and low bits differ from those of a LoRA alone.
        loras_per_row: The most under `fixed_shapes`.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: SlotLayout,
        slots: int = 8,
        dtype: torch.dtype | None = None,
        *,
        fixed_shapes: bool = False,
        loras_per_row: int = 1,
    ) -> None:
        weight = next(model.parameters())
        self.layout = layout
        self._fixed_ranks = layout.rank * loras_per_row if fixed_shapes else None
        self._slab = torch.zeros(slots, layout.numel, dtype=dtype or weight.dtype, device=weight.device)
        self._contents: list[tuple[tuple[int, ...], tuple[float, ...]] | None] = [None] * slots
        self._views: dict[tuple[int, tuple[int, ...]], list[Pair | None]] = {}
        self._stacks: dict[tuple[int, int], list[Pair]] = {}
        self._staging: Tensor | None = None
        self._staged: torch.cuda.Event | None = None
        self._rows: list[tuple[tuple[int, float], ...]] = []
        self._updates: list[_Update] = []
        self._modules: list[nn.Linear] = []
        for name in layout.names:
            module = model.get_submodule(name)
            if not isinstance(module, nn.Linear):
                raise LoraFileError(
                    f"module {name} ({type(module).__name__}) is no linear layer: slots cannot serve it"
                )
            update = _Update()
            if not isinstance(module, _SlotLinear):
                module.__class__ = _SlotLinear
                module.__dict__["slot_updates"] = ()
            module.__dict__["slot_updates"] += (update,)
            self._modules.append(module)
            self._updates.append(update)

    @property
    def slots(self) -> int:
        """How many there are."""
        return len(self._contents)

    @property
    def dtype(self) -> torch.dtype:
        """What packed LoRAs must be in."""
        return self._slab.dtype

    def load(self, slot: int, lora: PackedLora | Path) -> None:
        """Fill a slot. If it is active, its rows get the new LoRA from the next forward on.

        Raises:
            LoraFileError: Packed for another layout or dtype, or a damaged file; the slot is empty then.
        """
        before, self._contents[slot] = self._contents[slot], None
        try:
            if isinstance(lora, Path):
                contents = self._read(slot, lora)
            else:
                if lora.layout.fingerprint != self.layout.fingerprint or lora.flat.dtype != self.dtype:
                    raise LoraFileError("this LoRA is packed for another layout or dtype: pack it again")
                used = lora.used
                self._slab[slot, :used].copy_(lora.flat[:used], non_blocking=True)
                contents = (lora.ranks, lora.alphas)
        except BaseException:
            if any(slot == used for row in self._rows for used, _ in row):
                self.deactivate()
            raise
        self._contents[slot] = contents
        in_use = any(slot == used for row in self._rows for used, _ in row)
        if in_use and (contents != before or self._updates_stacked()):
            self._place()

    def activate(self, rows: Sequence[RowLoras]) -> None:
        """Set the LoRAs of each row of the forwards that follow.

        Args:
            rows: As many as the batch has, with both halves of classifier-free guidance; weights on top of
                alpha / rank, those of 0 count as none. Where all are alike, the batch may have any number.

        Raises:
            LoraFileError: A slot is empty or does not exist; what was active stays.
        """
        kept = [tuple((slot, weight) for slot, weight in row if weight != 0) for row in rows]
        for row in kept:
            for slot, _ in row:
                if not 0 <= slot < self.slots or self._contents[slot] is None:
                    raise LoraFileError(f"slot {slot} of {self.slots} holds no LoRA: load one before it is activated")
        if kept != self._rows:  # equal ones are in place, with what was loaded since
            self._rows = kept
            self._place()

    def deactivate(self) -> None:
        """No LoRA for anybody; outputs are those of the model alone, bit for bit."""
        self._rows = []
        for update in self._updates:
            update.same, update.stacked = (), None

    def remove(self) -> None:
        """Give the layers back as they were before any slots; for models that leave them for good."""
        self.deactivate()
        for module, update in zip(self._modules, self._updates, strict=True):
            left = tuple(other for other in module.__dict__["slot_updates"] if other is not update)
            module.__dict__["slot_updates"] = left
            if not left:
                del module.__dict__["slot_updates"]
                module.__class__ = nn.Linear
        self._modules, self._updates = [], []

    def _read(self, slot: int, path: Path) -> tuple[tuple[int, ...], tuple[float, ...]]:
        if self._slab.device.type == "cpu":
            return read_packed(path, self.layout, self._slab[slot])
        if self._staging is None:
            self._staging = torch.empty(self.layout.numel, dtype=self.dtype, pin_memory=True)
            self._staged = torch.cuda.Event()
        assert self._staged is not None
        self._staged.synchronize()  # the copy before may still read the staging memory
        contents = read_packed(path, self.layout, self._staging)
        self._slab[slot].copy_(self._staging, non_blocking=True)
        self._staged.record()
        return contents

    def _updates_stacked(self) -> bool:
        return bool(self._updates) and self._updates[0].stacked is not None

    @torch.no_grad()
    def _place(self) -> None:
        rows = self._rows
        if not any(rows) and self._fixed_ranks is None:
            self.deactivate()
        elif rows and self._fixed_ranks is None and all(row == rows[0] for row in rows):
            self._place_same(rows[0])
        else:
            self._place_stacked()

    def _place_same(self, row: tuple[tuple[int, float], ...]) -> None:
        loras = [(*self._of(slot), weight) for slot, weight in row]
        if len(loras) == 1:  # the usual case, kept lean: it is most of a swap beside the copy
            pairs, ranks, alphas, weight = loras[0]
            for update, pair, rank, alpha in zip(self._updates, pairs, ranks, alphas, strict=True):
                update.same = () if pair is None else ((*pair, weight * alpha / rank),)
                update.stacked = None
            return
        for number, update in enumerate(self._updates):
            update.same = tuple(
                (*pair, weight * alphas[number] / ranks[number])
                for pairs, ranks, alphas, weight in loras
                if (pair := pairs[number]) is not None
            )
            update.stacked = None

    def _place_stacked(self) -> None:
        """Gather every row's matrices side by side; costs some ms per change of composition, nothing per forward."""
        sums = [sum(max(self._content(slot)[0], default=0) for slot, _ in row) for row in self._rows]
        ranks_held = max(sums, default=0) if self._fixed_ranks is None else self._fixed_ranks
        if max(sums, default=0) > ranks_held:
            raise LoraFileError(f"rows with {max(sums)} ranks in all do not fit the {ranks_held} of these slots")
        stacks = self._stack(len(self._rows), ranks_held)
        begins = [0] * len(self._rows)
        for down, up in stacks:
            down.zero_()
            up.zero_()
        for row_number, row in enumerate(self._rows):
            for slot, weight in row:
                pairs, ranks, alphas = self._of(slot)
                begin = begins[row_number]
                for stacked, pair, rank, alpha in zip(stacks, pairs, ranks, alphas, strict=True):
                    if pair is not None:
                        stacked[0][row_number, :, begin : begin + rank].copy_(pair[0].T)
                        torch.mul(pair[1].T, weight * alpha / rank, out=stacked[1][row_number, begin : begin + rank])
                begins[row_number] += max(ranks)
        for update, stacked in zip(self._updates, stacks, strict=True):
            update.same, update.stacked = (), stacked

    def _content(self, slot: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        contents = self._contents[slot]
        if contents is None:
            raise LoraFileError(f"slot {slot} holds no LoRA: load one before it is activated")
        return contents

    def _of(self, slot: int) -> tuple[list[Pair | None], tuple[int, ...], tuple[float, ...]]:
        """Views of a slot's matrices in their true ranks, ranks and alphas."""
        ranks, alphas = self._content(slot)
        views = self._views.get((slot, ranks))
        if views is None:
            if len(self._views) >= 8 * self.slots:
                self._views.clear()
            flat = self._slab[slot]
            views = []
            for rank, (outputs, inputs), (down, up) in zip(ranks, self.layout.shapes, self.layout.starts, strict=True):
                pair = (
                    flat[down : down + rank * inputs].view(rank, inputs),
                    flat[up : up + outputs * rank].view(outputs, rank),
                )
                views.append(pair if rank else None)
            self._views[slot, ranks] = views
        return views, ranks, alphas

    def _stack(self, rows: int, ranks: int) -> list[Pair]:
        """Memory for `rows` rows, the same at each call, so that captured graphs keep their addresses."""
        stacks = self._stacks.get((rows, ranks))
        if stacks is None:
            if len(self._stacks) >= 4 and self._fixed_ranks is None:
                self._stacks.clear()
            sizes = [size for outputs, inputs in self.layout.shapes for size in (inputs, outputs)]
            ends = [0]
            for size in sizes:
                ends.append(ends[-1] + rows * ranks * size)
            flat = self._slab.new_zeros(ends[-1])
            parts = [flat[begin:end] for begin, end in pairwise(ends)]
            stacks = [
                (down.view(rows, ranks, inputs).transpose(1, 2), up.view(rows, ranks, outputs))
                for down, up, (outputs, inputs) in zip(parts[::2], parts[1::2], self.layout.shapes, strict=True)
            ]
            self._stacks[rows, ranks] = stacks
        return stacks
