"""Generation inside a worker: warm pipeline, cached LoRA files, then `core.generate`; requests come and go."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from core.config import GenerateConfig, LoraUse
from core.denoising import RowLoras
from core.drawing import Outcome, Request
from core.errors import Interrupted
from core.generate import generate_as_they_come
from core.image_files import ENDINGS, infotext, save_picture
from core.image_guidance import read_init_picture, read_mask
from core.lora_utils import apply_lora, sshs_model_hash
from core.memory_ladder import GenerationMemory, generation_memory
from core.pipelines import LoadedBase
from core.progress import Progress, Report
from core.text_encoding import resolve_clip_skip
from core.track_start import encode_texts
from gpu_worker import runtime
from gpu_worker.resident_loras import HeldLora, resident_loras
from gpu_worker.settings import BaseRef, Fetch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One finished picture on local disk; sizes in pixels."""

    path: Path
    seed: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """One request.

    Attributes:
        lora_names: Of `config.loras`, in their order, for people.
        folder: Gets the pictures.
        report: Its own; may raise `core.errors.Interrupted`, which stops this request alone.
        fetch: Gets its LoRAs and the pictures that it begins from, and may raise what `report` raises.
    """

    config: GenerateConfig
    lora_names: Sequence[str]
    folder: Path
    report: Report
    fetch: Fetch


Result = list[Picture] | Exception
"""The PNG files of a request in seed order, or what stopped it alone."""


def nobody(room: int) -> Sequence[Order]:
    """A `join` for a run that nobody joins."""
    return ()


def run_generations(
    *,
    orders: Sequence[Order],
    base_fingerprint: str,
    base_files: dict[str, str],
    base_name: str,
    memory_rung: int,
    on_done: Callable[[Order, Result], None],
    join: Callable[[int], Sequence[Order]] = nobody,
    vae: dict[str, Any] | None = None,
) -> None:
    """Draw requests of one base; each is handed out as soon as it is done.

    Args:
        orders: The first ones, >= 1.
        memory_rung: Of `core.memory_ladder`.
        on_done: Called once per order.
        vae: Name, fingerprint and files of a prepared base whose VAE decodes; None for the base's own.
        join: Asked before each step, with the number of pictures that there is room for; returns who joins.

    Raises:
        Exception: What stopped all orders that `on_done` has not heard of.
    """
    for order in orders:
        with suppress(Interrupted):  # It says so again at the first step, where it can leave alone.
            order.report(Progress(stage="loading the model", step=0, total=1))
    pool = runtime.current().pool
    ref = BaseRef(name=base_name, fingerprint=base_fingerprint, files=base_files)
    pipeline = "reused" if base_fingerprint in pool.fingerprints() else "loaded"
    base = pool.get(ref, BaseRef(**vae) if vae else None)
    says = f"base={base_name} pipeline={pipeline} attention={pool.attention_of(ref)}"
    settings = runtime.current().settings
    memory = generation_memory(memory_rung, slicing=settings.vae_slicing, tiling=settings.vae_tiling)
    run = _Run(base, says, base_name, memory, on_done, join)
    run.serve(orders)


@dataclass(frozen=True)
class _Drawn:
    """An order under way: when it began (monotonic seconds), where its LoRAs came from, which of them have slots."""

    order: Order
    began: float
    lora: str
    slotted: tuple[LoraUse, ...]


