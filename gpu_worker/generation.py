"""Generation inside a worker: warm pipeline, cached LoRA files, then `core.generate`."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from core.config import GenerateConfig
from core.errors import Interrupted
from core.generate import generate_together
from core.image_files import infotext, save_png
from core.memory_ladder import generation_memory
from core.progress import Progress, Report
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


@dataclass(frozen=True, kw_only=True)
class Order:
    """One request.

    Attributes:
        lora_names: Of `config.loras`, in their order, for people.
        folder: Gets the pictures.
        report: Its own; may raise `core.errors.Interrupted`, which stops this request alone.
    """

    config: GenerateConfig
    lora_names: Sequence[str]
    folder: Path
    report: Report


def run_generations(
    *,
    orders: Sequence[Order],
    base_fingerprint: str,
    base_files: dict[str, str],
    base_name: str,
    fetch: Fetch,
    memory_rung: int,
) -> list[list[Picture] | Interrupted]:
    """Draw requests of one base and the same LoRAs together.

    Args:
        orders: >= 1.
        memory_rung: Of `core.memory_ladder`.

    Returns:
        Per request its PNG files in seed order, or what its report raised.
    """
    first = orders[0].config
    for order in orders:
        with suppress(Interrupted):  # It says so again at the first step, where it can leave alone.
            order.report(Progress(stage="loading the model", step=0, total=1))
    ref = BaseRef(name=base_name, fingerprint=base_fingerprint, files=base_files)
    base = runtime.current().pool.get(ref)
    loras = [(fetch(use.sha256), use.weight) for use in first.loras]
    results = generate_together(
        base,
        [order.config for order in orders],
        loras,
        [order.report for order in orders],
        memory=generation_memory(memory_rung),
    )
    clip_skip = resolve_clip_skip(base, first.clip_skip)
    saved: list[list[Picture] | Interrupted] = []
    for order, images in zip(orders, results, strict=True):
        if isinstance(images, Interrupted):
            saved.append(images)
            continue
        pictures = []
        for number, (image, seed) in enumerate(zip(images, order.config.seeds(), strict=True)):
            path = order.folder / f"{number:04d}.png"
            save_png(image, path, infotext(order.config, seed, base_name, order.lora_names, clip_skip=clip_skip))
            pictures.append(Picture(path=path, seed=seed, width=image.width, height=image.height))
        saved.append(pictures)
    return saved
