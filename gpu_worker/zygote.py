"""Keep-warm bases mapped in the worker's parent, so that a child forked from it has them at once.

`prepare_forks` is called by the parent, which has no threads, no CUDA and no database connection: it learns from a
small file, written by its children, which bases are warm. `take` is called by a child.
"""

import gc
import json
import logging
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from core.errors import CoreError
from core.failpoints import side_effect
from core.pipelines import LoadedBase, load_base
from gpu_worker.settings import BaseRef

logger = logging.getLogger(__name__)

WARM_NAME = "warm.json"

_mapped: dict[str, LoadedBase] = {}
_seen: str | None = None


def warm_bases_tell(cache_folder: Path, warm: Sequence[BaseRef]) -> None:
    """Child: leave for the parent which bases it should map before it forks again."""
    folder = cache_folder / "bases"
    text = json.dumps([{"name": ref.name, "fingerprint": ref.fingerprint} for ref in warm])
    part = folder / f".warm-{uuid.uuid4().hex}"
    try:
        with side_effect("warm_list.write"):
            folder.mkdir(parents=True, exist_ok=True)
            part.write_text(text, encoding="utf-8")
            part.replace(folder / WARM_NAME)
    except OSError as error:  # Without it the next child loads for itself.
        logger.warning("list of warm bases could not be written reason=%s", error)
    finally:
        with suppress(OSError), side_effect("warm_list.clean_up"):
            part.unlink(missing_ok=True)


def prepare_forks(cache_folder: Path, dtype: torch.dtype) -> None:
    """Parent: from now on map, before each fork, what is warm then. Call once, before the first fork.

    Args:
        cache_folder: This machine's, as in `WorkerSettings`.
        dtype: Of UNet and text encoders in the children; what is stored otherwise is converted here, once for all.
    """
    torch.set_num_threads(1)  # A parent that has started a pool of threads can hang its children.
    parent = os.getpid()
    os.register_at_fork(before=lambda: map_warm_bases(cache_folder, dtype) if os.getpid() == parent else None)


def map_warm_bases(cache_folder: Path, dtype: torch.dtype) -> None:
    """Parent: hold exactly the warm bases that this machine has the files of. Never raises: it runs inside a fork."""
    global _seen
    try:
        path = cache_folder / "bases" / WARM_NAME
        text = path.read_text(encoding="utf-8") if path.is_file() else "[]"
        if text == _seen:
            return
        _seen = text
        wanted = {str(entry["fingerprint"]): str(entry["name"]) for entry in json.loads(text)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("list of warm bases is unreadable reason=%s", error)
        return
    for fingerprint in _mapped.keys() - wanted.keys():
        del _mapped[fingerprint]
    for fingerprint, name in wanted.items():
        if fingerprint not in _mapped:
            try:
                base = load_base(cache_folder / "bases" / fingerprint, dtype=dtype)
            except (CoreError, OSError) as error:
                logger.warning("warm base is not mapped base=%s reason=%s", name, error)
                continue
            if base.fingerprint == fingerprint:
                _mapped[fingerprint] = base
    # What lives now lives in all children: their collectors shall not write into its pages.
    gc.collect()
    gc.freeze()
    logger.info("warm bases mapped for children count=%d", len(_mapped))


def take(fingerprint: str) -> LoadedBase | None:
    """Child: the base that its parent mapped, once; the caller owns it. On the CPU, in the parent's dtype."""
    return _mapped.pop(fingerprint, None)