class _Run:
    """Orders of one base, drawn in rounds: one with LoRAs in slots, and one for each set that slots cannot serve."""

    def __init__(
        self,
        base: LoadedBase,
        says: str,
        base_name: str,
        memory: GenerationMemory,
        on_done: Callable[[Order, Result], None],
        join: Callable[[int], Sequence[Order]],
    ) -> None:
        self._base, self._says, self._base_name = base, says, base_name
        self._loras = resident_loras(base.unet)
        self._memory = memory
        self._on_done, self._join = on_done, join
        self._waiting: dict[Order, list[HeldLora] | None] = {}  # with its LoRAs, once they are read
        self._orders: dict[Request, _Drawn] = {}

    def serve(self, orders: Sequence[Order]) -> None:
        """Round by round, until nobody waits and nobody joins."""
        self._waiting.update(dict.fromkeys(orders))
        while self._waiting:
            first = next(iter(self._waiting))
            try:
                misfits = [held.misfit for held in self._open(first) if held.misfit]
                # PEFT's wrappers serve every kind of LoRA, and cost a tenth of a second per round.
                files = [(first.fetch(use.sha256), use.weight) for use in first.config.loras] if misfits else []
                applied = apply_lora(self._base.unet, files, **self._encoders())
            except Exception as error:  # noqa: BLE001 - becomes the end of this order
                self._end(first, error)
                continue
            uses = first.config.loras if misfits else None
            join = partial(self._joining, uses)
            try:
                with applied:
                    generate_as_they_come(
                        self._base, self._take(uses), self._done, join=join, memory=self._memory, slots=self._loras
                    )
            finally:  # What stops a run leaves orders behind; their slots are free all the same.
                for drawn in self._orders.values():
                    self._loras.leave(drawn.slotted)

    def _joining(self, uses: tuple[LoraUse, ...] | None, room: int) -> list[Request]:
        """Who waits for another round, or for a slot, goes first: until then nobody else joins."""
        for order in tuple(self._waiting):
            try:
                order.report(Progress(stage="waiting for its turn", step=0, total=order.config.steps))
            except Interrupted as interruption:
                self._end(order, interruption)
        if not self._waiting:
            self._waiting.update(dict.fromkeys(self._join(room)))
        return self._take(uses)

    def _take(self, uses: tuple[LoraUse, ...] | None) -> list[Request]:
        """Orders of this round: with exactly the LoRAs `uses`, or with LoRAs that have slots."""
        requests = []
        for order in tuple(self._waiting):
            began = time.monotonic()
            slotted: tuple[LoraUse, ...] = ()
            try:
                held = self._open(order)
                if order.config.loras != uses if uses is not None else any(lora.misfit for lora in held):
                    continue
                how = "applied"
                row: RowLoras = ()
                if uses is None:
                    how = "hit" if self._loras.has(order.config.loras) else "miss"
                    placed = self._loras.place(self._base.unet, order.config.loras, held)
                    if placed is None:
                        continue
                    row = placed
                    slotted = order.config.loras
                request = self._request(order, row, held if uses is None else [])
            except Exception as error:  # noqa: BLE001 - becomes the end of this order
                self._loras.leave(slotted)
                self._end(order, error)
                continue
            del self._waiting[order]
            lora = f"{how} ms={1e3 * (time.monotonic() - began):.1f}" if held else "none"
            self._orders[request] = _Drawn(order, began, lora, slotted)
            requests.append(request)
        return requests

    def _open(self, order: Order) -> list[HeldLora]:
        held = self._waiting[order]
        if held is None:
            held = [
                self._loras.open(self._base.unet, use.sha256, order.fetch(use.sha256)) for use in order.config.loras
            ]
            self._waiting[order] = held
        return held

    def _end(self, order: Order, error: Exception) -> None:
        del self._waiting[order]
        self._on_done(order, error)

    def _request(self, order: Order, row: RowLoras, held: Sequence[HeldLora]) -> Request:
        config = order.config
        size = config.width, config.height
        texts = [(lora.text, use.weight) for lora, use in zip(held, config.loras, strict=False) if lora.changes_text]
        with apply_lora(self._base.unet, texts, **self._encoders()):
            text = encode_texts(self._base, config)
        return Request(
            config=config,
            report=order.report,
            text=text,
            loras=row,
            init_picture=read_init_picture(order.fetch(config.init_image), *size) if config.init_image else None,
            mask=read_mask(order.fetch(config.mask), *size) if config.mask else None,
        )

    def _encoders(self) -> dict[str, Any]:
        return {"text_encoder": self._base.text_encoder, "text_encoder_2": self._base.text_encoder_2}

    def _done(self, request: Request, outcome: Outcome) -> None:
        drawn = self._orders.pop(request)
        order = drawn.order
        self._loras.leave(drawn.slotted)
        if isinstance(outcome, Exception):
            self._on_done(order, outcome)
            return
        config = order.config
        clip_skip = resolve_clip_skip(self._base, config.clip_skip)
        pictures = []
        for number, (image, seed) in enumerate(zip(outcome, config.seeds(), strict=True)):
            path = order.folder / f"{number:04d}{ENDINGS[config.image_format]}"
            words = infotext(
                config,
                seed,
                self._base_name,
                order.lora_names,
                clip_skip=clip_skip,
                model_hash=self._base.fingerprint,
                lora_hashes=[_hash_of_weights(order.fetch(use.sha256)) for use in config.loras],
            )
            save_picture(image, path, words, image_format=config.image_format, quality=config.image_quality)
            pictures.append(Picture(path=path, seed=seed, width=image.width, height=image.height))
        logger.info(
            "generated %s vae=%s lora=%s loras=%d count=%d size=%dx%d steps=%d sampler=%s seconds=%.2f",
            self._says, config.vae or "own", drawn.lora, len(config.loras), config.count, config.width, config.height,
            config.steps, config.sampler, time.monotonic() - drawn.began,
        )  # fmt: skip
        self._on_done(order, pictures)


@lru_cache(maxsize=4096)
def _hash_of_weights(path: Path) -> str:
    """WebUI's name for a LoRA; files of the cache are named by their hash, so that a path always means the same."""
    return sshs_model_hash(path)
