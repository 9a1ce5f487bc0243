"""What a request costs beside the model: from claim to published row, PNG and local storage included.

    python -m tests.benchmarks.request_path [--rounds N]

One process is a real worker on SQLite and local storage: it claims, draws on the narrow UNet (20 steps with guidance,
latent side 16, a LoRA of ten by Zipf), writes the PNG, stores it and publishes the row. The other side is a warm
diffusers pipeline that loads the LoRA, draws, writes the PNG and unloads the LoRA, without any database. From both the
time inside the UNet and the VAE's decoder is taken off. Rounds alternate; the last line is one JSON object.
"""

import argparse
import json
import logging
import os
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOAL_PERCENT, GOAL_TIMES = 5.0, 50.0
SIDE_PX, STEPS, GUIDANCE = 128, 20, 7.0
LORAS, RANK = 10, 8


def main() -> None:
    """Both sides in turns."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=9)
    given = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        _django(Path(scratch) / "data")
        answer = compare(Path(scratch), given.rounds)
    sys.stdout.write(json.dumps(answer) + "\n")


class ModelTime:
    """Seconds inside a UNet's forward and a VAE's decoder."""

    def __init__(self, unet: Any, vae: Any) -> None:
        self.seconds = 0.0
        for owner, name in ((unet, "forward"), (vae, "decode")):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, call: Any) -> Any:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - began

        return timed

    @contextmanager
    def beside(self, into: list[tuple[float, float]]) -> Iterator[None]:
        """Adds (seconds beside the model, seconds in the model) of the block."""
        before, began = self.seconds, time.perf_counter()
        yield
        whole, model = time.perf_counter() - began, self.seconds - before
        into.append((whole - model, model))


def compare(folder: Path, rounds: int) -> dict[str, Any]:
    """Measure, and compare the pictures of both sides."""
    from diffusers import StableDiffusionPipeline

    from core.prepared_base import prepare_base
    from gpu_worker import runtime
    from gpu_worker.settings import BaseRef, WorkerSettings
    from jobs.models import Job
    from jobs.node_cache import node_cache
    from jobs.status import JobState
    from tests.benchmarks.narrow_sd15 import narrow_pipeline_folder

    prepared = prepare_base(narrow_pipeline_folder(folder / "narrow"), folder / "prepared")
    logging.disable(logging.WARNING)
    base_model, ref = _register(prepared, BaseRef)
    cache = Path(os.environ["LORASITE_DATA"]) / "cache"
    settings = WorkerSettings(device="cpu", cache_folder=cache, fetch=node_cache().get)
    base = runtime.start(settings, [ref]).pool.get(ref)
    pipeline = StableDiffusionPipeline.from_pretrained(prepared.folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    files = [_lora_file(base.unet, folder / f"lora-{number}.safetensors", number) for number in range(LORAS)]
    versions = [_lora_version(base_model, path) for path in files]
    context = _worker()

    ours, theirs = ModelTime(base.unet, base.vae), ModelTime(pipeline.unet, pipeline.vae)
    beside: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    chance, difference = random.Random(1), 0
    weights = [1 / rank for rank in range(1, LORAS + 1)]
    for version in versions:  # each LoRA is in memory, as that of the other side is in the page cache
        _submit(base_model, version, 0, steps=1)
        _work_off(context)
    for number in range(rounds + 1):  # the first one warms up
        (lora,) = chance.choices(range(LORAS), weights)
        job = _submit(base_model, versions[lora], number)
        with ours.beside(beside[0]):
            _work_off(context)
        if Job.objects.get(pk=job.pk).state != JobState.SUCCEEDED:
            raise SystemExit(f"the job ended as {Job.objects.get(pk=job.pk).state}")
        with theirs.beside(beside[1]):
            picture = _with_pipeline(pipeline, base, files[lora], number, folder / "theirs.png")
        difference = max(difference, int(np.abs(_drawn(job) - np.asarray(picture, dtype=int)).max()))
    (own, model), (other, _) = (_medians(side[1:]) for side in beside)
    ratios = [there[0] / here[0] for here, there in zip(beside[0][1:], beside[1][1:], strict=True)]
    checks = [
        ("overhead beyond UNet and VAE, percent of their time", 100 * own / model, GOAL_PERCENT, "lower"),
        ("overhead of a warm pipeline with reload over ours", statistics.median(ratios), GOAL_TIMES, "higher"),
        ("our overhead, ms", 1000 * own, None, "lower"),
        ("overhead of the warm pipeline, ms", 1000 * other, None, "lower"),
        ("UNet and VAE, ms", 1000 * model, None, "lower"),
    ]
    return {
        "name": "request_path",
        "correct": difference <= 1,
        "max_diff": difference,
        "checks": [
            {"what": what, "value": round(value, 3), "goal": goal, "better": better}
            for what, value, goal, better in checks
        ],
    }


def _work_off(context: Any) -> None:
    """What a task does for one waiting job, the uploader's turn included."""
    from functools import partial

    from gpu_worker.generation import Order, run_generations
    from jobs.claims import jobs_claim
    from jobs.drain import run
    from jobs.status import JobKind
    from jobs.work.generate import GenerateWork, compute_as_they_come

    (claim,) = jobs_claim(kind=JobKind.GENERATE, worker=context.worker, at_most=8)
    start = partial(GenerateWork, run=run_generations, order=Order)
    run([context.heartbeat.take(claim)], start, compute_as_they_come)
    context.uploader.turn()


