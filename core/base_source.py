"""Reads and judges a base model folder before anything of it is loaded: which files, which family, which facts.

Called by `core.prepared_base`. Loads no ML library, so nothing of a foreign folder is ever run here.
"""

import json
from pathlib import Path
from typing import Any

from core.base_facts import BaseFacts, Family
from core.errors import BaseModelError, ConfigError

OVERRIDES_NAME = "lorasite.json"
"""Beside `model_index.json`: `{"default_clip_skip": 1}` where a base was not trained with its family's default."""

DEFAULT_CLIP_SKIP = 2
"""Of both families; for SDXL it means the penultimate layers of its two text encoders."""

SCALING_FACTOR = 0.18215
"""Of a VAE whose configuration is older than the field."""

FAMILIES: dict[str, Family] = {"StableDiffusionPipeline": "sd1", "StableDiffusionXLPipeline": "sdxl"}
TOKENIZER_CLASSES = {("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")}
COMPONENTS = {
    "tokenizer": TOKENIZER_CLASSES,
    "text_encoder": {("transformers", "CLIPTextModel")},
    "unet": {("diffusers", "UNet2DConditionModel")},
    "vae": {("diffusers", "AutoencoderKL")},
}
SDXL_COMPONENTS = COMPONENTS | {
    "tokenizer_2": TOKENIZER_CLASSES,
    "text_encoder_2": {("transformers", "CLIPTextModelWithProjection")},
}
WEIGHT_STEMS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
KNOWN_LIBRARIES = {"diffusers", "transformers", "stable_diffusion", None}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        BaseModelError: No such file, or no JSON object in it.
    """
    if not path.is_file():
        raise BaseModelError(f"{path} is missing: give the folder of a complete diffusers SD 1.x pipeline")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{path} is not JSON ({error}): download the model again") from error
    if not isinstance(data, dict):
        raise BaseModelError(f"{path} holds {type(data).__name__}, not a JSON object: download the model again")
    return data


def check_source(source: Path, vae: Path | None = None) -> None:
    """Refuse what is not a plain diffusers SD 1.x or SDXL pipeline in safetensors.

    Args:
        source: The pipeline's folder.
        vae: A folder whose VAE takes the place of the pipeline's own: a pipeline, or the VAE itself.

    Raises:
        BaseModelError: Says which part is wrong and why.
    """
    if source.is_file() and source.suffix in PICKLE_SUFFIXES:
        raise BaseModelError(
            f"{source} is a pickle, which can run code when it is read: use a safetensors version of this model"
        )
    if source.is_file():
        raise BaseModelError(
            f"{source} is a single file: convert it to a diffusers folder first "
            "(StableDiffusionPipeline.from_single_file(...).save_pretrained(...))"
        )
    index = read_json(source / "model_index.json")
    family = _family(index.get("_class_name"))
    if family is None:
        raise BaseModelError(
            f"{source} is a {index.get('_class_name')!r}: only StableDiffusionPipeline (SD 1.x) and "
            "StableDiffusionXLPipeline (SDXL) folders are served"
        )
    scripts = sorted(path.relative_to(source).as_posix() for path in source.rglob("*.py"))
    if scripts:
        raise BaseModelError(f"{source} brings its own code ({scripts[0]}), which is never run: use a plain pipeline")
    for name, entry in index.items():
        if isinstance(entry, list) and (len(entry) != 2 or entry[0] not in KNOWN_LIBRARIES):
            raise BaseModelError(f"{source}: {name} comes from {entry[0]!r}, not from diffusers or transformers")
    for name, allowed in components_of(family).items():
        if tuple(index.get(name) or ()) not in allowed:
            raise BaseModelError(f"{source}: {name} is {index.get(name)}, expected one of {sorted(allowed)}")
    scheduler = index.get("scheduler")
    if not isinstance(scheduler, list) or scheduler[0] != "diffusers":
        raise BaseModelError(f"{source}: scheduler is {scheduler}, expected one of diffusers")
    if vae is not None:
        _check_vae(source, vae)


def _check_vae(source: Path, vae: Path) -> None:
    """Whether another VAE has latents of the kind that the pipeline was trained with."""
    own, other = read_json(source / "vae" / "config.json"), read_json(vae_folder(vae) / "config.json")
    if other.get("_class_name") != "AutoencoderKL":
        raise BaseModelError(f"{vae} holds a {other.get('_class_name')!r}: give a folder with an AutoencoderKL")
    for name, default in (("latent_channels", 4), ("scaling_factor", SCALING_FACTOR), ("block_out_channels", (64,))):
        values = [config.get(name, default) for config in (own, other)]
        if name == "block_out_channels":
            values = [len(value) for value in values]
        if values[0] != values[1]:
            raise BaseModelError(
                f"the VAE of {vae} has {name} {values[1]}, {source} was trained with {values[0]}: "
                "give a VAE of the same family"
            )


def vae_folder(folder: Path) -> Path:
    """Where the VAE of a pipeline's folder is, or the folder itself, which is the VAE then."""
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder


