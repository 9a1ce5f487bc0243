"""The machine's file cache: how many bytes it keeps, what it never removes, and what it does when the disk is full."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from core import file_cache
from core.cache_journal import CacheJournal
from core.cache_rooms import folder_pin
from core.file_cache import FileCache
from tests.core.cache_process import content, names, open_cache

NAMES = names()
SIZES = [len(content(number)) for number in range(len(NAMES))]
THREE = sum(SIZES[:3]) + 100
"""Bytes: room for the first three files."""


def get(cache: FileCache, number: int, *, ahead: bool = False) -> Path:
    """As somebody who is done with the file at once."""
    with cache.pins() as pins:
        return cache.get(NAMES[number], pins=pins, ahead=ahead)


def held(folder: Path) -> set[int]:
    """Numbers of the files that lie in a cache's folder."""
    return {NAMES.index(path.name) for path in folder.glob("??/*") if not path.name.startswith(".")}


def test_the_bytes_are_kept_and_what_came_back_stays(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, THREE)
    for number in (0, 0, 0, 0, 1, 2, 3, 0, 4, 5):
        get(cache, number)
        assert cache.used_bytes() == sum(SIZES[kept] for kept in held(tmp_path)) <= THREE
    assert 0 in held(tmp_path)


def test_another_process_knows_what_was_asked_for(tmp_path: Path) -> None:
    first = open_cache(tmp_path, THREE)
    for _ in range(3):
        get(first, 0)
    get(first, 1)
    get(first, 2)
    get(open_cache(tmp_path, THREE), 3)
    assert 0 in held(tmp_path)
    assert 1 not in held(tmp_path)


def test_what_somebody_holds_is_not_removed(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, THREE)
    with cache.pins() as pins:
        cache.get(NAMES[0], pins=pins)
        for number in (1, 2, 3, 4, 5, 6):
            get(open_cache(tmp_path, THREE), number)
        assert 0 in held(tmp_path)
    for number in (1, 2, 3, 4, 5, 6):
        get(cache, number)
    assert 0 not in held(tmp_path)


def test_what_was_just_handed_out_is_not_removed_before_it_can_be_opened(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, THREE)
    paths = [cache.get(name) for name in NAMES[:8]]
    assert [path.read_bytes() for path in paths] == [content(number) for number in range(8)]


def test_what_was_handed_out_a_while_ago_may_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_cache, "PIN_SECONDS", 0.0)
    cache = open_cache(tmp_path, THREE)
    for name in NAMES[:8]:
        cache.get(name)
    assert len(held(tmp_path)) < 8


def test_an_open_file_can_be_read_to_its_end_after_it_was_removed(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, THREE)
    with get(cache, 0).open("rb") as file:
        for number in range(1, 8):
            get(cache, number)
        assert 0 not in held(tmp_path)
        assert file.read() == content(0)


def test_a_file_larger_than_the_cache_is_served_all_the_same(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, 100)
    assert get(cache, 7).read_bytes() == content(7)
    get(cache, 8)
    assert held(tmp_path) == {8}


def test_fetching_ahead_is_one_request_together_with_the_one_that_it_was_for(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, THREE)
    get(cache, 0, ahead=True)
    get(cache, 0, ahead=True)
    get(cache, 0)
    with CacheJournal(tmp_path, THREE).open() as policy:
        ((name, _, requests, is_expected),) = policy.dump()["real"]["held"]
    assert (name, len(requests), is_expected) == (NAMES[0], 1, False)


@pytest.fixture
def full_disk() -> Callable[[Path, int], FileCache]:
    """A cache whose disk holds so many bytes."""

    def make(folder: Path, size: int) -> FileCache:
        def download(sha256: str, destination: Path) -> None:
            data = content(NAMES.index(sha256))
            on_disk = sum(path.stat().st_size for path in folder.glob("??/*"))
            destination.write_bytes(data[: max(0, size - on_disk)])
            if on_disk + len(data) > size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return FileCache(folder, download=download)

    return make


def test_a_full_disk_is_made_room_on(tmp_path: Path, full_disk: Callable[[Path, int], FileCache]) -> None:
    cache = full_disk(tmp_path, THREE)
    for number in range(10):
        assert get(cache, number).read_bytes() == content(number)


def test_a_disk_full_of_files_in_use_is_reported_as_such(
    tmp_path: Path, full_disk: Callable[[Path, int], FileCache]
) -> None:
    cache = full_disk(tmp_path, THREE)
    with cache.pins() as pins:
        for name in NAMES[:3]:
            cache.get(name, pins=pins)
        with pytest.raises(OSError, match="no file of the cache can go") as raised:
            get(cache, 3)
        assert raised.value.errno == errno.ENOSPC
        assert held(tmp_path) == {0, 1, 2}
        assert not list(tmp_path.rglob(".part-*"))
    assert get(cache, 3).read_bytes() == content(3)


