"""Mixed precision and its checkpoints on a real CUDA device."""

import json
from pathlib import Path

import pytest
import torch

from core.errors import Paused
from core.pipelines import load_base
from core.progress import Progress
from core.train import train
from tests.core.training_parts import make_dataset, quick_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def pause_at_four(progress: Progress) -> None:
    if progress.stage == "training" and progress.step == 4:
        raise Paused("step 4")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_each_precision_trains_pauses_and_goes_on(precision: str, tiny_base_folder: Path, tmp_path: Path) -> None:
    base = load_base(tiny_base_folder, device="cuda")
    dataset = make_dataset(tmp_path / "pictures")
    config = quick_config(mixed_precision=precision, targets="with_conv", sample_prompts=["a cat"], sample_steps=2)
    with pytest.raises(Paused):
        train(config, base, dataset, tmp_path / "run", pause_at_four)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000004" / "state.json").read_text())
    assert bool(state["scaler"]) == (precision == "fp16")
    result = train(config, base, dataset, tmp_path / "run")
    assert result.facts["precision"] == precision
    assert len(result.losses) == 8
    whole = train(config, base, dataset, tmp_path / "whole")
    assert result.losses == pytest.approx(whole.losses, rel=0.05)
