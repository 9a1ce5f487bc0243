"""Fast stand-ins for the modules of `gpu_worker` that need torch: same names and signatures, bytes from `expected`.

Everything around them is the product's own code: tasks, drain, heartbeat, store, publish. `install` must run before
anything imports `gpu_worker`; each step is written to this process's journal.
"""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from tests.chaos import expected, journal

GENERATE_STEP_SECONDS = 0.03
ROOM = 8
TRAIN_STEP_SECONDS = 0.03
KEPT_CHECKPOINTS = 2


def install() -> None:
    """Put the stand-ins where the product's imports find them."""
    _module(
        "gpu_worker.runtime",
        start=lambda settings, warm: SimpleNamespace(pool=SimpleNamespace(fingerprints=lambda: [])),
        current=lambda: SimpleNamespace(pool=SimpleNamespace(fingerprints=lambda: [])),
        free_memory=lambda: None,
    )
    _module("gpu_worker.generation", run_generations=run_generations, Picture=Picture, Order=Order)
    _module("gpu_worker.training", run_training=run_training)
    _module("gpu_worker.base_preparation", run_base_preparation=_no_base_preparation)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """As `gpu_worker.generation.Picture`."""

    path: Path
    seed: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """As `gpu_worker.generation.Order`."""

    config: Any
    lora_names: Sequence[str]
    folder: Path
    report: Any
    fetch: Any


@dataclass(frozen=True, kw_only=True)
class Sample:
    """As `core.training_samples.Sample`."""

    step: int
    prompt: str
    seed: int
    path: Path


class WrongCheckpoint(Exception):
    """What lies in the work folder is not the state of this job after that many steps."""


def run_generations(
    *, orders: Sequence[Order], on_done: Callable[[Order, Any], None], join: Callable[[int], Sequence[Order]], **_: Any
) -> None:
    """Requests side by side, step by step; each leaves when it is done or interrupted, others join meanwhile."""
    from core.errors import Interrupted

    steps: dict[Order, int] = {}
    with contextlib.ExitStack() as stack:

        def begin(order: Order) -> None:
            steps[order] = 0
            stack.enter_context(_journaled("generate", _attempt_of(order.folder)))
            for use in order.config.loras:
                order.fetch(use.sha256).read_bytes()

        for order in orders:
            begin(order)
        while True:
            for order in join(ROOM - len(steps)):
                begin(order)
            if not steps:
                return
            for order in steps:
                journal.mine().write("step", step=steps[order], **_attempt_of(order.folder))
            time.sleep(GENERATE_STEP_SECONDS)
            for order in tuple(steps):
                steps[order] += 1
                total, attempt = order.config.steps, _attempt_of(order.folder)
                result: Any = None
                try:
                    look = b"a look" if order.config.preview_every_steps else None
                    order.report(_progress("denoising", steps[order], total, attempt, preview=look))
                except Interrupted as error:
                    result = error
                if result is None and steps[order] == total:
                    result = _pictures(order)
                if result is not None:
                    del steps[order]
                    on_done(order, result)


def _pictures(order: Order) -> list[Picture]:
    pictures = []
    for number, seed in enumerate(order.config.seeds()):
        path = order.folder / f"{number:04d}.png"
        path.write_bytes(expected.picture_bytes(order.config.prompt, seed))
        pictures.append(Picture(path=path, seed=seed, width=expected.SIDE_PX, height=expected.SIDE_PX))
    return pictures


def run_training(
    *,
    config: Any,
    lora_name: str,
    manifest: Any,
    fetch: Any,
    work_folder: Path,
    report: Any,
    on_checkpoint: Callable[[Path, int], None],
    **_: Any,
) -> Any:
    """The hash chain over all steps, going on from the newest checkpoint in `work_folder`."""
    from core.errors import Paused

    attempt = _attempt_of(work_folder)
    with _journaled("train", attempt):
        for image in manifest.images:
            fetch(image.sha256).read_bytes()
        done, state = _resume(config, lora_name, work_folder, attempt)
        saved = done

        def save() -> None:
            nonlocal saved
            folder = _save(work_folder / "checkpoints", done, state, attempt)
            saved = done
            on_checkpoint(folder, done)
            journal.mine().write("checkpoint", step=done, **attempt)

        try:
            for step in range(done, config.steps):
                journal.mine().write("step", step=step, **attempt)
                time.sleep(TRAIN_STEP_SECONDS)
                state, done = expected.chain_next(state, step), step + 1
                report(_progress("training", done, config.steps, attempt))
                if done % config.checkpoint_every_steps == 0 or done == config.steps:
                    save()
        except Paused:
            if saved != done:
                save()
            raise
        return _export(config, state, work_folder)


