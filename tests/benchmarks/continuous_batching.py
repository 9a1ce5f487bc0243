"""How much sooner pictures are there when requests join a running batch between two steps, instead of the next batch.

    python -m tests.benchmarks.continuous_batching [--requests N] [--rounds N]

Requests of one picture arrive by a Poisson process at 0.8 of what the run-to-completion side can do at most; steps are
drawn from {8, 20, 40}; at most 8 pictures run at once on either side. First the product's engine is measured on the
narrow UNet, latent side 16: a step with 1 to 8 pictures, text, decoding. Then the same engine serves thousands of
requests on a virtual clock: the model is a stand-in that answers at once and advances the clock by what was measured.
Two kinds of run to completion, each at 0.8 of its own throughput: a batch that keeps its shape until its longest
request is done, and one whose finished pictures leave the forward, which needs a timestep per row just as joining
does. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from core.config import GenerateConfig
from core.denoising import DenoisingRun
from core.drawing import Outcome, Request
from core.generate import generate, generate_as_they_come, to_pictures
from core.pipelines import LoadedBase, load_base
from core.prepared_base import prepare_base
from core.quiet_libraries import quiet_libraries
from core.text_encoding import TextCondition
from core.track_start import begin_track, encode_texts
from core.vae import decode_latents
from tests.benchmarks.narrow_sd15 import narrow_pipeline_folder

SIDE_PX = 128
STEPS = (8, 20, 40)
LOAD = 0.8
AT_ONCE = 8
GOAL = 2.0
MEASURED_ROUNDS = 7


@dataclass(frozen=True, kw_only=True)
class Costs:
    """CPU seconds, medians: of a step by the number of pictures, of text, of decoding one picture."""

    step: dict[int, float]
    text: float
    decode: float


class Site:
    """One side's clock, line of arrivals, and a base whose model only costs time."""

    def __init__(self, real: LoadedBase, costs: Costs, text: TextCondition, arrivals: "Arrivals") -> None:
        self.now, self.costs, self._text = 0.0, costs, text
        self._coming = list(arrivals)
        self.arrived = {request: at for at, request in arrivals}
        self.latencies: dict[Request, float] = {}
        self.base = dataclasses.replace(real, unet=_Unet(self, real), vae=_Vae(self, real))

    def take(self, at_most: int, *, wait: bool) -> list[Request]:
        """Requests that are there by now; with `wait`, the clock jumps to the first one where none is."""
        if wait and self._coming:
            self.now = max(self.now, self._coming[0][0])
        here = [request for at, request in self._coming[:at_most] if at <= self.now]
        del self._coming[: len(here)]
        self.now += len(here) * self.costs.text
        return here

    def done(self, request: Request, outcome: Outcome | None = None) -> None:
        """It has its pictures now."""
        if isinstance(outcome, Exception):
            raise outcome
        self.latencies[request] = self.now - self.arrived[request]


Arrivals = Sequence[tuple[float, Request]]
"""(seconds, request), in order."""
Side = Callable[[Site], None]


class _Unet:
    def __init__(self, site: Site, real: LoadedBase) -> None:
        self._site, self.config = site, real.unet.config

    def __call__(self, latents: torch.Tensor, *_: Any, **__: Any) -> Any:
        self._site.now += self._site.costs.step[len(latents)]
        return SimpleNamespace(sample=torch.zeros_like(latents))


class _Vae(torch.nn.Module):
    dtype = torch.float32

    def __init__(self, site: Site, real: LoadedBase) -> None:
        super().__init__()
        object.__setattr__(self, "_site", site)
        self.config = real.vae.config
        self.enable_slicing = self.enable_tiling = self.disable_slicing = self.disable_tiling = lambda: None

    def decode(self, latents: torch.Tensor) -> Any:
        self._site.now += self._site.costs.decode * len(latents)
        return SimpleNamespace(sample=torch.zeros(len(latents), 3, 8, 8))


def joining(site: Site) -> None:
    """A request joins at the first step with room, and is handed out after its last one."""
    generate_as_they_come(site.base, [], site.done, join=lambda room: site.take(room, wait=room == AT_ONCE))


def leaving(site: Site) -> None:
    """Whoever waits makes a batch; finished pictures leave the forward; all are handed out at the end."""
    while batch := site.take(AT_ONCE, wait=True):
        generate_as_they_come(site.base, batch, lambda request, outcome: None)
        for request in batch:
            site.done(request)


def staying(site: Site) -> None:
    """As `leaving`, but the batch keeps its shape until its longest request is done."""
    while batch := site.take(AT_ONCE, wait=True):
        run = DenoisingRun(site.base)
        tracks = [_track(site.base, request) for request in batch]
        for track in tracks:
            run.join(track)
        while not set(tracks).isdisjoint(run.tracks):
            for _ in run.step():
                run.join(_track(site.base, batch[0]))  # its row is computed on
        for track in tracks:
            to_pictures(decode_latents(site.base, track.latents))
        for request in batch:
            site.done(request)


def _track(base: LoadedBase, request: Request) -> Any:
    text = request.text or encode_texts(base, request.config)
    return begin_track(base, request.config, text, request.config.seeds())


