"""The shape of the project is tested: direction of imports, light web tier, file sizes, names."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("core", "gpu_worker", "jobs", "lorasite")


def sources() -> list[Path]:
    return [p for package in PACKAGES for p in (REPOSITORY / package).rglob("*.py") if "migrations" not in p.parts]


def test_imports_go_one_way() -> None:
    lint = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([str(lint)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "4 kept, 0 broken" in done.stdout


def test_the_web_tier_loads_no_torch() -> None:
    code = (
        "import django, sys; django.setup()\n"
        "import lorasite.urls, lorasite.asgi, jobs.tasks\n"
        "from django.contrib import admin; assert admin.site._registry\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'cv2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_are_rooms_not_halls() -> None:
    long = {str(p.relative_to(REPOSITORY)): n for p in sources() if (n := len(p.read_text().splitlines())) > 350}
    assert long == {}


def test_no_file_has_a_name_that_says_nothing() -> None:
    vague = [p.name for p in sources() if p.stem in {"utils", "helpers", "common", "misc"}]
    assert vague == []


def test_only_the_lifecycle_writes_a_job_state() -> None:
    writers = [
        str(path.relative_to(REPOSITORY))
        for path in sources()
        if path.parts[-2] == "jobs"
        and path.name not in ("lifecycle.py", "taking.py")
        and "update(state=" in path.read_text().replace("\n", "").replace(" ", "")
    ]
    assert writers == ["jobs/workers.py"], "WorkerProcess states only"


def test_no_pickle_no_shell_no_unsafe_yaml() -> None:
    forbidden = ("import pickle", "torch.load(", "shell=True", "yaml.load(", "mark_safe", "eval(")
    found = [
        (str(path.relative_to(REPOSITORY)), word)
        for path in sources()
        for word in forbidden
        if word in path.read_text().replace(".eval(", "")
    ]
    assert found == []
