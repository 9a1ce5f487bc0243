"""Prepares a base model once: safetensors with final dtypes, and a manifest with a fingerprint of all its inputs.

    python -m core.prepared_base SOURCE DESTINATION

Called by the command lines and by the `prepare_base` job; never runs or unpickles anything of the source.
"""

import logging
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from core.base_conversion import write_json, write_parts
from core.base_facts import BaseFacts
from core.base_source import (
    check_source,
    input_files,
    read_facts,
    read_json,
)
from core.command_line import parser, run_command
from core.config import canonical_json_hash
from core.errors import BaseModelError, ConfigError
from core.file_hash import hash_file
from core.hub_source import fetch_source, hub_revision
from core.progress import Report, silent
from core.quiet_libraries import quiet_libraries

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
FORMAT = 1
DEFAULT_CACHE_FOLDER = Path("var/prepared-bases")
"""Where the command lines keep what `ensure_prepared` makes."""

CODE_VERSION = 1
"""Raise it whenever this file writes different bytes for the same source: every prepared base becomes stale."""

DTYPE_POLICY = "unet and text encoders as in the source, vae float32"
LIBRARIES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True, kw_only=True)
class PreparedBase:
    """A prepared base model on disk.

    Attributes:
        folder: An ordinary diffusers pipeline folder plus `manifest.json`.
        facts: What the rest of the system must know about it.
        fingerprint: SHA-256 over all inputs of the preparation.
        files: SHA-256 of each file, by its relative path.
    """

    folder: Path
    facts: BaseFacts
    fingerprint: str
    files: dict[str, str]


