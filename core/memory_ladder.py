"""How a piece of work does the same with less memory, rung by rung. Pure: it decides, the callers act.

Rung 0 is the fastest way; each further rung saves memory for time and gives the same result, to rounding. Called by
the GPU worker to set a try up, and by the job code to know whether a next rung exists.
"""

from dataclasses import dataclass, replace
from typing import Literal

from core.train_config import TrainConfig

PICTURES_PER_FORWARD = 8
"""Bounds memory: a request of 64 pictures runs as 8 micro-batches, each of twice 8 samples under guidance."""


Switch = Literal["auto", "on", "off"]
"""Of one way to save memory: as the rung says, always, or never."""


@dataclass(frozen=True, kw_only=True)
class VaeSaving:
    """How a VAE decodes with less memory.

    Attributes:
        slicing: Picture by picture: the same to rounding.
        tiling: Pictures larger than the VAE's native size in blended tiles, which shows as slight shifts.
    """

    slicing: bool = False
    tiling: bool = False


NO_SAVING = VaeSaving()
FRUGAL = VaeSaving(slicing=True, tiling=True)


@dataclass(frozen=True, kw_only=True)
class GenerationMemory:
    """How pictures are drawn.

    Attributes:
        pictures_per_forward: Drawn together, 1-8.
        vae: How latents are decoded.
        says: For people.
    """

    pictures_per_forward: int
    vae: VaeSaving
    says: str


GENERATION_RUNGS: tuple[GenerationMemory, ...] = (
    GenerationMemory(pictures_per_forward=PICTURES_PER_FORWARD, vae=NO_SAVING, says="the fastest way"),
    GenerationMemory(pictures_per_forward=8, vae=FRUGAL, says="decoding in slices and tiles"),
    GenerationMemory(pictures_per_forward=4, vae=FRUGAL, says="4 pictures at a time"),
    GenerationMemory(pictures_per_forward=2, vae=FRUGAL, says="2 pictures at a time"),
    GenerationMemory(pictures_per_forward=1, vae=FRUGAL, says="one picture at a time"),
)


def generation_memory(rung: int, *, slicing: Switch = "auto", tiling: Switch = "auto") -> GenerationMemory:
    """The rung, or the last one where there are not so many, with what an operator has switched on or off."""
    memory = GENERATION_RUNGS[min(rung, len(GENERATION_RUNGS) - 1)]
    vae = VaeSaving(slicing=_switched(slicing, memory.vae.slicing), tiling=_switched(tiling, memory.vae.tiling))
    return replace(memory, vae=vae)


def _switched(switch: Switch, by_rung: bool) -> bool:
    return by_rung if switch == "auto" else switch == "on"


def training_rungs(config: TrainConfig) -> list[tuple[TrainConfig, str]]:
    """All ways to run one training, the asked-for one first, each with words for people.

    First gradient checkpointing, then micro-batches halved with accumulation doubled. These are the fields that a
    checkpoint does not bind (`core.checkpoint.FREE_FIELDS`), so a training goes on exactly on any rung.
    """
    rungs = [(config, "as configured")]
    if not config.gradient_checkpointing:
        config = config.model_copy(update={"gradient_checkpointing": True})
        rungs.append((config, "with gradient checkpointing"))
    while config.batch_size > 1:
        # An odd batch has no half: go to single pictures.
        parts = 2 if config.batch_size % 2 == 0 else config.batch_size
        changes = {
            "batch_size": config.batch_size // parts,
            "gradient_accumulation_steps": config.gradient_accumulation_steps * parts,
        }
        config = config.model_copy(update=changes)
        rungs.append((config, f"micro-batches of {config.batch_size}"))
    return rungs


def training_at(config: TrainConfig, rung: int) -> TrainConfig:
    """The configuration of a rung, or of the last one where there are not so many."""
    rungs = training_rungs(config)
    return rungs[min(rung, len(rungs) - 1)][0]
