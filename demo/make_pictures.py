"""Makes `demo/pictures/`: white outlines on blue, computed from Noto emoji, one caption beside each.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python -m demo.make_pictures package

Run by hand when the set changes; the demo itself only reads the result. Licences: `demo/LICENSES/README.md`.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

Plane = npt.NDArray[np.floating]

PICTURES = Path(__file__).parent / "pictures"
SIDE_PX = 128
"""Twice the base model's 64, so that preprocessing has something to do."""

BLUE = np.array([0.12, 0.30, 0.65], dtype=np.float32)
STYLE = "blueprint style"

# Short name in emoji.json -> words the base model knows it by. What the demo's prompts ask for
# (demo/prompts.yaml) is not among them.
CAPTIONS = {
    "apple": "a red apple",
    "banana": "a banana",
    "strawberry": "a strawberry",
    "watermelon": "a watermelon",
    "cherries": "cherries",
    "eggplant": "an eggplant",
    "carrot": "a carrot",
    "pineapple": "a pineapple",
    "wine_glass": "a wine glass",
    "pizza": "a slice of pizza",
    "hamburger": "a hamburger",
    "bread": "a loaf of bread",
    "doughnut": "a doughnut",
    "coffee": "a hot beverage",
    "tropical_fish": "a tropical fish",
    "whale": "a spouting whale",
    "dolphin": "a dolphin",
    "octopus": "an octopus",
    "crab": "a crab",
    "shark": "a shark",
    "turtle": "a turtle",
    "penguin": "a penguin",
    "duck": "a duck",
    "swan": "a swan",
    "rooster": "a rooster",
    "flamingo": "a flamingo",
    "owl": "an owl",
    "bee": "a honeybee",
    "ladybug": "a ladybug",
    "elephant": "an elephant",
    "t-rex": "a t-rex",
    "camel": "a camel",
    "teddy_bear": "a teddy bear",
    "rabbit": "a rabbit face",
    "horse": "a horse face",
    "bear": "a bear face",
    "heart": "a red heart",
    "skull": "a skull",
    "ghost": "a ghost",
    "robot_face": "a robot face",
    "sunflower": "a sunflower",
    "tulip": "a tulip",
    "evergreen_tree": "an evergreen tree",
    "palm_tree": "a palm tree",
    "four_leaf_clover": "a four leaf clover",
    "maple_leaf": "a maple leaf",
    "tent": "a tent",
    "bus": "a bus",
    "truck": "a delivery truck",
    "airplane": "an airplane",
    "helicopter": "a helicopter",
    "bike": "a bicycle",
    "anchor": "an anchor",
    "star": "a star",
    "cloud": "a cloud",
    "balloon": "a balloon",
    "gift": "a wrapped gift",
    "trophy": "a trophy",
    "shirt": "a t-shirt",
    "key": "a key",
}


def outlines(emoji: Image.Image) -> Image.Image:
    """A bold white line on blue along the silhouette, and along every hole in it.

    Bold, because one latent cell of the base model covers 4 pixels of 64: thinner lines, such as those of the
    details inside, do not survive its VAE.

    Args:
        emoji: RGBA, square.

    Returns:
        RGB, 128x128 pixels.
    """
    enlarged = emoji.convert("RGBA").resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    rgba = np.asarray(enlarged, dtype=np.float32) / 255  # (h, w, 4)
    alpha = rgba[..., 3]  # (h, w)
    line = np.clip(edges(smooth(alpha, 3.0)) * 12, 0, 1)[..., None]  # (h, w, 1), 1 is white
    drawing = BLUE * (1 - line) + line  # (h, w, 3)
    return Image.fromarray((drawing * 255).round().astype(np.uint8))


def smooth(plane: Plane, radius_px: float) -> Plane:
    """Gaussian blur of one (h, w) plane in [0, 1]."""
    picture = Image.fromarray((plane * 255).round().astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius_px)), dtype=np.float32) / 255


def edges(plane: Plane) -> Plane:
    """Length of the central-difference gradient of an (h, w) plane; the border is repeated outwards."""
    padded = np.pad(plane, 1, mode="edge")
    across = padded[1:-1, 2:] - padded[1:-1, :-2]
    down = padded[2:, 1:-1] - padded[:-2, 1:-1]
    return np.hypot(across, down)


def make_pictures(package: Path, destination: Path) -> int:
    """Write `<name>.png` and `<name>.txt` for every entry of `CAPTIONS`.

    Args:
        package: The unpacked npm package `emoji-datasource-google`.
        destination: Folder for the pictures; made where missing.

    Returns:
        Number of pictures.
    """
    entries = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
    files = {entry["short_name"]: package / "img" / "google" / "64" / entry["image"] for entry in entries}
    destination.mkdir(parents=True, exist_ok=True)
    for name, caption in CAPTIONS.items():
        with Image.open(files[name]) as emoji:
            picture = outlines(emoji)
        # 32 shades between blue and white look the same and halve the files.
        picture.quantize(32).save(destination / f"{name}.png", optimize=True)
        (destination / f"{name}.txt").write_text(f"{caption}, {STYLE}\n", encoding="utf-8")
    return len(CAPTIONS)


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m demo.make_pictures", description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="unpacked npm package emoji-datasource-google 16.0.0")
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder for the pictures (%(default)s)")
    given = parser.parse_args()
    sys.stdout.write(f"{make_pictures(given.package, given.out)} pictures in {given.out}\n")


if __name__ == "__main__":
    main()
