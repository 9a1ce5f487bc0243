"""Child processes: in their own process groups, dying with the studio, restarted when they die, stopped in order.

Everything runs in one thread: Linux ties die-with-parent to the thread that forked, and one loop needs no locks.
"""

import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.die_with_parent import die_with_parent
from lorasite.studio.console import Console
from lorasite.studio.errors import StopRequested, StudioError

TURN_SECONDS = 0.2  # between two looks at the children
QUICK_SECONDS = 30.0  # a child that lived shorter died quickly
QUICK_DEATHS = 5
MAX_BACKOFF_SECONDS = 15.0


@dataclass(frozen=True)
class Program:
    """What to run: `stop_seconds` is its time between SIGTERM and SIGKILL."""

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    folder: Path
    stop_seconds: float = 10.0


class Child:
    """One running program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            list(program.command),
            cwd=program.folder,
            env=program.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
            start_new_session=True,  # Ctrl-C reaches the studio alone, which then stops its children in order
        )
        assert self.process.stdout is not None
        self.pipe = self.process.stdout.fileno()
        os.set_blocking(self.pipe, False)
        self.lines: deque[str] = deque(maxlen=20)
        self._rest = b""

    def read(self) -> list[str] | None:
        """Complete lines that arrived; empty when there is nothing yet, None at the end of the output."""
        while True:
            try:
                chunk = os.read(self.pipe, 65536)
            except BlockingIOError:
                return []
            if not chunk:
                rest, self._rest = self._rest, b""
                return [self._keep(rest)] if rest else None
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            if whole:
                return [self._keep(line) for line in whole]

    def _keep(self, line: bytes) -> str:
        text = line.decode(errors="replace").rstrip()
        self.lines.append(text)
        return text

    def signal_group(self, number: int) -> None:
        """To the child and everything it started."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return  # All gone already.


class Supervisor:
    """All children of one studio."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._selector = selectors.DefaultSelector()
        self._children: dict[str, Child] = {}
        self._deaths: dict[str, int] = {}
        self._due: dict[str, tuple[float, Program]] = {}
        self._signals = 0

    def listen_for_signals(self) -> None:
        """Ctrl-C, SIGTERM and a closed terminal ask the studio to stop; a second one stops it at once."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._count_signal)

    @property
    def stop_requested(self) -> bool:
        """Whether somebody asked the studio to stop."""
        return self._signals > 0

    def run_once(self, program: Program) -> list[str]:
        """Run a program to its end. Returns its last lines.

        Raises:
            StudioError: It failed; holds its last words.
            StopRequested: Somebody asked the studio to stop meanwhile.
        """
        child = self._start(program)
        while child.process.poll() is None:
            self._turn()
            if self.stop_requested:
                raise StopRequested
        self._drain(child)
        del self._children[program.name]
        if child.process.returncode:
            raise StudioError(_failed(child))
        return list(child.lines)

    def start(self, program: Program) -> None:
        """Start a program that stays, and keep it alive from now on."""
        self._start(program)

    def keep_alive(self, until: Callable[[], bool]) -> None:
        """Pass on output and restart what dies, until the condition holds.

        Raises:
            StudioError: A program died quickly too often.
            StopRequested: Somebody asked the studio to stop.
        """
        while not until():
            self._turn()
            if self.stop_requested:
                raise StopRequested
            for child in list(self._children.values()):
                if child.process.poll() is not None:
                    self._bury(child)
            for name, (due, program) in list(self._due.items()):
                if time.monotonic() >= due:
                    del self._due[name]
                    self._start(program)

    def stop(self, *groups: Sequence[str]) -> None:
        """Stop the named programs, group after group, then whatever is left: SIGTERM, its time, then SIGKILL."""
        self._due.clear()
        for group in (*groups, list(self._children)):
            children = [self._children[name] for name in group if name in self._children]
            for child in children:
                if child.process.poll() is None:
                    child.process.send_signal(signal.SIGTERM)
            asked = time.monotonic()
            for child in children:
                self._await(child, asked + child.program.stop_seconds)

    def _await(self, child: Child, deadline: float) -> None:
        while child.process.poll() is None and time.monotonic() < deadline and self._signals < 2:
            self._turn()
        if child.process.poll() is None:
            self._console.say(f"{child.program.name} did not stop in time and is killed")
        # The group, not the child alone: nothing that it started may outlive the studio.
        child.signal_group(signal.SIGKILL)
        child.process.wait()
        self._drain(child)
        del self._children[child.program.name]

    def _start(self, program: Program) -> Child:
        try:
            child = Child(program)
        except OSError as error:
            raise StudioError(f"{program.name} cannot be started: {error}") from error
        self._children[program.name] = child
        self._selector.register(child.pipe, selectors.EVENT_READ, child)
        return child

    def _bury(self, child: Child) -> None:
        self._drain(child)
        child.signal_group(signal.SIGKILL)
        program = child.program
        del self._children[program.name]
        quick = time.monotonic() - child.started < QUICK_SECONDS
        deaths = self._deaths[program.name] = self._deaths.get(program.name, 0) + 1 if quick else 1
        if deaths >= QUICK_DEATHS:
            raise StudioError(f"{_failed(child)}\nIt died {deaths} times in a row, so the studio stops")
        wait_seconds = min(MAX_BACKOFF_SECONDS, 2.0 ** (deaths - 1))
        self._console.say(f"{program.name} ended ({_how(child)}); starting it again in {wait_seconds:g} s")
        self._due[program.name] = (time.monotonic() + wait_seconds, program)

    def _turn(self) -> None:
        for key, _ in self._selector.select(TURN_SECONDS):
            child: Child = key.data
            lines = child.read()
            if lines is None:
                self._selector.unregister(child.pipe)
                time.sleep(TURN_SECONDS / 10)  # it is about to end; do not spin on the way
            for line in lines or []:
                self._console.line(child.program.name, line)

    def _drain(self, child: Child) -> None:
        """The last words of a child that has ended."""
        while lines := child.read():
            for line in lines:
                self._console.line(child.program.name, line)
        if child.pipe in self._selector.get_map():
            self._selector.unregister(child.pipe)
        assert child.process.stdout is not None
        child.process.stdout.close()

    def _count_signal(self, number: int, frame: object) -> None:
        self._signals += 1


def _how(child: Child) -> str:
    code = child.process.returncode
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _failed(child: Child) -> str:
    words = "\n".join(f"    {line}" for line in list(child.lines)[-8:])
    return f"{child.program.name} failed ({_how(child)}). Its last words:\n{words}"
