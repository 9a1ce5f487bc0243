"""LoRAs added into a model's own weights, and taken out again exactly, from a saved copy.

For runs of many pictures with one LoRA, where somebody chose it: sums in the weights have other low bits than slots.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from core.lora_apply import fit
from core.lora_state import LoraLayer, ModuleUpdate


class FusedLoras:
    """One model whose weights LoRAs are added to.

    The untouched weights of every module that was ever changed are kept: memory of that size, and no drift.

    Args:
        model: Its weights are changed in place, so captured graphs stay valid.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._originals: dict[str, tuple[Tensor, Tensor]] = {}  # (the live weight, its copy)
        self._changed: list[str] = []

    @torch.no_grad()
    def fuse(self, loras: Sequence[tuple[Mapping[str, ModuleUpdate], float]]) -> None:
        """Make the weights W + sum of weight * delta, whatever was fused before.

        Args:
            loras: Layers by module name, and their weights.

        Raises:
            LoraFileError: A module or shape does not fit; nothing is changed then.
        """
        plan = [(name, layer, weight) for layers, weight in loras for name, layer in fit(self._model, layers).items()]
        self.unfuse()
        for name, _, _ in plan:
            if name not in self._originals:
                live = self._model.get_submodule(name).get_parameter("weight").data
                self._originals[name] = (live, live.clone())
        changed: set[str] = set()
        try:
            for name, layer, strength in plan:
                live, copy = self._originals[name]
                begin = live if name in changed else copy
                if name not in changed:
                    changed.add(name)
                    self._changed.append(name)
                if isinstance(layer, LoraLayer) and layer.magnitude is None:
                    up, down = (matrix.to(live.device, live.dtype).flatten(1) for matrix in (layer.up, layer.down))
                    out = live.flatten(1)  # (out, in * kh * kw), a view
                    torch.addmm(begin.flatten(1), up, down, alpha=strength * layer.scale, out=out)
                else:
                    update = layer.delta(copy).reshape(live.shape).to(live.device)
                    live.copy_(begin.float() + strength * update)
        except BaseException:
            self.unfuse()
            raise

    @torch.no_grad()
    def unfuse(self) -> None:
        """Restore the weights, bit for bit. Safe to call twice."""
        pairs = [self._originals[name] for name in self._changed]
        if pairs:
            torch._foreach_copy_([live for live, _ in pairs], [copy for _, copy in pairs])
        self._changed.clear()