def _resume(config: Any, lora_name: str, work_folder: Path, attempt: dict[str, Any]) -> tuple[int, str]:
    """(steps done, state) of the newest whole checkpoint, or of the start."""
    for folder in sorted((work_folder / "checkpoints").glob("step-*"), reverse=True):
        facts = json.loads((folder / "state.json").read_text())
        state = (folder / "lora.safetensors").read_text()
        right = expected.chain(config.seed, config.steps, lora_name, facts["step"])
        journal.mine().write("resume", step=facts["step"], of_token=facts["token"], right=state == right, **attempt)
        if (state, facts["job"]) != (right, attempt["job"]):
            raise WrongCheckpoint(f"{folder} is not job {attempt['job']} after {facts['step']} steps")
        return facts["step"], state
    return 0, expected.chain_start(config.seed, config.steps, lora_name)


def _save(checkpoints: Path, step: int, state: str, attempt: dict[str, Any]) -> Path:
    """A step folder with the real file names, written beside and renamed; the newest two are kept."""
    folder = checkpoints / f"step-{step:06d}"
    part = checkpoints / f".part-{step:06d}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / "lora.safetensors").write_text(state)
    (part / "optimizer.safetensors").write_text(f"{state}/{step}")
    (part / "state.json").write_text(json.dumps({"step": step, "job": attempt["job"], "token": attempt["token"]}))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    for old in sorted(checkpoints.glob("step-*"))[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _export(config: Any, state: str, work_folder: Path) -> Any:
    kohya, peft = work_folder / "lora.safetensors", work_folder / "lora-peft"
    kohya.write_bytes(expected.kohya_bytes(state))
    diffusers = work_folder / "lora-diffusers.safetensors"
    diffusers.write_bytes(b"diffusers " + expected.kohya_bytes(state))
    peft.mkdir(exist_ok=True)
    (peft / "adapter_model.safetensors").write_bytes(expected.adapter_bytes(state))
    (peft / "adapter_config.json").write_text(json.dumps({"state": state}))
    sample = work_folder / "samples" / "step-000000" / "00.png"
    sample.parent.mkdir(parents=True, exist_ok=True)
    sample.write_bytes(expected.picture_bytes(state, 0))
    return SimpleNamespace(
        kohya_file=kohya,
        peft_folder=peft,
        diffusers_file=diffusers,
        samples=[Sample(step=0, prompt="a sample", seed=0, path=sample)],
        losses=[1.0 / (1 + step) for step in range(config.steps)],
        steps=config.steps,
        seconds=0.0,
        facts={"sshs_model_hash": expected.sha256(state.encode()), "rank": config.rank},
    )


def _progress(stage: str, step: int, total: int, attempt: dict[str, Any], *, preview: bytes | None = None) -> Any:
    from core.progress import Progress

    # The token travels with the figures, so that the auditor sees in the row who wrote them.
    return Progress(stage=stage, step=step, total=total, figures={"token": float(attempt["token"])}, preview=preview)


def _attempt_of(folder: Path) -> dict[str, Any]:
    """Job and token, which the product's scratch folders are named by: `scratch/<job>/<token>`."""
    return {"job": folder.parent.name.replace("-", ""), "token": int(folder.name)}


@contextlib.contextmanager
def _journaled(kind: str, attempt: dict[str, Any]) -> Iterator[None]:
    journal.mine().write("begin", kind=kind, node=os.environ[journal.NODE_VARIABLE], **attempt)
    try:
        yield
    except BaseException as error:
        journal.mine().write("stopped", error=f"{type(error).__name__}: {error}"[:300], **attempt)
        raise
    journal.mine().write("computed", **attempt)


def _no_base_preparation(*_: Any) -> Any:
    raise RuntimeError("the chaos workload submits no prepare_base jobs")


def _module(name: str, **contents: Any) -> None:
    module = ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
    import gpu_worker

    setattr(gpu_worker, name.rpartition(".")[2], module)
