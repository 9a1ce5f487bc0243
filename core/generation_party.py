"""Requests that are drawn together: whose picture is whose, who is told what, who has dropped out.

Called by `core.generate`; knows no tensors.
"""

from collections.abc import Sequence

from PIL import Image

from core.errors import Interrupted
from core.progress import Progress, Report


class NobodyLeft(Exception):
    """Everybody whose pictures are in this forward has dropped out."""


class Party:
    """Members 0..n-1, each with some pictures; chunks of pictures go through the model together.

    Args:
        reports: One per member.
        counts: Pictures per member, each >= 1.
        steps: Denoising steps, as asked for.
        chunk_size: Pictures per forward, >= 1.
    """

    def __init__(self, reports: Sequence[Report], counts: Sequence[int], steps: int, chunk_size: int) -> None:
        self._reports = reports
        self._waiting = [(member, number) for member, count in enumerate(counts) for number in range(count)]
        self._chunk: list[tuple[int, int]] = []
        self._chunk_size = chunk_size
        self._steps = steps
        self._passed = [0] * len(counts)  # steps of earlier chunks that had pictures of this member
        self._chunks_of = [
            (sum(counts[: member + 1]) - 1) // chunk_size - sum(counts[:member]) // chunk_size + 1
            for member in range(len(counts))
        ]
        self._pictures: list[list[Image.Image]] = [[] for _ in counts]
        self._dropped: dict[int, Interrupted] = {}

    def next_chunk(self) -> list[tuple[int, int]]:
        """(member, number of its picture) of the next forward; pictures of who dropped out are left out."""
        for member in {member for member, _ in self._chunk}:
            self._passed[member] += self._steps
        self._waiting = [entry for entry in self._waiting if entry[0] not in self._dropped]
        self._chunk, self._waiting = self._waiting[: self._chunk_size], self._waiting[self._chunk_size :]
        return self._chunk

    def report(self, progress: Progress) -> None:
        """Tell every member how far it is; also those that wait for another chunk, since they may want to stop.

        Raises:
            NobodyLeft: Nobody wants this forward any more. One who dropped out while others stay is drawn along:
                multi-step samplers keep a history of the whole batch.
        """
        self._steps = progress.total
        inside = {member for member, _ in self._chunk}
        for member, report in enumerate(self._reports):
            if member in self._dropped:
                continue
            step = self._passed[member] + (progress.step if member in inside else 0)
            total = self._chunks_of[member] * progress.total
            try:
                report(Progress(stage=progress.stage, step=min(step, total), total=total))
            except Interrupted as interruption:
                self._dropped[member] = interruption
        if inside <= self._dropped.keys():
            raise NobodyLeft

    def add(self, pictures: Sequence[Image.Image]) -> None:
        """The pictures of the current chunk, in its order."""
        for (member, _), picture in zip(self._chunk, pictures, strict=True):
            self._pictures[member].append(picture)

    def results(self) -> list[list[Image.Image] | Interrupted]:
        """Per member its pictures, or what stopped it."""
        return [self._dropped.get(member, pictures) for member, pictures in enumerate(self._pictures)]