def main() -> None:
    """Measure the engine, then compare both kinds of run to completion with joining."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--requests", type=int, default=400, help="of each round and side")
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        folder = narrow_pipeline_folder(Path(scratch) / "narrow")
        base = load_base(prepare_base(folder, Path(scratch) / "prepared").folder, device="cpu")
        difference = largest_difference(base)
        costs = measure(base)
    _say("milliseconds of a step by pictures: " + ", ".join(f"{n}: {1e3 * s:.1f}" for n, s in costs.step.items()))
    stays, leaves = (compare(base, costs, side, given.rounds, given.requests) for side in (staying, leaving))
    what = "mean latency of run to completion over that of joining at 0.8 of the former's throughput"
    checks = [
        (what, statistics.median(stays.ratios), GOAL, "higher"),
        (f"{what}, lowest round", min(stays.ratios), None, "higher"),
        (f"{what}, where finished pictures leave the forward", statistics.median(leaves.ratios), None, "higher"),
        ("mean latency of joining, seconds", statistics.median(stays.joined_seconds), None, "lower"),
        ("one request alone, mean, seconds", statistics.mean(STEPS) * costs.step[1], None, "lower"),
        ("requests/s of run to completion", stays.throughput, None, "higher"),
        ("requests/s of run to completion, where finished pictures leave", leaves.throughput, None, "higher"),
    ]
    answer = {
        "name": "continuous_batching",
        "correct": difference <= 1,
        "max_diff": difference,
        "checks": [
            {"what": what, "value": round(value, 3), "goal": goal, "better": better}
            for what, value, goal, better in checks
        ],
    }
    sys.stdout.write(json.dumps(answer) + "\n")


def measure(base: LoadedBase) -> Costs:
    """What the real engine takes, in turns over all numbers of pictures."""
    requests = [Request(config=_config(number, 40)) for number in range(AT_ONCE)]
    runs = {count: DenoisingRun(base) for count in range(1, AT_ONCE + 1)}
    for count, run in runs.items():
        for request in requests[:count]:
            run.join(_track(base, request))
        run.step()
    steps: dict[int, list[float]] = {count: [] for count in runs}
    texts, decodes = [], []
    for _ in range(MEASURED_ROUNDS):
        for count, run in runs.items():
            steps[count].append(_seconds(run.step))
        texts.append(_seconds(lambda: _track(base, requests[0])))
        latents = runs[1].tracks[0].latents
        decodes.append(_seconds(lambda latents=latents: to_pictures(decode_latents(base, latents))))
    return Costs(
        step={count: statistics.median(seconds) for count, seconds in steps.items()},
        text=statistics.median(texts),
        decode=statistics.median(decodes),
    )


@dataclass
class Comparison:
    """One kind of run to completion beside joining; a figure per round."""

    throughput: float
    ratios: list[float] = field(default_factory=list)
    joined_seconds: list[float] = field(default_factory=list)


def compare(base: LoadedBase, costs: Costs, side: Side, rounds: int, count: int) -> Comparison:
    """Both on the same arrivals."""
    text = encode_texts(base, _config(0, 8))

    def served(how: Side, arrivals: Arrivals) -> Site:
        site = Site(base, costs, text, arrivals)
        how(site)
        return site

    backlog = [(0.0, request) for request in _requests(random.Random(0), 20 * AT_ONCE, text)]
    comparison = Comparison(len(backlog) / served(side, backlog).now)
    for number in range(rounds):
        chance = random.Random(number + 1)
        at, arrivals = 0.0, []
        for request in _requests(chance, count, text):
            at += chance.expovariate(LOAD * comparison.throughput)
            arrivals.append((at, request))
        waited, joined = (statistics.mean(served(how, arrivals).latencies.values()) for how in (side, joining))
        comparison.ratios.append(waited / joined)
        comparison.joined_seconds.append(joined)
        _say(f"{side.__name__}: mean latency {waited:.2f} s against {joined:.2f} s, {waited / joined:.2f} times")
    return comparison


def largest_difference(base: LoadedBase) -> float:
    """Grey levels between pictures that joined each other's run and the same ones drawn alone, on the real model."""
    requests = [Request(config=_config(number, steps)) for number, steps in enumerate((20, 8, 12))]
    outcomes: dict[Request, Outcome] = {}
    coming = list(requests)
    generate_as_they_come(base, [], outcomes.__setitem__, join=lambda room: [coming.pop(0)] if coming else [])
    largest = 0.0
    for request in requests:
        together = outcomes[request]
        if isinstance(together, Exception):
            raise together
        for mine, alone in zip(together, generate(base, request.config), strict=True):
            largest = max(largest, float(np.abs(np.asarray(mine, dtype=int) - np.asarray(alone, dtype=int)).max()))
    return largest


def _requests(chance: random.Random, count: int, text: TextCondition) -> list[Request]:
    return [Request(config=_config(number, chance.choice(STEPS)), text=text) for number in range(count)]


def _config(number: int, steps: int) -> GenerateConfig:
    return GenerateConfig(
        prompt=f"picture {number}",
        seed=number,
        steps=steps,
        guidance=1.0,
        width=SIDE_PX,
        height=SIDE_PX,
        sampler="dpmpp_2m",
    )


def _seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
