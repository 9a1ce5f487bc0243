"""Which number format a training computes in, decided from the configuration and the device. Called by `core.train`."""

from dataclasses import dataclass
from typing import Literal

import torch

from core.errors import ConfigError
from core.train_config import Precision

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TrainingPrecision:
    """How a training computes; LoRA weights, gradients and optimizer are fp32 in each case.

    Attributes:
        name: "fp32", "fp16" or "bf16".
        device_type: "cuda" or "cpu".
    """

    name: Literal["fp32", "fp16", "bf16"]
    device_type: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen UNet and of autocast."""
        return DTYPES[self.name]

    @property
    def needs_scaler(self) -> bool:
        """Small gradients vanish in fp16 unless the loss is scaled up."""
        return self.name == "fp16"

    def autocast(self) -> torch.autocast:
        """Context for the forward pass; does nothing in fp32."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.name != "fp32")


def choose_precision(wish: Precision, device: torch.device) -> TrainingPrecision:
    """auto: bf16 where the device computes in it, else fp16 on CUDA, and fp32 on a CPU.

    Raises:
        ConfigError: The device cannot do what was asked for.
    """
    on_cuda = device.type == "cuda"
    has_bf16 = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if wish == "auto":
        name: Literal["fp32", "fp16", "bf16"] = "fp32" if not on_cuda else "bf16" if has_bf16 else "fp16"
        return TrainingPrecision(name=name, device_type=device.type)
    if wish == "fp16" and not on_cuda:
        raise ConfigError(f"mixed_precision fp16 needs a CUDA device, this is {device}: choose auto, fp32 or bf16")
    if wish == "bf16" and on_cuda and not has_bf16:
        raise ConfigError("mixed_precision bf16 needs a GPU of compute capability 8.0 or newer: choose auto or fp16")
    return TrainingPrecision(name=wish, device_type=device.type)
