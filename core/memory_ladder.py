"""How a piece of work does the same with less memory, rung by rung. Pure: it decides, the callers act.

Rung 0 is the fastest way; each further rung saves memory for time and gives the same result, to rounding. Called by
the GPU worker to set a try up, and by the job code to know whether a next rung exists.
"""

from dataclasses import dataclass

from core.config import TrainConfig

PICTURES_PER_FORWARD = 8
"""Bounds memory: a request of 64 pictures runs as 8 micro-batches, each of twice 8 samples under guidance."""


@dataclass(frozen=True, kw_only=True)
class GenerationMemory:
    """How pictures are drawn.

    Attributes:
        pictures_per_forward: Drawn together, 1-8.
        frugal_vae: Decode picture by picture, and pictures larger than the VAE's native size in blended tiles.
        says: For people.
    """

    pictures_per_forward: int
    frugal_vae: bool
    says: str


GENERATION_RUNGS: tuple[GenerationMemory, ...] = (
    GenerationMemory(pictures_per_forward=PICTURES_PER_FORWARD, frugal_vae=False, says="the fastest way"),
    GenerationMemory(pictures_per_forward=8, frugal_vae=True, says="decoding in slices and tiles"),
    GenerationMemory(pictures_per_forward=4, frugal_vae=True, says="4 pictures at a time"),
    GenerationMemory(pictures_per_forward=2, frugal_vae=True, says="2 pictures at a time"),
    GenerationMemory(pictures_per_forward=1, frugal_vae=True, says="one picture at a time"),
)


def generation_memory(rung: int) -> GenerationMemory:
    """The rung, or the last one where there are not so many."""
    return GENERATION_RUNGS[min(rung, len(GENERATION_RUNGS) - 1)]


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
