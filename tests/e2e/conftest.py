"""Pictures and shortcuts of the end-to-end tests."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from tests.stack import Stack
from tests.tiny_models import make_tiny_pipeline


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight SD 1.x pipeline folder, used as the source of a base model."""
    return make_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


def png(colour: str, *, size: tuple[int, int] = (96, 80)) -> bytes:
    """A small picture: a disc on a coloured ground."""
    image = Image.new("RGB", size, colour)
    ImageDraw.Draw(image).ellipse((20, 16, 70, 60), fill="white")
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def pictures() -> dict[str, bytes]:
    """Six pictures, two with sidecar captions."""
    colours = ("red", "green", "blue", "yellow", "purple", "orange")
    files = {f"{colour}_disc.png": png(colour) for colour in colours}
    return files | {"red_disc.txt": b"a red picture with a disc", "blue_disc.txt": b"a blue picture"}


def add_base(site: Stack, source: Path) -> dict[str, Any]:
    """Register `source` as base model "tiny" and wait until it is prepared."""
    site.manage("base", "add", str(source), "--name", "tiny", "--warm", "--user", "owner")
    (job,) = site.call("GET", "/api/v1/jobs/?kind=prepare_base")["results"]
    site.wait_for_job(job)
    (base,) = [b for b in site.call("GET", "/api/v1/base-models/")["results"] if b["name"] == "tiny"]
    assert base["ready"], base
    return dict(base)


def prepare_dataset(site: Stack, base: dict[str, Any], name: str = "discs") -> str:
    """Upload the pictures, preprocess them; returns the dataset version's id."""
    dataset = site.call("POST", "/api/v1/datasets/", {"name": name})
    uploaded = site.upload(dataset["id"], pictures())
    assert (len(uploaded["images"]), uploaded["rejected"]) == (6, [])
    size = {"resolution": base["facts"]["native_size_px"], "bucket_step_px": base["facts"]["bucket_step_px"]}
    job = site.call("POST", f"/api/v1/datasets/{dataset['id']}/preprocess/", size)
    return str(site.wait_for_job(job)["result"]["id"])


def train(site: Stack, version_id: str, lora_name: str, **config: Any) -> dict[str, Any]:
    """Submit a training; returns its job."""
    values = {"steps": 8, "rank": 4, "alpha": 2, "batch_size": 2, "learning_rate": 1e-3, "seed": 5, **config}
    body = {"dataset_version": version_id, "base_model": "tiny", "lora_name": lora_name, "config": values}
    return dict(site.call("POST", "/api/v1/trainings/", body))
