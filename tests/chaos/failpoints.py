"""Tries every named point of the product: die, fail, hang or freeze there, and see whether all ends well.

    python -m tests.chaos.failpoints                        every point times every fault
    python -m tests.chaos.failpoints --only lease.renew     those of one name

One parent loads everything once and forks: each trial is a site of its own with a lease of a second. The process that
is hit may not finish; then another one tells the same story again, as the next worker would.
The last line is a JSON object {"points", "trials", "unreached", "failures"}.
"""

import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.chaos import journal, side_effects, small_audit, small_site

FAULTS = ("kill", "fail", "hang", "freeze")
HANG_SECONDS = 5.0
FREEZE_SECONDS = 2.2
TRIED_ELSEWHERE = frozenset({"job.announce:before", "job.announce:after"})
"""PostgreSQL only: `make chaos`."""
NOT_REACHED = "the point was not reached"
TRIES_TO_REACH = 3
"""Some points depend on who of two threads comes first."""
TELLER_SECONDS = 30.0
TELLINGS = 4
"""One that is struck, one that goes on, and as many as the story itself needs."""


@dataclass(frozen=True)
class Trial:
    """One fault at one point of one story."""

    scenario: str
    point: str
    fault: str


class Injected(Exception):
    """The fault of kind "fail"."""


# --- processes of one trial -------------------------------------------------------------------------------------------


def fork(work: Callable[[], None], log: Path) -> int:
    """Run `work` in a child; exit code 0 when it returns, 3 when it raises. Returns the pid."""
    pid = os.fork()
    if pid:
        return pid
    from core.die_with_parent import die_with_parent

    code = 3
    try:
        die_with_parent()
        descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it is, it is shown and ends this process
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def tell(folder: Path, broker_url: str, scenario: str) -> None:
    """Tell a story to its end."""
    from tests.chaos.scenarios import SCENARIOS

    small_site.enter(folder)
    everybody = small_site.Everybody(broker_url, f"{folder.name}:")
    everybody.start()
    SCENARIOS[scenario].begin()
    everybody.work()
    everybody.stop()


def hooked(folder: Path, trial: Trial) -> Callable[[str], None]:
    """The hook that strikes once, at the first time that the point is reached."""

    def hook(point: str) -> None:
        if point != trial.point or (folder / "struck").exists():
            return
        (folder / "struck").touch()
        if trial.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif trial.fault == "fail":
            raise Injected(f"at {point}")
        elif trial.fault == "hang":
            time.sleep(HANG_SECONDS)
        else:
            os.kill(os.getpid(), signal.SIGSTOP)

    return hook


def attempt(trial: Trial, template: Path, folder: Path, broker_url: str) -> list[str]:
    """Run one trial in processes of its own. Returns what is wrong."""
    from tests.chaos.scenarios import SCENARIOS

    log = folder.with_suffix(".log")
    with small_site.copied(template, folder):
        os.environ[journal.FOLDER_VARIABLE], os.environ[journal.NODE_VARIABLE] = str(folder / "journals"), "one"

        def be_struck() -> None:
            from core import failpoints

            failpoints.install(hooked(folder, trial))
            tell(folder, broker_url, trial.scenario)

        def hangs() -> bool:
            return trial.fault == "hang" and not asleep and (folder / "struck").exists()

        found: list[str] = []
        asleep: list[int] = []
        for _ in range(TELLINGS):
            teller = fork(be_struck, log)
            for frozen in [pid for pid in asleep if trial.fault == "freeze"]:
                time.sleep(FREEZE_SECONDS)
                os.kill(frozen, signal.SIGCONT)
            ended, _ = wait_for(teller, TELLER_SECONDS, until=hangs)
            if ended == 0:
                break
            if ended is None:
                asleep.append(teller)
        else:
            found.append("nobody came to the end of the story")
        for sleeper in asleep:
            if wait_for(sleeper, TELLER_SECONDS)[0] is None:
                found.append("a victim never ended")
                kill(sleeper)
        if not (folder / "struck").exists():
            found.append(NOT_REACHED)
        found += small_audit.findings(folder, SCENARIOS[trial.scenario].ends)
        found += check(folder, trial.scenario)
    if found:
        found.append(log.read_text(errors="replace")[-3000:] if log.exists() else "no log")
    log.unlink(missing_ok=True)
    return found


