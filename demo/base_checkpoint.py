"""Checkpoints of the base model's training: weights, their average, optimizer, step. Called by `demo.train_base`.

A whole file or none (temporary name, fsync, rename), so a stop at any moment costs what came after the last one.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from core.tensor_files import serialize, write_whole

Parameters = dict[str, torch.nn.Parameter]


class Trained:
    """Named parameters with their AdamW and their moving average.

    Args:
        parameters: What is trained.
        average_decay: Of the moving average; lower during the first steps. 0: no averaging.
    """

    def __init__(self, parameters: Parameters, *, average_decay: float, weight_decay: float) -> None:
        self.parameters, self._decay, self.step = parameters, average_decay, 0
        plain = [p for name, p in parameters.items() if p.ndim < 2 or "embedding" in name]
        others = [p for name, p in parameters.items() if not (p.ndim < 2 or "embedding" in name)]
        groups: list[dict[str, Any]] = [
            {"params": others, "weight_decay": weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
        self.average = {name: p.detach().clone() for name, p in parameters.items()}

    def update(self, loss: Tensor, learning_rate: float) -> None:
        """One optimizer step and one step of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        share = 1 - min(self._decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], share)

    def save(self, path: Path) -> None:
        """Write everything that is needed to go on to the same bytes."""
        tensors: dict[str, Tensor] = {"step": torch.tensor(self.step)}
        for name, parameter in self.parameters.items():
            tensors[f"weight.{name}"] = parameter.detach().contiguous()
            tensors[f"average.{name}"] = self.average[name].contiguous()
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}.{name}"] = self.optimizer.state[parameter][key].contiguous()
        write_whole(path, serialize(tensors, {}))

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on from a file of `save`."""
        with safe_open(path, framework="pt") as file:
            self.step = int(file.get_tensor("step"))
            for name, parameter in self.parameters.items():
                parameter.copy_(file.get_tensor(f"weight.{name}"))
                self.average[name].copy_(file.get_tensor(f"average.{name}"))
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    **{key: file.get_tensor(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq")},
                }

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and their average; a second call undoes the first."""
        for name, parameter in self.parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(kept)
