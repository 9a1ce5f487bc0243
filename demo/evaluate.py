"""How good the demo's base model is, in figures and in one picture.

    python -m demo.evaluate --base demo/tiny-sd-emoji --work var/base-training --sheet demo/contact_sheet.webp

Judges are trained first, on renderings of the emoji alone, and must be right on held-out ones. Prints one JSON object.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from core.config import GenerateConfig
from core.generate import generate
from core.hub_source import fetch_source
from core.pipelines import LoadedBase, load_base
from core.prepared_base import ensure_prepared
from demo.base_judges import Judge, as_batch, renderings, train_judge
from demo.base_pictures import HUES, Thing, colour_of, fetch_emoji, read_things, with_article
from demo.make_pictures import outlines

logger = logging.getLogger("demo.evaluate")

SEEDS = 4
STEPS, GUIDANCE = 20, 3.0
JUDGE_STEPS = 1500
SHEET_COLUMNS = 16


def word_judge(things: list[Thing], work: Path) -> tuple[Judge, float]:
    """Says which thing a picture shows; trained once, kept in the work folder."""
    path = work / "word_judge.safetensors"
    if path.is_file():
        tensors = load_file(path)
        judge = Judge(len(things))
        accuracy = float(tensors.pop("accuracy"))
        judge.load_state_dict(tensors)
        return judge.eval(), accuracy
    bar = tqdm(total=JUDGE_STEPS, desc="judge of words", disable=None)
    judge, accuracy = train_judge(
        len(things), lambda split, step: renderings(things, split, step), JUDGE_STEPS, lambda *_: bar.update()
    )
    bar.close()
    save_file(judge.state_dict() | {"accuracy": torch.tensor(accuracy)}, path)
    return judge, accuracy


def draw_all(base: LoadedBase, prompts: Sequence[str], seed: int, lora: tuple[Path, float] | None) -> list[Image.Image]:
    """One picture per prompt, from seeds that follow each other."""
    size = base.facts.native_size_px
    pictures = []
    for number, prompt in enumerate(tqdm(prompts, desc=f"pictures seed {seed}", disable=None)):
        config = GenerateConfig(
            prompt=prompt, seed=seed * 100_000 + number, steps=STEPS, guidance=GUIDANCE, width=size, height=size
        )
        pictures += generate(base, config, [lora] if lora else [])
    return pictures


@torch.no_grad()
def ranks(judge: Judge, pictures: list[Image.Image], right: Sequence[int]) -> Tensor:
    """(n,) how many other things the judge finds likelier; 0 is right."""
    logits = judge(as_batch(pictures))  # (n, classes)
    own = logits.gather(1, torch.tensor(right)[:, None])
    return (logits > own).sum(1)


def recognisability(base: LoadedBase, things: list[Thing], judge: Judge, sheet: Path | None) -> dict[str, float]:
    """Top-1 and top-5 over all words."""
    prompts, numbers = [with_article(thing.words[0]) for thing in things], list(range(len(things)))
    all_ranks = []
    for seed in range(SEEDS):
        pictures = draw_all(base, prompts, seed, None)
        all_ranks.append(ranks(judge, pictures, numbers))
        if seed == 0 and sheet:
            contact_sheet(pictures, [thing.words[0] for thing in things]).save(sheet, quality=80, method=6)
    found = torch.stack(all_ranks)  # (seeds, things)
    worst = sorted(numbers, key=lambda number: -float(found[:, number].float().mean()))[:15]
    logger.info("hardest words=%s", ", ".join(things[number].words[0] for number in worst))
    return {"top1": float((found == 0).float().mean()), "top5": float((found < 5).float().mean())}


def colours(base: LoadedBase, things: list[Thing], judge: Judge) -> dict[str, float]:
    """Share of "a COLOUR THING" pictures in which most of what is no background has that colour."""
    chosen = [(number, thing) for number, thing in enumerate(things) if thing.hue is not None][::6]
    asked = [(number, thing, colour) for number, thing in chosen for colour in HUES]
    pictures = draw_all(base, [with_article(f"{colour} {thing.words[0]}") for _, thing, colour in asked], 50, None)
    right = 0
    for (_, thing, colour), picture in zip(asked, pictures, strict=True):
        pixels = as_batch([picture])[0].permute(1, 2, 0).numpy()
        right += colour_of(pixels, thing.rgba[..., 3] > 0.5) == colour
    found = ranks(judge, pictures, [number for number, _, _ in asked])
    return {"colours": right / len(asked), "coloured_top5": float((found < 5).float().mean())}


def contact_sheet(pictures: list[Image.Image], words: Sequence[str]) -> Image.Image:
    """All pictures with their words, 16 a row."""
    side, line = 64, 12
    rows = -(-len(pictures) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * (side + 4), rows * (side + line + 4)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(9)
    for number, (picture, word) in enumerate(zip(pictures, words, strict=True)):
        left, top = number % SHEET_COLUMNS * (side + 4) + 2, number // SHEET_COLUMNS * (side + line + 4) + 2
        sheet.paste(picture, (left, top))
        pen.text((left, top + side), word[:15], fill="black", font=font)
    return sheet


def style_judge(things: list[Thing]) -> tuple[Judge, float]:
    """Says whether a picture is in the outline style of the demo's LoRA (1) or an ordinary one (0)."""
    drawings = as_batch([
        outlines(Image.fromarray((thing.rgba * 255).round().astype("uint8"))).resize((64, 64), Image.Resampling.LANCZOS)
        for thing in things
    ])  # fmt: skip

    def batch(split: str, step: int) -> tuple[Tensor, Tensor]:
        pictures, numbers = renderings(things, split, step)
        labels = torch.arange(len(pictures)) % 2
        mixed = torch.where(labels.view(-1, 1, 1, 1) == 1, drawings[numbers], pictures)
        return mixed, labels

    return train_judge(2, batch, 150, lambda *_: None)


