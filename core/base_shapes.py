"""Shapes of a base model's weights, from the headers of its files alone. Called by the gate for foreign LoRAs.

Imports no ML library and reads no tensor bytes, so that a cpu worker can ask it without fetching the base.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import BaseModelError, LoraFileError
from core.lora_header import LoraHeader, read_header
from core.lora_keys import COMPONENTS, flat_module

WEIGHT = ".weight"


@dataclass(frozen=True, kw_only=True)
class BaseShapes:
    """What a LoRA may change.

    Attributes:
        name: Of the base model, for people.
        modules: Component ("unet", "text_encoder", "text_encoder_2") -> flat module name -> shape of its weight.
    """

    name: str
    modules: Mapping[str, Mapping[str, tuple[int, ...]]] = field(repr=False)

    @property
    def family(self) -> str:
        """sdxl has a second text encoder, sd1 has not."""
        return "sdxl" if "text_encoder_2" in self.modules else "sd1"


def shapes_of_folder(folder: Path) -> BaseShapes:
    """Shapes of a diffusers pipeline folder in safetensors, prepared or not.

    Raises:
        BaseModelError: No weights of a UNet there, or a damaged header.
    """
    files = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.safetensors"))
    return shapes_of_files(files, lambda name: read_header(folder / name), folder.name)


def shapes_of_files(files: Iterable[str], header_of: Callable[[str], LoraHeader], name: str) -> BaseShapes:
    """Shapes of a base whose files are anywhere.

    Args:
        files: Paths relative to the pipeline's folder; only safetensors of the UNet and the text encoders are asked.
        header_of: Reads the header of one of them.
        name: Of the base model, for people.

    Raises:
        BaseModelError: No weights of a UNet there, or a damaged header.
    """
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for file in files:
        component, _, rest = file.partition("/")
        if component not in COMPONENTS or not rest.endswith(".safetensors") or "/" in rest:
            continue
        try:
            tensors = header_of(file).tensors
        except LoraFileError as error:
            raise BaseModelError(f"base model {name}, {component}: {error}") from error
        found = modules.setdefault(component, {})
        for key, tensor in tensors.items():
            if key.endswith(WEIGHT):
                found[flat_module(component, key.removesuffix(WEIGHT))] = tensor.shape
    if not modules.get("unet"):
        raise BaseModelError(f"base model {name} has no unet/*.safetensors: prepare it again")
    return BaseShapes(name=name, modules=modules)
