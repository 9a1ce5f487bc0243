"""A preparation in a worker: from a folder, or from the hub's cache without any network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import BaseModelError
from core.progress import silent
from gpu_worker.base_preparation import run_base_preparation
from tests.tiny_models import make_tiny_pipeline

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PREPARE = """
import sys
from pathlib import Path
from core.progress import silent
from gpu_worker.base_preparation import run_base_preparation
run_base_preparation(sys.argv[1], Path(sys.argv[2]), silent, *sys.argv[3:])
"""


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """HF_HOME with the model `owner/tiny` in it, as the hub's client lays it out."""
    model = tmp_path / "hf" / "hub" / "models--owner--tiny"
    source = make_tiny_pipeline(tmp_path / "source")
    (model / "blobs").mkdir(parents=True)
    for number, path in enumerate(path for path in source.rglob("*") if path.is_file()):
        blob, link = model / "blobs" / str(number), model / "snapshots" / COMMIT / path.relative_to(source)
        shutil.copyfile(path, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return tmp_path / "hf"


def _prepare(hub: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: the hub's client reads its environment when it is imported.
    environment = os.environ | {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", PREPARE, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("name", ["owner/tiny", "owner/tiny@main", f"owner/tiny@{COMMIT}"])
def test_a_hub_id_is_prepared_and_its_commit_recorded(hub: Path, tmp_path: Path, name: str) -> None:
    done = _prepare(hub, name, str(tmp_path / "out"))

    assert done.returncode == 0, done.stderr
    inputs = json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]
    assert inputs["revision"] == COMMIT
    assert "vae_revision" not in inputs


def test_the_vae_may_come_from_the_hub_too(hub: Path, tmp_path: Path) -> None:
    other = make_tiny_pipeline(tmp_path / "other", seed=1)
    done = _prepare(hub, str(other), str(tmp_path / "out"), "owner/tiny")

    assert done.returncode == 0, done.stderr
    inputs = json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]
    assert inputs["vae_revision"] == COMMIT
    assert "revision" not in inputs


def test_a_model_that_is_not_there_is_an_error_in_a_sentence(hub: Path, tmp_path: Path) -> None:
    done = _prepare(hub, "owner/unknown", str(tmp_path / "out"))

    assert "BaseModelError: owner/unknown is no folder here and cannot be downloaded" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="does not exist: give a pipeline folder, or a hub id"):
        run_base_preparation(str(tmp_path / "nowhere"), tmp_path / "out", silent)