def family_of(source: Path) -> Family:
    """The family that a checked folder says it belongs to."""
    return _family(read_json(source / "model_index.json").get("_class_name")) or "sd1"


def components_of(family: Family) -> dict[str, set[tuple[str, str]]]:
    """The parts of a pipeline of this family, and the classes that each may be."""
    return SDXL_COMPONENTS if family == "sdxl" else COMPONENTS


def _family(class_name: object) -> Family | None:
    return FAMILIES.get(class_name) if isinstance(class_name, str) else None


def input_files(source: Path, vae: Path | None = None) -> dict[str, Path]:
    """The files of a source that go into its preparation, by their names in it; all others are ignored.

    Args:
        source: The pipeline's folder.
        vae: Of `check_source`; its files have the names of those that they replace.

    Raises:
        BaseModelError: A weight file is missing, split, or there only as a pickle.
    """
    files = {"model_index.json": source / "model_index.json"}
    components = components_of(family_of(source))
    for name, stem in ((name, stem) for name, stem in WEIGHT_STEMS.items() if name in components):
        folder = vae_folder(vae) if vae is not None and name == "vae" else source / name
        files[f"{name}/config.json"] = folder / "config.json"
        weights = find_weights(folder, stem)
        files[f"{name}/{weights.name}"] = weights
    files["scheduler/scheduler_config.json"] = source / "scheduler" / "scheduler_config.json"
    for tokenizer in (name for name in components if name.startswith("tokenizer")):
        found = {name: source / tokenizer / name for name in TOKENIZER_FILES if (source / tokenizer / name).is_file()}
        if not {"vocab.json", "merges.txt"} <= found.keys() and "tokenizer.json" not in found:
            raise BaseModelError(f"{source}/{tokenizer} holds neither vocab.json and merges.txt nor tokenizer.json")
        files |= {f"{tokenizer}/{name}": path for name, path in found.items()}
    if (source / OVERRIDES_NAME).is_file():
        files[OVERRIDES_NAME] = source / OVERRIDES_NAME
    return files


