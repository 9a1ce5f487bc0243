"""The seeded killer: kills, freezes, cuts off, floods and fills, and journals each act with the leases it hit.

Everything is drawn from one `random.Random(seed)`: the same seed draws the same acts in the same order. What they hit
differs, since processes do not run in step.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from tests.chaos import journal
from tests.chaos.database import Database
from tests.chaos.fault_proxy import Fault
from tests.chaos.forgeries import forged_messages
from tests.chaos.site import LEASE_SECONDS, Site

WEIGHTS = {
    "kill_child": 62,
    "kill_worker": 3,
    "freeze_child": 5,
    "drain_worker": 2,
    "kill_dispatcher": 3,
    "freeze_leader": 1,
    "restart_broker": 2,
    "flush_broker": 2,
    "duplicate_doorbells": 4,
    "forge_messages": 3,
    "broker_fault": 3,
    "store_fault": 4,
    "database_reset": 4,
    "database_fault": 1,
    "fill_disk": 2,
}
DRAIN_PATIENCE_SECONDS = 25.0
PATIENCE_SECONDS = 1.5
SHARE_OF_SUCCESS = 0.7


@dataclass(frozen=True)
class Act:
    """One draw: what, how long until then, and three numbers in [0, 1) for whatever the act has to choose."""

    name: str
    gap_seconds: float
    pick: float
    length: float
    variant: float


def draw(dice: random.Random, mean_gap_seconds: float) -> Act:
    """The next act; always the same number of draws, so that a seed replays."""
    (name,) = dice.choices(list(WEIGHTS), weights=list(WEIGHTS.values()))
    gap = min(4 * mean_gap_seconds, dice.expovariate(1 / mean_gap_seconds))
    return Act(name, gap, dice.random(), dice.random(), dice.random())


class Monkey:
    """Acts on one site. `kills` counts processes that held a live lease when they died, by the database's word."""

    def __init__(self, site: Site, database: Database, seed: int, mean_gap_seconds: float) -> None:
        self.site, self.database = site, database
        self._dice, self._mean_gap = random.Random(seed), mean_gap_seconds
        self.journal = journal.Journal(site.journals / "monkey.jsonl")
        self.kills = 0
        self.acts: dict[str, int] = {}
        self._due: list[tuple[float, str, Callable[[], None]]] = []
        self._doorbell: bytes | None = None

    @property
    def running_faults(self) -> list[str]:
        """Names of the faults that have not ended."""
        return sorted({name for _, name, _ in self._due if not name.startswith("drain")})

    def step(self) -> None:
        """Wait for the next act, end what is due on the way, act, and let the supervisor restart what is dead."""
        act = draw(self._dice, self._mean_gap)
        end = time.monotonic() + act.gap_seconds
        while (left := end - time.monotonic()) > 0:
            self.end_due()
            time.sleep(min(left, 0.05))
        self.end_due()
        self.site.restart_dead()
        if getattr(self, f"_{act.name}")(act) is not False:
            self.acts[act.name] = self.acts.get(act.name, 0) + 1

    def end_due(self, *, everything: bool = False) -> None:
        """End the faults whose time has come, or all of them."""
        now = time.monotonic()
        ripe = [entry for entry in self._due if everything or entry[0] <= now]
        self._due = [entry for entry in self._due if entry not in ripe]
        for _, name, ending in ripe:
            ending()
            self.journal.write("fault_ended", fault=name)

    # --- processes -------------------------------------------------------------------------------------------------

    def _kill_child(self, act: Act) -> bool:
        self._let_some_succeed()
        target = self._holder(act.pick)
        if target is None:
            return False
        self._kill(target[0], target[1].pid, "child")
        return True

    def _kill_worker(self, act: Act) -> None:
        self._kill_whole(_choose(self.site.worker_names, act.pick))

    def _kill_dispatcher(self, act: Act) -> None:
        name = _choose(self.site.dispatcher_names, act.pick)
        self._kill(name, self.site.processes[name].pid, "dispatcher")

    def _freeze_child(self, act: Act) -> bool:
        target = self._holder(act.pick)
        if target is None:
            return False
        name, child = target
        self._freeze(child, LEASE_SECONDS + 0.3 + 2 * act.length, "child", node=name)
        return True

    def _freeze_leader(self, act: Act) -> bool:
        words = self.database.leading_dispatcher().split(":")
        pids = [self.site.processes[name].pid for name in self.site.dispatcher_names]
        leading = [pid for pid in pids if str(pid) in words and psutil.pid_exists(pid)]
        if not leading:
            return False
        self._freeze(psutil.Process(leading[0]), 11 + 3 * act.length, "dispatcher")
        return True

    def _drain_worker(self, act: Act) -> None:
        name = _choose(self.site.worker_names, act.pick)
        process = self.site.processes[name]
        self.journal.write("sigterm", node=name, pid_hit=process.pid)
        process.send_signal(signal.SIGTERM)

        def lose_patience() -> None:
            if self.site.processes[name] is process and process.poll() is None:
                self._kill_whole(name)

        self._later(DRAIN_PATIENCE_SECONDS, f"drain {name}", lose_patience)

    def _kill_whole(self, name: str) -> None:
        """A worker with its children, which die with it."""
        pids = [child.pid for child in self.site.children_of(name)]
        self._kill(name, self.site.processes[name].pid, "worker", also=pids)

    def _kill(self, name: str, pid: int, what: str, also: list[int] | None = None) -> None:
        dead = {pid, *(also or [])}
        before = [row for row in self.database.held() if row["pid"] in dead]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if what == "worker":
            self.site.processes[name].wait()
            for child in also or []:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                    psutil.Process(child).wait(timeout=0.5)
        # Asked after the death: what is still held, or was taken from it as lost, is what the dead process held.
        held = [row for row in self.database.held() if row["pid"] in dead]
        held += [row for row in before if row not in held and self.database.was_lost(row["job"], row["token"])]
        holders = {row["pid"] for row in held}
        self.kills += len(holders)
        self.journal.write("kill", what=what, node=name, pids=sorted(dead), holders=sorted(holders), held=held)

    def _freeze(self, process: psutil.Process, seconds: float, what: str, node: str = "") -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
        held = [row for row in self.database.held() if row["pid"] == process.pid]
        self.journal.write("freeze", what=what, node=node, pids=[process.pid], held=held, seconds=seconds)

        def wake() -> None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

        self._later(seconds, f"frozen {what}", wake)

    def _holder(self, pick: float) -> "tuple[str, psutil.Process] | None":
        """(worker, child) of a random live lease; waits a little for one."""
        for _ in range(20):
            pids = {row["pid"] for row in self.database.held()}
            children = [(name, child) for name in self.site.worker_names for child in self.site.children_of(name)]
            holders = [(name, child) for name, child in children if child.pid in pids]
            if holders:
                return _choose(holders, pick)
            time.sleep(0.05)
        return None

    def _let_some_succeed(self) -> None:
        """On a busy machine, wait a little: a run in which nothing succeeds would show nothing about effects."""
        end = time.monotonic() + PATIENCE_SECONDS
        query = "SELECT COUNT(*) AS n FROM jobs_job WHERE state = 'succeeded'"
        while time.monotonic() < end and self.database.rows(query)[0]["n"] < self.kills * SHARE_OF_SUCCESS:
            self.end_due()
            time.sleep(0.1)

    # --- broker ----------------------------------------------------------------------------------------------------

    def _restart_broker(self, act: Act) -> None:
        self.journal.write("restart_broker")
        self.site.valkey.kill()
        time.sleep(0.5 * act.length)
        self.site.valkey.start()

    def _flush_broker(self, act: Act) -> None:
        self.journal.write("flush_broker")
        self.site.valkey.client().flushall()

    def _duplicate_doorbells(self, act: Act) -> bool:
        client = self.site.valkey.client()
        for queue in ("gpu", "cpu"):
            lying: list[Any] = client.lrange(f"lorasite:{queue}", 0, 0)  # type: ignore[assignment]
            self._doorbell = next(iter(lying), self._doorbell)
        if self._doorbell is None:
            return False
        copies = 20 + int(60 * act.length)
        self.journal.write("duplicate_doorbells", copies=copies)
        client.lpush("lorasite:gpu", *[self._doorbell] * copies)
        return True

    def _forge_messages(self, act: Act) -> None:
        foreign = [row["job"] for row in self.database.rows("SELECT id AS job FROM jobs_job LIMIT 3")]
        messages = forged_messages(foreign, self._doorbell)
        self.journal.write("forge_messages", count=len(messages))
        self.site.valkey.client().lpush("lorasite:gpu" if act.variant < 0.7 else "lorasite:cpu", *messages)

    def _broker_fault(self, act: Act) -> bool:
        faults = [(Fault.REFUSE, 0.0), (Fault.STALL, 0.0), (Fault.BLACK_HOLE, 0.0), (Fault.LATENCY, 0.1)]
        return self._fault("broker", _choose(faults, act.variant), 1 + 4 * act.length)

    # --- store, database, disk -------------------------------------------------------------------------------------

    def _store_fault(self, act: Act) -> bool:
        faults = [
            (Fault.REFUSE, 0.0),
            (Fault.HTTP_503, 0.0),
            (Fault.HTTP_500, 0.0),
            (Fault.STALL, 0.0),
            (Fault.TRUNCATE, 150.0),
            (Fault.LATENCY, 0.2),
        ]
        return self._fault("s3", _choose(faults, act.variant), 1.5 + 3 * act.length)

    def _database_reset(self, act: Act) -> bool:
        if self.site.database_proxy is None:
            return False
        self.journal.write("database_reset", closed=self.site.database_proxy.reset())
        return True

    def _database_fault(self, act: Act) -> bool:
        faults = [(Fault.REFUSE, 0.0), (Fault.STALL, 0.0), (Fault.BLACK_HOLE, 0.0), (Fault.LATENCY, 0.05)]
        return self._fault("database", _choose(faults, act.variant), 0.5 + 2.5 * act.length)

    def _fault(self, which: str, fault: tuple[Fault, float], seconds: float) -> bool:
        proxy = {"broker": self.site.broker_proxy, "s3": self.site.s3_proxy, "database": self.site.database_proxy}[
            which
        ]
        name = f"{which} fault"
        if proxy is None or name in self.running_faults:
            return False
        self.journal.write("fault", fault=name, how=fault[0].value, seconds=seconds)
        proxy.set(*fault)
        self._later(seconds, name, lambda: proxy.set(Fault.NONE))
        return True

    def _fill_disk(self, act: Act) -> bool:
        folder = self.site.small_disk
        if folder is None or "full disk" in self.running_faults:
            return False
        filler = folder / "filler"
        self.journal.write("fault", fault="full disk", node=folder.name, seconds=2 + 4 * act.length)
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        self._later(2 + 4 * act.length, "full disk", lambda: filler.unlink(missing_ok=True))
        return True

    def _later(self, seconds: float, name: str, ending: Callable[[], None]) -> None:
        self._due.append((time.monotonic() + seconds, name, ending))


def _choose(things: Any, number: float) -> Any:
    return things[int(number * len(things))]