def _with_pipeline(pipeline: Any, base: Any, lora: Path, number: int, path: Path) -> Any:
    from core.image_files import save_png
    from core.randomness import generator
    from core.samplers import make_scheduler

    pipeline.scheduler = make_scheduler(base.scheduler_config, "dpmpp_2m")
    pipeline.load_lora_weights(lora)
    picture = pipeline(
        f"picture {number}",
        negative_prompt="blurred",
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        width=SIDE_PX,
        height=SIDE_PX,
        generator=generator(number, "picture"),
    ).images[0]
    save_png(picture, path, "")
    pipeline.unload_lora_weights()
    return picture


def _django(data: Path) -> None:
    data.mkdir(parents=True)
    for name in [name for name in os.environ if name.startswith("LORASITE_")]:
        del os.environ[name]
    os.environ |= {
        "DJANGO_SETTINGS_MODULE": "lorasite.settings.base",
        "LORASITE_DATA": str(data),
        "LORASITE_SECRET_KEY": secrets.token_urlsafe(48),
        "LORASITE_LOG_LEVEL": "WARNING",
        "OMP_NUM_THREADS": "1",
    }
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0, skip_checks=True)


def _register(prepared: Any, ref: Any) -> tuple[Any, Any]:
    from jobs.artifacts import artifact_put
    from jobs.models import BaseModel

    files = {name: artifact_put(prepared.folder / name)[0] for name in [*prepared.files, "manifest.json"]}
    facts = prepared.facts.dump()
    base_model = BaseModel.objects.create(
        name="narrow", source="narrow", fingerprint=prepared.fingerprint, facts=facts, files=files
    )
    return base_model, ref(name="narrow", fingerprint=prepared.fingerprint, files=files)


def _lora_file(unet: Any, path: Path, seed: int) -> Path:
    """All attention layers, weak: the picture stays one."""
    from core.lora_state import LoraLayer, LoraState
    from core.lora_targets import target_modules
    from core.lora_utils import write_kohya
    from core.randomness import normal

    layers = {}
    for name in target_modules(unet, "attention"):
        rows, columns = unet.get_submodule(name).weight.shape
        down, up = normal((RANK, columns), seed, name, "down"), normal((rows, RANK), seed, name, "up")
        layers[name] = LoraLayer(down=down * 0.05, up=up * 0.05, alpha=float(RANK))
    write_kohya(path, LoraState(unet=layers), {})
    return path


def _lora_version(base_model: Any, path: Path) -> Any:
    from core.lora_utils import sshs_model_hash
    from jobs.artifacts import artifact_put
    from jobs.models import Lora, LoraVersion

    owner = _person()
    sha256, size_bytes = artifact_put(path)
    lora = Lora.objects.create(owner=owner, name=path.stem, base_model=base_model)
    version = LoraVersion.objects.create(
        owner=owner,
        lora=lora,
        number=1,
        kohya_sha256=sha256,
        kohya_size_bytes=size_bytes,
        model_hash=sshs_model_hash(path),
        peft_files={},
        facts={"rank": RANK},
    )
    return LoraVersion.objects.select_related("lora__base_model").get(pk=version.pk)


def _person() -> Any:
    from jobs.models import User

    return User.objects.filter(username="person").first() or User.objects.create_user("person")


def _worker() -> Any:
    from jobs import worker_context
    from jobs.heartbeat import Heartbeat
    from jobs.worker_context import ShutdownFlag, WorkerContext
    from jobs.workers import worker_register

    worker = worker_register(queues=["gpu"], device="cpu")
    context = WorkerContext(worker, Heartbeat(worker), ShutdownFlag())
    worker_context.enter(context)
    return context


def _submit(base_model: Any, version: Any, number: int, *, steps: int = STEPS) -> Any:
    from jobs.submission import generation_submit

    values: dict[str, Any] = {
        "prompt": f"picture {number}",
        "negative_prompt": "blurred",
        "seed": number,
        "steps": steps,
        "guidance": GUIDANCE,
        "width": SIDE_PX,
        "height": SIDE_PX,
        "sampler": "dpmpp_2m",
        "clip_skip": 1,  # the default of diffusers
    }
    return generation_submit(owner=_person(), base_model=base_model, loras=[(version, 1.0)], values=values)


def _drawn(job: Any) -> np.ndarray:
    from PIL import Image

    from jobs.models import GeneratedImage
    from jobs.node_cache import node_cache

    stored = GeneratedImage.objects.get(request__job=job)
    with Image.open(node_cache().get(stored.sha256)) as image:
        return np.asarray(image, dtype=int)


def _medians(side: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(beside for beside, _ in side), statistics.median(model for _, model in side)


if __name__ == "__main__":
    main()
