"""Names in a folder that survive a power cut. No ML library: checkpoints, LoRA files and the artifact store use it."""

import os
from pathlib import Path

from core.failpoints import side_effect


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with side_effect("folder.fsync"):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