def prepare_base(source: Path, destination: Path, *, vae: Path | None = None, report: Report = silent) -> PreparedBase:
    """Convert a diffusers SD 1.x or SDXL pipeline folder, unless that is done. It appears complete or not at all.

    Args:
        source: The folder, weights in safetensors.
        destination: A new or empty folder, or a prepared base, which is replaced.
        vae: A folder whose VAE takes the place of the source's own: a pipeline, or the VAE itself.
        report: Called after each part.

    Returns:
        The prepared base at `destination`.

    Raises:
        BaseModelError: The source is incomplete, unsafe or of another family, or the destination is in use.
    """
    quiet_libraries()
    check_source(source, vae)
    facts = read_facts(source)
    inputs = _inputs(source, vae)
    fingerprint = canonical_json_hash(inputs)
    if ready := _ready(destination, fingerprint):
        return ready
    if destination.exists() and not is_prepared(destination) and any(destination.iterdir()):
        raise BaseModelError(f"{destination} holds other files: choose a new or empty folder")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        write_parts(input_files(source, vae), partial, report)
        files = {path: hash_file(partial / path) for path in _relative_files(partial)}
        sizes = {path: (partial / path).stat().st_size for path in files}
        manifest = {"format": FORMAT, "facts": facts.dump(), "fingerprint": fingerprint, "inputs": inputs}
        write_json(partial / MANIFEST_NAME, manifest | {"files": files, "sizes_bytes": sizes})
        partial.chmod(0o755)  # mkdtemp makes it readable by this user alone
        # Another process may have been quicker; what it put there may be in use already.
        if ready := _ready(destination, fingerprint):
            return ready
        _put_in_place(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("base prepared source=%s fingerprint=%s", source.name, fingerprint[:12])
    return open_prepared(destination)


def open_prepared(folder: Path, *, verify: bool = False, only: str = "") -> PreparedBase:
    """Open a prepared base, if its fingerprint still fits its inputs, these libraries and this code.

    Args:
        folder: Written by `prepare_base`.
        verify: Also hash every file (about 1 s per GB); without it sizes are compared.
        only: Look at no other files than those whose names begin so.

    Raises:
        BaseModelError: Not prepared, damaged, or stale: the text says which, and to prepare it again.
    """
    manifest = read_json(folder / MANIFEST_NAME) if is_prepared(folder) else None
    if manifest is None or manifest.get("format") != FORMAT:
        raise BaseModelError(f"{folder} is not a prepared base: run `python -m core.prepared_base SOURCE {folder}`")
    try:
        facts = BaseFacts.parse(manifest["facts"])
        inputs, fingerprint = dict(manifest["inputs"]), str(manifest["fingerprint"])
        files, sizes = dict(manifest["files"]), dict(manifest["sizes_bytes"])
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise BaseModelError(f"{folder}/{MANIFEST_NAME} is damaged ({error}): prepare the base again") from error
    if canonical_json_hash(inputs) != fingerprint:
        raise BaseModelError(f"{folder}: the fingerprint does not fit the recorded inputs: prepare the base again")
    stale = [name for name, value in _environment().items() if inputs.get(name) != value]
    if stale:
        was, now = inputs.get(stale[0]), _environment()[stale[0]]
        raise BaseModelError(f"{folder} is stale: {stale[0]} was {was}, is now {now}: prepare the base again")
    for path, sha256 in ((path, sha256) for path, sha256 in files.items() if path.startswith(only)):
        size_bytes = (folder / path).stat().st_size if (folder / path).is_file() else None
        if size_bytes != sizes.get(path):
            raise BaseModelError(
                f"{folder}/{path} is damaged: {size_bytes} bytes instead of {sizes.get(path)}: prepare the base again"
            )
        if verify and hash_file(folder / path) != sha256:
            raise BaseModelError(f"{folder}/{path} is damaged: its SHA-256 differs: prepare the base again")
    return PreparedBase(folder=folder, facts=facts, fingerprint=fingerprint, files=files)


def ensure_prepared(source: Path, cache_folder: Path, *, report: Report = silent) -> PreparedBase:
    """The prepared form of any pipeline folder, prepared into `cache_folder/<fingerprint>` unless it is there.

    Args:
        source: A diffusers folder (its files are hashed each time), or a prepared base, which is opened.
        cache_folder: Where prepared bases are kept.
        report: Called after each part that is prepared.

    Raises:
        BaseModelError: As `prepare_base` and `open_prepared`.
    """
    if is_prepared(source):
        return open_prepared(source)
    check_source(source)
    return prepare_base(source, cache_folder / canonical_json_hash(_inputs(source)), report=report)


def is_prepared(folder: Path) -> bool:
    """Whether a folder claims to be a prepared base (valid or not)."""
    return (folder / MANIFEST_NAME).is_file() and (folder / "model_index.json").is_file()


def _ready(folder: Path, fingerprint: str) -> PreparedBase | None:
    """The base at `folder` if it is valid and of this fingerprint, None where it must be prepared."""
    if not is_prepared(folder):
        return None
    try:
        prepared = open_prepared(folder)
    except BaseModelError as error:
        logger.warning("base is prepared again folder=%s reason=%s", folder.name, error)
        return None
    return prepared if prepared.fingerprint == fingerprint else None


def _environment() -> dict[str, Any]:
    """What a preparation depends on beside the source."""
    return {
        "code_version": CODE_VERSION,
        "dtype_policy": DTYPE_POLICY,
        "library_versions": {name: version(name) for name in LIBRARIES},
    }


def _inputs(source: Path, vae: Path | None = None) -> dict[str, Any]:
    files = {name: hash_file(path) for name, path in input_files(source, vae).items()}
    commits = {"revision": hub_revision(source), "vae_revision": vae and hub_revision(vae)}
    return {"files": files} | {name: commit for name, commit in commits.items() if commit} | _environment()


def _relative_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _put_in_place(partial: Path, destination: Path) -> None:
    """Rename `partial` to `destination`; a base that is there already goes away last."""
    old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old.", dir=destination.parent))
    try:
        if destination.exists():
            destination.replace(old / "base")
        partial.replace(destination)
    except OSError as error:
        raise BaseModelError(f"{destination} was changed by another process meanwhile ({error}): try again") from error
    finally:
        shutil.rmtree(old, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module; `--help` explains it."""
    options = parser(
        "core.prepared_base",
        "Prepare a base model: checks a Stable Diffusion 1.x or SDXL folder, converts it to safetensors with final "
        "dtypes (VAE in fp32) and writes manifest.json with its facts and a fingerprint of all inputs.",
        example="python -m core.prepared_base demo/tiny-sd-emoji var/bases/demo",
    )
    options.add_argument("source", help="pipeline folder, or a Hugging Face id such as owner/model")
    options.add_argument("destination", type=Path, help="new folder, or a prepared base to replace")
    options.add_argument("--vae", help="folder or hub id whose VAE takes the place of the source's own")
    given = options.parse_args(arguments)
    vae = fetch_source(given.vae) if given.vae else None
    prepared = prepare_base(fetch_source(given.source), given.destination, vae=vae)
    sys.stdout.write(f"{prepared.folder}\nfingerprint {prepared.fingerprint}\n")
    for name, value in prepared.facts.dump().items():
        sys.stdout.write(f"{name} {value}\n")


if __name__ == "__main__":
    run_command(main)
