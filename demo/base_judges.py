"""Classifiers that judge the demo's base model; they never see a generated picture. Called by `demo.evaluate`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from core.randomness import generator
from demo.base_pictures import BACKGROUNDS, HUES, Thing, draw

BATCH = 64
SIDE_PX = 64


class Judge(nn.Module):
    """A small convolutional classifier of (n, 3, 64, 64) pictures in [0, 1]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 128), (128, 128)):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)  # (n, 128, 4, 4)
        self.head = nn.Linear(128 * 16, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """(n, classes) logits."""
        logits: Tensor = self.head(self.layers(pictures * 2 - 1).flatten(1))
        return logits


def train_judge(
    classes: int, batch: Callable[[str, int], tuple[Tensor, Tensor]], steps: int, report: Callable[[int, float], object]
) -> tuple[Judge, float]:
    """Train on `batch("train", step)` and test on `batch("test", n)`.

    Returns:
        The judge, and its share of right answers on 16 held-out batches.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = Judge(classes)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        pictures, labels = batch("train", step)
        loss = functional.cross_entropy(judge(pictures), labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        report(step, float(loss.detach()))
    judge.eval()
    right = total = 0
    with torch.no_grad():
        for number in range(16):
            pictures, labels = batch("test", number)
            right += int((judge(pictures).argmax(1) == labels).sum())
            total += len(labels)
    return judge, right / total


def renderings(things: list[Thing], split: str, step: int) -> tuple[Tensor, Tensor]:
    """BATCH pictures (n, 3, 64, 64) in [0, 1] and the numbers of what they show; moved, recoloured, blurred, noisy.

    "train" and "test" draw other colours, places and sizes of the same things.
    """
    dice = np.random.default_rng([int(split == "test"), step])
    labels = dice.integers(len(things), size=BATCH)
    colours, grounds = [*HUES], [*BACKGROUNDS]
    pixels = []
    for label in labels:
        thing = things[label]
        colour = colours[dice.integers(len(colours))] if thing.hue is not None and dice.random() < 0.4 else None
        ground = grounds[dice.integers(len(grounds))] if dice.random() < 0.5 else "white"
        pixels.append(draw(thing, colour, ground))
    return degraded(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), split, step), torch.from_numpy(labels)


def degraded(pictures: Tensor, split: str, step: int) -> Tensor:
    """Small moves, sizes and turns, and what a small VAE does to a picture: blur and noise."""
    dice = generator(0, "judge", split, step)
    count = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=dice) * (high - low) + low

    scale, angle, shift = uniform(0.85, 1.2, count), uniform(-0.2, 0.2, count), uniform(-0.12, 0.12, count, 2)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = functional.affine_grid(matrix, list(pictures.shape), align_corners=False)
    moved = functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    small = functional.interpolate(moved, scale_factor=0.5, mode="bilinear", antialias=True)
    blurred = functional.interpolate(small, size=(SIDE_PX, SIDE_PX), mode="bilinear")
    share = uniform(0, 1, count, 1, 1, 1)
    noise = torch.randn(pictures.shape, generator=dice) * uniform(0, 0.08, count, 1, 1, 1)
    return (moved * (1 - share) + blurred * share + noise).clamp(0, 1)


def as_batch(pictures: list[Any]) -> Tensor:
    """(n, 3, h, w) in [0, 1] of PIL pictures."""
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]).astype(np.float32) / 255
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
