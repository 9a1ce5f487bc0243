"""A LoRA into the weights and out again: ours from a saved copy against diffusers' fuse_lora + unfuse_lora.

    python -m tests.benchmarks.lora_fuse [--cycles N] [--rounds N]

Narrow SD 1.5, CPU time of one thread. The last line is one JSON object.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from core.lora_fuse import FusedLoras
from core.lora_utils import read_lora
from tests.benchmarks.lora_swap import lora_file, output
from tests.benchmarks.narrow_sd15 import narrow_pipeline_folder


def main() -> None:
    """Measure, compare, print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cycles", type=int, default=1000)
    options.add_argument("--rounds", type=int, default=7)
    given = options.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        folder = narrow_pipeline_folder(Path(scratch) / "narrow")
        ours: Any = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        theirs: Any = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        path = lora_file(ours, Path(scratch) / "lora.safetensors", 0, False)
        layers = read_lora(path).unet
        before = {name: weight.clone() for name, weight in ours.unet.state_dict().items()}
        theirs.load_lora_weights(path)
        applied = output(theirs, False)
        fused = FusedLoras(ours.unet)
        fitted = fused.fitted(layers)  # as diffusers' LoRA is on its model before the clock runs
        fused.fuse([(fitted, 1.0)])
        difference = float((output(ours, False) - applied).abs().max())
        ratios, quick, slow = [], [], []
        for _ in range(given.rounds):
            began = time.process_time()
            theirs.fuse_lora()
            theirs.unfuse_lora()
            middle = time.process_time()
            for _ in range(5):
                fused.fuse([(fitted, 1.0)])
                fused.unfuse()
            quick.append((time.process_time() - middle) / 5)
            slow.append(middle - began)
            ratios.append(slow[-1] / quick[-1])
        for _ in range(given.cycles):
            fused.fuse([(fitted, 1.0)])
            fused.unfuse()
        after = ours.unet.state_dict()
        exact = all(torch.equal(after[name], weight) for name, weight in before.items())
    sys.stderr.write(f"ours {1e3 * median(quick):.1f} ms, diffusers {1e3 * median(slow):.1f} ms a cycle\n")
    checks = [
        ("fuse/un-fuse cycles after which all weights are bit-exact", given.cycles if exact else 0, 1000),
        ("times fuse_lora + unfuse_lora", median(ratios), 8.0),
    ]
    line = {
        "name": "lora_fuse",
        "correct": exact and difference <= 1e-5,
        "max_diff": difference,
        "checks": [{"what": what, "value": value, "goal": goal, "better": "higher"} for what, value, goal in checks],
    }
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
