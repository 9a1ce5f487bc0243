"""Preprocessing inside a worker. Loads no ML library, so a cpu worker stays small."""

from collections.abc import Sequence
from pathlib import Path

from core.config import PreprocessConfig
from core.preprocess import PreprocessResult, SourceImage, preprocess
from core.progress import Report


def run_preprocess(
    sources: Sequence[SourceImage], config: PreprocessConfig, images_folder: Path, report: Report
) -> PreprocessResult:
    """Prepare pictures into `images_folder`; see `core.preprocess.preprocess`."""
    images_folder.mkdir(parents=True, exist_ok=True)
    return preprocess(sources, config, images_folder, report)
