"""LoRAs added into a model's own weights, and taken out again exactly, from a saved copy.

For runs of many pictures with one LoRA, where somebody chose it: sums in the weights have other low bits than slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.lora_apply import fit
from core.lora_state import LoraLayer, ModuleUpdate


@dataclass(eq=False)
class _Weight:
    """One weight of the model: the live tensor, its untouched copy, and both as matrices (out, in * kh * kw)."""

    live: Tensor
    copy: Tensor
    live_matrix: Tensor
    copy_matrix: Tensor


@dataclass(frozen=True, eq=False)
class FittedLora:
    """A LoRA found out for one model by `FusedLoras.fitted`: its matrices on the model's device and in its dtype.

    Attributes:
        products: (weight, up (out, rank), down (rank, in * kh * kw), alpha / rank).
        others: Updates that are no product of two matrices.
    """

    products: tuple[tuple[_Weight, Tensor, Tensor, float], ...]
    others: tuple[tuple[_Weight, ModuleUpdate], ...]


class FusedLoras:
    """One model whose weights LoRAs are added to.

    The untouched weights of every module that a LoRA ever came for are kept: memory of that size, and no drift.

    Args:
        model: Its weights are changed in place, so captured graphs stay valid; it must keep its device and dtype.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._weights: dict[str, _Weight] = {}
        self._changed: list[_Weight] = []

    @torch.no_grad()
    def fitted(self, layers: Mapping[str, ModuleUpdate]) -> FittedLora:
        """Find a LoRA's modules once, so that fusing it is arithmetic alone.

        Args:
            layers: By module name.

        Raises:
            LoraFileError: A module or shape does not fit.
        """
        products: list[tuple[_Weight, Tensor, Tensor, float]] = []
        others: list[tuple[_Weight, ModuleUpdate]] = []
        for name, layer in fit(self._model, layers).items():
            weight = self._weight(name)
            # A convolution in channels_last has no matrix that shares its memory: its sum is copied in.
            if isinstance(layer, LoraLayer) and layer.magnitude is None and weight.live.is_contiguous():
                up, down = (matrix.to(weight.live.device, weight.live.dtype) for matrix in (layer.up, layer.down))
                products.append((weight, up.flatten(1), down.flatten(1), layer.scale))
            else:
                others.append((weight, layer))
        return FittedLora(tuple(products), tuple(others))

    @torch.no_grad()
    def fuse(self, loras: Sequence[tuple[FittedLora, float]]) -> None:
        """Make the weights W + sum of weight * delta, whatever was fused before.

        Args:
            loras: What `fitted` of this very object gave, and their weights.
        """
        before, self._changed = self._changed, []
        changed: set[_Weight] = set()  # by identity; the first update of a weight begins from its copy
        try:
            for lora, strength in loras:
                for weight, up, down, scale in lora.products:
                    begin = weight.live_matrix if weight in changed else weight.copy_matrix
                    torch.addmm(begin, up, down, alpha=strength * scale, out=weight.live_matrix)
                    changed.add(weight)
                for weight, layer in lora.others:
                    update = layer.delta(weight.copy).reshape(weight.live.shape).to(weight.live.device)
                    begin = weight.live if weight in changed else weight.copy
                    weight.live.copy_(begin.float() + strength * update)
                    changed.add(weight)
        except BaseException:
            self._changed = [*self._weights.values()]  # one of them may be half written
            self.unfuse()
            raise
        _restore([weight for weight in before if weight not in changed])
        self._changed = [*changed]

    @torch.no_grad()
    def unfuse(self) -> None:
        """Restore the weights, bit for bit. Safe to call twice."""
        _restore(self._changed)
        self._changed = []

    def _weight(self, name: str) -> _Weight:
        if name not in self._weights:
            live = self._model.get_submodule(name).get_parameter("weight").data
            copy = live.clone()
            self._weights[name] = _Weight(live, copy, live.flatten(1), copy.flatten(1))
        return self._weights[name]


def _restore(weights: Sequence[_Weight]) -> None:
    if weights:
        torch._foreach_copy_([weight.live for weight in weights], [weight.copy for weight in weights])
