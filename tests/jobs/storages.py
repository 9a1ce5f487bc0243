"""A store that goes away and comes back, for tests of everything that waits for one."""

import threading
from collections.abc import Iterable
from typing import Any

from jobs.local_storage import LocalArtifactStorage


class Outage:
    """Whether the store is away; shared by all instances of `FlakyStorage`."""

    def __init__(self) -> None:
        self.is_on = False
        self.refused = 0
        self.was_refused = threading.Event()

    def check(self) -> None:
        if self.is_on:
            self.refused += 1
            self.was_refused.set()
            raise ConnectionError("the store is away")


OUTAGE = Outage()


class FlakyStorage(LocalArtifactStorage):
    """The local store, behind a network that a test can cut."""

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        OUTAGE.check()
        return super().sizes(names)

    def exists(self, name: str) -> bool:
        OUTAGE.check()
        return super().exists(name)

    def _save(self, name: str, content: Any) -> str:
        OUTAGE.check()
        return super()._save(name, content)
