"""The machine's file cache under many real processes, some of them killed."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from core.file_cache import FileCache
from tests.core.cache_process import FILES, content, names, open_cache

CAPACITY = 20_000
"""Bytes: seven of the forty files."""


def start(
    folder: Path, seed: int, reads: int, *, slow_seconds: float = 0.0, hold: bool = False
) -> "subprocess.Popen[str]":
    words = [str(folder), str(CAPACITY), str(seed), str(reads), str(slow_seconds), *(["hold"] if hold else [])]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.core.cache_process", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_all_is_well(folder: Path, *, capacity: int = CAPACITY) -> FileCache:
    """Files and journal agree, the bytes are kept, and every file that is there is right."""
    cache = open_cache(folder, capacity)
    used = cache.used_bytes()  # its first look sweeps what the dead left
    on_disk = {path.name: path.stat().st_size for path in folder.glob("??/*")}
    assert not [name for name in on_disk if name.startswith(".")]
    assert used == sum(on_disk.values()) <= CAPACITY
    right = dict(zip(names(), map(content, range(FILES)), strict=True))
    for path in folder.glob("??/*"):
        assert path.name.endswith(".made") or path.read_bytes() == right[path.name]
    return cache


def test_many_processes_share_one_cache_that_is_far_too_small(tmp_path: Path) -> None:
    processes = [start(tmp_path, seed, 400) for seed in range(5)]
    for process in processes:
        out, err = process.communicate(timeout=100)
        assert (process.returncode, out) == (0, "done\n"), err
    assert_all_is_well(tmp_path)


def test_processes_that_are_killed_leave_a_cache_that_goes_on(tmp_path: Path) -> None:
    chance = random.Random(7)
    steady = start(tmp_path, 99, 300)
    for round_number in range(12):
        victim = start(tmp_path, round_number, 100_000, slow_seconds=0.005 if round_number % 2 else 0.0)
        while not list(tmp_path.glob("??/*")):
            time.sleep(0.01)
        time.sleep(0.25 + 0.3 * chance.random())
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    out, err = steady.communicate(timeout=100)
    assert (steady.returncode, out) == (0, "done\n"), err
    assert_all_is_well(tmp_path)


def test_what_a_process_holds_goes_free_when_it_is_killed(tmp_path: Path) -> None:
    holder = start(tmp_path, 1, 1, hold=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "done\n"
    (held,) = [path for path in tmp_path.glob("??/*") if not path.name.endswith(".made")]
    cache = open_cache(tmp_path, CAPACITY)

    def crowd() -> None:
        for name in [name for name in names() if name != held.name] * 2:
            with cache.pins() as pins:
                cache.get(name, pins=pins)

    crowd()
    assert held.exists()
    holder.kill()
    holder.communicate()
    crowd()
    assert not held.exists()
    assert_all_is_well(tmp_path)
