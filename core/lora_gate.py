"""The gate for LoRA files of strangers: what is let in can be read, applied and shown without a surprise.

    judge_lora(path, base_shapes) -> LoraFacts, or LoraFileError with a sentence

Called on upload and by the `import_lora` job. Imports no ML library; memory is bounded whatever the file says.
"""

import math
import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.base_shapes import BaseShapes
from core.errors import LoraFileError
from core.lora_header import LoraHeader, TensorInfo, read_header
from core.lora_keys import LoraKey, block_counting, read_key
from core.lora_parts import LoraModule, read_module
from core.lora_values import EXPONENT_BITS, check_values, read_scalars
from core.progress import Report, silent

MAX_ALPHA = 1e6
SHOWN_METADATA = (
    "ss_output_name",
    "modelspec.title",
    "ss_sd_model_name",
    "ss_base_model_version",
    "ss_training_comment",
)


@dataclass(frozen=True, kw_only=True)
class LoraFacts:
    """What a file that passed the gate holds.

    Attributes:
        kind: Whose names it has: "kohya", "peft" or "diffusers".
        family: "sd1" or "sdxl", None where neither names nor sizes tell.
        adapters: What its modules are: "lora", "dora", "loha", "lokr", "diff".
        ranks: Rank -> number of modules; full differences have none.
        alphas: Alpha -> number of modules; empty where the file holds none.
        modules: Component -> number of modules.
        dtype: Of the weights ("F16"; several: "BF16, F32").
        model_hash: SHA-256 of the tensor bytes, kohya's `sshs_model_hash`; "" where only the header was judged.
        size_bytes: Of the file.
        parameters: Numbers in its matrices.
        metadata: The header's strings, a stranger's words.
        notes: Sentences for people.
    """

    kind: str
    family: str | None
    adapters: tuple[str, ...]
    ranks: dict[int, int]
    alphas: dict[float, int]
    modules: dict[str, int]
    dtype: str
    model_hash: str
    size_bytes: int
    parameters: int
    metadata: dict[str, str]
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """What a LoRA version's record keeps: without the metadata, keys as JSON has them."""
        return {
            "kind": self.kind,
            "family": self.family,
            "adapters": list(self.adapters),
            "rank": most(self.ranks),
            "alpha": most(self.alphas),
            "ranks": {str(rank): count for rank, count in sorted(self.ranks.items())},
            "alphas": {f"{alpha:g}": count for alpha, count in sorted(self.alphas.items())},
            "modules": sum(self.modules.values()),
            "dtype": self.dtype,
            "parameters": self.parameters,
            "trained_as": {key: self.metadata[key][:200] for key in SHOWN_METADATA if self.metadata.get(key)},
            "notes": list(self.notes),
        }


def judge_lora(path: Path, base_shapes: BaseShapes | None = None, *, report: Report = silent) -> LoraFacts:
    """Judge a whole file: header, names, ranks, shapes and every number.

    Args:
        path: A regular file; links and folders are refused.
        base_shapes: Of the base model that it is meant for; None: its shapes are compared with each other only.
        report: Called as the numbers are read; may raise to stop.

    Raises:
        LoraFileError: Says which rule the file breaks, in a sentence that begins with its name.
    """
    header = _read_plain(path)
    facts, alphas = _judge_header(path, header, base_shapes)
    model_hash = check_values(path, header, report)
    found = read_scalars(path, header, alphas)
    for name, alpha in found.items():
        if not math.isfinite(alpha) or not 0 < abs(alpha) <= MAX_ALPHA:
            raise LoraFileError(f"{path.name}: {name} is {alpha:g}; it must be between 0 and {MAX_ALPHA:g}, not 0")
    notes = list(facts.notes)
    stated = header.metadata.get("sshs_model_hash")
    if stated and stated != model_hash:
        notes.append("its weights are not those that its own hash was made of: it was edited after training")
    values = {name: getattr(facts, name) for name in facts.__dataclass_fields__}
    return LoraFacts(
        **values | {"alphas": dict(Counter(found.values())), "model_hash": model_hash, "notes": tuple(notes)}
    )


def judge_header(path: Path, base_shapes: BaseShapes | None = None) -> LoraFacts:
    """As `judge_lora` without reading a single number: milliseconds for any file, for an answer at upload.

    Raises:
        LoraFileError: As `judge_lora`.
    """
    return _judge_header(path, _read_plain(path), base_shapes)[0]


def most(counts: Mapping[Any, int]) -> Any:
    """The value that most modules have; None where none has one."""
    return max(counts, key=lambda value: (counts[value], value), default=None)


def _read_plain(path: Path) -> LoraHeader:
    """The header of a regular file. A pipe would wait for ever, a link may lead anywhere."""
    try:
        mode = os.lstat(path).st_mode
    except OSError as error:
        raise LoraFileError(f"{path.name} cannot be read ({error.strerror}): check that the file is there") from error
    if not stat.S_ISREG(mode):
        what = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
        raise LoraFileError(f"{path.name} is {what}: a single safetensors file is needed")
    return read_header(path)


