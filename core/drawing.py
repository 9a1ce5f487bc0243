"""One request being drawn: which of its pictures wait, run and are done, and what its owner is told.

Called by `core.generate`; decides nothing about the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from core.config import GenerateConfig
from core.denoising import RowLoras, Track
from core.errors import CoreError, Interrupted
from core.progress import Progress, Report, silent
from core.text_encoding import TextCondition


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What is to be drawn for whom.

    Attributes:
        config: The LoRAs that it names are the caller's to load.
        report: Called after each step; may raise `core.errors.Interrupted`, which stops this request alone.
        text: Encoded prompts, the unconditional one first under guidance; None: `core.generate` encodes them.
        loras: Slots (of the run's `LoraSlots`) and weights.
        init_picture: RGB, what `config.init_image` names, of `core.image_guidance.read_init_picture`.
        mask: What `config.mask` names, of `core.image_guidance.read_mask`.
    """

    config: GenerateConfig
    report: Report = silent
    text: TextCondition | None = None
    loras: RowLoras = ()
    init_picture: Image.Image | None = None
    mask: Image.Image | None = None


Outcome = list[Image.Image] | Interrupted | CoreError
"""The pictures of a request in seed order, or what stopped it alone."""


class Drawing:
    """The state of one request.

    Args:
        request: Whose it is.
        text: Its encoded prompts.
        source: Clean latents (1, c, h, w) of its `init_picture`.
        cells: Mask (1, 1, h, w) in latent cells, 1 where `source` may change.
        pictures_per_forward: At most so many of its pictures run at once.
    """

    def __init__(
        self,
        request: Request,
        text: TextCondition,
        *,
        source: Tensor | None = None,
        cells: Tensor | None = None,
        pictures_per_forward: int,
    ) -> None:
        self.request, self.text, self.source, self.cells = request, text, source, cells
        self.preview: bytes | None = None
        """A small JPEG that nobody was told of yet."""
        self._waiting = list(range(request.config.count))
        self._running: dict[Track, list[int]] = {}
        self._second: set[Track] = set()
        self._pictures: dict[int, Image.Image] = {}
        self._steps = request.config.steps  # per picture; the first track knows better
        self._steps_done = 0  # of all pictures that are done
        self._turns = -(-request.config.count // pictures_per_forward)

    @property
    def tracks(self) -> Sequence[Track]:
        """Those under way."""
        return tuple(self._running)

    @property
    def unfinished(self) -> int:
        """Pictures that wait or run."""
        return self.request.config.count - len(self._pictures)

    def ended(self) -> list[Track]:
        """Those whose latents are final."""
        return [track for track in self._running if track.is_done]

    def next_seeds(self, at_most: int) -> list[int]:
        """Of the pictures that begin next, in order; an exact request's begin one by one."""
        return [self.request.config.seed + number for number in self._waiting[: self._together(at_most)]]

    def begin(self, track: Track) -> None:
        """The pictures of `next_seeds` have become this track."""
        count = len(track.latents)
        hires = self.request.config.hires
        # As many as the second pass will take, unless its sampler is a special one.
        more = int((hires.steps or self.request.config.steps) * hires.denoising_strength) if hires else 0
        self._steps = track.steps + more
        self._running[track], self._waiting = self._waiting[:count], self._waiting[count:]

    def seeds_of(self, track: Track) -> list[int]:
        """Of the pictures of a track."""
        return [self.request.config.seed + number for number in self._running[track]]

    def go_on(self, track: Track, second: Track) -> None:
        """The pictures of a track that came to its end go through a second pass."""
        numbers = self._running.pop(track)
        self._steps_done += len(numbers) * track.steps
        self._steps = track.steps + second.steps
        self._running[second] = numbers
        self._second.add(second)

    def wants_second_pass(self, track: Track) -> bool:
        """Whether this was the first of two."""
        return self.request.config.hires is not None and track not in self._second

    def end(self, track: Track, pictures: Sequence[Image.Image]) -> None:
        """The pictures of a track that came to its end."""
        numbers = self._running.pop(track)
        self._steps_done += len(numbers) * track.steps
        self._pictures.update(zip(numbers, pictures, strict=True))

    def pictures(self) -> list[Image.Image] | None:
        """All of them in seed order once the last is there."""
        if self.unfinished:
            return None
        return [self._pictures[number] for number in range(self.request.config.count)]

    def tell(self) -> None:
        """Report how far it is; also while it waits, since it may want to stop.

        Raises:
            Interrupted: Whatever the owner's report raises.
        """
        running = sum(len(numbers) * track.steps_done for track, numbers in self._running.items())
        total = self._turns * self._steps
        step = (self._steps_done + running) * total // (self.request.config.count * self._steps)
        preview, self.preview = self.preview, None
        self.request.report(Progress(stage="denoising", step=min(step, total), total=total, preview=preview))

    def _together(self, at_most: int) -> int:
        return min(at_most, 1) if self.request.config.exact else at_most
