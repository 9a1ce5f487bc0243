"""The generation parameters that AUTOMATIC1111 WebUI writes into pictures, and reads back. Nothing personal is written.

Called wherever a picture is saved, and for pictures that people bring.
"""

import json
import re
from collections.abc import Sequence
from pathlib import PurePath

from core.config import GenerateConfig
from core.webui_names import WEBUI_NAMES, WEBUI_SCHEDULES

UPSCALER_NAMES = {"latent": "Latent", "lanczos": "Lanczos"}

_NEGATIVE = "Negative prompt:"
# Both of WebUI's `infotext_utils`.
_PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"^(\d+)x(\d+)$")
_TAG = re.compile(r"\s*<lora:[^<>]+>")


def infotext(
    config: GenerateConfig,
    seed: int,
    model_name: str,
    lora_names: Sequence[str],
    *,
    clip_skip: int | None = None,
    model_hash: str | None = None,
    lora_hashes: Sequence[str] = (),
) -> str:
    """The parameters of one picture in the format of WebUI's `create_infotext`.

    Args:
        config: Of the request.
        seed: Of this picture.
        model_name: Of the base; of a path only the last part is kept.
        lora_names: One per entry of `config.loras`; of a path only the last part without its ending is kept.
        clip_skip: WebUI convention; None takes the request's. 1 is left out, as readers take what is missing for 1.
        model_hash: Identifies the base; its first 10 digits are kept.
        lora_hashes: `core.lora_utils.sshs_model_hash` (called AutoV3) of each LoRA; of each the first 12 digits are
            kept. Empty where they are not known.

    Returns:
        Prompt with `<lora:name:weight>`, negative prompt, one line of parameters.
    """
    names = [_plain(PurePath(name).stem) for name in lora_names]
    tags = [f"<lora:{name}:{use.weight:g}>" for name, use in zip(names, config.loras, strict=True)]
    hashes = ", ".join(f"{name}: {full[:12]}" for name, full in zip(names, lora_hashes, strict=bool(lora_hashes)))
    clip_skip = config.clip_skip if clip_skip is None else clip_skip
    hires = config.hires
    strength = hires.denoising_strength if hires else config.denoising_strength if config.init_image else None
    parameters: dict[str, object] = {
        "Steps": config.steps,
        "Sampler": WEBUI_NAMES[config.sampler],
        "Schedule type": None if config.schedule == "default" else WEBUI_SCHEDULES[config.schedule],
        "CFG scale": f"{config.guidance:g}",
        "Seed": seed,
        "Size": f"{config.width}x{config.height}",
        "Model hash": model_hash and model_hash[:10],
        "Model": _plain(PurePath(model_name).name),
        "VAE": config.vae and _plain(PurePath(config.vae).name),
        "Denoising strength": None if strength is None else f"{strength:g}",
        "Clip skip": clip_skip if (clip_skip or 1) > 1 else None,
        "Hires upscale": f"{hires.scale:g}" if hires else None,
        "Hires steps": hires.steps if hires else None,
        "Hires upscaler": UPSCALER_NAMES[hires.upscaler] if hires else None,
        "Lora hashes": hashes or None,
        "Version": "lorasite",
    }
    lines = [" ".join([config.prompt, *tags])]
    if config.negative_prompt:
        lines.append(f"{_NEGATIVE} {config.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in parameters.items() if value is not None))
    return "\n".join(lines)


def parse_infotext(text: str) -> dict[str, str]:
    """What an infotext says, as WebUI's `parse_generation_parameters` reads it.

    Args:
        text: Of any tool that writes this format; any other text is taken for a prompt.

    Returns:
        "Prompt", "Negative prompt" and every parameter by its own name; a missing "Clip skip" is "1".
    """
    *lines, last = text.strip().split("\n")
    found = _PARAMETER.findall(last)
    if len(found) < 3:
        lines, found = [*lines, last], []
    prompt: list[str] = []
    negative: list[str] = []
    current = prompt
    for line in (line.strip() for line in lines):
        if line.startswith(_NEGATIVE):
            current, line = negative, line[len(_NEGATIVE) :].strip()
        current.append(line)
    parameters = {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative), "Clip skip": "1"}
    return parameters | {name: _unquoted(value) for name, value in found}


def config_values(parameters: dict[str, str]) -> dict[str, object]:
    """The fields of `GenerateConfig` that an infotext sets; LoRA tags leave the prompt, for `loras` to name.

    Args:
        parameters: Of `parse_infotext`. What no field has is left out; a wrong value is for the field's own check.
    """
    values: dict[str, object] = {
        "prompt": _TAG.sub("", parameters["Prompt"]),
        "negative_prompt": parameters["Negative prompt"],
    }
    fields = {"Steps": "steps", "CFG scale": "guidance", "Seed": "seed", "Clip skip": "clip_skip", "VAE": "vae"}
    values |= {field: parameters[name] for name, field in fields.items() if name in parameters}
    if parameters.get("Sampler", WEBUI_NAMES["default"]) != WEBUI_NAMES["default"]:
        values["sampler"] = parameters["Sampler"]
        values["schedule"] = parameters.get("Schedule type", "default")
    if size := _SIZE.match(parameters.get("Size", "")):
        values |= {"width": int(size[1]), "height": int(size[2])}
    if "Hires upscale" in parameters:
        upscalers = {webui: name for name, webui in UPSCALER_NAMES.items()}
        values["hires"] = {
            "scale": parameters["Hires upscale"],
            "steps": parameters.get("Hires steps"),
            "denoising_strength": parameters.get("Denoising strength", "0.7"),
            "upscaler": upscalers.get(parameters.get("Hires upscaler", ""), "latent"),
        }
    elif "Denoising strength" in parameters:
        values["denoising_strength"] = parameters["Denoising strength"]
    return values


def _plain(name: str) -> str:
    """A name without the characters that end a `<lora:name:weight>` tag."""
    return re.sub(r"[<>:\s]+", "_", name)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(character in text for character in ",:\n") else text


def _unquoted(text: str) -> str:
    if not (len(text) > 1 and text[0] == text[-1] == '"'):
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text
