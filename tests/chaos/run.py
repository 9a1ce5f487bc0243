"""`python -m tests.chaos.run --kills 300 --seed 7 [--database sqlite]`: one chaos run and its audit.

The last line is `chaos: kills=<n> jobs=<n> lost=<n> duplicated=<n> overlaps=<n> stale_writes=<n> seed=<s>`; any
non-zero count, or fewer kills or jobs than asked for, ends with exit status 1. The seed replays what is drawn, not
the timing of the processes.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.audit_report import Report
from tests.chaos.auditor import audit
from tests.chaos.database import Database
from tests.chaos.monkey import Monkey
from tests.chaos.site import Site, spawn
from tests.chaos.stored_blobs import Blobs, FolderBlobs, S3Blobs
from tests.services import wait_until

PROGRESS_SECONDS = 5.0
QUIET_SECONDS = 150.0
"""After the chaos: a job that has not ended by then is lost. Longer than any delay of a retry that the chaos causes."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run is asked for."""

    kills: int
    seed: int
    database: str = "postgres"
    minutes: float = 60.0
    workers: int = 3
    children: int = 3
    mean_gap_seconds: float = 0.3
    folder: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run found."""

    kills: int
    jobs: int
    seed: int
    seconds_of_chaos: float
    acts: dict[str, int]
    notes: list[str]
    report: Report

    def last_line(self) -> str:
        """The one line that counts."""
        return f"chaos: kills={self.kills} jobs={self.jobs} {self.report.counts()} seed={self.seed}"


def say(text: str) -> None:
    """A line for the person who watches."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def chaos(options: Options) -> Outcome:
    """Start a site, let the monkey loose until it has its kills, wait for the last job, and audit."""
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    site = Site(folder, database=options.database, workers=options.workers, children=options.children)
    say(f"chaos: seed={options.seed} kills wanted={options.kills} database={options.database} folder={folder}")
    try:
        site.start()
        database = Database(site.database_url)
        database.install_history()
        backlog = 2 * options.workers * options.children
        workload_command = [sys.executable, "-m", "tests.chaos.workload", str(options.seed), str(backlog)]
        workload_log = folder / "workload.log"
        workload = spawn([*workload_command, str(options.kills)], workload_log, site.environment)
        promises = site.journals / "workload.jsonl"
        wait_until(lambda: promises.exists() and promises.stat().st_size > 0, "the workload starts", log=workload_log)
        site.start_all()
        wait_until(lambda: bool(database.held()), "a worker holds a job", seconds=90, log=folder / "node0.log")
        monkey = Monkey(site, database, options.seed, options.mean_gap_seconds)
        began = time.monotonic()
        _let_loose(monkey, database, workload, options, began)
        seconds = time.monotonic() - began
        monkey.end_due(everything=True)
        say(f"chaos: over after {seconds:.0f} s, {60 * monkey.kills / seconds:.0f} kills/min; acts {monkey.acts}")
        workload.terminate()
        _wait_for_the_last(site, database, workload)
        for note in site.notes:
            say(f"chaos: note: {note}")
        report = audit(database=database, journals=site.journals, store=_store(site), folder=folder)
        jobs = int(database.rows("SELECT COUNT(*) AS n FROM jobs_job")[0]["n"])
        database.close()
        return Outcome(
            kills=report.kills,
            jobs=jobs,
            seed=options.seed,
            seconds_of_chaos=seconds,
            acts=monkey.acts,
            notes=site.notes,
            report=report,
        )
    finally:
        site.close()


def _let_loose(
    monkey: Monkey, database: Database, workload: "subprocess.Popen[bytes]", options: Options, began: float
) -> None:
    said = 0.0
    while monkey.kills < options.kills and time.monotonic() - began < 60 * options.minutes:
        assert workload.poll() is None, "the workload died; see workload.log"
        monkey.step()
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            states = database.rows("SELECT state, COUNT(*) AS n FROM jobs_job GROUP BY state ORDER BY state")
            counts = " ".join(f"{row['state']}={row['n']}" for row in states)
            say(
                f"chaos: t={said - began:.0f}s kills={monkey.kills} {counts} "
                f"faults={','.join(monkey.running_faults) or 'none'}"
            )


def _wait_for_the_last(site: Site, database: Database, workload: "subprocess.Popen[bytes]") -> None:
    """Everything works again; jobs that end within the time are not lost."""
    end, said = time.monotonic() + QUIET_SECONDS, time.monotonic()
    while time.monotonic() < end:
        site.restart_dead()
        unfinished = database.unfinished()
        if workload.poll() is not None and unfinished == 0:
            return
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            say(f"chaos: quiet, waiting for {unfinished} jobs")
        time.sleep(0.25)


def _store(site: Site) -> Blobs:
    return S3Blobs(site.s3) if site.s3 is not None else FolderBlobs(site.folder / "data" / "storage")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.run", description=__doc__)
    parser.add_argument("--kills", type=int, default=300, help="processes that must die while they hold a live lease")
    parser.add_argument("--seed", type=int, default=None, help="replays what is drawn; default: a new one")
    parser.add_argument("--database", choices=("postgres", "sqlite"), default="postgres")
    parser.add_argument("--minutes", type=float, default=60.0, help="give up after this long")
    parser.add_argument("--keep", action="store_true", help="keep the run's folder: logs, journals")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    outcome = chaos(
        Options(kills=arguments.kills, seed=seed, database=arguments.database, minutes=arguments.minutes, folder=folder)
    )
    for finding in outcome.report.findings:
        say(finding.text())
    bad = bool(outcome.report.findings) or outcome.kills < arguments.kills or outcome.jobs < outcome.kills
    if not bad and not arguments.keep:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        say(f"chaos: logs and journals are in {folder}")
    for line in outcome.report.remarks:
        say(f"chaos: {line}")
    say(outcome.last_line())
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