def find_weights(folder: Path, stem: str) -> Path:
    """The safetensors file of one component: the full one, else the fp16 variant.

    Raises:
        BaseModelError: There is none.
    """
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return folder / name
    found = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
    pickles = [name for name in found if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise BaseModelError(
            f"{folder} holds weights only as {pickles[0]}, a pickle, which can run code when it is read: "
            "use a safetensors version of this model"
        )
    if any("-of-" in name and name.endswith(".safetensors") for name in found):
        raise BaseModelError(f"{folder} holds its weights in several parts: save them as one {stem}.safetensors")
    raise BaseModelError(f"{folder} holds no {stem}.safetensors: the model is incomplete, download it again")


def read_facts(source: Path) -> BaseFacts:
    """The facts of a source, from its configuration files alone.

    Raises:
        BaseModelError: Another family, or values that make no sense.
    """
    family = family_of(source)
    unet = read_json(source / "unet" / "config.json")
    vae = read_json(source / "vae" / "config.json")
    scheduler = read_json(source / "scheduler" / "scheduler_config.json")
    encoders = {name: read_json(source / name / "config.json") for name in _named(family, "text_encoder")}
    tokenizers = {name: _read_optional(source / name / "tokenizer_config.json") for name in _named(family, "tokenizer")}
    _check_family(source, family, unet, vae)
    for name, config in {"unet": unet, "vae": vae, **encoders, **tokenizers}.items():
        if "auto_map" in config:
            raise BaseModelError(f"{source}/{name} asks for its own code (auto_map), which is never run")
    try:
        vae_factor = 2 ** (len(vae["block_out_channels"]) - 1)
        text_layers = min(int(config["num_hidden_layers"]) for config in encoders.values())
        positions = min(int(config["max_position_embeddings"]) for config in encoders.values())
        return BaseFacts.parse(
            {
                "family": family,
                "default_clip_skip": min(_default_clip_skip(source), text_layers),
                "prediction_type": scheduler.get("prediction_type", "epsilon"),
                # A tokenizer without a limit of its own writes 1e30 here.
                "max_tokens": int(
                    min(positions, *(config.get("model_max_length", positions) for config in tokenizers.values()))
                ),
                "vae_factor": vae_factor,
                # Every UNet block but the last halves the latent's sides.
                "bucket_step_px": max(8, vae_factor * 2 ** (len(unet["block_out_channels"]) - 1)),
                "native_size_px": int(unet["sample_size"]) * vae_factor,
                "latent_channels": int(vae["latent_channels"]),
                "text_layers": text_layers,
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BaseModelError(f"{source}: a configuration file lacks or garbles a value ({error!r})") from error
    except ConfigError as error:
        raise BaseModelError(f"{source} does not fit what lorasite serves: {error}") from error


def _named(family: Family, prefix: str) -> list[str]:
    return [name for name in components_of(family) if name.startswith(prefix)]


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _check_family(source: Path, family: Family, unet: dict[str, Any], vae: dict[str, Any]) -> None:
    added = unet.get("addition_embed_type")
    if family == "sdxl" and added != "text_time":
        raise BaseModelError(f"{source} calls itself SDXL, but its UNet takes {added!r} instead of sizes: not served")
    if family == "sd1" and added not in (None, "text"):
        raise BaseModelError(f"{source} has a UNet of the SDXL family in a pipeline of SD 1.x: not served")
    if family == "sd1" and unet.get("use_linear_projection"):
        raise BaseModelError(f"{source} is of the SD 2.x family (linear projections): only SD 1.x and SDXL are served")
    if unet.get("in_channels") != vae.get("latent_channels"):
        raise BaseModelError(
            f"{source}: the UNet takes {unet.get('in_channels')} channels, the VAE gives {vae.get('latent_channels')} "
            "(an inpainting model?): only text-to-image models are served"
        )
    if vae.get("shift_factor") or vae.get("latents_mean"):
        raise BaseModelError(f"{source}: its VAE shifts latents, which no SD 1.x or SDXL model does: not served")


def _default_clip_skip(source: Path) -> int:
    path = source / OVERRIDES_NAME
    if not path.is_file():
        return DEFAULT_CLIP_SKIP
    overrides = read_json(path)
    unknown = sorted(overrides.keys() - {"default_clip_skip"})
    value = overrides.get("default_clip_skip", DEFAULT_CLIP_SKIP)
    if unknown or not isinstance(value, int) or value < 1:
        raise BaseModelError(f'{path} may hold only {{"default_clip_skip": a number from 1}}, got {overrides}')
    return value
