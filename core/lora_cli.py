"""The commands for LoRA files: inspect, convert, verify, repair. `python -m core.lora_utils` calls `main`.

Everything here is readable text on stdout, or one JSON object with --json; exit status 1 where something is wrong.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.base_shapes import BaseShapes, shapes_of_folder
from core.errors import CoreError, LoraFileError
from core.lora_gate import LoraFacts
from core.lora_lycoris import LycorisUpdate
from core.lora_peft import CONFIG_NAME
from core.lora_repair import (
    alpha_of,
    modules_without_alpha,
    prove_equal,
    repair,
    update_of,
    write_lora,
)
from core.lora_source import ENDING, find_source, judge_source, peft_beside
from core.lora_state import LoraLayer, LoraState, ModuleUpdate
from core.lora_utils import read_lora

DESCRIPTION = "Look at LoRA files, convert them between the formats of other tools, and give lost strength back."
EXAMPLES = """
examples:
  what is this file, and how strong is it?
    python -m core.lora_utils inspect ink.safetensors
  a PEFT folder for WebUI, and back for diffusers
    python -m core.lora_utils convert ink-peft --to kohya --out ink.safetensors
    python -m core.lora_utils convert ink.safetensors --to peft --out ink-peft
    python -m core.lora_utils convert ink.safetensors --to diffusers --out pytorch_lora_weights.safetensors
  is it whole, and does it fit this base model?
    python -m core.lora_utils verify ink.safetensors --base demo/tiny-sd-emoji
  a converted file came out 32 times too weak: its alpha was lost, the training's was 32
    python -m core.lora_utils repair weak.safetensors --alpha 32 --out right.safetensors
    python -m core.lora_utils repair weak.safetensors --config ink-peft/adapter_config.json --out right.safetensors

SRC is a .safetensors file, a PEFT folder (adapter_config.json and adapter_model.safetensors), or a folder that holds
one LoRA; a PEFT folder wins over a loose file beside it. Exit status: 0 all is well, 1 something is wrong, 2 usage.
"""
FORMATS = ("kohya", "peft", "diffusers")
METADATA_SHOWN = {
    "trained as": ("ss_output_name", "modelspec.title"),
    "trained on": ("ss_sd_model_name", "ss_base_model_version"),
    "trigger": ("modelspec.trigger_phrase",),
    "steps": ("ss_steps",),
    "pictures": ("ss_num_train_images",),
    "resolution": ("ss_resolution", "modelspec.resolution"),
    "learning rate": ("ss_learning_rate",),
    "clip skip": ("ss_clip_skip", "modelspec.encoder_layer"),
    "comment": ("ss_training_comment",),
}
Answer = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; ends the process with its exit status."""
    given = _options().parse_args(arguments)
    command: Callable[[argparse.Namespace], Answer] = given.command
    try:
        answer = command(given)
    except CoreError as error:
        answer = {"ok": False, "problems": [str(error)]}
    if given.json:
        sys.stdout.write(json.dumps(answer, indent=2) + "\n")
    else:
        _write(answer)
    raise SystemExit(0 if answer["ok"] else 1)


def inspect(given: argparse.Namespace) -> Answer:
    """What a LoRA is, how strong, and how it was trained."""
    source = find_source(given.source)
    facts = judge_source(source)
    answer = _described(source, facts)
    try:
        state = read_lora(source)
    except LoraFileError as error:
        return answer | {"ok": False, "problems": [str(error)]}
    layers = [layer for part in state.components().values() for layer in part.values()]
    scaled = [layer for layer in layers if isinstance(layer, LoraLayer | LycorisUpdate) and layer.rank]
    alphas = Counter(alpha_of(layer) for layer in scaled)
    scales = Counter(round(layer.scale, 6) for layer in scaled)
    answer["alphas"] = {f"{alpha:g}": count for alpha, count in sorted(alphas.items())}
    answer["scales"] = {f"{scale:g}": count for scale, count in sorted(scales.items())}
    answer["strength"] = {name: strength(part) for name, part in state.components().items() if part}
    return answer


def convert(given: argparse.Namespace) -> Answer:
    """Write the same LoRA in another format, and prove that it is the same."""
    source = find_source(given.source)
    judge_source(source)
    state = read_lora(source)
    write_lora(state, given.out, given.to)
    return {"ok": True, "written": str(given.out), "modules": _count(state), "notes": ["read back: the same LoRA"]}


def verify(given: argparse.Namespace) -> Answer:
    """Everything that can be wrong with a file, all of it at once."""
    source = find_source(given.source)
    base: BaseShapes | None = shapes_of_folder(given.base) if given.base else None
    facts = judge_source(source, base)
    problems: list[str] = []
    stated = facts.metadata.get("sshs_model_hash")
    if stated and stated != facts.model_hash:
        problems.append(f"sshs_model_hash says {stated[:12]}, the weights are {facts.model_hash[:12]}: it was edited")
    if source.is_file() and facts.kind == "peft":
        problems.append(f"a PEFT file without {CONFIG_NAME}: its alpha is lost, `repair` gives it back")
    elif facts.kind == "kohya" and (missing := modules_without_alpha(source)):
        problems.append(f"{missing} modules have no alpha: readers take their strength as 1.0")
    state = None
    try:
        state = read_lora(source)
    except LoraFileError as error:
        problems.append(str(error))
    folder = peft_beside(source) if source.is_file() else None
    if folder and state:
        try:
            prove_equal(read_lora(folder), state, f"{source.name} and {folder.name}/ disagree")
        except LoraFileError as error:
            problems.append(f"{error}; the folder counts, `repair` makes the file follow it")
    checked = ["header", "names", "shapes", "finite values", "alpha", "hash"]
    checked += [f"fits {given.base}"] if base else []
    checked += [f"agrees with {folder.name}/"] if folder else []
    answer = _described(source, facts) | {"ok": not problems, "problems": problems}
    return answer if problems else answer | {"checked": checked}


