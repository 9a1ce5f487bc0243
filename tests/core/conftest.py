"""A tiny base model, made once per test session and read-only for the tests."""

from pathlib import Path

import pytest
import torch

from core.pipelines import LoadedBase, load_base
from core.prepared_base import prepare_base
from tests.tiny_models import make_tiny_pipeline, make_tiny_sdxl_pipeline


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Two threads on a busy machine of two cores wait for each other: a forward pass becomes 30 times slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary diffusers SD1 folder, not prepared."""
    return make_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny-sd")


@pytest.fixture(scope="session")
def tiny_base_folder(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pipeline, prepared: what `load_base` opens."""
    return prepare_base(tiny_pipeline_folder, tmp_path_factory.mktemp("prepared") / "tiny-sd").folder


@pytest.fixture(scope="session")
def tiny_base(tiny_base_folder: Path) -> LoadedBase:
    """Loaded on the CPU in fp32; tests must not change its weights."""
    return load_base(tiny_base_folder)


@pytest.fixture(scope="session")
def tiny_sdxl_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL pipeline, prepared."""
    source = make_tiny_sdxl_pipeline(tmp_path_factory.mktemp("models") / "tiny-sdxl")
    return prepare_base(source, tmp_path_factory.mktemp("prepared") / "tiny-sdxl").folder


@pytest.fixture(scope="session")
def tiny_sdxl_base(tiny_sdxl_base_folder: Path) -> LoadedBase:
    """Loaded on the CPU in fp32; tests must not change its weights."""
    return load_base(tiny_sdxl_base_folder)
