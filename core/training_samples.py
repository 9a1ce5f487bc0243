"""Sample pictures of a training: fixed prompts and seeds, drawn before, during and after. Called by `core.train`."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from core.config import MAX_SEED, GenerateConfig
from core.generate import generate
from core.image_files import infotext, save_png
from core.manifest import DatasetManifest
from core.pipelines import LoadedBase
from core.progress import Progress, Report, silent
from core.text_encoding import resolve_clip_skip
from core.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample picture.

    Attributes:
        step: Optimizer steps done when it was drawn; 0 is the base model without LoRA.
        prompt, seed: The same at every step.
        path: `<folder>/step-000250/00-<prompt hash>.png`.
    """

    step: int
    prompt: str
    seed: int
    path: Path


def sample_due(step: int, config: TrainConfig) -> bool:
    """Whether pictures are drawn after `step` optimizer steps."""
    every = config.sample_every_steps
    return step in (0, config.steps) or bool(every and step % every == 0)


def planned_samples(config: TrainConfig, folder: Path, step: int) -> list[Sample]:
    """The pictures of one step, whether they are drawn already or not."""
    samples = []
    for number, prompt in enumerate(config.sample_prompts):
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
        path = folder / f"step-{step:06d}" / f"{number:02d}-{digest}.png"
        samples.append(Sample(step=step, prompt=prompt, seed=(config.seed + number) % MAX_SEED, path=path))
    return samples


def all_samples(config: TrainConfig, folder: Path) -> list[Sample]:
    """The pictures of a finished training, by step, over all its tries."""
    steps = [step for step in range(config.steps + 1) if sample_due(step, config)]
    return [sample for step in steps for sample in planned_samples(config, folder, step)]


def draw_samples(
    base: LoadedBase,
    config: TrainConfig,
    manifest: DatasetManifest,
    folder: Path,
    step: int,
    *,
    model_name: str,
    report: Report = silent,
) -> list[Sample]:
    """Draw the pictures of one step that are not there yet, so that a resumed run loses and doubles none.

    Args:
        base: With the UNet in training in its place.
        config: Prompts, steps, guidance, seed, clip skip.
        manifest: Its resolution is the pictures' size.
        folder: Gets a folder per step.
        step: Optimizer steps done.
        model_name: Of the base, for the pictures' infotext.
        report: Called after each denoising step; may raise `core.errors.Interrupted`.
    """
    grid = base.facts.bucket_step_px
    side = max(grid, round(manifest.config.resolution / grid) * grid)
    clip_skip = resolve_clip_skip(base, config.clip_skip)
    samples = planned_samples(config, folder, step)
    for number, sample in enumerate(samples):
        if sample.path.exists():
            continue
        request = GenerateConfig(
            prompt=sample.prompt,
            seed=sample.seed,
            width=side,
            height=side,
            steps=config.sample_steps,
            guidance=config.sample_guidance,
            clip_skip=config.clip_skip,
        )

        def counted(progress: Progress, number: int = number) -> None:
            done = number * progress.total + progress.step
            report(Progress(stage="drawing samples", step=done, total=len(samples) * progress.total))

        picture = generate(base, request, report=counted)[0]
        save_png(picture, sample.path, infotext(request, sample.seed, model_name, [], clip_skip=clip_skip))
    return samples