def _judge_header(path: Path, header: LoraHeader, base: BaseShapes | None) -> tuple[LoraFacts, list[str]]:
    """Facts, and the names of all alphas."""
    label = path.name
    groups: dict[tuple[str, str], dict[str, TensorInfo]] = {}
    namings: set[str] = set()
    alphas: list[str] = []
    counted: dict[str, str] = {}
    for name, tensor in header.tensors.items():
        key = _key(label, name)
        parts = groups.setdefault((key.component, key.module), {})
        if key.part in parts:
            raise LoraFileError(f"{label}: module {key.module} has its {key.part} twice, under two names")
        parts[key.part] = tensor
        namings.add(key.naming)
        counting = block_counting(name) if key.component == "unet" else None
        if counting:
            counted.setdefault(counting, name)
        if key.part == "alpha":
            alphas.append(name)
        elif tensor.dtype not in EXPONENT_BITS:
            raise LoraFileError(
                f"{label}: tensor {name} has type {tensor.dtype}; weights are {', '.join(EXPONENT_BITS)}"
            )
    if len(namings) > 1:
        raise LoraFileError(f"{label} mixes the names of {' and '.join(sorted(namings))}: export it again")
    if len(counted) > 1:
        both = " and ".join(counted.values())
        raise LoraFileError(f"{label} counts the UNet's blocks in two ways, {both}: export it again")
    modules = {at: read_module(f"{label}: {at[1]}", parts) for at, parts in groups.items()}
    if base is not None:
        _compare(label, modules, base)
    weights = [tensor for parts in groups.values() for part, tensor in parts.items() if part != "alpha"]
    kind = namings.pop()
    facts = LoraFacts(
        kind=kind,
        family=_family(modules),
        adapters=tuple(sorted({module.adapter for module in modules.values()})),
        ranks=dict(Counter(module.rank for module in modules.values() if module.rank)),
        alphas={},
        modules=dict(Counter(component for component, _ in modules)),
        dtype=", ".join(sorted({tensor.dtype for tensor in weights})),
        model_hash="",
        size_bytes=path.stat().st_size,
        parameters=sum(math.prod(tensor.shape) for tensor in weights),
        metadata=header.metadata,
        notes=tuple(_notes(kind, header, modules)),
    )
    return facts, alphas


def _key(label: str, name: str) -> LoraKey:
    try:
        return read_key(name)
    except LoraFileError as error:
        raise LoraFileError(f"{label}: {error}") from error


def _compare(label: str, modules: dict[tuple[str, str], LoraModule], base: BaseShapes) -> None:
    """Every module must exist in the base, and its update must have the size of the weight."""
    misfits: list[str] = []
    for (component, name), module in modules.items():
        weight = base.modules.get(component, {}).get(name)
        if weight is None:
            misfits.append(f"{component} has no module {name}")
        elif len(weight) not in (2, 4) or name.endswith("_embedding"):
            what = "an embedding" if len(weight) == 2 else "a norm"
            raise LoraFileError(f"{label} changes {component} {name}, {what}, which is not served")
        elif not module.fits(weight):
            misfits.append(f"{component} {name} has shape {list(weight)}, the LoRA changes {module.described()}")
    if misfits:
        family = _family(modules)
        hint = f" (it looks like {family}, the base is {base.family})" if family and family != base.family else ""
        raise LoraFileError(
            f"{label} does not fit base model {base.name}{hint}: {len(misfits)} of {len(modules)} modules differ, "
            f"first: {misfits[0]}; choose the base model that it was trained for"
        )


def _family(modules: dict[tuple[str, str], LoraModule]) -> str | None:
    """By the second text encoder, or by the width of the text that cross-attention reads."""
    if any(component == "text_encoder_2" for component, _ in modules):
        return "sdxl"
    widths = {module.inputs for (_, name), module in modules.items() if name.endswith(("attn2_to_k", "attn2_to_v"))}
    return {768: "sd1", 2048: "sdxl"}.get(widths.pop()) if len(widths) == 1 else None


def _notes(kind: str, header: LoraHeader, modules: dict[tuple[str, str], LoraModule]) -> list[str]:
    notes = []
    scaled = [module for module in modules.values() if module.adapter != "diff"]
    without = sum(not module.has_alpha for module in scaled)
    if without and kind == "peft":
        notes.append("alpha is in adapter_config.json, not in this file")
    elif without and not (kind == "diffusers" and "lora_adapter_metadata" in header.metadata):
        notes.append(f"{without} of {len(scaled)} modules have no alpha: every reader takes their strength as 1.0")
    if len({module.rank for module in scaled}) > 1:
        notes.append("its modules have different ranks")
    odd = sorted({module.adapter for module in modules.values()} - {"lora"})
    if odd:
        notes.append(f"it holds {', '.join(odd)} modules, which are applied more slowly than plain LoRA")
    return notes
