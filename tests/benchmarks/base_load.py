"""Loading a base model with Stable Diffusion 1.5's UNet at full width, against `from_pretrained`.

    python -m tests.benchmarks.base_load [--rounds N]

Page cache warm, CPU, one thread, both sides in turns in one process; 3.5 GB of disk under $TMPDIR, not of memory.
The last line is one JSON object.
"""

import argparse
import gc
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from core.mapped_weights import map_model
from core.pipelines import load_base
from core.prepared_base import prepare_base
from core.quiet_libraries import quiet_libraries
from tests.benchmarks.narrow_sd15 import full_width_unet, narrow_pipeline_folder, unet_inputs

GOAL = 3.0


def main() -> None:
    """Make the folder, load it in turns, compare outputs, print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=9)
    given = options.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        source = narrow_pipeline_folder(Path(scratch) / "source", unet=full_width_unet())
        folder = prepare_base(source, Path(scratch) / "prepared").folder
        for path in source.rglob("*.safetensors"):
            path.unlink()
        first_seconds = seconds(lambda: load_base(folder))
        sides: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "UNet": (
                lambda: UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True),
                lambda: map_model(
                    UNet2DConditionModel, folder / "unet", dtype=torch.float32, device=torch.device("cpu")
                ),
            ),
            "pipeline": (
                lambda: StableDiffusionPipeline.from_pretrained(folder, local_files_only=True),
                lambda: load_base(folder),
            ),
        }
        ratios: dict[str, list[float]] = {name: [] for name in sides}
        best: dict[str, list[float]] = {name: [9e9, 9e9] for name in sides}
        for _ in range(given.rounds):
            for name, (theirs, ours) in sides.items():
                pair = [seconds(theirs), seconds(ours)]
                ratios[name].append(pair[0] / pair[1])
                best[name] = [min(old, new) for old, new in zip(best[name], pair, strict=True)]
        difference, same = compare(folder)
    for name, (theirs_seconds, ours_seconds) in best.items():
        sys.stdout.write(f"{name}: from_pretrained {theirs_seconds * 1e3:.0f} ms, ours {ours_seconds * 1e3:.0f} ms\n")
    result = {
        "name": "base_load",
        "correct": same,
        "max_diff": difference,
        "first_load_in_process_ms": 1e3 * first_seconds,
        "best_ms": {name: [1e3 * value for value in pair] for name, pair in best.items()},
        "checks": [
            {
                "what": f"{name}: times as fast as from_pretrained, full SD 1.5 width, warm page cache",
                "value": statistics.median(values),
                "goal": GOAL,
                "better": "higher",
            }
            for name, values in ratios.items()
        ],
    }
    sys.stdout.write(json.dumps(result) + "\n")


def seconds(load: Callable[[], Any]) -> float:
    """Wall time of one load; what it loaded is gone before the next one begins."""
    gc.collect()
    began = time.perf_counter()
    model = load()
    taken = time.perf_counter() - began
    del model
    return taken


@torch.no_grad()
def compare(folder: Path) -> tuple[float, bool]:
    """(largest difference of UNet outputs, whether outputs and all weights are the same bits)."""
    theirs = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    base = load_base(folder)
    latents, timesteps, text = unet_inputs(theirs.unet, side=8)
    outputs = [unet(latents, timesteps, encoder_hidden_states=text).sample for unet in (theirs.unet, base.unet)]
    parts = [(theirs.text_encoder, base.text_encoder), (theirs.vae, base.vae), (theirs.unet, base.unet)]
    same = all(
        torch.equal(one, two) for left, right in parts for one, two in zip(weights(left), weights(right), strict=True)
    )
    return float((outputs[0] - outputs[1]).abs().max()), same and torch.equal(*outputs)


def weights(model: Any) -> list[torch.Tensor]:
    """In the order of their names."""
    return [tensor for _, tensor in sorted(model.state_dict().items())]


if __name__ == "__main__":
    main()