def repair_command(given: argparse.Namespace) -> Answer:
    """Write the LoRA with its alphas as trained."""
    if given.out.resolve() == given.source.resolve():
        raise LoraFileError(f"--out {given.out} is the source: name another place, the source stays as it is")
    source = given.source if given.source.is_file() else find_source(given.source)
    judge_source(source)
    state, changed = repair(source, alpha=given.alpha, config=given.config)
    write_lora(state, given.out, "kohya" if given.out.suffix == ENDING else "peft")
    note = f"{changed} of {sum(_count(state).values())} modules had no alpha or another one"
    strengths = {name: strength(part) for name, part in state.components().items() if part}
    return {"ok": True, "written": str(given.out), "modules": _count(state), "strength": strengths, "notes": [note]}


def strength(layers: Mapping[str, ModuleUpdate]) -> float:
    """Frobenius norm of all updates together: sqrt(sum |delta W|^2). 0.0 changes nothing."""
    return math.sqrt(sum(_squared_norm(layer) for layer in layers.values()))


def _squared_norm(layer: ModuleUpdate) -> float:
    if not isinstance(layer, LoraLayer):
        return float(update_of(layer).double().square().sum())
    down = layer.down.double().flatten(1)  # (rank, in * kh * kw)
    up = layer.up.double().flatten(1)  # (out, rank)
    # |up @ down|^2 = trace(up^T up  down down^T): two small matrices instead of a large product.
    return float(layer.scale**2 * ((up.T @ up) * (down @ down.T)).sum())


def _described(source: Path, facts: LoraFacts) -> Answer:
    summary = facts.summary()
    metadata = facts.metadata
    trained = {
        label: next(metadata[key] for key in keys if metadata.get(key))
        for label, keys in METADATA_SHOWN.items()
        if any(metadata.get(key) for key in keys)
    }
    return {
        "ok": True,
        "source": str(source),
        "kind": f"{facts.kind} {'folder' if source.is_dir() else 'file'}",
        "family": facts.family or "unknown",
        "adapters": summary["adapters"],
        "modules": facts.modules,
        "ranks": summary["ranks"],
        "alphas": summary["alphas"],
        "dtype": facts.dtype,
        "size_bytes": facts.size_bytes,
        "model_hash": facts.model_hash,
        "training": trained,
        "notes": [note for note in facts.notes if not (source.is_dir() and CONFIG_NAME in note)],
    }


def _count(state: LoraState) -> dict[str, int]:
    return {name: len(part) for name, part in state.components().items() if part}


def _write(answer: Answer) -> None:
    """The answer as a table: a word, what it is."""
    for key, value in answer.items():
        if key in ("ok", "problems", "notes") or not value:
            continue
        if key == "training":
            for label, text in value.items():
                _line(label, _plain(text))
        elif key in ("ranks", "alphas", "scales"):
            _line(key, ", ".join(f"{number} ({count} modules)" for number, count in value.items()))
        elif isinstance(value, dict):
            _line(key, ", ".join(f"{name} {_figure(number)}" for name, number in value.items()))
        else:
            _line(key.replace("_", " "), ", ".join(value) if isinstance(value, list) else _plain(str(value)))
    for note in answer.get("notes", ()):
        _line("note", note)
    for problem in answer.get("problems", ()):
        sys.stdout.write(f"WRONG  {_plain(problem)}\n")
    if answer["ok"]:
        sys.stdout.write("ok\n")


def _line(label: str, text: str) -> None:
    sys.stdout.write(f"{label:<14} {text}\n")


def _figure(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:.4g}"


def _plain(text: str) -> str:
    """A stranger's words for a terminal: without control characters, not endless."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:400]


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m core.lora_utils",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], Answer], text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=(command.__doc__ or text))
        one.add_argument("source", metavar="SRC", type=Path, help="A .safetensors file or a PEFT folder.")
        one.add_argument("--json", action="store_true", help="One JSON object instead of a table.")
        one.set_defaults(command=command)
        return one

    add("inspect", inspect, "show kind, family, ranks, alphas, strength, training")
    converting = add("convert", convert, "write the same LoRA in another format")
    converting.add_argument("--to", choices=FORMATS, required=True, help="kohya is WebUI's format, too.")
    converting.add_argument("--out", metavar="DST", type=Path, required=True, help="A .safetensors file, or a folder.")
    verifying = add("verify", verify, "find everything that is wrong with a file")
    verifying.add_argument("--base", metavar="FOLDER", type=Path, help="A pipeline folder that it must fit.")
    repairing = add("repair", repair_command, "give lost alphas back")
    value = repairing.add_mutually_exclusive_group()
    value.add_argument("--alpha", type=float, help="The alpha that it was trained with, for every module.")
    value.add_argument("--config", type=Path, help=f"An {CONFIG_NAME}. Default: the one that lies beside SRC.")
    repairing.add_argument("--out", metavar="DST", type=Path, required=True, help="A .safetensors file, or a folder.")
    return parser
