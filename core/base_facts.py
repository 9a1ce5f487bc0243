"""What the rest of the system must know about a base model, instead of assuming 77, 8 or epsilon.

Written into the prepared base's `manifest.json` by `core.prepared_base`; read by the web tier. No ML library here.
"""

from typing import Literal

from pydantic import Field

from core.config import Config

Family = Literal["sd1", "sdxl"]


class BaseFacts(Config):
    """Facts of one prepared base model."""

    family: Family = Field(description="Model family; decides text encoders and LoRA key names.")
    default_clip_skip: int = Field(ge=1, le=12, description="WebUI convention, used where a request leaves it null.")
    prediction_type: Literal["epsilon", "v_prediction"] = Field(description="What the UNet predicts.")
    max_tokens: int = Field(ge=4, le=512, description="Tokens per prompt, start and end tokens included.")
    vae_factor: int = Field(ge=1, le=32, description="Pixels per latent cell along one side.")
    bucket_step_px: int = Field(ge=8, le=256, description="Widths and heights must be multiples of this, in pixels.")
    native_size_px: int = Field(ge=8, le=2048, description="Side in pixels that the model was trained at.")
    latent_channels: int = Field(ge=1, le=64, description="Channels of a latent.")
    text_layers: int = Field(ge=1, le=64, description="Layers of the (first) text encoder: clip_skip's limit.")
