"""The configuration of a training. One definition checks REST input, job rows, YAML and the command line.

Imports no ML library, so the web tier validates with the very class that the trainer uses.
"""

from typing import Literal

from pydantic import Field

from core.config import MAX_SEED, CleanText, Config, PromptText

TargetPreset = Literal["attention", "attention_ff", "all_linear", "with_conv"]
LrSchedule = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]

FIRST_LR_SCHEDULES = frozenset({"constant", "linear", "cosine"})


class TrainConfig(Config):
    """How a LoRA is trained. Times in optimizer steps, sizes in pictures, unless said otherwise."""

    later_fields = frozenset({"lr_cycles", "zero_terminal_snr", "shuffle_captions", "keep_tokens", "caption_separator"})

    rank: int = Field(16, ge=1, le=256, description="Rank r of the LoRA matrices, 1-256.")
    alpha: float = Field(16.0, gt=0, le=1024, description="LoRA alpha; the update is scaled by alpha / rank.")
    targets: TargetPreset = Field(
        "attention",
        description="Which UNet layers get a LoRA: attention (default), attention_ff (plus feed-forward), "
        "all_linear, with_conv (every linear and convolution: strongest style changes).",
    )
    steps: int = Field(1000, ge=1, le=200_000, description="Optimizer steps, 1-200000.")
    batch_size: int = Field(4, ge=1, le=64, description="Pictures per micro-batch, 1-64.")
    gradient_accumulation_steps: int = Field(1, ge=1, le=64, description="Micro-batches per optimizer step, 1-64.")
    learning_rate: float = Field(1e-4, gt=0, le=1.0, description="Peak learning rate of AdamW.")
    lr_schedule: LrSchedule = Field(
        "cosine",
        description="Shape after warm-up: constant; linear, cosine or polynomial (squared) to zero; or cosine to zero "
        "lr_cycles times (cosine_with_restarts).",
    )
    lr_warmup_steps: int = Field(0, ge=0, le=10_000, description="Steps of linear warm-up from zero.")
    lr_cycles: int = Field(1, ge=1, le=100, description="Falls of cosine_with_restarts, 1-100.")
    weight_decay: float = Field(0.01, ge=0, le=1.0, description="AdamW weight decay on the LoRA weights.")
    max_grad_norm: float = Field(1.0, ge=0, le=100, description="Clip the gradient to this norm; 0 switches it off.")
    min_snr_gamma: float | None = Field(
        None, gt=0, le=50, description="min-SNR loss weight (arXiv 2303.09556); 5 is usual."
    )
    noise_offset: float = Field(0.0, ge=0, le=1.0, description="Per-channel offset noise strength; 0 switches it off.")
    zero_terminal_snr: bool = Field(
        False,
        description="Rescale the noise levels so that the last one is pure noise (arXiv 2305.08891); for bases that "
        "predict v. Draw with a scheduler that does the same.",
    )
    caption_dropout: float = Field(0.05, ge=0, le=1, description="Share of samples trained with an empty caption, 0-1.")
    shuffle_captions: bool = Field(False, description="Each step puts the parts of a caption in another order.")
    keep_tokens: int = Field(
        0, ge=0, le=75, description="Parts at a caption's front that shuffling leaves alone, 0-75."
    )
    caption_separator: CleanText = Field(
        ",", min_length=1, max_length=8, description="What stands between the parts of a caption."
    )
    clip_skip: int | None = Field(
        None,
        ge=1,
        le=12,
        description="WebUI convention: 1 = last text layer, 2 = the one before. Null: base's default.",
    )
    mixed_precision: Precision = Field(
        "auto", description="auto: bf16 or fp16 where the device has it, fp32 on a CPU. fp16 uses a GradScaler."
    )
    gradient_checkpointing: bool = Field(False, description="Less memory for about a third more time.")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="All randomness is a function of (seed, step, sample).")
    checkpoint_every_steps: int = Field(250, ge=1, le=100_000, description="Steps between resumable checkpoints.")
    sample_every_steps: int = Field(
        0, ge=0, le=100_000, description="Steps between samples; 0: only before and at the end."
    )
    sample_prompts: tuple[PromptText, ...] = Field(
        (), max_length=16, description="Prompts of the sample pictures, at most 16; seeds are fixed."
    )
    sample_steps: int = Field(20, ge=1, le=150, description="Denoising steps of the sample pictures.")
    sample_guidance: float = Field(5.0, ge=1, le=30, description="Guidance of the sample pictures.")

    @property
    def spec_version(self) -> int:
        """3 for what a worker of an earlier version does not understand, else 1."""
        newer = self.dump().keys() & self.later_fields or self.lr_schedule not in FIRST_LR_SCHEDULES
        return 3 if newer else 1