def lora_shift(base: LoadedBase, things: list[Thing], lora: Path, weight: float, names: set[str]) -> dict[str, float]:
    """Share of pictures that the style judge calls outlines with the LoRA, and without it. Words: not in its set."""
    judge, accuracy = style_judge(things)
    prompts = [f"{with_article(t.words[0])}, blueprint style" for t in things if not names & set(t.words)][:40]
    shares = {}
    for label, use in (("before", None), ("after", (lora, weight))):
        with torch.no_grad():
            votes = judge(as_batch(draw_all(base, prompts, 70, use))).argmax(1)
        shares[f"lora_{label}"] = float(votes.float().mean())
    return shares | {"style_judge": accuracy}


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="demo/tiny-sd-emoji", help="pipeline folder (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("var/base-training"), help="emoji and judges (%(default)s)")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of all words here (.webp or .png)")
    parser.add_argument("--lora", type=Path, help="the demo's trained LoRA file: also measure what it changes")
    parser.add_argument("--lora-weight", type=float, default=1.0, help="of --lora (%(default)s)")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)
    things = read_things(fetch_emoji(given.work))
    prepared = ensure_prepared(fetch_source(given.base), given.work / "prepared")
    base = load_base(prepared.folder)
    judge, accuracy = word_judge(things, given.work)
    figures = {"judge": accuracy} | recognisability(base, things, judge, given.sheet) | colours(base, things, judge)
    began = time.process_time()
    draw_all(base, ["a cat"] * 3, 90, None)
    figures["seconds_per_picture"] = (time.process_time() - began) / 3
    if given.lora:
        known = {path.read_text(encoding="utf-8") for path in Path("demo/pictures").glob("*.txt")}
        names = {thing.words[0] for thing in things if any(thing.words[0] in text for text in known)}
        figures |= lora_shift(base, things, given.lora, given.lora_weight, names)
    sys.stdout.write(json.dumps({name: round(value, 4) for name, value in figures.items()}) + "\n")


if __name__ == "__main__":
    main()
