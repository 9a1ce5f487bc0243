"""The latents that the base model's UNet learns from: every thing plain, recoloured, and on backgrounds."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from demo.base_pictures import BACKGROUNDS, HUES, Thing, caption, draw, own_colour

Variant = tuple[int, str | None, str]
"""Number of the thing, its colour word (None: as it is), its background."""


class LatentTable:
    """Latents by variant.

    Attributes:
        latents: (variants, c, h, w) fp32: the means of the VAE's posterior, whose deviation is below 0.01 here.
        variants: What each row shows.
    """

    def __init__(self, latents: Tensor, variants: list[Variant]) -> None:
        self.latents, self.variants = latents, variants
        self._row = {variant: row for row, variant in enumerate(variants)}

    def plain(self, thing: int) -> Tensor:
        """(c, h, w) of a thing as it is, on white."""
        return self.latents[self._row[thing, None, "white"]]

    def batch(self, things: list[Thing], seed: int, step: int, size: int) -> tuple[Tensor, list[str]]:
        """Latents (size, c, h, w) and captions of one step; a tenth of the captions is empty."""
        dice = random.Random(f"{seed} {step}")
        rows, captions = [], []
        for _ in range(size):
            number = dice.randrange(len(things))
            thing, kind = things[number], dice.random()
            colour = dice.choice(list(HUES)) if thing.hue is not None and kind < 0.4 else None
            ground = dice.choice(list(BACKGROUNDS)) if 0.25 <= kind < 0.6 else "white"
            rows.append(self._row[number, colour, ground])
            said = colour or (own_colour(thing) if dice.random() < 0.2 else None)
            noun = thing.words[0] if dice.random() < 0.75 else dice.choice(thing.words)
            named = ground if ground != "white" or dice.random() < 0.15 else None
            captions.append("" if dice.random() < 0.1 else caption(noun, said, named, dice=dice))
        return self.latents[rows], captions


@torch.no_grad()
def build_table(vae: Any, things: list[Thing], path: Path) -> LatentTable:
    """Encode all variants, once; kept at `path`."""
    variants: list[Variant] = []
    for number, thing in enumerate(things):
        colours = [None, *HUES] if thing.hue is not None else [None]
        variants += [(number, colour, ground) for colour in colours for ground in BACKGROUNDS]
    if path.is_file():
        return LatentTable(safetensors.torch.load_file(path)["latents"], variants)
    vae.eval()
    parts = []
    for begin in range(0, len(variants), 64):
        pixels = np.stack(
            [draw(things[number], colour, ground) for number, colour, ground in variants[begin : begin + 64]]
        )
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2) * 2 - 1  # (n, 3, 64, 64)
        parts.append(vae.encode(batch).latent_dist.mean)
    latents = torch.cat(parts)
    safetensors.torch.save_file({"latents": latents.contiguous()}, path)
    return LatentTable(latents, variants)
