"""Finds the files of the LoRA that a person means, and lets the gate judge all of them. Called by `core.lora_cli`.

A PEFT folder describes one model, so a LoRA of several models is several files.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from core.base_shapes import BaseShapes
from core.errors import LoraFileError
from core.lora_gate import LoraFacts, judge_lora
from core.lora_peft import CONFIG_NAME, TEXT_FOLDERS, WEIGHTS_NAME

ENDING = ".safetensors"


def find_source(path: Path) -> Path:
    """The LoRA that a person means: a file, or a PEFT folder, which wins over a loose file beside it.

    Args:
        path: A safetensors file; a PEFT folder, or a file in it; or a folder that holds one LoRA.

    Raises:
        LoraFileError: Nothing there, or several.
    """
    if path.is_file():
        return path.parent if path.name == WEIGHTS_NAME and (path.parent / CONFIG_NAME).is_file() else path.resolve()
    if not path.is_dir():
        raise LoraFileError(f"{path} is not there: name a {ENDING} file or a PEFT folder")
    if is_peft_folder(path):
        return path
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and is_peft_folder(folder))
    files = sorted(path.glob(f"*{ENDING}"))
    found = folders or files
    if len(found) != 1:
        what = ", ".join(item.name for item in found[:5]) or "nothing"
        raise LoraFileError(f"{path} should hold one LoRA and holds {what}: name the file or the PEFT folder itself")
    return found[0]


def is_peft_folder(folder: Path) -> bool:
    """Whether it has a configuration, be it that of a text encoder alone."""
    return any((part / CONFIG_NAME).is_file() for part in _parts(folder).values())


def peft_beside(file: Path) -> Path | None:
    """The PEFT folder that was exported together with a file: `<name>-peft`, or the file's own folder."""
    for folder in (file.with_name(f"{file.stem}-peft"), file.parent):
        weights = weights_of(folder)
        if is_peft_folder(folder) and weights and file not in weights.values():
            return folder
    return None


def weights_of(source: Path) -> dict[str, Path]:
    """The files of a LoRA's numbers: the file itself as "unet", or those of a PEFT folder by component."""
    if not source.is_dir():
        return {"unet": source}
    return {component: part / WEIGHTS_NAME for component, part in _parts(source).items() if _holds_weights(part)}


def judge_source(source: Path, base: BaseShapes | None = None) -> LoraFacts:
    """Facts of all files of a LoRA together.

    Raises:
        LoraFileError: One of them breaks a rule of the gate, or there is none.
    """
    found: list[LoraFacts] = []
    for component, path in weights_of(source).items():
        shapes = base
        if base is not None and component != "unet":  # in a PEFT folder, each file calls its model the same
            shapes = replace(base, modules={"unet": base.modules.get(component, {})})
        facts = judge_lora(path, shapes)
        if component != "unet":
            facts = replace(facts, modules={component: sum(facts.modules.values())})
        found.append(facts)
    if not found:
        raise LoraFileError(f"{source} holds no {WEIGHTS_NAME}: a PEFT folder needs its weights")
    first = found[0]
    if len(found) == 1:
        return first
    return replace(
        first,
        adapters=tuple(sorted({adapter for facts in found for adapter in facts.adapters})),
        ranks=dict(sum((Counter(facts.ranks) for facts in found), Counter())),
        alphas=dict(sum((Counter(facts.alphas) for facts in found), Counter())),
        modules={component: count for facts in found for component, count in facts.modules.items()},
        family="sdxl" if any("text_encoder_2" in facts.modules for facts in found) else first.family,
        size_bytes=sum(facts.size_bytes for facts in found),
        parameters=sum(facts.parameters for facts in found),
        notes=tuple(dict.fromkeys(note for facts in found for note in facts.notes)),
    )


def _parts(folder: Path) -> dict[str, Path]:
    return {"unet": folder} | {name: folder / name for name in TEXT_FOLDERS}


def _holds_weights(folder: Path) -> bool:
    return (folder / WEIGHTS_NAME).is_file()
