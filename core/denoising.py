"""Pictures on their way from noise to latents: a `Track` is some pictures of one request, a `DenoisingRun` steps all.

Called by `core.generate`. Tracks join and leave between steps and know nothing of each other; what they share is the
UNet's forward, in which every row has its own timestep, text and LoRAs.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from core.latent_preview import denoised_estimate
from core.pipelines import LoadedBase

RowLoras = Sequence[tuple[int, float]]
"""Slots and weights of one row of a forward; empty for no LoRA."""


class Slots(Protocol):
    """What a run needs of `core.lora_slots.LoraSlots`."""

    def activate(self, rows: Sequence[RowLoras]) -> None:
        """Set the LoRAs of each row of the forwards that follow."""

    def deactivate(self) -> None:
        """No LoRA for anybody."""


@dataclass(eq=False, kw_only=True)
class Track:
    """Some pictures of one request, at the same step.

    Attributes:
        scheduler: Its own, `set_timesteps` done: a sampler keeps a history from step to step.
        latents: (n, c, h, w) fp32 on the base's device.
        text: (2n, tokens, dim) with the n unconditional rows first, (n, tokens, dim) where `guidance` is 1.
        guidance: Classifier-free guidance scale >= 1.
        generators: n, one per picture: all noise of a picture comes from its own seed.
        added: More conditions of the UNet (`added_cond_kwargs`, SDXL), each with as many rows as `text`.
        loras: Of all its rows.
        exact: Its forwards hold nothing but this track.
        start: Index into the scheduler's timesteps where it begins.
        after_step: Changes the latents after each step (inpainting keeps what is not masked): takes them and the
            next position.
        watch, watch_every: Who is shown, every so many steps, what the model thinks that the first picture's clean
            latents are: (c, h, w) fp32; 0 for never.
    """

    scheduler: Any
    latents: Tensor
    text: Tensor
    guidance: float
    generators: Sequence[torch.Generator]
    added: dict[str, Tensor] = field(default_factory=dict)
    loras: RowLoras = ()
    exact: bool = False
    start: int = 0
    after_step: Callable[[Tensor, int], Tensor] | None = None
    watch: Callable[[Tensor], None] | None = None
    watch_every: int = 0

    def __post_init__(self) -> None:
        self.position = self.start
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        self._options: dict[str, Any] = {"generator": list(self.generators)} if takes_generator else {}
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self.start)

    @property
    def steps(self) -> int:
        """Forwards from its start to the end; some samplers need two per step."""
        return len(self.scheduler.timesteps) - self.start

    @property
    def steps_done(self) -> int:
        """Forwards so far."""
        return self.position - self.start

    @property
    def is_done(self) -> bool:
        """Whether the latents are final."""
        return self.steps_done >= self.steps

    @property
    def timestep(self) -> Tensor:
        """Of the coming step, 0-dim."""
        timestep: Tensor = self.scheduler.timesteps[self.position]
        return timestep

    def model_input(self) -> Tensor:
        """What the UNet sees: (2n, c, h, w) under guidance, (n, c, h, w) without."""
        scaled: Tensor = self.scheduler.scale_model_input(self.latents, self.timestep)  # (n, c, h, w)
        return torch.cat([scaled, scaled]) if self.guidance > 1 else scaled

    def advance(self, prediction: Tensor) -> None:
        """Take one step.

        Args:
            prediction: The UNet's answer to `model_input`, same shape, fp32.
        """
        if self.guidance > 1:
            unconditional, conditional = prediction.chunk(2)  # (n, c, h, w) each
            prediction = unconditional + self.guidance * (conditional - unconditional)
        if self.watch is not None and self.watch_every and (self.steps_done + 1) % self.watch_every == 0:
            scaled = self.scheduler.scale_model_input(self.latents[:1], self.timestep)  # (1, c, h, w)
            self.watch(denoised_estimate(self.scheduler, scaled, prediction[:1], self.timestep)[0])
        step = self.scheduler.step(prediction, self.timestep, self.latents, **self._options)
        self.position += 1
        self.latents = step.prev_sample  # (n, c, h, w)
        if self.after_step is not None:
            self.latents = self.after_step(self.latents, self.position)


@dataclass(frozen=True, kw_only=True)
class _Forward:
    """Tracks that go through the UNet together, with everything that stays the same from step to step."""

    tracks: Sequence[Track]
    text: Tensor  # (rows, tokens, dim)
    added: dict[str, Tensor]
    loras: Sequence[RowLoras]  # per row


class DenoisingRun:
    """All tracks under way on one base.

    Args:
        base: Its UNet predicts.
        slots: Holds the LoRAs that tracks name; None where tracks name none.
    """

    def __init__(self, base: LoadedBase, slots: Slots | None = None) -> None:
        self._base, self._slots = base, slots
        self._tracks: list[Track] = []
        self._forwards: list[_Forward] | None = None
        self._active: _Forward | None = None

    @property
    def tracks(self) -> Sequence[Track]:
        """Those under way."""
        return tuple(self._tracks)

    def join(self, track: Track) -> None:
        """Take part from the next step on."""
        self._tracks.append(track)
        self._forwards = None

    def leave(self, track: Track) -> None:
        """Take part no longer; the others go on as they were."""
        self._tracks.remove(track)
        self._forwards = None

    @torch.no_grad()
    def step(self) -> list[Track]:
        """One step of every track.

        Returns:
            Tracks that have come to their end; they have left.
        """
        if self._forwards is None:
            self._forwards = [self._compose(tracks) for tracks in _fitting_together(self._tracks)]
        for forward in self._forwards:
            rows = [track.model_input() for track in forward.tracks]
            predictions = self._predict(forward, rows).split([len(own) for own in rows])
            for track, prediction in zip(forward.tracks, predictions, strict=True):
                track.advance(prediction)
        ended = [track for track in self._tracks if track.is_done]
        for track in ended:
            self.leave(track)
        return ended

    def _predict(self, forward: _Forward, rows: Sequence[Tensor]) -> Tensor:
        """(rows, c, h, w) fp32."""
        timesteps = [track.timestep.float().expand(len(own)) for track, own in zip(forward.tracks, rows, strict=True)]
        if self._slots is not None and self._active is not forward:
            self._slots.activate(forward.loras)
            self._active = forward
        prediction: Tensor = self._base.unet(
            torch.cat(list(rows)).to(self._base.dtype),  # (rows, c, h, w)
            torch.cat(timesteps).to(self._base.device),  # (rows,)
            encoder_hidden_states=forward.text,  # (rows, tokens, dim)
            added_cond_kwargs=forward.added or None,
        ).sample
        return prediction.float()

    def _compose(self, tracks: Sequence[Track]) -> _Forward:
        keys = tracks[0].added.keys()
        return _Forward(
            tracks=tracks,
            text=torch.cat([track.text for track in tracks]).to(self._base.device, self._base.dtype),
            added={key: torch.cat([track.added[key] for track in tracks]) for key in keys},
            loras=[track.loras for track in tracks for _ in track.text],
        )


def _fitting_together(tracks: Sequence[Track]) -> Iterator[list[Track]]:
    """Tracks of one size and text length; exact ones alone, so that no kernel sees another shape than ever."""
    groups: dict[tuple[object, ...], list[Track]] = {}
    for number, track in enumerate(tracks):
        own = number if track.exact else None
        groups.setdefault((track.latents.shape[1:], track.text.shape[1:], own), []).append(track)
    yield from groups.values()
