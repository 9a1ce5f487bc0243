"""Writes generated pictures as PNG files with the infotext that WebUI users know. Nothing personal is written."""

import io
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePath

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from core.config import GenerateConfig

# As AUTOMATIC1111 WebUI names them.
SAMPLER_NAMES = {
    "default": "Default",
    "dpmpp_2m": "DPM++ 2M",
    "euler": "Euler",
    "euler_a": "Euler a",
    "ddim": "DDIM",
}


def infotext(
    config: GenerateConfig, seed: int, model_name: str, lora_names: Sequence[str], *, clip_skip: int | None = None
) -> str:
    """The generation parameters in the format of AUTOMATIC1111 WebUI (`create_infotext`).

    Args:
        config: Of the request.
        seed: Of this picture.
        model_name: Of the base; of a path only the last part is kept.
        lora_names: One per entry of `config.loras`; of a path only the last part without its ending is kept.
        clip_skip: WebUI convention; None takes the request's, and leaves the entry out where that is None too.

    Returns:
        Prompt with `<lora:name:weight>`, negative prompt, one line of parameters.
    """
    tags = [
        f"<lora:{_plain(PurePath(name).stem)}:{use.weight:g}>"
        for name, use in zip(lora_names, config.loras, strict=True)
    ]
    clip_skip = config.clip_skip if clip_skip is None else clip_skip
    parameters: dict[str, object] = {
        "Steps": config.steps,
        "Sampler": SAMPLER_NAMES[config.sampler],
        "CFG scale": f"{config.guidance:g}",
        "Seed": seed,
        "Size": f"{config.width}x{config.height}",
        "Model": _plain(PurePath(model_name).name),
        "Clip skip": clip_skip,
        "Version": "lorasite",
    }
    lines = [" ".join([config.prompt, *tags])]
    if config.negative_prompt:
        lines.append(f"Negative prompt: {config.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in parameters.items() if value is not None))
    return "\n".join(lines)


def encode_picture(image: Image.Image, infotext: str) -> bytes:
    """PNG bytes with the infotext in the text chunk "parameters"; empty text writes none."""
    info = PngInfo()
    if infotext:
        info.add_text("parameters", infotext)
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def save_png(image: Image.Image, path: Path, infotext: str) -> None:
    """Write a picture; it is there complete or not at all.

    Args:
        image: An RGB picture made by `core.generate`.
        path: Its folder is made where missing; a file there is replaced.
        infotext: From `infotext`, or "" for none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(encode_picture(image, infotext))
        file.flush()
        os.fsync(file.fileno())  # a resumed training takes a picture that is there for a whole one
    Path(partial).chmod(0o644)
    Path(partial).replace(path)


def _plain(name: str) -> str:
    """A name without the characters that end a `<lora:name:weight>` tag."""
    return re.sub(r"[<>:\s]+", "_", name)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(character in text for character in ",:\n") else text
