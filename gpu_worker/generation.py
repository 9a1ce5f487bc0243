"""Generation inside a worker: warm pipeline, cached LoRA files, then `core.generate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.config import GenerateConfig
from core.generate import generate
from core.image_files import infotext, save_png
from core.progress import Report
from core.text_encoding import resolve_clip_skip
from gpu_worker import runtime
from gpu_worker.settings import BaseRef, Fetch


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One finished picture on local disk; sizes in pixels."""

    path: Path
    seed: int
    width: int
    height: int


def run_generation(
    *,
    config: GenerateConfig,
    base_fingerprint: str,
    base_files: dict[str, str],
    base_name: str,
    lora_names: Sequence[str],
    fetch: Fetch,
    folder: Path,
    report: Report,
) -> list[Picture]:
    """All pictures of one request as PNG files in `folder`, in seed order."""
    ref = BaseRef(name=base_name, fingerprint=base_fingerprint, files=base_files)
    base = runtime.current().pool.get(ref)
    loras = [(fetch(use.sha256), use.weight) for use in config.loras]
    images = generate(base, config, loras, report)
    pictures = []
    clip_skip = resolve_clip_skip(base, config.clip_skip)
    for number, (image, seed) in enumerate(zip(images, config.seeds(), strict=True)):
        path = folder / f"{number:04d}.png"
        save_png(image, path, infotext(config, seed, base_name, lora_names, clip_skip=clip_skip))
        pictures.append(Picture(path=path, seed=seed, width=image.width, height=image.height))
    return pictures
