"""Training inside a worker: its own model beside the pool's, then `core.train`."""

from collections.abc import Callable
from pathlib import Path

from core.manifest import DatasetManifest, PreparedDataset
from core.memory_ladder import training_at
from core.pipelines import load_base
from core.progress import Progress, Report
from core.train import TrainResult, train
from core.train_config import TrainConfig
from gpu_worker import runtime
from gpu_worker.settings import BaseRef, Fetch


def run_training(
    *,
    config: TrainConfig,
    base_fingerprint: str,
    base_files: dict[str, str],
    base_name: str,
    lora_name: str,
    manifest: DatasetManifest,
    fetch: Fetch,
    work_folder: Path,
    report: Report,
    on_checkpoint: Callable[[Path, int], None],
    memory_rung: int = 0,
) -> TrainResult:
    """Train one LoRA in `work_folder`, going on from a checkpoint that lies there; see `core.train.train`.

    Args:
        memory_rung: Of `core.memory_ladder`; a checkpoint of one rung goes on exactly on another.
    """
    report(Progress(stage="loading the model", step=0, total=1))
    state = runtime.current()
    state.pool.make_room()
    ref = BaseRef(name=base_name, fingerprint=base_fingerprint, files=base_files)
    base = load_base(state.folder_of(ref), device=state.settings.device)
    files = {image.sha256: fetch(image.sha256) for image in manifest.images}
    dataset = PreparedDataset(manifest=manifest, files=files)
    config = training_at(config, memory_rung)
    return train(config, base, dataset, work_folder, report, on_checkpoint, name=lora_name, base_name=base_name)
