"""Configurations of jobs, but for `core.train_config`. One definition checks REST input, job rows, YAML and commands.

Imports no ML library, so the web tier validates with the very classes that the trainer uses.
"""

import hashlib
import json
import re
import unicodedata
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from core.errors import ConfigError
from core.webui_names import understand_webui_names

MAX_SEED = 2**63 - 1
MAX_HIRES_PX = 4096
MAX_LCM_STEPS = 50
FIRST_SAMPLERS = frozenset({"default", "dpmpp_2m", "euler", "euler_a", "ddim"})
PROMPT_SYNTAX = re.compile(r"[()\[\]\\]|\bBREAK\b")
"""What gives parts of a prompt more or less weight, or splits it."""

Sampler = Literal[
    "default",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "dpm2",
    "dpm2_a",
    "euler",
    "euler_a",
    "heun",
    "lms",
    "ddim",
    "pndm",
    "unipc",
    "lcm",
]
Schedule = Literal["default", "automatic", "uniform", "karras", "exponential", "sgm_uniform"]
ImageFormat = Literal["png", "jpeg", "webp"]


def _compose(text: object) -> object:
    """One spelling for texts that look the same (Unicode NFC), so that they are counted, hashed and encoded alike."""
    return unicodedata.normalize("NFC", text) if isinstance(text, str) else text


def _refuse_control_characters(text: str) -> str:
    bad = sorted({f"U+{ord(c):04X}" for c in text if unicodedata.category(c) == "Cc" and c not in "\n\t"})
    if bad:
        raise ValueError(f"contains control characters ({', '.join(bad)}); remove them")
    return text


