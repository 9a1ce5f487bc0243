"""Trainings in forks of one process that loaded everything before, ended at any moment: by SIGKILL, a pause, an error.

Called by the resume tests. Every fork gets another global random state, as processes on other machines have.
"""

import logging
import multiprocessing
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from core import failpoints
from core.die_with_parent import die_with_parent
from core.errors import CoreError, Interrupted, Paused
from core.manifest import PreparedDataset
from core.pipelines import LoadedBase
from core.progress import Progress
from core.train import train
from core.train_config import TrainConfig

FORK = multiprocessing.get_context("fork")
NAME, BASE_NAME = "killed", "tiny"
INSIDE_THE_UNET = ("down_blocks.0", "mid_block", "up_blocks.1")

Keep = Callable[[Path, int], None]


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training, ready to be forked."""

    config: TrainConfig
    base: LoadedBase
    dataset: PreparedDataset


@dataclass(frozen=True)
class Stop:
    """What happens at the n-th time that a moment comes.

    Attributes:
        moment: `report.<stage>`, `forward.<module>`, `backward.<module>`, `optimizer.before` or `.after`, or a point of
            `core.failpoints`.
        occurrence: 1 for the first time in this process.
        action: Called there.
    """

    moment: str
    occurrence: int
    action: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How one try ended.

    Attributes:
        how: "failed" for an expected error, "crashed" for any other.
        error: Class name and text of what was raised.
        moments: All that came, in order; empty after a kill.
        log: Messages of `core`; empty after a kill.
    """

    how: Literal["finished", "paused", "failed", "crashed", "killed"]
    error: str = ""
    moments: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    @property
    def resumed_from(self) -> int:
        """The step from which the try went on; 0 when it began at the beginning."""
        words = [word for line in self.log if line.startswith("resumed ") for word in line.split()]
        return next((int(word.removeprefix("step=")) for word in words if word.startswith("step=")), 0)


def kill_me() -> None:
    """SIGKILL from within: at exactly this moment, with no chance to clean up."""
    os.kill(os.getpid(), signal.SIGKILL)


def pause() -> None:
    """What a worker that must go raises through `report`."""
    raise Paused("the test pauses")


def attempt(training: Training, folder: Path, stop: Stop | None = None, on_checkpoint: Keep | None = None) -> Ending:
    """One try of a training in `folder`, in a fork of this process."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_train, args=(training, folder, stop, on_checkpoint, sender, os.getpid()))
    process.start()
    sender.close()
    try:
        ending: Ending | None = receiver.recv()
    except EOFError:
        ending = None
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return Ending(how="killed")
    return ending or Ending(how="crashed", error=f"exit code {process.exitcode}")


def in_forks(stories: Mapping[str, Callable[[Path], None]], folder: Path, at_once: int = 2) -> None:
    """Run each story in a fork and a folder of its own, some at the same time.

    Raises:
        AssertionError: With the traceback of every story that failed.
    """
    waiting, running, failures = list(stories.items()), dict[int, tuple[str, multiprocessing.Process]](), list[str]()
    while waiting or running:
        while waiting and len(running) < at_once:
            name, story = waiting.pop(0)
            process = FORK.Process(target=_tell, args=(story, folder / name, os.getpid()))
            process.start()
            running[process.sentinel] = (name, process)  # type: ignore[assignment]
        for sentinel in wait(list(running)):
            name, ended = running.pop(sentinel)  # type: ignore[call-overload]
            ended.join()
            if ended.exitcode != 0:
                failures.append(f"{name}: exit code {ended.exitcode}\n{(folder / name / 'stderr.txt').read_text()}")
    assert not failures, f"{len(failures)} of {len(stories)} failed\n" + "\n".join(failures)


def _tell(story: Callable[[Path], None], folder: Path, parent_pid: int) -> None:
    die_with_parent(parent_pid)
    folder.mkdir(parents=True)
    # multiprocessing writes the traceback there when the story raises, and exits with 1.
    sys.stderr = (folder / "stderr.txt").open("w", buffering=1)
    story(folder)


def _train(
    training: Training, folder: Path, stop: Stop | None, on_checkpoint: Keep | None, sender: Connection, parent_pid: int
) -> None:
    die_with_parent(parent_pid)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(os.getpid())
    moments: list[str] = []
    counts: Counter[str] = Counter()
    log: list[str] = []

    def moment(name: str) -> None:
        moments.append(name)
        counts[name] += 1
        if stop is not None and (name, counts[name]) == (stop.moment, stop.occurrence):
            stop.action()

    def report(progress: Progress) -> None:
        moment(f"report.{progress.stage}")

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.append(record.getMessage())

    logging.getLogger("core").addHandler(Listener())
    logging.getLogger("core").setLevel(logging.INFO)
    failpoints.install(moment)
    register_optimizer_step_pre_hook(lambda *_: moment("optimizer.before"))
    register_optimizer_step_post_hook(lambda *_: moment("optimizer.after"))
    for name in INSIDE_THE_UNET:  # the copy in training takes its hooks along
        module = training.base.unet.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: moment(f"forward.{name}"))
        module.register_full_backward_hook(lambda *_, name=name: moment(f"backward.{name}"))
    how: Literal["finished", "paused", "failed"] = "finished"
    error = ""
    try:
        train(
            training.config, training.base, training.dataset, folder, report, on_checkpoint,
            name=NAME, base_name=BASE_NAME,
        )  # fmt: skip
    except (CoreError, Interrupted, OSError) as raised:
        how = "paused" if isinstance(raised, Paused) else "failed"
        error = f"{type(raised).__name__}: {raised}"
    failpoints.install(None)
    sender.send(Ending(how=how, error=error, moments=moments, log=log))
