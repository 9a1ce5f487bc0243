"""The training of a LoRA, one function to read from top to bottom.

    python -m core.train demo/train.yaml

The same call, or command, after any interruption goes on from the newest checkpoint, bit for bit on a CPU.
"""

import copy
import dataclasses
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from core.checkpoint import Checkpoint, RunIdentity, newest_valid, save_checkpoint
from core.data_order import plan_batch
from core.diffusion_loss import diffusion_loss, draw_micro_batch
from core.errors import Paused, TrainingDiverged
from core.latent_cache import cache_latents
from core.lora_metadata import RunFacts, lora_metadata
from core.lora_modules import inject_lora
from core.lora_targets import target_modules
from core.lora_utils import export_lora, sshs_model_hash
from core.lr_schedule import lr_at
from core.manifest import PreparedDataset
from core.noise_schedule import noise_schedule
from core.pipelines import LoadedBase
from core.precision import choose_precision
from core.progress import Progress, Report, silent
from core.text_cache import cache_texts
from core.text_encoding import resolve_clip_skip
from core.train_config import TrainConfig
from core.training_samples import Sample, all_samples, draw_samples, sample_due

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished training leaves behind.

    Attributes:
        kohya_file: For WebUI, ComfyUI, kohya and diffusers.
        peft_folder: For PEFT.
        diffusers_file: For diffusers.
        samples: All sample pictures, by step; step 0 is the base model without LoRA.
        losses: One per optimizer step, over all interruptions.
        steps: Optimizer steps done.
        seconds: Spent in the loop, all tries together.
        facts: Plain JSON values about the run, to show and to store.
    """

    kohya_file: Path
    peft_folder: Path
    diffusers_file: Path
    samples: list[Sample]
    losses: list[float]
    steps: int
    seconds: float
    facts: dict[str, Any]

    @property
    def samples_before(self) -> list[Path]:
        """Pictures of the base model without LoRA."""
        return [sample.path for sample in self.samples if sample.step == 0]

    @property
    def sample_files(self) -> list[Path]:
        """Pictures of the finished LoRA, in the order of `samples_before`."""
        return [sample.path for sample in self.samples if sample.step == self.steps]


def train(
    config: TrainConfig,
    base: LoadedBase,
    dataset: PreparedDataset,
    work_folder: Path,
    report: Report = silent,
    on_checkpoint: Callable[[Path, int], None] | None = None,
    *,
    name: str = "lora",
    base_name: str = "",
) -> TrainResult:
    """Train a LoRA and export it.

    Args:
        config: What to do.
        base: Its UNet is copied, so it comes back unchanged.
        dataset: Prepared pictures with captions.
        work_folder: Gets `checkpoints/`, `samples/`, `<name>.safetensors`, `<name>-peft/` and `<name>-diffusers/`.
        report: Called after each step of each stage; may raise Cancelled, or Paused, which writes a checkpoint first.
        on_checkpoint: Called with each new checkpoint folder and its step.
        name: Of the LoRA: of its files and its title.
        base_name: Of the base model, a label in the metadata.

    Raises:
        CheckpointMismatch: `work_folder` holds checkpoints of another run.
        TrainingDiverged: The loss, the gradient or the weights became NaN or infinite; nothing is exported.
        Interrupted: As `report` raised it.
    """
    # --- parts, in the order in which they need each other ---
    manifest = dataset.manifest
    base_name = base_name or base.facts.family
    effective_batch = config.batch_size * config.gradient_accumulation_steps
    identity = RunIdentity.of(config, manifest.content_hash(), base.fingerprint)
    checkpoints, sample_folder = work_folder / "checkpoints", work_folder / "samples"
    checkpoint = newest_valid(checkpoints, identity)  # first, so that a mismatch costs no minutes of encoding
    if checkpoint is None:
        shutil.rmtree(sample_folder, ignore_errors=True)  # of a run that never came to a checkpoint

    precision = choose_precision(config.mixed_precision, base.device)
    logger.info("precision=%s device=%s lora_weights=fp32", precision.name, base.device)
    clip_skip = resolve_clip_skip(base, config.clip_skip)
    captions = [image.caption for image in manifest.images]
    lasting = [] if config.shuffle_captions else captions  # a caption has too many orders to keep them all
    text_cache = cache_texts(base, lasting, clip_skip, precision.dtype, report)
    logger.info("captions unique=%d cache_bytes=%d", len(set(captions)), text_cache.byte_count)
    latent_cache = cache_latents(base, dataset, report)
    logger.info("latents cached=%d bytes=%d loader_workers=0", len(latent_cache.means), latent_cache.byte_count)
    schedule = noise_schedule(base.scheduler_config, base.facts.prediction_type, base.device, config.zero_terminal_snr)

    unet = copy.deepcopy(base.unet).to(precision.dtype)
    if base.device.type == "cuda":  # convolutions are faster so on tensor cores; on a CPU it makes no difference
        unet = unet.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train(config.gradient_checkpointing)  # diffusers checkpoints in train mode only; nothing else depends on it
    targets = target_modules(unet, config.targets)
    weights = inject_lora(unet, config.rank, config.alpha, targets, config.seed)
    logger.info("lora modules=%d parameters=%d", len(targets), weights.parameter_count)
    base_in_training = dataclasses.replace(base, unet=unet, dtype=precision.dtype)

    optimizer = torch.optim.AdamW([weights.flat], lr=config.learning_rate, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(precision.device_type, enabled=precision.needs_scaler)

    # What AdamW would make at its first step. In fp16 that step may be skipped, and a checkpoint needs all parts.
    moments = {name: torch.zeros_like(weights.flat.data) for name in ("exp_avg", "exp_avg_sq")}  # (n,) fp32 each
    optimizer.state[weights.flat] = {"step": torch.tensor(0.0), **moments}
    done, losses, started_at, seconds_before = 0, list[float](), time.time(), 0.0
    if checkpoint is not None:
        weights.load(checkpoint.lora)
        for part, tensor in optimizer.state[weights.flat].items():
            tensor.copy_(checkpoint.optimizer[part])
        if precision.needs_scaler and checkpoint.scaler:
            scaler.load_state_dict(checkpoint.scaler)
        done, losses = checkpoint.step, list(checkpoint.losses)
        started_at, seconds_before = checkpoint.started_at, checkpoint.seconds
        logger.info("resumed step=%d of=%d", done, config.steps)

    run = RunFacts(
        name=name, base_name=base_name, base_fingerprint=base.fingerprint, precision=precision.name, steps_done=done,
        clip_skip=clip_skip, has_conv=config.targets == "with_conv", started_at=started_at, finished_at=started_at,
    )  # fmt: skip
    saved, loop_started = done, time.monotonic()

    def save() -> None:
        nonlocal saved
        if not torch.isfinite(weights.flat).all():  # the loss of the step that overflowed them was still finite
            raise TrainingDiverged(
                f"step {done}: the weights became NaN or infinite; lower the learning rate ({config.learning_rate:g})"
            )
        state = Checkpoint(
            step=done, lora=weights.state(), optimizer=optimizer.state[weights.flat], scaler=scaler.state_dict(),
            losses=losses, started_at=started_at, seconds=seconds_before + time.monotonic() - loop_started,
        )  # fmt: skip
        facts = dataclasses.replace(run, steps_done=done, finished_at=time.time())
        folder = save_checkpoint(checkpoints, state, identity, lora_metadata(config, manifest, base.facts, facts))
        saved = done
        logger.info("checkpoint step=%d folder=%s", done, folder)
        if on_checkpoint is not None:
            on_checkpoint(folder, done)

    def sample(model: LoadedBase, step: int) -> None:
        draw_samples(model, config, manifest, sample_folder, step, model_name=base_name, report=report)

    # --- the loop ---
    try:
        sample(base, 0)
        for step in range(done, config.steps):
            if step > 0 and sample_due(step, config):
                sample(base_in_training, step)

            plan = plan_batch(manifest, config.seed, step, effective_batch)
            lr = lr_at(step, config)
            optimizer.param_groups[0]["lr"] = lr
            weights.gradient.zero_()
            loss_sum = torch.zeros((), device=base.device)
            for first in range(0, effective_batch, config.batch_size):
                members = range(first, first + config.batch_size)
                batch = draw_micro_batch(
                    config, step, plan, members, captions, latent_cache, text_cache, schedule.timesteps
                )
                with precision.autocast():
                    loss = diffusion_loss(unet, schedule, batch, config.min_snr_gamma).sum() / effective_batch  # ()
                scaler.scale(loss).backward()
                loss_sum += loss.detach()

            scaler.unscale_(optimizer)  # clipping needs the true size
            grad_norm = torch.nn.utils.clip_grad_norm_([weights.flat], config.max_grad_norm or math.inf)  # ()
            loss_value, norm_value = torch.stack([loss_sum, grad_norm]).tolist()  # the one device sync of a step
            # An infinite gradient is normal in fp16: the scaler skips that step and lowers its scale.
            if not math.isfinite(loss_value) or not (precision.needs_scaler or math.isfinite(norm_value)):
                raise TrainingDiverged(
                    f"step {step + 1}: loss {loss_value}, gradient norm {norm_value}; lower the learning rate "
                    f"({config.learning_rate:g}) or raise the warm-up ({config.lr_warmup_steps} steps)"
                )
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss_value)
            done = step + 1

            logger.debug("step=%d loss=%.6f lr=%.3g grad_norm=%.3g", done, loss_value, lr, norm_value)
            figures = {"loss": loss_value, "lr": lr}
            report(Progress(stage="training", step=done, total=config.steps, figures=figures))
            if done % config.checkpoint_every_steps == 0 or done == config.steps:
                save()
        sample(base_in_training, config.steps)
    except Paused:
        # `report` is called between steps only, so the weights are those of `done` whole steps.
        if saved != done:
            save()
        raise

    # --- what remains ---
    seconds = seconds_before + time.monotonic() - loop_started
    finished = dataclasses.replace(run, steps_done=done, finished_at=time.time())
    export = export_lora(
        weights.state(), lora_metadata(config, manifest, base.facts, finished), work_folder, name, base_name
    )
    logger.info("finished steps=%d seconds=%.1f file=%s", done, seconds, export.kohya_file)
    return TrainResult(
        kohya_file=export.kohya_file,
        peft_folder=export.peft_folder,
        diffusers_file=export.diffusers_file,
        samples=all_samples(config, sample_folder),
        losses=losses,
        steps=done,
        seconds=seconds,
        facts={
            "rank": config.rank,
            "alpha": config.alpha,
            "targets": config.targets,
            "modules": len(targets),
            "parameters": weights.parameter_count,
            "precision": precision.name,
            "clip_skip": clip_skip,
            "pictures": len(manifest.images),
            "dataset_hash": identity.dataset_hash,
            "base_fingerprint": base.fingerprint,
            "sshs_model_hash": sshs_model_hash(export.kohya_file),
            "file_bytes": export.kohya_file.stat().st_size,
        },
    )


if __name__ == "__main__":
    # Here and not at the top: the command imports this module.
    from core.command_line import run_command
    from core.train_cli import main

    run_command(main)
