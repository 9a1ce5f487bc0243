"""Seeded bugs: each patch in `mutations/` breaks one protection, and the tests that it names must go red.

    make mutate                                  all of them
    python -m tests.chaos.mutate fence-removed   one of them

Works on a copy of the tracked files, so the working tree stays as it is. The first lines of a patch say what is broken
and which tests must catch it:

    Bug: the token guard is gone, so a zombie's write passes.
    Caught-by: tests/jobs/test_lifecycle.py::test_a_fenced_worker_can_write_nothing
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
GIT = shutil.which("git") or "git"
MUTATIONS = Path(__file__).parent / "mutations"
SECONDS_EACH = 60.0


@dataclass(frozen=True)
class Mutation:
    """One seeded bug."""

    patch: Path
    bug: str
    tests: tuple[str, ...]

    @classmethod
    def read(cls, patch: Path) -> "Mutation":
        """Raises ValueError where the patch does not say what it is for."""
        lines = patch.read_text(encoding="utf-8").splitlines()
        bugs = [line.removeprefix("Bug: ") for line in lines if line.startswith("Bug: ")]
        tests = [line.removeprefix("Caught-by: ") for line in lines if line.startswith("Caught-by: ")]
        if len(bugs) != 1 or not tests:
            raise ValueError(f"{patch.name} needs one 'Bug: ' line and at least one 'Caught-by: ' line at its top")
        return cls(patch=patch, bug=bugs[0], tests=tuple(tests))


def mutations(names: Sequence[str] = ()) -> list[Mutation]:
    """All seeded bugs, or the named ones, in the order of their names.

    Raises:
        ValueError: No such mutation.
    """
    found = {path.stem: path for path in sorted(MUTATIONS.glob("*.patch"))}
    if unknown := set(names) - set(found):
        raise ValueError(f"no such mutation: {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    return [Mutation.read(path) for name, path in found.items() if not names or name in names]


def copy_of_the_tree(folder: Path) -> None:
    """The tracked files as they are now."""
    listed = subprocess.run([GIT, "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True).stdout
    for name in listed.decode().split("\0"):
        if name and (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)


def run_tests(folder: Path, tests: Sequence[str], *, seconds: float = SECONDS_EACH) -> subprocess.CompletedProcess[str]:
    """The named tests in the copy; exit code -1 when they take longer than `seconds`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LORASITE_")}
    # A table made from the models is there sooner than one made by all migrations.
    options = ["-q", "-x", "-p", "no:cacheprovider", "--nomigrations", "-m", "not gpu"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    try:
        return subprocess.run(
            command, cwd=folder, env=kept, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as late:
        return subprocess.CompletedProcess(command, -1, (late.stdout or b"").decode(errors="replace"), "timed out")


def is_caught(mutation: Mutation, folder: Path) -> tuple[bool, str]:
    """Apply, test, take back. Returns whether the tests went red, and what there is to say."""
    apply = [GIT, "apply", "--unsafe-paths", "--directory", str(folder), "-C1", str(mutation.patch)]
    done = subprocess.run(apply, cwd="/", capture_output=True, text=True, check=False)
    if done.returncode:
        return False, f"the patch no longer fits the code: {done.stderr.strip()}"
    try:
        ran = run_tests(folder, mutation.tests)
    finally:
        subprocess.run([*apply, "-R"], cwd="/", check=True, capture_output=True)
    if ran.returncode == 1:
        return True, ""
    if ran.returncode == -1:
        return False, f"its tests took longer than {SECONDS_EACH:g} s: name quicker ones"
    if ran.returncode == 0:
        return False, "its tests stayed green"
    return False, f"pytest could not run its tests ({ran.returncode}): {(ran.stdout + ran.stderr)[-600:]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when every bug is caught."""
    options = ArgumentParser("python -m tests.chaos.mutate", description=__doc__.split("\n\n")[0])
    options.add_argument("names", nargs="*", help="file names without .patch; all when none is given")
    chosen = mutations(options.parse_args(arguments).names)
    with tempfile.TemporaryDirectory(prefix="mutate-") as temporary:
        folder = Path(temporary)
        copy_of_the_tree(folder)
        named = sorted({test for mutation in chosen for test in mutation.tests})
        healthy = run_tests(folder, named, seconds=SECONDS_EACH * len(named))
        if healthy.returncode != 0:
            said = (healthy.stdout + healthy.stderr)[-3000:]
            sys.stdout.write(f"the tests are red without any bug ({healthy.returncode}):\n{said}\n")
            return 1
        caught = 0
        for mutation in chosen:
            began = time.monotonic()
            found, said = is_caught(mutation, folder)
            caught += found
            mark = "caught" if found else "MISSED"
            sys.stdout.write(
                f"{mark} {mutation.patch.stem} ({time.monotonic() - began:.0f} s): {mutation.bug} {said}\n"
            )
            sys.stdout.flush()
    sys.stdout.write(f"mutations: caught={caught} of {len(chosen)}\n")
    return 0 if caught == len(chosen) and chosen else 1


if __name__ == "__main__":
    sys.exit(main())