def check(folder: Path, scenario: str) -> list[str]:
    """The story's own findings."""
    from tests.chaos.scenarios import SCENARIOS

    small_site.enter(folder)
    try:
        return SCENARIOS[scenario].check()
    finally:
        small_site.leave()


def wait_for(pid: int, seconds: float, until: Callable[[], bool] = lambda: False) -> tuple[int | None, bool]:
    """(exit code, negative for a signal; None while it lives; whether it is stopped)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if found:
            if os.WIFSTOPPED(status):
                return None, True
            return os.waitstatus_to_exitcode(status), False
        if until():
            return None, False
        time.sleep(0.01)
    return None, False


def kill(pid: int) -> None:
    """Away with it."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


# --- all trials -------------------------------------------------------------------------------------------------------


def census(template: Path, work: Path, broker_url: str) -> dict[str, Counter[str]]:
    """{scenario: points that it reaches and how often}, each told once without any fault."""
    from tests.chaos.scenarios import SCENARIOS

    reached: dict[str, Counter[str]] = {}
    for name in SCENARIOS:
        folder = work / f"census-{len(reached)}"
        with small_site.copied(template, folder):
            os.environ[journal.FOLDER_VARIABLE], os.environ[journal.NODE_VARIABLE] = str(folder / "journals"), "one"

            def record(folder: Path = folder, name: str = name) -> None:
                from core import failpoints

                descriptor = os.open(folder / "points", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
                failpoints.install(lambda point: os.write(descriptor, f"{point}\n".encode()) and None)
                tell(folder, broker_url, name)
                (folder / "modules").write_text("\n".join(sys.modules))
                (folder / "compiled").write_text(small_site.compiled())

            log = work / "census.log"
            code, _ = wait_for(fork(record, log), TELLER_SECONDS)
            if SCENARIOS[name].dies:
                code, _ = wait_for(fork(record, log), TELLER_SECONDS)
            found = small_audit.findings(folder, SCENARIOS[name].ends) + check(folder, name)
            if code != 0 or found:
                raise SystemExit(f"story {name!r} fails without any fault ({code}): {found}\n{log.read_text()[-4000:]}")
            log.unlink(missing_ok=True)
            reached[name] = Counter((folder / "points").read_text().split())
            small_site.compile_ahead((folder / "compiled").read_text())
            load_modules((folder / "modules").read_text().split())
    return reached


def load_modules(names: Sequence[str]) -> None:
    """Import here what a child had to import by itself, so that the next ones need not."""
    for name in names:
        if name not in sys.modules and not name.startswith("__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # A collection in a child would write to, and so copy, every page of the parent.


def trials_of(reached: dict[str, Counter[str]], only: str) -> list[Trial]:
    """Each point once with each fault, in a story that reaches it for sure: several times, else the shortest one."""
    everywhere = {point for points in reached.values() for point in points}
    trials = []
    for fault in FAULTS:
        for point in side_effects.points():
            if point in everywhere and point.startswith(only):
                name = max(reached, key=lambda name: (*_surely(name, reached[name][point]), -reached[name].total()))
                trials.append(Trial(name, point, fault))
    return trials


def _surely(scenario: str, hits: int) -> tuple[bool, int]:
    """How certain a story is to reach a point; one whose process is replaced on the way is the last choice."""
    from tests.chaos.scenarios import SCENARIOS

    return hits > 0 and not SCENARIOS[scenario].dies, min(3, hits)


def run_all(
    trials: Sequence[Trial], template: Path, work: Path, broker_url: str, at_once: int
) -> dict[Trial, list[str]]:
    """Every trial, several at a time. Returns the failures."""
    waiting = list(enumerate(trials))
    running: dict[int, tuple[Trial, Path]] = {}
    failures: dict[Trial, list[str]] = {}
    done = 0
    while waiting or running:
        while waiting and len(running) < at_once:
            number, trial = waiting.pop(0)
            answer = work / f"answer-{number}"

            def supervise(number: int = number, trial: Trial = trial, answer: Path = answer) -> None:
                for again in range(TRIES_TO_REACH):
                    try:
                        found = attempt(trial, template, work / f"site-{number}-{again}", broker_url)
                    except Exception:  # noqa: BLE001 - a trial that cannot be judged is a failed one
                        found = ["could not be judged", traceback.format_exc()]
                    if found[:1] != [NOT_REACHED]:
                        break
                answer.write_text(json.dumps(found))

            running[fork(supervise, work / "supervisors.log")] = (trial, answer)
        pid, status = os.wait()
        trial, answer = running.pop(pid)
        found = json.loads(answer.read_text()) if answer.exists() else [f"the supervisor ended with {status}"]
        done += 1
        if found:
            failures[trial] = found
            sys.stdout.write(f"WRONG {trial.scenario} / {trial.point} / {trial.fault}: {'; '.join(found[:-1])}\n")
        if done % 25 == 0 or done == len(trials):
            sys.stdout.write(f"{done} of {len(trials)} trials, {len(failures)} wrong\n")
        sys.stdout.flush()
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when every trial ended well and every point was reached."""
    options = ArgumentParser("python -m tests.chaos.failpoints", description=__doc__.split("\n\n")[0])
    options.add_argument("--only", default="", help="points whose name begins so")
    options.add_argument("--fault", choices=FAULTS, help="this fault alone")
    options.add_argument("--at-once", type=int, default=10, help="trials side by side; most of them wait (%(default)s)")
    given = options.parse_args(arguments)
    from tests.chaos import misfortunes
    from tests.services import seaweedfs, valkey

    work = Path(tempfile.mkdtemp(prefix="failpoints-"))
    try:
        small_site.load()
        with valkey(work / "valkey") as broker_url, seaweedfs(work / "s3") as s3:
            os.environ[misfortunes.S3_VARIABLE] = json.dumps(
                {
                    "bucket_name": s3.bucket,
                    "endpoint_url": s3.endpoint_url,
                    "region_name": "us-east-1",
                    "access_key": s3.access_key,
                    "secret_key": s3.secret_key,
                    "signature_version": "s3v4",
                    "addressing_style": "path",
                }
            )
            small_site.make_template(work / "template")
            reached = census(work / "template", work, broker_url)
            trials = [t for t in trials_of(reached, given.only) if given.fault in (None, t.fault)]
            failures = run_all(trials, work / "template", work, broker_url, given.at_once)
            # In a crowd one of two threads may always be the later one; that says nothing about the product.
            missed = [trial for trial, found in failures.items() if found[0] == NOT_REACHED]
            (work / "again").mkdir()
            failures = {trial: found for trial, found in failures.items() if trial not in missed}
            failures |= run_all(missed, work / "template", work / "again", broker_url, 1)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    everywhere = {point for points in reached.values() for point in points}
    unreached = sorted(set(side_effects.points()) - everywhere - TRIED_ELSEWHERE)
    for trial, found in failures.items():
        sys.stdout.write(f"\n=== {trial}\n" + "\n".join(found) + "\n")
    answer = {
        "points": len(side_effects.points()),
        "trials": len(trials),
        "unreached": unreached,
        "failures": [asdict(trial) for trial in failures],
    }
    sys.stdout.write(json.dumps(answer) + "\n")
    return 1 if failures or unreached else 0


if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "lorasite.settings.test")
    sys.exit(main())
