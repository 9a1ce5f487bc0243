"""The command line of `core.generate`: words in, PNG files out.

Called by `python -m core.generate`; holds no generation code.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from core.command_line import ProgressBar, add_config_options, parser, read_config
from core.config import GenerateConfig
from core.errors import ConfigError
from core.file_hash import hash_file
from core.generate import generate
from core.hub_source import fetch_source
from core.image_files import infotext, save_png
from core.pipelines import load_base, pick_device
from core.prepared_base import DEFAULT_CACHE_FOLDER, ensure_prepared
from core.text_encoding import resolve_clip_skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module; `--help` explains it."""
    options = parser(
        "core.generate",
        "Draw pictures with a base model, with or without LoRAs. Each picture is written as PNG with its parameters "
        "in it; a seed gives the same picture again.",
        example='python -m core.generate --base demo/tiny-sd-emoji --prompt "a red apple" --seed 3 --out pictures',
    )
    options.add_argument("--base", required=True, help="pipeline folder (prepared or not), or a Hugging Face id")
    options.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    options.add_argument("--lora", type=Path, action="append", default=[], help="LoRA file; may be given several times")
    options.add_argument(
        "--lora-weight", type=float, action="append", default=[], help="weight of each --lora in order; 1 where missing"
    )
    options.add_argument("--device", help="cpu, cuda, cuda:1 ...; the first GPU where there is one by default")
    options.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE_FOLDER, help="folder of prepared bases (%(default)s)"
    )
    native = "the base's native size"
    add_config_options(options, GenerateConfig, skip={"loras"}, defaults={"width": native, "height": native})
    given = options.parse_args(arguments)
    if len(given.lora_weight) > len(given.lora):
        raise ConfigError(f"{len(given.lora_weight)} --lora-weight for {len(given.lora)} --lora: give each LoRA one")
    missing = [path for path in given.lora if not path.is_file()]
    if missing:
        raise ConfigError(f"--lora {missing[0]} is no file: give the path of a LoRA file (.safetensors)")
    weights = given.lora_weight + [1.0] * (len(given.lora) - len(given.lora_weight))
    prepared = ensure_prepared(fetch_source(given.base), given.cache)
    size = prepared.facts.native_size_px
    given.width, given.height = given.width or size, given.height or size
    uses = [{"sha256": hash_file(path), "weight": weight} for path, weight in zip(given.lora, weights, strict=True)]
    config = read_config(GenerateConfig, given, loras=uses)

    base = load_base(prepared.folder, device=given.device or pick_device())
    bar = ProgressBar()
    try:
        pictures = generate(base, config, list(zip(given.lora, weights, strict=True)), bar)
    finally:
        bar.close()
    names = [path.name for path in given.lora]
    clip_skip = resolve_clip_skip(base, config.clip_skip)
    for seed, picture in zip(config.seeds(), pictures, strict=True):
        path = given.out / f"{config.content_hash()[:8]}-seed-{seed}.png"
        save_png(picture, path, infotext(config, seed, Path(given.base).name, names, clip_skip=clip_skip))
        sys.stdout.write(f"{path}\n")
