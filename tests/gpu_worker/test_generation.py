"""Requests in one GPU process: files for each, one model, one forward; memory is given back after a failure."""

import dataclasses
import io
from pathlib import Path

import pytest
from PIL import Image

from core.config import GenerateConfig, LoraUse
from core.errors import Cancelled
from core.image_files import read_infotext
from core.lora_state import LoraLayer, LoraState
from core.lora_utils import write_kohya
from core.memory_ladder import training_at
from core.progress import Progress, Report, silent
from core.randomness import normal
from core.train_config import TrainConfig
from gpu_worker import runtime
from gpu_worker.generation import Order, Result, run_generations
from gpu_worker.settings import BaseRef, Fetch, WorkerSettings

SHARED = GenerateConfig(prompt="a red apple", width=32, height=32, steps=2, sampler="ddim")


def no_files(sha256: str) -> Path:
    raise AssertionError(f"nobody needs {sha256}")


def order(folder: Path, report: Report = silent, fetch: Fetch = no_files, **changes: object) -> Order:
    folder.mkdir()
    names = [use.sha256[:4] for use in changes.get("loras", ())]  # type: ignore[attr-defined]
    config = SHARED.model_copy(update=changes)
    return Order(config=config, lora_names=names, folder=folder, report=report, fetch=fetch)


def lora_file(base: BaseRef, path: Path, seed: int) -> Path:
    """A strong LoRA on one attention layer."""
    unet = runtime.current().pool.get(base).unet
    name = next(name for name, _ in unet.named_modules() if name.endswith("attn2.to_v"))
    rows, columns = unet.get_submodule(name).weight.shape
    down, up = normal((4, columns), seed, "down"), normal((rows, 4), seed, "up")
    write_kohya(path, LoraState(unet={name: LoraLayer(down=down, up=up, alpha=4.0)}), {})
    return path


def cancelling(progress: Progress) -> None:
    raise Cancelled("stop")


def generate(base: BaseRef, orders: list[Order]) -> list[Result]:
    results: dict[Order, Result] = {}
    run_generations(
        orders=orders,
        base_fingerprint=base.fingerprint,
        base_files=base.files,
        base_name=base.name,
        memory_rung=0,
        on_done=results.__setitem__,
    )
    return [results[order] for order in orders]


def test_each_request_gets_its_files_with_its_own_words_in_them(
    settings_of_worker: WorkerSettings, bases: list[BaseRef], tmp_path: Path
) -> None:
    runtime.start(settings_of_worker, [bases[0]])
    orders = [order(tmp_path / "a", seed=4, count=2), order(tmp_path / "b", prompt="a blue house", seed=9)]
    first, second = generate(bases[0], orders)
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert [(picture.seed, picture.path) for picture in first] == [
        (4, tmp_path / "a" / "0000.png"),
        (5, tmp_path / "a" / "0001.png"),
    ]
    with Image.open(second[0].path) as image:
        assert image.info["parameters"].startswith("a blue house\n")
        assert "Seed: 9" in image.info["parameters"]


def test_pictures_begin_from_a_picture_and_are_stored_in_the_format_asked_for(
    settings_of_worker: WorkerSettings, bases: list[BaseRef], tmp_path: Path
) -> None:
    runtime.start(settings_of_worker, [bases[0]])
    source, mask = tmp_path / "source.png", tmp_path / "mask.png"
    Image.new("RGB", (64, 64), (200, 60, 20)).save(source)
    picture = Image.new("RGB", (64, 64))
    picture.paste((255, 255, 255), (0, 0, 16, 64))
    picture.save(mask)
    files = {"0" * 64: source, "1" * 64: mask}
    changes: dict[str, object] = {"init_image": "0" * 64, "mask": "1" * 64, "image_format": "jpeg"}
    (drawn,) = generate(bases[0], [order(tmp_path / "a", fetch=files.__getitem__, **changes)])
    assert isinstance(drawn, list)
    assert drawn[0].path.name == "0000.jpg"
    with Image.open(drawn[0].path) as image:
        assert image.format == "JPEG"
        red, _, blue = image.getpixel((28, 16))
        assert abs(red - 200) < 12 and abs(blue - 20) < 12, "what is not masked stays"
        assert read_infotext(image).startswith("a red apple\n")


