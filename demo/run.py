"""`make demo`: the whole main job through the REST API of a studio that this program starts and stops.

    python -m demo.run [--data var/demo] [--port 8123] [--keep-running]

Ends with one line that says what came out; exit code 1 and a plain reason where something did not work.
"""

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from PIL import Image, UnidentifiedImageError

from core.errors import CoreError
from demo.colour_layout import distance_to_dataset
from demo.progress_line import ProgressLine
from demo.recipe import FixedPrompt, Recipe, read_recipe
from demo.report import DemoResult, Pair, Sample, render_report
from demo.rest_client import ApiError, RestClient
from demo.studio_process import StudioError, StudioProcess

BASE_MODEL = "demo"
BASE_MODEL_SECONDS = 180
REPORT_NAME = "report.html"


@dataclass(frozen=True, kw_only=True)
class TrainedLora:
    """What the training left: the version's id, its file on this machine, losses and sample pictures."""

    version_id: str
    file: Path
    losses: list[float]
    samples: list[Sample]


def run_demo(studio: StudioProcess, recipe: Recipe, line: ProgressLine) -> str:
    """The main job, stage by stage.

    Returns:
        What came out, as the last line of the program says it.

    Raises:
        StudioError, ApiError: A stage failed; `line.stage` names it.
    """
    started = time.monotonic()

    line.start("studio")
    line.update("starting")
    studio.start()
    key = studio.manage("api_key", "admin", "--name", "demo").split()[-1]
    client = RestClient(studio.site, key)
    line.done(f"ready at {studio.site}")

    try:
        result = _make_result(client, recipe, studio.data / "results" / time.strftime("%Y%m%d-%H%M%S"), line)
    except (KeyboardInterrupt, ApiError):
        client.cancel_open_jobs()  # else the next start of the studio would go on with them before anything new
        raise

    line.start("report")
    report = studio.data / REPORT_NAME
    report.write_text(render_report(result), encoding="utf-8")
    line.done(
        f"distance to the LoRA's pictures {result.before.mean:.3f} without, {result.after.mean:.3f} with: "
        f"fell by {result.fall:.0f} %"
    )
    seconds = time.monotonic() - started
    lora, images = _shown(result.lora_file), len(result.pairs)
    return f"demo: ok lora={lora} images={images} report={_shown(report)} seconds={seconds:.0f}"


def _make_result(client: RestClient, recipe: Recipe, results: Path, line: ProgressLine) -> DemoResult:
    """Everything that goes through REST, into the folder `results`."""
    line.start("base model")
    _wait_for_base_model(client, line)
    line.done(f"{BASE_MODEL} is prepared")

    line.start("upload")
    dataset = client.post("datasets/", {"name": f"blueprint {results.name}"})
    captions = [picture.with_suffix(".txt") for picture in recipe.pictures]
    answer = client.upload(f"datasets/{dataset['id']}/images/", [*recipe.pictures, *captions])
    if answer["rejected"]:
        first = answer["rejected"][0]
        raise ApiError(f"{len(answer['rejected'])} files were rejected, first {first['name']}: {first['reason']}")
    line.done(f"{len(answer['images'])} pictures with captions")

    line.start("preprocess")
    job = client.submit(f"datasets/{dataset['id']}/preprocess/", recipe.preprocess.dump())
    version = client.get(client.wait_for_job(job, line.update_from_job)["result"]["url"])
    line.done(f"{version['image_count']} pictures at {recipe.preprocess.resolution} px")

    line.start("train")
    lora = _train(client, recipe, version["id"], results, line)
    line.done(f"{len(lora.losses)} steps, loss {lora.losses[0]:.2f} to {statistics.mean(lora.losses[-20:]):.2f}")

    line.start("draw")
    before = _draw(client, recipe, [], results / "without", line)
    after = _draw(client, recipe, [{"lora": lora.version_id, "weight": recipe.lora_weight}], results / "with", line)
    line.done(f"{len(before)} pictures without and {len(after)} with the LoRA")

    dataset_pictures = _open_all(recipe.pictures)
    return DemoResult(
        base_model=BASE_MODEL,
        lora_file=lora.file,
        pictures=[(file, file.with_suffix(".txt").read_text(encoding="utf-8").strip()) for file in recipe.pictures],
        pairs=[
            Pair(prompt=fixed.prompt, seed=fixed.seed, before=without, after=with_lora)
            for fixed, without, with_lora in zip(recipe.prompts, before, after, strict=True)
        ],
        samples=lora.samples,
        losses=lora.losses,
        settings=recipe.train.dump(),
        drawing=recipe.drawing | {"lora_weight": recipe.lora_weight},
        before=distance_to_dataset(_open_all(before), dataset_pictures),
        after=distance_to_dataset(_open_all(after), dataset_pictures),
        seconds=dict(line.seconds),
    )


