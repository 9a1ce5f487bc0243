"""Loading a prepared base."""

import dataclasses
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from core.errors import BaseModelError
from core.pipelines import LoadedBase, assert_vae_fp32, load_base, pick_device


def test_a_base_is_loaded_in_fp32_on_the_cpu_frozen_and_in_eval_mode(tiny_base: LoadedBase) -> None:
    for part in (tiny_base.text_encoder, tiny_base.unet, tiny_base.vae):
        assert not part.training
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert not any(parameter.is_meta for parameter in part.parameters())
    assert tiny_base.scheduler_config["_class_name"] == "PNDMScheduler"


def test_the_vae_stays_fp32_when_the_rest_is_half(tiny_base_folder: Path) -> None:
    base = load_base(tiny_base_folder, dtype=torch.float16)

    assert base.unet.dtype == base.text_encoder.dtype == base.dtype == torch.float16
    assert base.vae.dtype == torch.float32


def test_a_half_precision_vae_is_noticed(tiny_base: LoadedBase) -> None:
    assert_vae_fp32(tiny_base)

    with pytest.raises(BaseModelError, match=r"torch.float16.*vae.to\(torch.float32\)"):
        assert_vae_fp32(dataclasses.replace(tiny_base, vae=deepcopy(tiny_base.vae).half()))


def test_a_folder_that_is_not_prepared_is_refused_with_the_command_to_run(tiny_pipeline_folder: Path) -> None:
    with pytest.raises(BaseModelError, match=r"python -m core.prepared_base"):
        load_base(tiny_pipeline_folder)


def test_loading_is_silent(tiny_base_folder: Path) -> None:
    code = f"from pathlib import Path; from core.pipelines import load_base; load_base(Path({str(tiny_base_folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)

    assert done.stdout == ""
    assert done.stderr == ""


def test_a_device_is_picked_that_works() -> None:
    assert torch.zeros(1, device=pick_device()).item() == 0


@pytest.mark.gpu
def test_on_a_gpu_the_default_is_half_precision_with_an_fp32_vae(tiny_base_folder: Path) -> None:
    base = load_base(tiny_base_folder, device="cuda")

    assert base.unet.dtype == torch.float16
    assert base.vae.dtype == torch.float32
    assert base.vae.device.type == base.unet.device.type == "cuda"
