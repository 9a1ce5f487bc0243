"""The command line of `core.preprocess`: `python -m core.preprocess SOURCE DESTINATION`; `--help` explains it."""

import sys
from collections.abc import Sequence
from pathlib import Path

from core.command_line import ProgressBar, add_config_options, parser, read_config
from core.config import PreprocessConfig
from core.preprocess import preprocess_folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare a folder of pictures and say what was left out."""
    options = parser(
        "core.preprocess",
        "Prepare pictures for training: checks each file's content, cuts it to the nearest aspect bucket, writes it "
        "as DESTINATION/images/<sha256>.png and the list with captions as DESTINATION/manifest.json. A caption is "
        "the .txt of the same name, else the file name. Bad files are left out with a reason.",
        example="python -m core.preprocess my_pictures var/datasets/mine --resolution 64 --bucket-step-px 16",
    )
    options.add_argument(
        "source", type=Path, help="folder of PNG, JPEG or WebP pictures, with or without .txt captions"
    )
    options.add_argument("destination", type=Path, help="folder for the prepared dataset")
    add_config_options(options, PreprocessConfig)
    given = options.parse_args(arguments)
    bar = ProgressBar()
    try:
        result = preprocess_folder(given.source, given.destination, read_config(PreprocessConfig, given), bar)
    finally:
        bar.close()
    for rejected in result.rejected:
        sys.stdout.write(f"left out {rejected.name}: {rejected.reason}\n")
    sys.stdout.write(f"{len(result.manifest.images)} pictures, dataset {result.manifest.content_hash()}\n")
