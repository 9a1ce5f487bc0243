"""LoRAs in slots through the whole of the worker: mixed with others, reused, more than there are slots, or unfit."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from core.config import GenerateConfig, LoraUse
from core.generate import generate
from core.lora_state import LoraLayer, LoraState
from core.lora_targets import target_modules
from core.lora_utils import write_kohya
from core.pipelines import LoadedBase
from core.progress import Progress, silent
from core.randomness import normal
from gpu_worker import runtime
from gpu_worker.generation import Order, Result, run_generations
from gpu_worker.resident_loras import SLOTS, resident_loras
from gpu_worker.settings import BaseRef, WorkerSettings

SHARED = GenerateConfig(prompt="a red apple", width=32, height=32, steps=3, sampler="dpmpp_2m", guidance=4.0)


@pytest.fixture
def base(settings_of_worker: WorkerSettings, bases: list[BaseRef]) -> LoadedBase:
    return runtime.start(settings_of_worker, [bases[0]]).pool.get(bases[0])


@pytest.fixture
def files(base: LoadedBase, tmp_path: Path) -> dict[str, Path]:
    """{sha256: file}: ten of different ranks for attention; a... also for the text; b... for convolutions."""
    made = {f"{number:064d}": write(base, tmp_path / f"{number}.safetensors", number) for number in range(10)}
    made["a" * 64] = write(base, tmp_path / "text.safetensors", 20, text=True)
    made["b" * 64] = write(base, tmp_path / "convolutions.safetensors", 21, preset="with_conv")
    return made


def write(base: LoadedBase, path: Path, seed: int, *, preset: Any = "attention", text: bool = False) -> Path:
    def layers(model: Any, names: list[str]) -> dict[str, LoraLayer]:
        made, rank = {}, 2 + seed % 3
        for name in names:
            shape = tuple(model.get_submodule(name).weight.shape)
            down = 0.2 * normal((rank, *shape[1:]), seed, name, "down")
            up = 0.2 * normal((shape[0], rank, *[1] * len(shape[2:])), seed, name, "up")
            made[name] = LoraLayer(down=down, up=up, alpha=2.0 * rank)
        return made

    encoder = base.text_encoder
    words = [name for name, _ in encoder.named_modules() if name.endswith(("q_proj", "v_proj"))] if text else []
    state = LoraState(unet=layers(base.unet, target_modules(base.unet, preset)), text_encoder=layers(encoder, words))
    write_kohya(path, state, {})
    return path


def draw(
    ref: BaseRef, files: dict[str, Path], folder: Path, *named: dict[str, float], report: Any = silent
) -> list[Any]:
    """One picture per {sha256: weight}."""
    orders, results = [], dict[Order, Result]()
    for number, loras in enumerate(named):
        uses = tuple(LoraUse(sha256=sha256, weight=weight) for sha256, weight in loras.items())
        own = folder / str(number)
        own.mkdir(parents=True)
        config = SHARED.model_copy(update={"loras": uses, "seed": number})
        names = [use.sha256[:4] for use in uses]
        orders.append(Order(config=config, lora_names=names, folder=own, report=report, fetch=files.__getitem__))
    run_generations(
        orders=orders,
        base_fingerprint=ref.fingerprint,
        base_files=ref.files,
        base_name=ref.name,
        memory_rung=0,
        on_done=results.__setitem__,
    )
    pictures = []
    for order in orders:
        result = results[order]
        assert isinstance(result, list), result
        pictures.append(np.asarray(Image.open(io.BytesIO(result[0].path.read_bytes())), dtype=int))
    return pictures


def alone(base: LoadedBase, files: dict[str, Path], seed: int, loras: dict[str, float]) -> np.ndarray:
    applied = [(files[sha256], weight) for sha256, weight in loras.items()]
    return np.asarray(generate(base, SHARED.model_copy(update={"seed": seed}), applied)[0], dtype=int)


def test_anybodys_loras_share_forwards_and_each_picture_is_the_one_that_peft_draws_alone(
    base: LoadedBase, bases: list[BaseRef], files: dict[str, Path], tmp_path: Path
) -> None:
    zero, one, text, conv = "0" * 64, "0" * 63 + "1", "a" * 64, "b" * 64
    named = [{}, {zero: 1.0}, {one: 0.5, zero: -0.5}, {text: 1.0}, {conv: 1.0}, {zero: 1.0}]
    rows: list[int] = []
    hook = base.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    try:
        drawn = draw(bases[0], files, tmp_path / "out", *named)
    finally:
        hook.remove()
    assert rows == [10] * 3 + [2] * 3, "what slots cannot serve has a round of its own"
    plain = [alone(base, files, number, {}) for number in range(len(named))]
    for number, loras in enumerate(named):
        assert np.abs(drawn[number] - alone(base, files, number, loras)).max() <= 1, loras
        assert (np.abs(drawn[number] - plain[number]).max() > 1) == bool(loras), "it shows"
    assert torch.equal(torch.tensor(alone(base, files, 0, {})), torch.tensor(plain[0]))


def test_more_loras_than_slots_wait_for_one_and_all_are_drawn(
    base: LoadedBase, bases: list[BaseRef], files: dict[str, Path], tmp_path: Path
) -> None:
    attention = [sha256 for sha256 in files if sha256.startswith("0000")]
    assert len(attention) > SLOTS
    told: list[Progress] = []
    drawn = draw(bases[0], files, tmp_path / "out", *({sha256: 1.0} for sha256 in attention), report=told.append)
    for number, sha256 in enumerate(attention):
        assert np.abs(drawn[number] - alone(base, files, number, {sha256: 1.0})).max() <= 1
    assert {progress.stage for progress in told} >= {"waiting for its turn", "denoising"}


def test_a_run_that_breaks_keeps_no_slot(
    base: LoadedBase, bases: list[BaseRef], files: dict[str, Path], tmp_path: Path
) -> None:
    zero = "0" * 64

    def run_out(module: object, inputs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = base.unet.register_forward_pre_hook(run_out)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            draw(bases[0], files, tmp_path / "broken", {zero: 1.0})
    finally:
        hook.remove()
    before = alone(base, files, 0, {})
    attention = [sha256 for sha256 in files if sha256.startswith("0000")]
    draw(bases[0], files, tmp_path / "out", *({sha256: 1.0} for sha256 in attention))
    assert resident_loras(base.unet).has([LoraUse(sha256=attention[-1])])
    assert np.array_equal(alone(base, files, 0, {}), before)
