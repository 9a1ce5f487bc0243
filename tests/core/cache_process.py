"""One of many processes that read and check files of one cache; run as `python -m tests.core.cache_process`.

Arguments: folder, capacity, seed, number of reads, seconds that a download takes, and "hold" to hold what was read.
"""

import hashlib
import logging
import random
import sys
import time
from pathlib import Path

from core.file_cache import FileCache

FILES = 40


def content(number: int) -> bytes:
    """The bytes of one file."""
    return random.Random(number).randbytes(500 + 131 * number)


def names() -> list[str]:
    """Of all files."""
    return [hashlib.sha256(content(number)).hexdigest() for number in range(FILES)]


def open_cache(folder: Path, capacity: int, *, slow_seconds: float = 0.0) -> FileCache:
    """A cache of these files."""
    numbers = {name: number for number, name in enumerate(names())}

    def download(sha256: str, destination: Path) -> None:
        data = content(numbers[sha256])
        with destination.open("wb") as out:
            out.write(data[:200])
            out.flush()
            time.sleep(slow_seconds)
            out.write(data[200:])

    return FileCache(folder, download=download, capacity=capacity)


def main() -> int:
    """Exit code 0 when every read gave the right bytes."""
    folder, capacity, seed, reads, slow_seconds, *hold = sys.argv[1:]
    logging.disable(logging.INFO)
    cache = open_cache(Path(folder), int(capacity), slow_seconds=float(slow_seconds))
    chance, known = random.Random(int(seed)), names()
    kept = cache.pins()
    for _ in range(int(reads)):
        number = int(FILES * chance.random() ** 2)
        pins = kept if hold else cache.pins()
        path = cache.get(known[number], pins=pins)
        if path.read_bytes() != content(number):
            return 3
        if chance.random() < 0.2:
            backwards = content(number)[::-1]
            made = cache.get_or_make(
                f"packed {number}", lambda to, data=backwards: to.write_bytes(data) and None, pins=pins
            )
            if made.read_bytes() != backwards:
                return 4
        if not hold:
            pins.close()
    sys.stdout.write("done\n")
    sys.stdout.flush()
    if hold:
        sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
