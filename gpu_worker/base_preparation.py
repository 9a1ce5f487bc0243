"""Preparing a base model inside a worker."""

from pathlib import Path

from core.prepared_base import PreparedBase, prepare_base
from core.progress import Report


def run_base_preparation(source: Path, destination: Path, report: Report) -> PreparedBase:
    """Prepare `source` into `destination`; see `core.prepared_base.prepare_base`."""
    return prepare_base(source, destination, report=report)
