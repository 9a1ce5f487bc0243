"""Preparing a base model inside a worker."""

from pathlib import Path

from core.hub_source import fetch_source
from core.prepared_base import PreparedBase, prepare_base
from core.progress import Report


def run_base_preparation(source: str, destination: Path, report: Report, vae_source: str = "") -> PreparedBase:
    """Prepare `source` into `destination`.

    Args:
        source: A folder on this machine, or a hub id, which is downloaded; see `core.hub_source.fetch_source`.
        destination: A new folder.
        report: Called after each part.
        vae_source: Of the same kind: its VAE takes the place of the source's own. Empty: it stays.

    Raises:
        BaseModelError: Says what is wrong with the source.
    """
    vae = fetch_source(vae_source) if vae_source else None
    return prepare_base(fetch_source(source), destination, vae=vae, report=report)
