"""What a long piece of work tells its caller at every step. `core` never knows who listens."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One step done.

    Attributes:
        stage: Short present-tense word for people: "caching latents", "training", "denoising".
        step: Steps done in this stage, 0..total.
        total: Steps of this stage, >= 1.
        figures: Numbers worth showing (loss, lr, steps_per_second ...), finite floats only.
        preview: A small JPEG of the first picture under way (`core.latent_preview`, at most 16 KiB), where one is new.
    """

    stage: str
    step: int
    total: int
    figures: dict[str, float] = field(default_factory=dict)
    preview: bytes | None = None


Report = Callable[[Progress], None]
"""Called between steps. May raise `core.errors.Interrupted` (Cancelled, Paused): the work stops there."""


def silent(_: Progress) -> None:
    """A `Report` that nobody listens to."""
