"""Files that no gate may let in, by what is wrong with them; each with the words of its refusal."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from core.lora_header import MAX_HEADER_BYTES
from tests.core.lora_samples import CONVOLUTION, TEXT, entry, kohya, noise, raw, write

U = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
C = "lora_unet_down_blocks_0_resnets_0_conv1"
DOWN, UP, ALPHA = f"{U}.lora_down.weight", f"{U}.lora_up.weight", f"{U}.alpha"
GOOD = kohya()
Make = Callable[[Path], object]


def changed(**parts: Any) -> dict[str, Any]:
    """The good file with parts of its one module replaced; None removes one."""
    tensors = GOOD | {f"{U}.{name.replace('__', '.')}": value for name, value in parts.items()}
    return {name: value for name, value in tensors.items() if value is not None}


def with_values(number: float, dtype: Any = np.float32, where: str = "lora_up__weight") -> dict[str, Any]:
    tensor = noise(32, 4, dtype=dtype)
    tensor[7, 2] = number
    return changed(**{where: tensor})


def honest(tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> Make:
    return lambda path: write(path, tensors, metadata)


def header(value: object, data: bytes = b"") -> Make:
    return lambda path: raw(path, value, data)


def content(data: bytes) -> Make:
    return lambda path: path.write_bytes(data)


def sparse(length: int, beginning: bytes) -> Make:
    def make(path: Path) -> None:
        path.write_bytes(beginning)
        os.truncate(path, length)

    return make


def a_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")


def a_link(path: Path) -> None:
    path.symlink_to(write(path.with_name("target"), GOOD))


NAN = b"\xc0\x7f"  # in bfloat16
ONE = entry([1], 0, 4)
DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
TWICE = b'{"%s":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"%s":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'

HOSTILE: dict[str, tuple[Make, str]] = {
    # not such a file at all
    "empty": (content(b""), "too short"),
    "seven bytes": (content(b"1234567"), "too short"),
    "a pickle of protocol 2": (content(b"\x80\x02}q\x00." + b"\0" * 40), "pickle"),
    "a pickle of protocol 4": (content(pickle.dumps({"a": 1}, protocol=4)), "pickle"),
    "a pickle of protocol 5": (content(pickle.dumps({"a": 1}, protocol=5)), "pickle"),
    "an old torch checkpoint": (content(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"\0" * 40), "pickle"),
    "a zip renamed": (a_zip, "ZIP"),
    "a web page": (content(b"<!DOCTYPE html><html>not found</html>"), "web page"),
    "a web page without doctype": (content(b"<html><body>login</body></html>"), "web page"),
    "a git lfs pointer": (content(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"), "git lfs pull"),
    "a gguf file": (content(b"GGUF\x03\0\0\0" + b"\0" * 40), "GGUF"),
    "a picture": (content(b"\x89PNG\r\n\x1a\n" + b"\0" * 40), "picture"),
    "a folder": (lambda path: path.mkdir(), "a folder"),
    "a link": (a_link, "a link"),
    "a link to nothing": (lambda path: path.symlink_to("/nowhere/at/all"), "a link"),
    "a pipe": (lambda path: os.mkfifo(path), "no ordinary file"),
    "missing": (lambda path: None, "cannot be read"),
    # the header's length
    "a length of 2^64-1": (content(b"\xff" * 8 + b"{}"), "announces"),
    "a length above the limit": (sparse(1 << 30, (MAX_HEADER_BYTES + 1).to_bytes(8, "little")), "announces"),
    "a length beyond the end": (content((1000).to_bytes(8, "little") + b"{}"), "ends inside its header"),
    "a length of 0": (content(b"\0" * 16), "damaged header"),
    "a length too short by one": (
        lambda path: path.write_bytes((len(t := b'{"a": 1}') - 1).to_bytes(8, "little") + t),
        "damaged header",
    ),
    "a header of nothing but zeros": (sparse(MAX_HEADER_BYTES + 8, MAX_HEADER_BYTES.to_bytes(8, "little")), "damaged"),
    # the header's JSON
    "a deep nesting": (header(DEEP), "damaged header"),
    "deep lists": (header(b"[" * 500_000), "damaged header"),
    "a list": (header([1, 2, 3]), "not a JSON object"),
    "not UTF-8": (header(b'{"\xff\xfe": 1}'), "damaged header"),
    "a byte-order mark": (header(b"\xef\xbb\xbf{}"), "damaged header"),
    "white space in front": (header(b' {"a": 1}'), "not a JSON object"),
    "NaN as a value": (header(b'{"a": NaN}'), "NaN is not allowed"),
    "infinity as a shape": (header(b'{"a": {"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}'), "not allowed"),
    "a number of a million digits": (header(b'{"a": ' + b"9" * 1_000_000 + b"}"), "damaged header"),
    "a key that stands twice": (header(TWICE % (ALPHA.encode(), ALPHA.encode()), b"\0" * 4), "twice"),
    "a metadata that is a list": (header({"__metadata__": [], ALPHA: ONE}, b"\0" * 4), "text to text"),
    "a metadata of numbers": (header({"__metadata__": {"a": 1}, ALPHA: ONE}, b"\0" * 4), "text to text"),
    "no tensors": (header({"__metadata__": {"a": "b"}}), "no tensors"),
    "too many tensors": (header({f"t{i}": ONE for i in range(20_001)}), "more than 20000"),
    # the header's entries
    "a path as name": (header({"../../x": ONE}, b"\0" * 4), "odd name"),
    "markup as name": (header({"<script>": ONE}, b"\0" * 4), "odd name"),
    "NaN as name": (header({"NaN": ONE}, b"\0" * 4), "no part of a LoRA"),
    "an empty name": (header({"": ONE}, b"\0" * 4), "odd name"),
    "a name of 300 letters": (header({"a" * 300: ONE}, b"\0" * 4), "odd name"),
    "a name in another script": (header({"ключ.alpha": ONE}, b"\0" * 4), "odd name"),
    "an unknown type": (header({ALPHA: entry([1], 0, 1, "F8_E4M3")}, b"\0"), "allowed are"),
    "whole numbers as weights": (honest(changed(lora_up__weight=np.ones((32, 4), np.int32))), "weights are"),
    "a shape that overflows": (header({ALPHA: entry([2**40, 2**40], 0, 4)}, b"\0" * 4), "does not fill"),
    "a shape of fractions": (header({ALPHA: {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}), "whole"),
    "a negative shape": (header({ALPHA: entry([-1], 0, 4)}, b"\0" * 4), "whole numbers"),
    "five dimensions": (header({ALPHA: entry([1] * 5, 0, 4)}, b"\0" * 4), "at most 4"),
    "an empty tensor": (header({ALPHA: entry([0, 4], 0, 0)}), "is empty"),
    "an overlap": (header({ALPHA: entry([2], 0, 8), DOWN: entry([1], 4, 8)}, b"\0" * 8), "gap or overlap"),
    "a gap": (header({ALPHA: ONE, DOWN: entry([1], 8, 12)}, b"\0" * 12), "gap or overlap"),
    "offsets backwards": (header({ALPHA: entry([1], 4, 0)}, b"\0" * 4), "does not fill"),
    "offsets beyond the file": (header({ALPHA: entry([1 << 20], 0, 4 << 20)}, b"\0" * 4), "cut off"),
    "bytes behind the tensors": (content(save(GOOD) + b"PK\x03\x04 hidden"), "extra bytes"),
    "the last byte missing": (content(save(GOOD)[:-1]), "cut off"),
    # names
    "a whole model": (honest({"model.diffusion_model.out.0.weight": noise(4)}), "no part of a LoRA"),
    "an embedding": (honest({"emb_params": noise(2, 768)}), "no part of a LoRA"),
    "an unknown part": (honest(changed(extra=noise(4))), "after the module come"),
    "OFT": (honest({f"{U}.oft_blocks": noise(4, 8, 8)}), "OFT"),
    "IA3": (honest({f"{U}.on_input": noise(1)}), "IA3"),
    "IA3's weight": (honest({f"{U}.weight": noise(32)}), "IA3, which is not served"),
    "GLoRA": (honest({f"{U}.a2.weight": noise(4, 32)}), "GLoRA, which is not served"),
    "a trained norm": (honest({f"{U}.w_norm": noise(32)}), "trained norms, which is not served"),
    "a norm's difference": (honest({f"{U}.diff": noise(32)}), "a norm .* which is not served"),
    "a changed bias": (honest({f"{U}.diff": noise(32, 32), f"{U}.diff_b": noise(32)}), "bias, which is not served"),
    "IA3 of PEFT": (honest({f"base_model.model.{CONVOLUTION}.ia3_l": noise(32, 1)}), "IA3, which is not served"),
    "a bundled embedding": (honest(GOOD | {"bundle_emb.x.weight": noise(1, 8)}), "textual inversion"),
    "two countings": (honest({f"lora_unet_{module}.lora_{side}.weight": noise(*shape)
                              for module in ("input_blocks_4_1_proj_in", "down_blocks_1_attentions_1_proj_in")
                              for side, shape in (("down", (4, 8)), ("up", (8, 4)))}), "in two ways"),
    "a prefix without a module": (honest({"lora_unet_.alpha": noise(1)}), "no part of a LoRA|no module"),
    "two namings at once": (honest(GOOD | {f"unet.{CONVOLUTION}.lora_A.weight": noise(4, 32)}), "mixes|lacks"),
    "a module under two names": (honest(GOOD | kohya("text_model.x") | kohya(prefix="lycoris_unet_")), "twice"),
    # parts and ranks
    "no down": (honest(changed(lora_down__weight=None)), "lacks down"),
    "no up": (honest(changed(lora_up__weight=None)), "lacks up"),
    "alpha alone": (honest({ALPHA: np.array(1.0, np.float32)}), "lacks diff"),
    "rank 0": (header({DOWN: entry([0, 32], 0, 0), UP: entry([32, 0], 0, 0)}), "is empty"),
    "a huge rank": (honest(changed(lora_down__weight=noise(1025, 8), lora_up__weight=noise(8, 1025))), "1 to 1024"),
    "ranks that differ": (honest(changed(lora_up__weight=noise(32, 3))), "do not belong together"),
    "a vector as down": (honest(changed(lora_down__weight=noise(4))), "do not belong together"),
    "an up with a kernel": (honest(changed(lora_up__weight=noise(32, 4, 3, 3))), "do not belong together"),
    "a mid without a kernel": (honest(changed(lora_mid__weight=noise(4, 4))), "do not belong together"),
    "lora and loha in one": (honest(changed(hada_w1_a=noise(32, 4))), "another kind"),
    "half a loha": (honest({f"{U}.hada_w1_a": noise(32, 4), f"{U}.hada_w1_b": noise(4, 32)}), "lacks hada_w2_a"),
    "a loha of two sizes": (
        honest({f"{U}.hada_w{i}_{x}": noise(*((30 + i, 4) if x == "a" else (4, 32))) for i in (1, 2) for x in "ab"}),
        "different sizes",
    ),
    "half a lokr": (honest({f"{U}.lokr_w1": noise(4, 4)}), "lokr_w2 do not belong"),
    "a magnitude of another size": (honest(changed(dora_scale=noise(7, 1))), "magnitude"),
    # numbers
    "alpha of two numbers": (honest(changed(alpha=noise(2))), "a single number"),
    "alpha 0": (honest(changed(alpha=np.array(0.0, np.float32))), "alpha is 0"),
    "alpha NaN": (honest(changed(alpha=np.array(np.nan, np.float32))), "NaN or infinite"),
    "alpha infinite": (honest(changed(alpha=np.array(np.inf, np.float16))), "NaN or infinite"),
    "alpha of a billion": (honest(changed(alpha=np.array(10**9, np.int64))), "alpha is 1e"),
    "NaN in F32": (honest(with_values(np.nan)), "lora_up.weight holds NaN"),
    "infinity in F32": (honest(with_values(-np.inf)), "lora_up.weight holds NaN"),
    "NaN in F16": (honest(with_values(np.nan, np.float16)), "lora_up.weight holds NaN"),
    "infinity in F16": (honest(with_values(np.inf, np.float16)), "lora_up.weight holds NaN"),
    "NaN in F64": (honest(with_values(np.nan, np.float64)), "lora_up.weight holds NaN"),
    "NaN in BF16": (
        header({DOWN: entry([1, 32], 0, 64, "BF16"), UP: entry([32, 1], 64, 128, "BF16")}, b"\x80\x3f" * 63 + NAN),
        "lora_up.weight holds NaN"),
    # against the base
    "a module that the base lacks": (honest(kohya("down_blocks.7.attn1.to_q")), "unet has no module"),
    "a second text encoder": (honest(kohya(TEXT, prefix="lora_te2_")), "looks like sdxl"),
    "a wider module": (honest(changed(lora_down__weight=noise(4, 320))), r"has shape \[32, 32\]"),
    "a taller module": (honest(changed(lora_up__weight=noise(320, 4))), r"the LoRA changes 320 x 32"),
    "another kernel": (honest({f"{C}.lora_down.weight": noise(4, 32, 1, 9), f"{C}.lora_up.weight": noise(32, 4, 1, 1)}),
                       "kernel 1x9"),
}  # fmt: skip
