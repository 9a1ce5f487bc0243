"""Dependencies: each says why it is there, none is below its floor, and what must stay out is out."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from django.conf import settings
from packaging.requirements import Requirement

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"


def lines(name: str) -> list[str]:
    text = (REQUIREMENTS / name).read_text()
    return [line for line in text.splitlines() if line and not line.startswith(("#", "-r"))]


@pytest.mark.parametrize("name", ["web.txt", "gpu.txt", "cuda.txt", "dev.txt"])
def test_every_dependency_is_pinned_and_says_why_it_is_there(name: str) -> None:
    for line in lines(name):
        requirement, _, reason = line.partition("#")
        pins = [specifier.operator for specifier in Requirement(requirement).specifier]
        assert pins == ["=="], line
        assert len(reason.strip()) > 10, line


def test_no_dependency_is_below_its_floor() -> None:
    floors = [Requirement(line.partition("#")[0]) for line in lines("floors.txt")]
    assert len(floors) >= 7
    below = {floor.name: version(floor.name) for floor in floors if version(floor.name) not in floor.specifier}
    assert below == {}


@pytest.mark.parametrize("name", ["picklescan", "flower", "celery-batches", "torchvision"])
def test_what_must_stay_out_is_not_installed(name: str) -> None:
    with pytest.raises(PackageNotFoundError):
        version(name)


def test_no_geodjango() -> None:
    assert "django.contrib.gis" not in settings.INSTALLED_APPS
