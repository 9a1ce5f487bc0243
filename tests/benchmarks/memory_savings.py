"""Peak memory of attention slicing, VAE slicing and VAE tiling against doing without, each in a process of its own.

    python -m tests.benchmarks.memory_savings

CPU, one thread: Stable Diffusion 1.5's graph, the UNet narrow, the VAE at a quarter of its width. Counted is what the
peak of resident memory grows by during one call, after the same call at a small size. Last line: one JSON object.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.quiet_libraries import quiet_libraries
from gpu_worker.attention import choose_attention
from tests.benchmarks.narrow_sd15 import narrow_unet, unet_inputs

SEED = 5
UNET_SIDE, SMALL_SIDE = 64, 16
"""Latent sides: 512 px, and 128 px."""


def unet_call(attention: str) -> Callable[[int], Tensor]:
    """A forward of one row of a side's latents."""
    unet = narrow_unet()
    if attention == "whole":
        unet.set_attn_processor(AttnProcessor())  # the scores of all heads at once, as before SDPA
    else:
        choose_attention(unet, attention, "cpu", torch.float32)

    def call(side: int) -> Tensor:
        latents, timesteps, text = unet_inputs(unet, side=side)
        sample: Tensor = unet(latents, timesteps, encoder_hidden_states=text).sample  # (n, 4, side, side)
        return sample

    return call


def vae_call(pictures: int, *, slicing: bool = False, tiling: bool = False) -> Callable[[int], Tensor]:
    """Decoding so many pictures of a side's latents."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        vae: Any = AutoencoderKL(
            block_out_channels=(32, 64, 128, 128),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=256,  # tiles of 256 px
        )
    vae.eval()
    if slicing:
        vae.enable_slicing()
    if tiling:
        vae.enable_tiling()

    def call(side: int) -> Tensor:
        latents = torch.randn(pictures, 4, side, side, generator=torch.Generator().manual_seed(SEED))
        decoded: Tensor = vae.decode(latents).sample  # (n, 3, 8 * side, 8 * side)
        return decoded

    return call


VARIANTS: dict[str, tuple[Callable[[], Callable[[int], Tensor]], int]] = {
    "UNet at 512 px, all scores at once": (lambda: unet_call("whole"), UNET_SIDE),
    "UNet at 512 px, SDPA": (lambda: unet_call("sdpa"), UNET_SIDE),
    "UNet at 512 px, sliced": (lambda: unet_call("sliced"), UNET_SIDE),
    "VAE, 4 pictures of 256 px": (lambda: vae_call(4), 32),
    "VAE, 4 pictures of 256 px, slicing": (lambda: vae_call(4, slicing=True), 32),
    "VAE, a picture of 512 px": (lambda: vae_call(1), 64),
    "VAE, a picture of 512 px, tiling": (lambda: vae_call(1, tiling=True), 64),
}
PAIRS = {
    "attention slicing ÷ all scores at once": ("UNet at 512 px, sliced", "UNet at 512 px, all scores at once"),
    "VAE slicing ÷ without": ("VAE, 4 pictures of 256 px, slicing", "VAE, 4 pictures of 256 px"),
    "VAE tiling ÷ without": ("VAE, a picture of 512 px, tiling", "VAE, a picture of 512 px"),
}
SAME_UP_TO = 1e-4
TILES_MEAN_UP_TO = 0.1
"""Mean difference that blended tiles of random weights may show; trained decoders show less."""


def peak_bytes() -> int:
    """Of this process's resident memory so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def measure(name: str, output: Path) -> None:
    """One variant, in this process; prints the growth in bytes."""
    torch.set_num_threads(1)
    quiet_libraries()
    make, side = VARIANTS[name]
    call = make()
    call(SMALL_SIDE)
    before = peak_bytes()
    result = call(side)
    sys.stdout.write(f"{peak_bytes() - before}\n")
    save_file({"result": result.contiguous()}, output)


def main() -> None:
    """Each variant in a process of its own, then the comparison."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--variant", choices=sorted(VARIANTS))
    options.add_argument("--output", type=Path)
    given = options.parse_args()
    if given.variant:
        measure(given.variant, given.output)
        return
    grown: dict[str, int] = {}
    results: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(VARIANTS):
            output = Path(scratch) / f"{number}.safetensors"
            command = [sys.executable, "-m", "tests.benchmarks.memory_savings"]
            done = subprocess.run(
                [*command, "--variant", name, "--output", str(output)], capture_output=True, text=True, check=True
            )
            grown[name] = int(done.stdout.splitlines()[-1])
            results[name] = load_file(output)["result"]
            sys.stdout.write(f"{name}: {grown[name] / 2**20:.0f} MiB\n")
    differences = {what: (results[saving] - results[without]).abs() for what, (saving, without) in PAIRS.items()}
    tiles = float(differences.pop("VAE tiling ÷ without").mean())
    largest = max(float(difference.max()) for difference in differences.values())
    result = {
        "name": "memory_savings",
        "correct": largest <= SAME_UP_TO and tiles <= TILES_MEAN_UP_TO,
        "max_diff": largest,
        "tiles_mean_difference": tiles,
        "peak_growth_mib": {name: value / 2**20 for name, value in grown.items()},
        "checks": [
            {
                "what": f"peak memory, {what}",
                "value": grown[saving] / grown[without],
                "goal": 1.0,
                "better": "lower",
            }
            for what, (saving, without) in PAIRS.items()
        ],
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
