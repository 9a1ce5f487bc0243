"""The command line of `core.train`: one YAML file in, LoRA files and sample pictures out.

Called by `python -m core.train`; holds no training code.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from core.command_line import ProgressBar
from core.config import PreprocessConfig
from core.errors import ConfigError
from core.hub_source import fetch_source
from core.manifest import PreparedDataset, read_dataset
from core.pipelines import load_base, pick_device
from core.prepared_base import DEFAULT_CACHE_FOLDER, ensure_prepared
from core.preprocess import preprocess_folder
from core.progress import Progress, Report
from core.train import train
from core.train_config import TrainConfig

DESCRIPTION = """\
Train a LoRA as a YAML file says, and draw sample pictures before and after.

Stop it at any time, with Ctrl+C or kill -9: the same command goes on from its newest checkpoint, and on a CPU ends
with the very bytes of an uninterrupted run.

The YAML file holds:
  base_model   a diffusers Stable Diffusion 1.x folder or hub id
  dataset      a folder made by `python -m core.preprocess`; or instead of it:
  pictures     a folder of pictures, each with a caption in NAME.txt or in its file name
  preprocess   for `pictures`: options of `python -m core.preprocess` (resolution, bucket_step_px, trigger_word ...)
  output       folder for checkpoints, samples and the finished files; its name becomes the LoRA's
and any of these, with their defaults (paths are relative to the folder where the command runs):
"""
EXAMPLE = """\
example file:
  base_model: demo/tiny-sd-emoji
  pictures: demo/pictures
  preprocess: {resolution: 64, bucket_step_px: 16, caption_suffix: blueprint style}
  output: var/blueprint
  rank: 16
  targets: with_conv
  steps: 450
  batch_size: 8
  learning_rate: 1.0e-3
  sample_prompts: ["a cat, blueprint style"]
"""
OWN_KEYS = ("base_model", "dataset", "pictures", "preprocess", "output")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the file, prepare what is missing, train, and say where the files are."""
    options = argparse.ArgumentParser(
        prog="python -m core.train",
        description=DESCRIPTION + _field_help(),
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("file", type=Path, help="YAML file")
    options.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the first GPU, else the CPU)")
    options.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads; more is faster on an idle machine, and far slower on a busy one. Bit-equal results need "
        "equal numbers (default: %(default)s)",
    )
    options.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE_FOLDER, help="folder of prepared bases (default: %(default)s)"
    )
    options.add_argument("--verbose", action="store_true", help="show what is cached, resumed and saved")
    given = options.parse_args(arguments)
    if given.verbose:
        logging.getLogger("core").setLevel(logging.INFO)
    torch.set_num_threads(max(1, given.threads))

    own, config = read_training_file(given.file)
    output = Path(own["output"])
    bar = ProgressBar()
    try:
        prepared = ensure_prepared(fetch_source(str(own["base_model"])), given.cache, report=bar)
        dataset = _dataset(own, output, bar)
        base = load_base(prepared.folder, device=given.device or pick_device())
        result = train(
            config, base, dataset, output, _with_rounded_figures(bar), name=output.name, base_name=own["base_model"]
        )
    finally:
        bar.close()
    last = result.losses[-50:]
    sys.stdout.write(
        f"trained {result.steps} steps in {result.seconds:.0f} s, mean loss of the last {len(last)} steps "
        f"{sum(last) / len(last):.4f}\n"
        f"LoRA for WebUI, ComfyUI, diffusers: {result.kohya_file}\n"
        f"LoRA for PEFT:                      {result.peft_folder}\n"
    )
    if result.samples:
        sys.stdout.write(f"sample pictures, before to after:    {result.samples[0].path.parent.parent}\n")


def read_training_file(path: Path) -> tuple[dict[str, Any], TrainConfig]:
    """The command's own keys and the training configuration of a YAML file.

    Raises:
        ConfigError: Not YAML, a key is unknown or missing, or a value makes no sense.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give a YAML file, see --help") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, see --help")
    own = {key: values.pop(key) for key in OWN_KEYS if key in values}
    missing = [key for key in ("base_model", "output") if not own.get(key)]
    if missing:
        raise ConfigError(f"{path} lacks {' and '.join(missing)}, see --help")
    if ("dataset" in own) == ("pictures" in own):
        raise ConfigError(f"{path} needs either `dataset` (a prepared folder) or `pictures` (a folder of pictures)")
    return own, TrainConfig.parse(values)


def _dataset(own: dict[str, Any], output: Path, report: Report) -> PreparedDataset:
    """The prepared folder that the file names, or the pictures prepared into the output folder."""
    if "dataset" in own:
        return read_dataset(Path(own["dataset"]))
    # Prepared anew each time, in seconds: changed pictures are noticed and refused by the checkpoint, not overlooked.
    config = PreprocessConfig.parse(own.get("preprocess") or {})
    result = preprocess_folder(Path(own["pictures"]), output / "dataset", config, report)
    for rejected in result.rejected:
        sys.stderr.write(f"left out {rejected.name}: {rejected.reason}\n")
    return read_dataset(output / "dataset")


def _field_help() -> str:
    """One line per field of TrainConfig: name, default, meaning."""
    lines = []
    for name, field in TrainConfig.model_fields.items():
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        lines.append(f"  {name}: {'null' if default is None else default}\n      {field.description}")
    return "\n".join(lines)


def _with_rounded_figures(bar: ProgressBar) -> Report:
    """Loss and learning rate with the digits that a person reads."""

    def report(progress: Progress) -> None:
        figures = {key: float(f"{value:.4g}") for key, value in progress.figures.items()}
        bar(Progress(stage=progress.stage, step=progress.step, total=progress.total, figures=figures))

    return report