CleanText = Annotated[str, BeforeValidator(_compose), AfterValidator(_refuse_control_characters)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PromptText = Annotated[
    str, Field(max_length=4000), BeforeValidator(_compose), AfterValidator(_refuse_control_characters)
]


class Config(BaseModel):
    """Base of all configurations: frozen, unknown fields refused, stable hash."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    later_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that the first version did not have."""

    @classmethod
    def parse(cls, values: dict[str, object]) -> Self:
        """Build from plain values.

        Raises:
            ConfigError: Names every wrong field at once, with the value and the rule.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(describe_problems(error)) from error

    def dump(self) -> dict[str, object]:
        """Plain JSON values, defaults written out; but of `later_fields` only what differs from its default.

        So a job that uses none of them keeps the hash that it always had, and older workers can read it.
        """
        values = self.model_dump(mode="json")
        defaults = {name: type(self).model_fields[name].default for name in self.later_fields}
        return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}

    def content_hash(self) -> str:
        """SHA-256 (64 hex digits) of the canonical JSON of all fields."""
        return canonical_json_hash(self.dump())


def canonical_json_hash(value: object) -> str:
    """SHA-256 (64 hex digits) of `value` as JSON with sorted keys and no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def describe_problems(error: ValidationError) -> str:
    """All problems of a pydantic error as one sentence per field."""
    lines = []
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"]) or "configuration"
        lines.append(f"{name}: {problem['msg']} (got {problem['input']!r:.80})")
    return "; ".join(lines)


class PreprocessConfig(Config):
    """How uploaded pictures become training pictures."""

    resolution: int = Field(
        512, ge=32, le=2048, description="Training size: the side in pixels of a square of the same area, 32-2048."
    )
    bucket_step_px: int = Field(
        64, ge=8, le=256, description="Sides of buckets are multiples of this, in pixels (64 for SD 1.5 and SDXL)."
    )
    aspect_buckets: bool = Field(
        True, description="Keep each picture's aspect ratio by bucket; false crops everything to a square."
    )
    max_aspect_ratio: float = Field(
        2.0, ge=1.0, le=4.0, description="Longest side over shortest side of the most extreme bucket, 1-4."
    )
    caption_source: Literal["sidecar_or_filename", "sidecar", "filename", "none"] = Field(
        "sidecar_or_filename",
        description="Where captions come from: a .txt of the same name uploaded beside the picture, or its file name.",
    )
    trigger_word: CleanText = Field(
        "", max_length=100, description="Put in front of every caption, so that prompts can call the LoRA by it."
    )
    caption_suffix: CleanText = Field(
        "", max_length=200, description="Put behind every caption, e.g. 'blueprint style'."
    )
    min_side_px: int = Field(
        32, ge=8, le=2048, description="Pictures with a shorter side than this (pixels) are rejected with a reason."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.resolution < self.bucket_step_px:
            raise ValueError(f"resolution {self.resolution} is below bucket_step_px {self.bucket_step_px}: raise it")
        return self


class LoraUse(Config):
    """One LoRA in a generation: which, and how strongly."""

    sha256: Sha256 = Field(description="SHA-256 of the kohya/WebUI file.")
    weight: float = Field(1.0, ge=-4, le=4, description="Multiplier on top of the file's own alpha / rank scale.")


class HiresConfig(Config):
    """A second pass at a larger size: more detail without the doubled bodies of a large first pass."""

    scale: float = Field(2.0, gt=1, le=4, description="Sides of the second pass over those of the first, above 1 to 4.")
    steps: int | None = Field(None, ge=1, le=150, description="Steps of the second pass. Null: as many as the first.")
    denoising_strength: float = Field(
        0.7, ge=0, le=1, description="How much the second pass changes: 0 hardly anything, 1 everything."
    )
    upscaler: Literal["latent", "lanczos"] = Field(
        "latent", description="What enlarges between the passes: the latents, or the picture with a Lanczos filter."
    )


class GenerateConfig(Config):
    """One request for n pictures that share all settings but the seed."""

    later_fields = frozenset({
        "schedule", "init_image", "mask", "denoising_strength", "hires", "vae", "exact", "image_format",
        "image_quality", "preview_every_steps",
    })  # fmt: skip

    prompt: PromptText = Field(description="What to draw, at most 4000 characters.")
    negative_prompt: PromptText = Field("", description="What to avoid.")
    count: int = Field(1, ge=1, le=64, description="Number of pictures, 1-64.")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Seed of the first picture; picture i uses seed + i.")
    width: int = Field(512, ge=32, le=2048, description="Width in pixels, a multiple of the base's step.")
    height: int = Field(512, ge=32, le=2048, description="Height in pixels, a multiple of the base's step.")
    steps: int = Field(25, ge=1, le=150, description="Denoising steps, 1-150.")
    guidance: float = Field(7.0, ge=1, le=30, description="Classifier-free guidance scale; 1 switches it off.")
    sampler: Sampler = Field(
        "default", description="default is the base's own scheduler. WebUI's names (DPM++ 2M Karras) are understood."
    )
    clip_skip: int | None = Field(
        None,
        ge=1,
        le=12,
        description="WebUI convention: 1 = last text layer, 2 = the one before. Null: base's default.",
    )
    loras: tuple[LoraUse, ...] = Field((), max_length=8, description="LoRAs to apply together, at most 8.")
    schedule: Schedule = Field(
        "default",
        description="How the noise levels are spaced. default: as the base's own scheduler; automatic: as WebUI does "
        "for the sampler. WebUI's names are understood.",
    )
    init_image: Sha256 | None = Field(
        None, description="SHA-256 of a picture to begin from (img2img), fitted to width and height. Null: from noise."
    )
    mask: Sha256 | None = Field(
        None, description="SHA-256 of a picture that is white where init_image may change (inpainting)."
    )
    denoising_strength: float = Field(
        0.75, ge=0, le=1, description="How much init_image changes: 0 hardly anything, 1 everything."
    )
    hires: HiresConfig | None = Field(None, description="A second pass at a larger size. Null: none.")
    vae: CleanText | None = Field(
        None, min_length=1, max_length=200, description="Name or fingerprint of another VAE. Null: the base's own."
    )
    exact: bool = Field(
        False, description="Never share a forward: the same bytes whatever else runs, for more time per picture."
    )
    image_format: ImageFormat = Field("png", description="Of the stored pictures: png, jpeg or webp.")
    image_quality: int = Field(90, ge=1, le=100, description="Of jpeg and webp, 1-100.")
    preview_every_steps: int = Field(
        0, ge=0, le=150, description="Denoising steps between previews of the first picture; 0: none."
    )

    @model_validator(mode="before")
    @classmethod
    def _webui_names(cls, values: Any) -> Any:
        return understand_webui_names(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _sampler_fits(self) -> Self:
        if self.sampler == "lcm" and max(self.steps, self.hires.steps or 0 if self.hires else 0) > MAX_LCM_STEPS:
            raise ValueError(f"sampler lcm takes at most {MAX_LCM_STEPS} steps (2 to 8 are usual)")
        if self.schedule in ("default", "automatic"):
            return self
        if self.sampler in ("default", "lcm"):
            raise ValueError(f"sampler {self.sampler} has a schedule of its own: name another sampler, or no schedule")
        if self.sampler in ("ddim", "pndm") and self.schedule in ("karras", "exponential"):
            raise ValueError(f"sampler {self.sampler} knows the schedules uniform and sgm_uniform alone")
        return self

    @model_validator(mode="after")
    def _pictures_fit(self) -> Self:
        if self.mask is not None and self.init_image is None:
            raise ValueError("mask needs init_image: name the picture whose white part may change")
        if self.hires is not None:
            if self.init_image is not None:
                raise ValueError("hires is for pictures from noise: leave out hires, or init_image")
            longest = round(max(self.width, self.height) * self.hires.scale)
            if longest > MAX_HIRES_PX:
                raise ValueError(f"hires makes a side of {longest} px, {MAX_HIRES_PX} is the most: lower scale or size")
        return self

    @model_validator(mode="after")
    def _seeds_fit(self) -> Self:
        if self.seed + self.count - 1 > MAX_SEED:
            raise ValueError(f"seed {self.seed} + count {self.count} passes {MAX_SEED}: choose a smaller seed")
        return self

    @property
    def spec_version(self) -> int:
        """2 for what a worker of the first version does not understand or would draw differently, else 1."""
        newer = self.dump().keys() & self.later_fields or self.sampler not in FIRST_SAMPLERS
        return 2 if newer or PROMPT_SYNTAX.search(f"{self.prompt} {self.negative_prompt}") else 1

    def seeds(self) -> list[int]:
        """The seed of each picture, in order; length `count`."""
        return [self.seed + i for i in range(self.count)]
