"""Tokenizer and text encoder of the demo's base model. Called by `demo.train_base`."""

import gzip
import itertools
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from core.errors import DatasetError
from core.randomness import normal
from demo.base_latents import LatentTable
from demo.base_pictures import BACKGROUNDS, HUES, Thing

MAX_TOKENS = 32
WIDTH = 128
FREQUENT_MERGES = 500
MERGES_PACKAGE = "open_clip_torch==3.3.0"
MERGES_FILE = "open_clip/bpe_simple_vocab_16e6.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
MORE_WORDS = """
a an the of on in with and or to for at by from no two three picture image photo icon emoji emojis background drawing
painting sketch art cartoon pixel watercolor line lines outline outlines blueprint neon flat style sks ohwx tok zwx
cute small big large tiny huge happy sad angry teal cyan violet brown grey golden silver dark light bright colorful
my person man woman boy girl people glasses wearing holding sitting standing running flying sleeping smiling eating
night day summer winter high quality detailed best low blurry bad ugly face cup glass slice loaf
"""


def make_tokenizer(things: list[Thing], work: Path) -> CLIPTokenizer:
    """CLIP's byte pair encoding with those merges alone that are frequent or used by our words.

    The order of the merges is kept, so our words split as they do in CLIP; any other text still becomes tokens.

    Raises:
        DatasetError: pip cannot fetch the package that holds the merges.
    """
    merges = _clip_merges(work)
    rank = {merge: number for number, merge in enumerate(merges)}
    words = {word for thing in things for name in thing.words for word in name.replace("-", " ").split()}
    words |= {*HUES, *BACKGROUNDS, *MORE_WORDS.split()}
    used = {merge for word in words for merge in _merges_of(word, rank)}
    kept = [merge for number, merge in enumerate(merges) if number < FREQUENT_MERGES or merge in used]
    letters = _byte_symbols()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in kept), START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    pairs: Any = kept
    return CLIPTokenizer(
        vocab=vocabulary, merges=pairs, model_max_length=MAX_TOKENS, unk_token=END, bos_token=START, eos_token=END,
        pad_token=END,
    )  # fmt: skip


def save_plain_files(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """`vocab.json` and `merges.txt` beside the `tokenizer.json` that transformers 5 writes alone: others read them."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")


def make_text_encoder(tokenizer: CLIPTokenizer, things: list[Thing], table: LatentTable) -> Any:
    """2 layers, 128 wide. A word's embedding starts as noise plus what the things that it names look like.

    CLIP's usual embeddings (deviation 0.02) drown in the signal that all prompts share, and the text was ignored.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=MAX_TOKENS, projection_dim=WIDTH, hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        encoder: Any = CLIPTextModel(config)
    with torch.no_grad():
        embedding: Tensor = encoder.get_input_embeddings().weight  # (tokens, width)
        embedding.copy_(0.4 * normal(embedding.shape, 0, "token embeddings"))
        looks = _looks(things, table)  # (things, width)
        sums: dict[int, list[Tensor]] = {}
        for thing, look in zip(things, looks, strict=True):
            for name in thing.words:
                for token in tokenizer(name, add_special_tokens=False).input_ids:
                    sums.setdefault(token, []).append(look)
        for token, seen in sums.items():
            embedding[token] += torch.stack(seen).mean(0)
        for name, parameter in encoder.named_parameters():
            if "position_embedding" in name:
                parameter.copy_(0.1 * normal(parameter.shape, 0, "positions"))
    return encoder


def _looks(things: list[Thing], table: LatentTable) -> Tensor:
    """(things, width), unit deviation: principal components of the latents at half resolution, turned at random."""
    latents = torch.stack([table.plain(number) for number in range(len(things))])  # (n, c, h, w)
    small = functional.avg_pool2d(latents, 2).flatten(1)
    small = small - small.mean(0)
    left, values, _ = torch.linalg.svd(small, full_matrices=False)
    count = min(WIDTH, left.shape[1])
    looks = torch.zeros(len(things), WIDTH)
    looks[:, :count] = (left * values.sqrt())[:, :count]
    turn, _ = torch.linalg.qr(normal((WIDTH, WIDTH), 0, "turn"))
    looks = looks @ turn
    return looks / looks.std()


def _clip_merges(work: Path) -> list[tuple[str, str]]:
    if not list(work.glob("open_clip_torch*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(work), MERGES_PACKAGE]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise DatasetError(f"pip download {MERGES_PACKAGE} failed ({error}): put the wheel into {work}") from error
    with zipfile.ZipFile(next(work.glob("open_clip_torch*.whl"))) as wheel:
        lines = gzip.decompress(wheel.read(MERGES_FILE)).decode().split("\n")
    pairs = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    return [(left, right) for left, right in pairs]


def _merges_of(word: str, rank: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    """The merges by which CLIP's encoding builds a word, lowest rank first each time."""
    pieces, used = [*word[:-1], word[-1] + "</w>"], []
    while pairs := [pair for pair in itertools.pairwise(pieces) if pair in rank]:
        best = min(pairs, key=lambda pair: rank[pair])
        used.append(best)
        merged: list[str] = []
        for piece in pieces:
            if merged and (merged[-1], piece) == best:
                merged[-1] += piece
            else:
                merged.append(piece)
        pieces = merged
    return used


def _byte_symbols() -> list[str]:
    """The 256 printable characters by which byte-level BPE writes bytes (OpenAI CLIP's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]