def test_another_bases_vae_may_decode(settings_of_worker: WorkerSettings, bases: list[BaseRef], tmp_path: Path) -> None:
    runtime.start(settings_of_worker, [bases[0]])
    pictures = []
    for name, vae in (("own", None), ("other", dataclasses.asdict(bases[1])), ("again", None)):
        results: dict[Order, Result] = {}
        run_generations(
            orders=[order(tmp_path / name)],
            base_fingerprint=bases[0].fingerprint,
            base_files=bases[0].files,
            base_name=bases[0].name,
            memory_rung=0,
            on_done=results.__setitem__,
            vae=vae,
        )
        (drawn,) = results.values()
        assert isinstance(drawn, list), drawn
        with Image.open(drawn[0].path) as image:
            pictures.append(image.tobytes())
    assert pictures[0] == pictures[2] != pictures[1]


def test_a_file_that_one_needs_and_does_not_get_is_the_end_of_that_one_alone(
    settings_of_worker: WorkerSettings, bases: list[BaseRef], tmp_path: Path
) -> None:
    runtime.start(settings_of_worker, [bases[0]])

    def away(sha256: str) -> Path:
        raise ConnectionError("the store is away")

    orders = [
        order(tmp_path / "a", fetch=away, init_image="0" * 64),
        order(tmp_path / "b", seed=9),
        order(tmp_path / "c", fetch=away, loras=(LoraUse(sha256="2" * 64),)),
    ]
    first, second, third = generate(bases[0], orders)
    assert isinstance(first, ConnectionError)
    assert isinstance(second, list)
    assert isinstance(third, ConnectionError)


def test_orders_with_different_loras_share_a_run_and_leave_no_trace(
    settings_of_worker: WorkerSettings, bases: list[BaseRef], tmp_path: Path
) -> None:
    runtime.start(settings_of_worker, [bases[0]])
    files = {name * 64: lora_file(bases[0], tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate("ab")}
    told: list[str] = []
    orders = [
        order(tmp_path / "plain"),
        *(
            order(tmp_path / f"with-{sha256[0]}", fetch=files.__getitem__, loras=(LoraUse(sha256=sha256),))
            for sha256 in files
        ),
        order(tmp_path / "last", report=lambda progress: told.append(progress.stage)),
    ]
    results = generate(bases[0], orders)
    pictures = []
    for result in results:
        assert isinstance(result, list), result
        pictures.append(result[0].path.read_bytes())
    plain, with_a, with_b, last = [Image.open(io.BytesIO(picture)).tobytes() for picture in pictures]
    assert plain == last, "no LoRA is left behind"
    assert len({plain, with_a, with_b}) == 3
    assert told
    with Image.open(io.BytesIO(pictures[1])) as image:
        assert "Lora hashes" in read_infotext(image)


def test_one_that_stops_leaves_no_files_and_does_not_stop_the_other(
    settings_of_worker: WorkerSettings, bases: list[BaseRef], tmp_path: Path
) -> None:
    runtime.start(settings_of_worker, [bases[0]])
    orders = [order(tmp_path / "a", report=cancelling), order(tmp_path / "b", seed=9)]
    stopped, done = generate(bases[0], orders)
    assert isinstance(stopped, Cancelled)
    assert list((tmp_path / "a").iterdir()) == []
    assert isinstance(done, list)
    assert done[0].path.is_file()


def test_a_model_that_is_about_to_be_loaded_is_announced(
    settings_of_worker: WorkerSettings, bases: list[BaseRef], tmp_path: Path
) -> None:
    runtime.start(settings_of_worker, [])
    stages: list[str] = []
    generate(bases[0], [order(tmp_path / "a", report=lambda p: stages.append(p.stage))])
    assert stages == ["loading the model", "denoising", "denoising"]


def test_freed_memory_includes_what_only_a_cycle_kept_alive() -> None:
    class Node:
        freed = 0

        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            Node.freed += 1

    Node()
    runtime.free_memory()
    assert Node.freed == 1


@pytest.mark.parametrize(("rung", "batch"), [(0, 4), (1, 4), (2, 2), (3, 1)])
def test_a_rung_sets_the_micro_batch_of_a_training(rung: int, batch: int) -> None:
    assert training_at(TrainConfig(batch_size=4), rung).batch_size == batch
