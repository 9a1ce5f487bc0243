"""The production scheduler against first come, first served, on traces with a counted clock.

    python -m tests.benchmarks.scheduler_replay [--jobs N]

Four T4-like workers (4.3 s a request) with room for 16 of 1,000 LoRAs each (Zipf 1.0), 1.5 s for one that is not there,
5 ms for one that is, load 0.75; 50 people (Zipf 1.0). "Drift and bursts": the popular LoRAs change every 500 requests,
and every ten minutes one person sends 20 requests at once. "Ours" is the product on one machine with four devices: its
workers share one cache of files (64 LoRAs, `core.cache_policy`), which fetches for the first four of the line at each
look, once a second and when a free worker finds only jobs whose LoRA is still to come; that worker takes them when it
has come. "Four machines": a cache of 16 each. First come, first served keeps what its own worker used last and fetches
when a request starts; "one machine" gives it one shared cache. Bytes from S3: 2,000 LoRAs, lognormal around 35 MB. The
last line is one JSON object.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from core.cache_policy import CachePolicy
from tests.benchmarks.cache_policies import LruCache, S3FifoCache
from tests.benchmarks.fleet_simulation import Arrival, Fleet, Served, Simulation

LOAD = 0.75
LORAS, PEOPLE = 1000, 50
DRIFT_EVERY, DRIFT_BY = 500, 20
BURST_EVERY_S, BURST_JOBS = 600.0, 20
CACHED_LORAS, CACHE_REQUESTS = 2000, 60_000
MEDIAN_BYTES, SIGMA = 35_000_000, 0.89
CACHE_SHARE = 0.10
OURS = Fleet()
FIRST_COME = Fleet(fair=False, ours=False, prefetch=False, machines=4)


def main() -> None:
    """Play all traces, print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--jobs", type=int, default=20_000)
    given = options.parse_args()
    checks: list[tuple[str, float, float, str]] = []
    seen: dict[str, Any] = {}
    correct = True
    for name, drifting in (("steady", False), ("drift and bursts", True)):
        arrivals = trace(given.jobs, seed=1, drifting=drifting)
        fleets = {
            "first come": FIRST_COME,
            "first come, one machine": replace(FIRST_COME, machines=1),
            "first come with prefetch, one machine": replace(FIRST_COME, machines=1, prefetch=True),
            "ours": OURS,
            "ours, four machines": replace(OURS, machines=4),
            "ours, no misses": replace(OURS, miss=0.0),
        }
        simulations = {side: Simulation(fleet) for side, fleet in fleets.items()}
        runs = {side: simulation.run(arrivals) for side, simulation in simulations.items()}
        again = Simulation(OURS).run(arrivals)
        correct &= again == runs["ours"] and all(
            sorted(map(_arrival, run)) == sorted(map(_key, arrivals)) for run in runs.values()
        )
        mean = {side: statistics.mean(job.latency for job in run) for side, run in runs.items()}
        longest = {side: max(job.wait for job in run) for side, run in runs.items()}
        reads = {side: simulation.fetches / given.jobs for side, simulation in simulations.items()}
        del reads["ours, no misses"]
        seen[name] = {"mean latency, s": mean, "longest wait, s": longest, "S3 reads a request": reads}
        for side in ("ours", "ours, four machines"):
            checks += [
                (f"{name}: mean latency of first come / {side}", mean["first come"] / mean[side], 2.0, "higher"),
                (f"{name}: mean latency of {side} / no misses", mean[side] / mean["ours, no misses"], 1.15, "lower"),
                (f"{name}: longest wait of {side} / first come", longest[side] / longest["first come"], 3.0, "lower"),
            ]
    for workers in (4, 1):
        alone, beside = quiet(workers, noisy=False), quiet(workers, noisy=True)
        seen[f"quiet person, {workers} workers"] = {
            "p95 wait alone / beside 1,000 jobs, s": [_p95(alone, "wait"), _p95(beside, "wait")],
            "p95 latency alone / beside, s": [_p95(alone, "latency"), _p95(beside, "latency")],
        }
        ratio = _p95(beside, "latency") / _p95(alone, "latency")
        checks.append(
            (f"{workers} workers: quiet person's p95 time to result beside 1,000 jobs / alone", ratio, 2.0, "lower")
        )
    for name, drifting in (("steady", False), ("drift", True)):
        lru, fifo, ours = bytes_fetched(drifting)
        seen[f"cache, {name}: MB a request, LRU / S3-FIFO / ours"] = [lru / 1e6, fifo / 1e6, ours / 1e6]
        checks.append((f"{name}: S3 bytes saved against LRU, percent", 100 * (1 - ours / lru), 15.0, "higher"))
    result = {
        "name": "scheduler_replay",
        "correct": correct,
        "max_diff": 0.0,
        "seen": seen,
        "checks": [
            {"what": what, "value": value, "goal": goal, "better": better} for what, value, goal, better in checks
        ],
    }
    sys.stdout.write(json.dumps(result) + "\n")


