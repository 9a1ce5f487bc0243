"""A replaced GPU process (a fork of the worker's parent) against a fresh one: to READY and to the first picture.

    python -m tests.benchmarks.cold_start [--rounds N]

READY is when `gpu_worker.runtime.start` has returned: the keep-warm base is in the pool and a job could begin; rows
in the database, the same few for both sides, are left out. A fresh process is an interpreter that imports the same
modules and calls the same function. Narrow Stable Diffusion 1.5, CPU, one thread; the last line is one JSON object.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from core.file_hash import hash_file
from core.prepared_base import prepare_base
from core.quiet_libraries import quiet_libraries
from gpu_worker import zygote
from gpu_worker.settings import BaseRef
from tests.benchmarks.narrow_sd15 import narrow_pipeline_folder

GOALS = {"the first picture": 10.0, "READY": 300.0}
# From the first line of a child's life to its answer: nanoseconds of the clock that all processes share.
LIFE = """
import hashlib, logging, sys, time
from pathlib import Path
logging.disable(logging.WARNING)
def life(cache_folder, files, name, fingerprint, hashes):
    from core.config import GenerateConfig
    from core.generate import generate
    from gpu_worker import runtime
    from gpu_worker.settings import BaseRef, WorkerSettings
    settings = WorkerSettings(device="cpu", cache_folder=cache_folder, fetch=lambda sha256: files[sha256])
    ref = BaseRef(name=name, fingerprint=fingerprint, files=hashes)
    started = runtime.start(settings, [ref])
    ready = time.monotonic_ns()
    config = GenerateConfig(prompt="a red apple", width=64, height=64, steps=4, seed=3)
    picture = generate(started.pool.get(ref), config)[0]
    return ready, time.monotonic_ns(), hashlib.sha256(picture.tobytes()).hexdigest()
"""


def main() -> None:
    """Prepare the base, start both kinds of process in turns, compare, print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    given = options.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare_base(narrow_pipeline_folder(Path(scratch) / "source"), Path(scratch) / "prepared")
        names = {p.relative_to(prepared.folder).as_posix(): p for p in prepared.folder.rglob("*") if p.is_file()}
        hashes = {name: hash_file(path) for name, path in names.items()}
        files = {hashes[name]: path for name, path in names.items()}
        ref = BaseRef(name="narrow", fingerprint=prepared.fingerprint, files=hashes)
        cache_folder = Path(scratch) / "cache"
        arguments = repr((str(cache_folder), {k: str(v) for k, v in files.items()}, "narrow", ref.fingerprint, hashes))
        fresh(arguments)  # Builds the cache folder, and warms the page cache.
        import gpu_worker.generation
        import gpu_worker.runtime
        import gpu_worker.training  # noqa: F401 - what the worker's parent imports

        namespace: dict[str, Callable[..., tuple[int, int, str]]] = {}
        exec(compile(LIFE, "life", "exec"), namespace)  # noqa: S102 - the very text that the fresh process runs
        zygote.map_warm_bases(cache_folder, torch.float32)
        ratios: dict[str, list[float]] = {name: [] for name in GOALS}
        times: dict[str, list[float]] = {}
        pictures = set()
        for _ in range(given.rounds):
            sides = {
                "fresh": fresh(arguments),
                "replaced": replaced(lambda: namespace["life"](cache_folder, files, "narrow", ref.fingerprint, hashes)),
            }
            for side, (ready, first, picture) in sides.items():
                times.setdefault(f"{side} READY", []).append(ready)
                times.setdefault(f"{side} first picture", []).append(first)
                pictures.add(picture)
            ratios["READY"].append(sides["fresh"][0] / sides["replaced"][0])
            ratios["the first picture"].append(sides["fresh"][1] / sides["replaced"][1])
    result = {
        "name": "cold_start",
        "correct": len(pictures) == 1,
        "max_diff": 0.0 if len(pictures) == 1 else 1.0,
        "median_ms": {name: 1e3 * statistics.median(values) for name, values in times.items()},
        "checks": [
            {
                "what": f"a replaced child against a fresh process: times as fast to {name}",
                "value": statistics.median(values),
                "goal": GOALS[name],
                "better": "higher",
            }
            for name, values in ratios.items()
        ],
    }
    sys.stdout.write(json.dumps(result) + "\n")


def fresh(arguments: str) -> tuple[float, float, str]:
    """(seconds to READY, seconds to the first picture, the picture's hash) of a new interpreter."""
    code = (
        f"{LIFE}\ncache, files, *rest = {arguments}\n"
        "print(*life(Path(cache), {k: Path(v) for k, v in files.items()}, *rest))"
    )
    began = time.monotonic_ns()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ready, first, picture = done.stdout.split()[-3:]
    return (int(ready) - began) / 1e9, (int(first) - began) / 1e9, picture


def replaced(life: Callable[[], tuple[int, int, str]]) -> tuple[float, float, str]:
    """The same of a child forked from this process."""
    reading, writing = os.pipe()
    began = time.monotonic_ns()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, " ".join(str(value) for value in life()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        ready, first, picture = answer.read().split()
    os.waitpid(child, 0)
    return (int(ready) - began) / 1e9, (int(first) - began) / 1e9, picture


if __name__ == "__main__":
    main()
