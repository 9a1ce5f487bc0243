r"""The prompt grammar of AUTOMATIC1111 WebUI: `(word)`, `(word:1.2)`, `[word]`, `\(`, `BREAK`, `<lora:name:weight>`.

Called by `core.text_encoding` and, to find LoRAs by their names, by the web tier; loads no ML library. The rules are
those of WebUI's `prompt_parser.parse_prompt_attention` and `extra_networks`.
"""

import re
from dataclasses import dataclass

from core.errors import ConfigError

ROUND, SQUARE = 1.1, 1 / 1.1
MAX_WEIGHT = 10.0

_ATTENTION = re.compile(
    r"\\\(|\\\)|\\\[|\\]|\\\\|\\|\(|\[|:\s*([+-]?[.\d]+)\s*\)|\)|]|[^\\()\[\]:]+|:",
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*", re.DOTALL)
_NETWORK = re.compile(r"<(\w+):([^<>]+)>")
_UNSUPPORTED = (
    (re.compile(r"\bAND\b"), "AND (several prompts drawn over each other)", "write one prompt, or a comma"),
    (
        re.compile(r"(?<!\\)\[[^\[\]]*:\s*[\d.]+\s*\]"),
        "[from:to:when] (a prompt that changes on the way)",
        "write one of both, or \\[ and \\] for brackets in the text",
    ),
    (
        re.compile(r"(?<!\\)\[[^\[\]]*\|[^\[\]]*\]"),
        "[a|b] (words that take turns)",
        "write one of both, or \\[ and \\] for brackets in the text",
    ),
)


@dataclass(frozen=True)
class Piece:
    """Some text of one weight.

    Attributes:
        text: Without brackets and escapes.
        weight: 1 is ordinary.
        begins_chunk: It stands behind a BREAK: the text encoder sees it apart from what stands before.
    """

    text: str
    weight: float = 1.0
    begins_chunk: bool = False


@dataclass(frozen=True, kw_only=True)
class ParsedPrompt:
    """What a prompt says.

    Attributes:
        pieces: At least one; neighbours differ in weight or in chunk.
        loras: Name and weight of each `<lora:...>`, in their order.
        text: The prompt without those tags, otherwise as it was written.
    """

    pieces: tuple[Piece, ...]
    loras: tuple[tuple[str, float], ...]
    text: str


def parse_prompt(text: str) -> ParsedPrompt:
    """Read a prompt.

    Raises:
        ConfigError: It uses a part of WebUI's grammar that is not served here, or a weight is no number.
    """
    plain, loras = _take_networks(text)
    for pattern, what, instead in _UNSUPPORTED:
        if found := pattern.search(plain):
            raise ConfigError(f"the prompt holds {found[0]!r}: {what} is not served here; {instead}")
    return ParsedPrompt(pieces=_weighted(plain), loras=loras, text=plain)


def _take_networks(text: str) -> tuple[str, tuple[tuple[str, float], ...]]:
    """The text without `<lora:...>`, and what they name."""
    loras = []
    for tag in _NETWORK.finditer(text):
        kind, values = tag[1].lower(), [value.strip() for value in tag[2].split(":")]
        if kind not in ("lora", "lyco"):
            raise ConfigError(f"the prompt holds {tag[0]!r}: only <lora:name:weight> is served here")
        weights = [_number(value.rpartition("=")[2], tag[0]) for value in values[1:]] or [1.0]
        if len(set(weights)) > 1:
            raise ConfigError(f"{tag[0]!r} weighs text encoder and UNet differently: give one weight for both")
        loras.append((values[0], weights[0]))
    without = _NETWORK.sub("", text)
    if loras:
        without = re.sub(r"[ \t]{2,}", " ", without).strip()
    return without, tuple(loras)


def _weighted(text: str) -> tuple[Piece, ...]:
    """Pieces with the weights of all brackets around them multiplied."""
    texts: list[str] = []
    weights: list[float] = []
    begins: list[bool] = []
    round_open: list[int] = []
    square_open: list[int] = []

    def add(part: str, *, begins_chunk: bool = False) -> None:
        texts.append(part)
        weights.append(1.0)
        begins.append(begins_chunk)

    def multiply(start: int, factor: float) -> None:
        for index in range(start, len(weights)):
            weights[index] *= factor

    for match in _ATTENTION.finditer(text):
        part, number = match[0], match[1]
        if part.startswith("\\"):
            add(part[1:])
        elif part == "(":
            round_open.append(len(texts))
        elif part == "[":
            square_open.append(len(texts))
        elif number is not None and round_open:
            multiply(round_open.pop(), _number(number, part))
        elif part == ")" and round_open:
            multiply(round_open.pop(), ROUND)
        elif part == "]" and square_open:
            multiply(square_open.pop(), SQUARE)
        else:
            for index, words in enumerate(_BREAK.split(part)):
                add(words, begins_chunk=index > 0)
    # Brackets that nobody closed reach to the end.
    for start in round_open:
        multiply(start, ROUND)
    for start in square_open:
        multiply(start, SQUARE)
    return _merged([Piece(*values) for values in zip(texts, weights, begins, strict=True)])


def _merged(pieces: list[Piece]) -> tuple[Piece, ...]:
    """Neighbours of one weight as one piece, so that words are not torn between tokens."""
    merged: list[Piece] = []
    for piece in pieces:
        if merged and not piece.begins_chunk and merged[-1].weight == piece.weight:
            last = merged.pop()
            piece = Piece(last.text + piece.text, piece.weight, last.begins_chunk)
        merged.append(piece)
    return tuple(merged) or (Piece(""),)


def _number(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise ConfigError(f"{where!r}: {text!r} is no weight; write a number such as 0.8") from error
    if not abs(number) <= MAX_WEIGHT:
        raise ConfigError(f"{where!r}: the weight {text} is beyond {MAX_WEIGHT:g}; weights of 0.5 to 1.5 are usual")
    return number
