"""Header strings of a trained LoRA: kohya's `ss_*` and Stability's `modelspec.*`. Called by `core.train`.

Only what is true of a run is written. Values are strings, objects JSON-encoded, as kohya-ss/sd-scripts has them.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from core.base_facts import BaseFacts
from core.manifest import DatasetManifest
from core.train_config import TrainConfig

DATASET_LABEL = "dataset"
MODELSPEC_VERSION = "1.0.1"
ARCHITECTURES = {"sd1": "stable-diffusion-v1/lora", "sdxl": "stable-diffusion-xl-v1-base/lora"}
IMPLEMENTATIONS = {"sd1": "diffusers", "sdxl": "https://github.com/Stability-AI/generative-models"}
# All in which the files of two equal trainings differ: times, and what is computed from them. The last one is kohya's
# hash of a piece of the file that starts behind 1 MiB; the length of the header decides which bytes lie there.
TIME_AND_SESSION_KEYS = (
    "ss_session_id",
    "ss_training_started_at",
    "ss_training_finished_at",
    "modelspec.date",
    "sshs_legacy_hash",
)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the metadata needs beside configuration and dataset.

    Attributes:
        name: Of the output, without extension.
        base_name: Folder or hub name of the base model.
        base_fingerprint: Of the prepared base.
        precision: "fp32", "bf16" or "fp16", as used.
        clip_skip: As used.
        has_conv: Convolutions larger than 1x1 have layers.
        steps_done: Optimizer steps.
        started_at, finished_at: Seconds since 1970.
    """

    name: str
    base_name: str
    base_fingerprint: str
    precision: str
    clip_skip: int
    has_conv: bool
    steps_done: int
    started_at: float
    finished_at: float


def lora_metadata(config: TrainConfig, manifest: DatasetManifest, base: BaseFacts, run: RunFacts) -> dict[str, str]:
    """All header strings but the `sshs_*` hashes, which the writer computes."""
    values: dict[str, object] = {
        "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0" if base.family == "sdxl" else "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": config.rank,
        "ss_network_alpha": _number(config.alpha),
        "ss_network_args": _network_args(config) if run.has_conv else {},
        "ss_network_dropout": "None",
        **_training(config, run),
        **_dataset(config, manifest),
        "ss_output_name": run.name,
        "ss_sd_model_name": run.base_name,
        "ss_new_sd_model_hash": run.base_fingerprint,
        "ss_max_token_length": base.max_tokens,
        **_modelspec(config, manifest, base, run),
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def _network_args(config: TrainConfig) -> dict[str, str]:
    return {"conv_dim": str(config.rank), "conv_alpha": _number(config.alpha)}


def _training(config: TrainConfig, run: RunFacts) -> dict[str, object]:
    session = hashlib.sha256(f"{run.started_at}:{config.content_hash()}".encode()).digest()
    return {
        "ss_session_id": int.from_bytes(session[:4], "little"),
        "ss_training_started_at": run.started_at,
        "ss_training_finished_at": run.finished_at,
        "ss_learning_rate": config.learning_rate,
        "ss_unet_lr": config.learning_rate,
        "ss_text_encoder_lr": "None",
        "ss_lr_scheduler": config.lr_schedule,
        "ss_lr_warmup_steps": config.lr_warmup_steps,
        "ss_optimizer": f"torch.optim.adamw.AdamW(weight_decay={config.weight_decay})",
        "ss_max_grad_norm": config.max_grad_norm,
        "ss_max_train_steps": config.steps,
        "ss_steps": run.steps_done,
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_gradient_checkpointing": str(config.gradient_checkpointing),
        "ss_mixed_precision": {"fp32": "no"}.get(run.precision, run.precision),
        "ss_full_fp16": "False",
        "ss_seed": config.seed,
        "ss_clip_skip": run.clip_skip,
        "ss_cache_latents": "True",
        "ss_min_snr_gamma": "None" if config.min_snr_gamma is None else config.min_snr_gamma,
        "ss_zero_terminal_snr": str(config.zero_terminal_snr),
        "ss_keep_tokens": config.keep_tokens,
        "ss_noise_offset": config.noise_offset or "None",
        "ss_caption_dropout_rate": config.caption_dropout,
        "ss_prior_loss_weight": 1.0,
        "ss_loss_type": "l2",
        "ss_lowram": "False",
    }


def _dataset(config: TrainConfig, manifest: DatasetManifest) -> dict[str, object]:
    """Pictures as kohya describes them: one folder, one repeat."""
    effective_batch = config.batch_size * config.gradient_accumulation_steps
    image_count = len(manifest.images)
    sizes = Counter((image.width, image.height) for image in manifest.images)
    tags = Counter(tag.strip() for image in manifest.images for tag in image.caption.split(",") if tag.strip())
    side = manifest.config.resolution
    buckets = {
        str(number): {"resolution": list(size), "count": count}
        for number, (size, count) in enumerate(sorted(sizes.items()))
    }
    folders = {DATASET_LABEL: {"n_repeats": 1, "img_count": image_count}}
    datasets = {
        "is_dreambooth": True,
        "batch_size_per_device": config.batch_size,
        "num_train_images": image_count,
        "num_reg_images": 0,
        "resolution": [side, side],
        "enable_bucket": manifest.config.aspect_buckets,
        "bucket_info": {"buckets": buckets},
        "tag_frequency": {DATASET_LABEL: dict(tags)},
    }
    return {
        "ss_num_train_images": image_count,
        "ss_num_reg_images": 0,
        "ss_num_batches_per_epoch": -(-image_count // config.batch_size),
        "ss_num_epochs": -(-config.steps * effective_batch // image_count),
        "ss_batch_size_per_device": config.batch_size,
        "ss_total_batch_size": effective_batch,
        "ss_resolution": f"({side}, {side})",
        "ss_enable_bucket": str(manifest.config.aspect_buckets),
        "ss_bucket_info": {"buckets": buckets},
        "ss_tag_frequency": {DATASET_LABEL: dict(tags)},
        "ss_dataset_dirs": folders,
        "ss_reg_dataset_dirs": {},
        "ss_datasets": [datasets],
        "ss_color_aug": "False",
        "ss_flip_aug": "False",
        "ss_random_crop": "False",
        "ss_shuffle_caption": str(config.shuffle_captions),
    }


def _modelspec(config: TrainConfig, manifest: DatasetManifest, base: BaseFacts, run: RunFacts) -> dict[str, object]:
    """https://github.com/Stability-AI/ModelSpec, the fields that we can know."""
    side = manifest.config.resolution
    values: dict[str, object] = {
        "modelspec.sai_model_spec": MODELSPEC_VERSION,
        "modelspec.architecture": ARCHITECTURES[base.family],
        "modelspec.implementation": IMPLEMENTATIONS[base.family],
        "modelspec.title": run.name,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.date": datetime.fromtimestamp(run.finished_at, UTC).isoformat(timespec="seconds"),
        "modelspec.implementation_version": f"lorasite {_own_version()}",
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}[base.prediction_type],
        "modelspec.encoder_layer": run.clip_skip,
        "modelspec.timestep_range": "0,1000",
    }
    if manifest.config.trigger_word:
        values["modelspec.trigger_phrase"] = manifest.config.trigger_word
    return values


def _own_version() -> str:
    try:
        return version("lorasite")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "development"


def _number(value: float) -> str:
    """kohya writes a whole alpha without a fraction."""
    return str(int(value)) if value == int(value) else str(value)