def _wait_for_base_model(client: RestClient, line: ProgressLine) -> None:
    end = time.monotonic() + BASE_MODEL_SECONDS
    while time.monotonic() < end:
        found = [row for row in client.all("base-models/") if row["name"] == BASE_MODEL]
        if found and found[0]["ready"]:
            return
        state = found[0]["state"] if found else None
        if state == "failed":
            raise ApiError(f"base model {BASE_MODEL} could not be prepared; its job in the admin says why")
        line.update(f"waiting: {state or 'not registered yet'}")
        time.sleep(0.5)
    raise ApiError(f"base model {BASE_MODEL} was not ready after {BASE_MODEL_SECONDS} s")


def _train(client: RestClient, recipe: Recipe, version_id: str, results: Path, line: ProgressLine) -> TrainedLora:
    """Train on a dataset version and fetch what came out."""
    wish = {
        "dataset_version": version_id,
        "base_model": BASE_MODEL,
        "lora_name": "blueprint",
        "config": recipe.train.dump(),
    }
    job = client.wait_for_job(client.submit("trainings/", wish), line.update_from_job)
    training = client.get(job["request"]["url"])
    lora_version = training["lora_version"]
    file = client.download(f"lora-versions/{lora_version}/file/", results / "blueprint.safetensors")
    samples = [
        Sample(
            step=sample["step"],
            prompt=sample["prompt"],
            file=client.download(sample["url"], results / "samples" / f"{number:02d}.png"),
        )
        for number, sample in enumerate(training["samples"])
    ]
    return TrainedLora(version_id=lora_version, file=file, losses=training["losses"], samples=samples)


def _draw(
    client: RestClient, recipe: Recipe, loras: list[dict[str, Any]], folder: Path, line: ProgressLine
) -> list[Path]:
    """One picture per prompt. All requests are sent first, so that the worker can batch them."""
    jobs = [client.submit("generations/", _wish(recipe, fixed, loras)) for fixed in recipe.prompts]
    files: list[Path] = []
    for fixed, job in zip(recipe.prompts, jobs, strict=True):
        line.update(f"{folder.name} the LoRA: {len(files)} of {len(jobs)}, {fixed.thing}")
        done = client.wait_for_job(job, lambda _: None)
        image = client.get(done["request"]["url"])["images"][0]
        files.append(client.download(image["url"], folder / f"{fixed.seed}.png"))
    return files


def _wish(recipe: Recipe, fixed: FixedPrompt, loras: list[dict[str, Any]]) -> dict[str, Any]:
    drawing = {"prompt": fixed.prompt, "seed": fixed.seed, "count": 1} | recipe.drawing
    return {"base_model": BASE_MODEL, "loras": loras} | drawing


def _open_all(files: Sequence[Path]) -> list[Image.Image]:
    pictures = []
    for file in files:
        with Image.open(file) as picture:
            pictures.append(picture.convert("RGB"))
    return pictures


def _shown(path: Path) -> Path:
    """Relative to the working directory where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """The command line of this module; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("var/demo"), help="data folder of the studio (%(default)s)")
    parser.add_argument("--port", type=int, help="port of the studio; a free one by default")
    parser.add_argument("--keep-running", action="store_true", help="leave the studio up; Ctrl-C ends it")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    line = ProgressLine()
    studio = StudioProcess(given.data, given.port)
    try:
        last_line = run_demo(studio, read_recipe(), line)
        if given.keep_running:
            sys.stdout.write(f"the studio stays up at {studio.site}; Ctrl-C stops it\n{last_line}\n")
            sys.stdout.flush()
            with suppress(KeyboardInterrupt):
                signal.pause()
            return 0
    except KeyboardInterrupt:
        line.leave()
        sys.stdout.write(f"demo: failed {line.stage}: stopped from outside; the studio's log is {studio.log}\n")
        return 1
    except (StudioError, ApiError, CoreError, OSError, UnidentifiedImageError) as error:
        line.leave()
        sys.stdout.write(f"the studio's log is {_shown(studio.log)}\ndemo: failed {line.stage}: {error}\n")
        return 1
    finally:
        studio.stop()
    sys.stdout.write(last_line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
