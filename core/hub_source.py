"""Finds a source by its name: a folder here, or a model of the Hugging Face hub, downloaded without pickles or code.

Called by the command lines and the `prepare_base` job, before `core.prepared_base`.
"""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from core.base_source import OVERRIDES_NAME, SDXL_COMPONENTS
from core.errors import BaseModelError

HUB_FILES = [
    "model_index.json",
    OVERRIDES_NAME,
    "scheduler/*.json",
    *(f"{name}/*.{ending}" for name in SDXL_COMPONENTS for ending in ("json", "txt", "safetensors")),
    # Where a repository is a VAE and nothing else.
    "config.json",
    "diffusion_pytorch_model*.safetensors",
]
"""What is downloaded: no pickles, no code, and not the single-file checkpoints that lie beside many pipelines."""


def fetch_source(name: str) -> Path:
    """The local folder of a base model or VAE: a path as it is, or a hub id, downloaded into the hub's cache.

    Args:
        name: A path, or a Hugging Face id such as owner/model, or owner/model@revision (a branch, tag or commit).

    Raises:
        BaseModelError: Neither a folder here nor a model that can be downloaded.
    """
    if Path(name).exists():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise BaseModelError(f"{name} does not exist: give a pipeline folder, or a hub id such as owner/model")
    owner_and_model, _, revision = name.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            owner_and_model,
            revision=revision or None,
            allow_patterns=HUB_FILES,
            ignore_patterns=["*.non_ema.*", "flax_*"],
        )
        return Path(folder)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise BaseModelError(
            f"{name} is no folder here and cannot be downloaded ({(str(error).splitlines() or [repr(error)])[0]})"
        ) from error


def hub_revision(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache (`models--owner--name/snapshots/<commit>`) holds; None elsewhere."""
    in_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if in_cache else None
