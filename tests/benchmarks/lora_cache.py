"""Bytes that a machine's cache reads from storage: the product's policy against least recently used, on fixed traces.

    python -m tests.benchmarks.lora_cache [--requests N]

2,000 LoRAs with lognormal sizes (median 35 MB), Zipf {0.8, 1.0, 1.2} x a cache of {2, 10} percent of all bytes; every
5,000 requests a tenth of the ranks changes places. The policy is `core.cache_policy.CachePolicy`, which the real cache
(`core.file_cache.FileCache`) drives: a stretch of the trace is played with real small files through the real cache, and
both must have read the same files. S3-FIFO (SOSP 2023) is shown for comparison. The last line is one JSON object.
"""

import argparse
import hashlib
import itertools
import json
import logging
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple, Protocol

from core.cache_policy import CachePolicy
from core.file_cache import FileCache
from tests.benchmarks.cache_policies import LruCache, S3FifoCache

LORAS, REQUESTS = 2000, 60_000
MEDIAN_BYTES, SIGMA = 35_000_000, 0.89
EXPONENTS, SHARES = (0.8, 1.0, 1.2), (0.02, 0.10)
RESHUFFLE_EVERY, RESHUFFLED = 5000, LORAS // 10
SEEDS = (1, 2)
"""The first one counts; the other shows how much of it is luck."""
GOAL_PERCENT = 10.0
REAL_REQUESTS, REAL_SCALE = 2500, 20_000
"""Requests through the real cache, with files so many times smaller."""


class Cache(Protocol):
    """Something that only counts."""

    def request(self, name: str, size: int) -> bool: ...


class Trace(NamedTuple):
    """Sizes of all LoRAs in bytes, and who is asked for in turn."""

    sizes: list[int]
    requests: list[int]


def main() -> None:
    """Play all cells, print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--requests", type=int, default=REQUESTS, help="of each trace (%(default)s)")
    given = options.parse_args()
    logging.disable(logging.INFO)
    cells: dict[str, dict[str, float]] = {}
    others: list[float] = []
    for seed, exponent in itertools.product(SEEDS, EXPONENTS):
        played = trace(exponent, seed=seed, requests=given.requests)
        for share in SHARES:
            capacity = int(share * sum(played.sizes))
            lru, ours = (fetched(cache, played) for cache in (LruCache(capacity), CachePolicy(capacity)))
            saved = 100 * (1 - ours / lru)
            if seed != SEEDS[0]:
                others.append(saved)
                continue
            fifo = fetched(S3FifoCache(capacity), played)
            cells[f"Zipf {exponent}, cache {share:.0%}"] = {
                "LRU, MB a request": lru / len(played.requests) / 1e6,
                "ours, MB a request": ours / len(played.requests) / 1e6,
                "saved, percent": saved,
                "saved by S3-FIFO, percent": 100 * (1 - fifo / lru),
            }
    saved_percent = [cell["saved, percent"] for cell in cells.values()]
    different = differing_reads(trace(1.0, seed=SEEDS[0], requests=REAL_REQUESTS))
    checks = [
        ("mean bytes from storage below LRU over cells, percent", statistics.mean(saved_percent), GOAL_PERCENT),
        ("bytes from storage below LRU in the worst cell, percent", min(saved_percent), 0.0),
    ]
    result = {
        "name": "lora_cache",
        "correct": different == 0,
        "max_diff": float(different),
        "seen": cells,
        "another seed: saved, mean and worst cell, percent": [statistics.mean(others), min(others)],
        "checks": [{"what": what, "value": value, "goal": goal, "better": "higher"} for what, value, goal in checks],
    }
    sys.stdout.write(json.dumps(result) + "\n")


def trace(exponent: float, *, seed: int, requests: int) -> Trace:
    """A fixed trace: the same for every cache."""
    chance = random.Random(seed)
    sizes = [int(MEDIAN_BYTES * chance.lognormvariate(0, SIGMA)) for _ in range(LORAS)]
    weights = list(itertools.accumulate(1 / rank**exponent for rank in range(1, LORAS + 1)))
    names = list(range(LORAS))
    chance.shuffle(names)
    asked: list[int] = []
    while len(asked) < requests:
        ranks = chance.choices(range(LORAS), cum_weights=weights, k=min(RESHUFFLE_EVERY, requests - len(asked)))
        asked += [names[rank] for rank in ranks]
        places = chance.sample(range(LORAS), RESHUFFLED)
        moved = [names[place] for place in places]
        chance.shuffle(moved)
        for place, name in zip(places, moved, strict=True):
            names[place] = name
    return Trace(sizes, asked)


def fetched(cache: Cache, played: Trace) -> int:
    """Bytes that had to be read from storage."""
    return sum(played.sizes[lora] for lora in played.requests if not cache.request(str(lora), played.sizes[lora]))


def differing_reads(played: Trace) -> int:
    """Requests for which the real cache, with real files, and the policy alone disagree on whether it was there."""
    contents = [random.Random(lora).randbytes(1 + size // REAL_SCALE) for lora, size in enumerate(played.sizes)]
    names = [hashlib.sha256(content).hexdigest() for content in contents]
    by_name: dict[str, bytes] = dict(zip(names, contents, strict=True))
    capacity = sum(map(len, contents)) // 50
    policy = CachePolicy(capacity)
    downloads: list[str] = []

    def download(name: str, destination: Path) -> None:
        downloads.append(name)
        destination.write_bytes(by_name[name])

    different = 0
    with tempfile.TemporaryDirectory() as scratch:
        cache = FileCache(Path(scratch), download=download, capacity=capacity)
        for lora in played.requests:
            before = len(downloads)
            with cache.pins() as pins:  # or everything would count as in use for a minute
                content = cache.get(names[lora], pins=pins).read_bytes()
            was_there = policy.request(names[lora], len(contents[lora]))
            different += (content != contents[lora]) + (was_there != (len(downloads) == before))
        different += cache.used_bytes() != policy.used
    return different


if __name__ == "__main__":
    main()
