"""No side effect on the path of a job without a name: otherwise nobody would have tried what happens when it fails."""

import ast
import re

from tests.chaos.side_effects import _effects_of, effects, names, points

LEAST_POINTS = 60


def test_every_side_effect_on_the_path_of_a_job_has_a_name() -> None:
    nameless = [f"{effect.file}:{effect.line} {effect.text}" for effect in effects() if effect.name is None]
    assert not nameless, "put each into `with side_effect('subject.verb'):` (core/failpoints.py):\n" + "\n".join(
        nameless
    )


def test_names_are_literal_unique_and_say_subject_and_verb() -> None:
    found = [name for name, _ in names()]
    assert sorted(set(found)) == sorted(found), "a name is used twice: a test could not tell which one it hit"
    assert [name for name in found if not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)+", name)] == []


def test_there_are_enough_points_for_the_whole_path() -> None:
    assert len(points()) >= LEAST_POINTS


def test_the_finder_sees_a_nameless_write_and_not_a_named_one() -> None:
    code = """
def a(path, rows, text):
    path.replace(path)
    with side_effect("b.c"):
        rows.filter(x=1).update(y=2)
    rows.update(**values)
    text.replace("a", "b")
    digest.update(b"")
    self.waiting.update(dict.fromkeys(rows))
"""
    found = list(_effects_of(ast.parse(code), "x.py"))
    assert {(effect.text, effect.name) for effect in found} == {
        ("path.replace(path)", None),
        ("rows.update(**values)", None),
        ("rows.filter(x=1).update(y=2)", "b.c"),
    }
