"""The rules by which a picture gets its caption. Called by preprocessing; no file is read here."""

import re
from pathlib import PurePath

from core.config import PreprocessConfig

MAX_CHARACTERS = 4000
"""As for prompts; text encoders see far less."""

CAMERA_WORDS = {"img", "dsc", "dscf", "dscn", "pxl", "image", "photo", "picture", "screenshot", "untitled"}
"""A file name of only such a word (and numbers) says nothing of the picture."""


def make_caption(name: str, sidecar: str | None, config: PreprocessConfig) -> str:
    """The caption of one picture: trigger word, text, suffix, joined by commas; empty parts are left out.

    Args:
        name: File name of the picture.
        sidecar: Text uploaded beside it, None where there is none.
        config: Says where the text comes from.

    Returns:
        One line of at most 4000 characters, perhaps empty.
    """
    text = ""
    if config.caption_source in ("sidecar_or_filename", "sidecar"):
        text = one_line(sidecar or "")
    if config.caption_source == "filename" or (config.caption_source == "sidecar_or_filename" and not text):
        text = name_to_words(name)
    parts = (one_line(config.trigger_word), text, one_line(config.caption_suffix))
    return ", ".join(part for part in parts if part)[:MAX_CHARACTERS].strip()


def one_line(text: str) -> str:
    """Text without control characters, each run of white space as one space."""
    visible = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(visible.split())


def name_to_words(name: str) -> str:
    """A file name as words: "red_apple-03.png" is "red apple", "IMG_1234.JPG" is "".

    The folder, the ending, and numbers at the end (counters) go; other numbers stay.
    """
    words = re.sub(r"[^\w']+|_", " ", one_line(PurePath(name.replace("\\", "/")).stem)).split()
    while words and words[-1].isdigit():
        words.pop()
    if all(word.lower() in CAMERA_WORDS or word.isdigit() for word in words):
        return ""
    return " ".join(words)
