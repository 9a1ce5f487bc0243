"""What the demo does, read from `demo/train.yaml` and `demo/prompts.yaml`. Imports no ML library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from core.config import PreprocessConfig
from core.train_config import TrainConfig

DEMO = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class FixedPrompt:
    """One picture that is drawn without and with the LoRA: the same words, the same seed."""

    thing: str
    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The demo's settings.

    Attributes:
        preprocess, train: The very configurations that REST gets.
        prompts: What is drawn, in order; none of it is among the LoRA's pictures.
        drawing: Settings that all those pictures share: steps, guidance.
        lora_weight: Of the second round.
        pictures: The LoRA's pictures, PNG, each with a .txt beside it.
    """

    preprocess: PreprocessConfig
    train: TrainConfig
    prompts: tuple[FixedPrompt, ...]
    drawing: dict[str, Any]
    lora_weight: float
    pictures: tuple[Path, ...]


def read_recipe(folder: Path = DEMO) -> Recipe:
    """Read both files and list the pictures.

    Raises:
        core.errors.ConfigError: A setting is wrong; names each.
    """
    training = yaml.safe_load((folder / "train.yaml").read_text(encoding="utf-8"))
    drawing = yaml.safe_load((folder / "prompts.yaml").read_text(encoding="utf-8"))
    preprocess = PreprocessConfig.parse(training.pop("preprocess"))
    for place in ("base_model", "pictures", "output"):  # of the command line; the studio has its own places
        training.pop(place)
    return Recipe(
        preprocess=preprocess,
        train=TrainConfig.parse(training),
        prompts=tuple(
            FixedPrompt(thing=line["prompt"], prompt=f"{line['prompt']}, {drawing['style']}", seed=line["seed"])
            for line in drawing["prompts"]
        ),
        drawing={"steps": drawing["steps"], "guidance": drawing["guidance"]},
        lora_weight=drawing["lora_weight"],
        pictures=tuple(sorted((folder / "pictures").glob("*.png"))),
    )