def test_a_disk_that_others_fill_gets_some_of_its_room_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(tmp_path, 10**9)
    for number in range(6):
        get(cache, number)
    disk = file_cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(file_cache, "SPARE_SHARE", 1.0)
    monkeypatch.setattr(file_cache, "SPARE_BYTES", disk.free + SIZES[0] // 2)
    monkeypatch.setattr(file_cache.shutil, "disk_usage", lambda _: disk)
    get(cache, 6)
    assert held(tmp_path) == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("damage", ["gone", "torn", "foreign", "empty"])
def test_a_damaged_journal_costs_no_file_and_no_limit(damage: str, tmp_path: Path) -> None:
    cache = open_cache(tmp_path, THREE)
    get(cache, 0)
    get(cache, 1)
    journal = tmp_path / "journal"
    if damage == "gone":
        journal.unlink()
    elif damage == "torn":
        os.truncate(journal, journal.stat().st_size - 5)
    else:
        journal.write_bytes(b"something else\n" if damage == "foreign" else b"")
    assert cache.used_bytes() == SIZES[0] + SIZES[1]
    for reader in (cache, open_cache(tmp_path, THREE)):
        for number in range(6):
            assert get(reader, number).read_bytes() == content(number)
        assert reader.used_bytes() == sum(SIZES[kept] for kept in held(tmp_path)) <= THREE


def test_a_long_journal_is_folded_and_everybody_reads_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.cache_journal.COMPACT_FROM_BYTES", 1000)
    one, other = open_cache(tmp_path, THREE), open_cache(tmp_path, THREE)
    for number in (0, 1, 0, 2, 3, 1, 0, 4) * 40:
        get(one, number)
        get(other, number)
    with CacheJournal(tmp_path, THREE).open() as policy:
        assert {NAMES.index(name) for name in policy.names()} == held(tmp_path)
    assert (tmp_path / "journal").stat().st_size < 12_000
    assert one.used_bytes() == other.used_bytes() == sum(SIZES[kept] for kept in held(tmp_path))


def test_what_is_made_here_is_an_entry_like_any_other(tmp_path: Path) -> None:
    made: list[str] = []

    def make(key: str) -> Callable[[Path], None]:
        def write(to: Path) -> None:
            made.append(key)
            to.write_bytes(key.encode() * 500)

        return write

    cache = open_cache(tmp_path, 3500)
    for key in ("a", "a", "b", "a"):
        with cache.pins() as pins:
            assert cache.get_or_make(key, make(key), pins=pins).read_bytes() == key.encode() * 500
    assert made == ["a", "b"]
    assert cache.used_bytes() == 1000
    with open_cache(tmp_path, 3500).pins() as pins:
        path = open_cache(tmp_path, 3500).get_or_make("a", make("a"), pins=pins)
    assert made == ["a", "b"]  # another process takes it over
    path.write_bytes(b"rotten")
    with cache.pins() as pins:
        assert cache.get_or_make("a", make("a"), pins=pins).read_bytes() == b"a" * 500
    (tmp_path / "journal").unlink()  # nobody but who uses it knows any more what it should hold
    for key in ("b", "a"):
        with cache.pins() as pins:
            cache.get_or_make(key, make(key), pins=pins)
    assert made == ["a", "b", "a", "a"]
    for number in range(10):
        get(cache, number)
    assert cache.used_bytes() <= 3500


def test_a_folder_of_links_goes_as_a_whole_and_stays_while_it_is_used(tmp_path: Path) -> None:
    bases = tmp_path / "bases"
    cache = FileCache(
        tmp_path / "files",
        download=lambda name, to: to.write_bytes(content(NAMES.index(name))) and None,
        capacity=THREE,
        linked=bases,
    )
    base = bases / "one"
    (base / "unet").mkdir(parents=True)
    for number in (0, 1):
        os.link(get(cache, number), base / "unet" / str(number))
    with cache.pins() as pins:
        pins.add(folder_pin(base))
        for number in range(2, 9):
            get(cache, number)
        assert sorted(path.name for path in base.rglob("?")) == ["0", "1"]
        assert {0, 1} <= held(tmp_path / "files")
    for number in range(2, 9):
        get(cache, number)
    assert list(bases.iterdir()) == []
    assert not {0, 1} <= held(tmp_path / "files")
