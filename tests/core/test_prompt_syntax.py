"""The grammar of prompts, as WebUI reads it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError
from core.prompt_syntax import Piece, parse_prompt


def _read(text: str) -> list[tuple[str, float]]:
    return [(piece.text, round(piece.weight, 6)) for piece in parse_prompt(text).pieces]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        # The examples in WebUI's own docstring of parse_prompt_attention.
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        ("", [("", 1.0)]),
        ("a: b", [("a: b", 1.0)]),
        ("(a:-0.5)", [("a", -0.5)]),
        ("tail)", [("tail)", 1.0)]),
    ],
)
def test_weights_are_those_of_webui(text: str, pieces: list[tuple[str, float]]) -> None:
    assert _read(text) == pieces


def test_break_parts_pieces_and_keeps_their_weights() -> None:
    assert parse_prompt("a (b BREAK c:1.2)").pieces == (
        Piece("a "),
        Piece("b", 1.2),
        Piece("c", 1.2, begins_chunk=True),
    )
    assert parse_prompt("BREAKFAST").pieces == (Piece("BREAKFAST"),)


def test_lora_tags_are_taken_out_and_returned_in_their_order() -> None:
    parsed = parse_prompt("a cat <lora:blue print:0.8>, (red:1.2) <lora:emoji> <lyco:c:1:1>")

    assert parsed.loras == (("blue print", 0.8), ("emoji", 1.0), ("c", 1.0))
    assert parsed.text == "a cat , (red:1.2)"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a cat AND a dog", "AND .* is not served here"),
        ("a [cat:dog:0.5]", "changes on the way"),
        ("a [cat|dog]", "take turns"),
        ("<hypernet:x:1>", "only <lora:name:weight>"),
        ("<lora:x:strong>", "'strong' is no weight"),
        ("<lora:x:1:0.5>", "one weight for both"),
        ("(a:99)", "beyond 10"),
        ("(a:1.2.3)", "no weight"),
    ],
)
def test_what_is_not_served_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_prompt(text)


@given(st.text(st.sampled_from("ab ()[]\\:.1<>|"), max_size=40))
def test_every_text_is_read_or_refused(text: str) -> None:
    try:
        parsed = parse_prompt(text)
    except ConfigError:
        return
    assert parsed.pieces


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="()[]\\<>"), max_size=60))
def test_a_text_without_grammar_is_one_piece_as_it_is(text: str) -> None:
    if "AND" not in text and "BREAK" not in text:
        assert parse_prompt(text).pieces == (Piece(text),)