def zipf(count: int, chance: random.Random, *, drift_every: int = 0) -> Iterator[int]:
    """Endless picks of 0..count-1; with drift, the names move along the ranks."""
    weights = list(itertools.accumulate(1 / rank for rank in range(1, count + 1)))
    names = list(range(count))
    chance.shuffle(names)
    for number in itertools.count(1):
        yield names[chance.choices(range(count), cum_weights=weights)[0]]
        if drift_every and number % drift_every == 0:
            names = names[-DRIFT_BY:] + names[:-DRIFT_BY]


def trace(jobs: int, *, seed: int, drifting: bool) -> list[Arrival]:
    """Poisson arrivals at `LOAD`; bursts are part of the load, not on top of it."""
    chance = random.Random(seed)
    loras = zipf(LORAS, chance, drift_every=DRIFT_EVERY if drifting else 0)
    people = zipf(PEOPLE, chance)
    rate = LOAD * OURS.workers / OURS.service
    if drifting:
        rate -= BURST_JOBS / BURST_EVERY_S
    now, burst = 0.0, BURST_EVERY_S
    arrivals: list[Arrival] = []
    while len(arrivals) < jobs:
        now += chance.expovariate(rate)
        if drifting and now > burst:
            person, lora = next(people), str(next(loras))
            arrivals += [Arrival(burst, person, lora) for _ in range(BURST_JOBS)]
            burst += BURST_EVERY_S
        arrivals.append(Arrival(now, next(people), str(next(loras))))
    return arrivals


def quiet(workers: int, *, noisy: bool) -> list[Served]:
    """One request every 10 s for an hour; beside them somebody's thousand at once."""
    chance = random.Random(3)
    mine = [Arrival(10.0 * number + chance.random(), 1, "7") for number in range(1, 361)]
    theirs = [Arrival(0.0, 2, str(number % 40)) for number in range(1000)] if noisy else []
    done = Simulation(replace(OURS, workers=workers)).run([*theirs, *mine])
    last = max((job.ended for job in done if job.arrival.owner == 2), default=1e9)
    return [job for job in done if job.arrival.owner == 1 and job.arrival.at < last]


def bytes_fetched(drifting: bool) -> tuple[float, float, float]:
    """(LRU, S3-FIFO, ours) bytes from S3 a request, for a cache of a tenth of all bytes."""
    chance = random.Random(5)
    sizes = [int(MEDIAN_BYTES * chance.lognormvariate(0, SIGMA)) for _ in range(CACHED_LORAS)]
    capacity = int(CACHE_SHARE * sum(sizes))
    caches: tuple[LruCache, S3FifoCache, CachePolicy] = (
        LruCache(capacity),
        S3FifoCache(capacity),
        CachePolicy(capacity),
    )
    fetched = [0, 0, 0]
    for lora in itertools.islice(
        zipf(CACHED_LORAS, chance, drift_every=DRIFT_EVERY if drifting else 0), CACHE_REQUESTS
    ):
        for number, cache in enumerate(caches):
            fetched[number] += 0 if cache.request(str(lora), sizes[lora]) else sizes[lora]
    lru, fifo, ours = (total / CACHE_REQUESTS for total in fetched)
    return lru, fifo, ours


def _key(arrival: Arrival) -> tuple[float, int, str]:
    return arrival.at, arrival.owner, arrival.lora


def _arrival(job: Served) -> tuple[float, int, str]:
    return _key(job.arrival)


def _p95(jobs: Sequence[Served], what: str) -> float:
    values: list[float] = sorted(getattr(job, what) for job in jobs)
    return values[int(0.95 * len(values))]


if __name__ == "__main__":
    main()
