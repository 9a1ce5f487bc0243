"""Generation inside a worker: warm pipeline, cached LoRA files, then `core.generate`; requests come and go."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from core.config import GenerateConfig, LoraUse
from core.drawing import Outcome, Request
from core.errors import Interrupted
from core.generate import generate_as_they_come
from core.image_files import ENDINGS, infotext, save_picture
from core.image_guidance import read_init_picture, read_mask
from core.lora_utils import apply_lora, sshs_model_hash
from core.memory_ladder import generation_memory
from core.pipelines import LoadedBase
from core.progress import Progress, Report
from core.text_encoding import resolve_clip_skip
from gpu_worker import runtime
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
) -> None:
    """Draw requests of one base; each is handed out as soon as it is done.

    Args:
        orders: The first ones, >= 1.
        memory_rung: Of `core.memory_ladder`.
        on_done: Called once per order.
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
    run = _Run(pool.get(ref), f"base={base_name} pipeline={pipeline}", base_name, memory_rung, on_done, join)
    run.serve(orders)


class _Run:
    """Orders of one base, drawn in rounds: the orders of a round have the same LoRAs on the model."""

    def __init__(
        self,
        base: LoadedBase,
        says: str,
        base_name: str,
        memory_rung: int,
        on_done: Callable[[Order, Result], None],
        join: Callable[[int], Sequence[Order]],
    ) -> None:
        self._base, self._says, self._base_name = base, says, base_name
        self._memory = generation_memory(memory_rung)
        self._on_done, self._join = on_done, join
        self._waiting: deque[Order] = deque()
        self._orders: dict[Request, tuple[Order, float]] = {}

    def serve(self, orders: Sequence[Order]) -> None:
        """Round by round, until nobody waits and nobody joins."""
        self._waiting.extend(orders)
        while self._waiting:
            first = self._waiting[0]
            uses = first.config.loras
            try:
                files = [(first.fetch(use.sha256), use.weight) for use in uses]
                encoders = {"text_encoder": self._base.text_encoder, "text_encoder_2": self._base.text_encoder_2}
                applied = apply_lora(self._base.unet, files, **encoders)
            except Exception as error:  # noqa: BLE001 - becomes the end of this order
                self._waiting.popleft()
                self._on_done(first, error)
                continue
            join = partial(self._joining, uses)
            with applied:
                generate_as_they_come(self._base, self._take(uses), self._done, join=join, memory=self._memory)

    def _joining(self, uses: tuple[LoraUse, ...], room: int) -> list[Request]:
        """Who waits for other LoRAs has the next round: until then nobody else joins."""
        self._tell_waiting()
        if not self._waiting:
            self._waiting.extend(self._join(room))
        return self._take(uses)

    def _tell_waiting(self) -> None:
        """They live, and may want to stop."""
        for order in tuple(self._waiting):
            try:
                order.report(Progress(stage="waiting for its turn", step=0, total=order.config.steps))
            except Interrupted as interruption:
                self._waiting.remove(order)
                self._on_done(order, interruption)

    def _take(self, uses: tuple[LoraUse, ...]) -> list[Request]:
        requests = []
        for order in tuple(self._waiting):
            if order.config.loras == uses:
                self._waiting.remove(order)
                try:
                    request = self._request(order)
                except Exception as error:  # noqa: BLE001 - becomes the end of this order
                    self._on_done(order, error)
                    continue
                self._orders[request] = (order, time.monotonic())
                requests.append(request)
        return requests

    def _request(self, order: Order) -> Request:
        config = order.config
        size = config.width, config.height
        return Request(
            config=config,
            report=order.report,
            init_picture=read_init_picture(order.fetch(config.init_image), *size) if config.init_image else None,
            mask=read_mask(order.fetch(config.mask), *size) if config.mask else None,
        )

    def _done(self, request: Request, outcome: Outcome) -> None:
        order, began = self._orders.pop(request)
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
            "generated %s vae=own attention=sdpa loras=%d count=%d size=%dx%d steps=%d sampler=%s seconds=%.2f",
            self._says, len(config.loras), config.count, config.width, config.height, config.steps, config.sampler,
            time.monotonic() - began,
        )  # fmt: skip
        self._on_done(order, pictures)


@lru_cache(maxsize=4096)
def _hash_of_weights(path: Path) -> str:
    """WebUI's name for a LoRA; files of the cache are named by their hash, so that a path always means the same."""
    return sshs_model_hash(path)
