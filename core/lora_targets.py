"""Which UNet modules get a LoRA under each preset of `TrainConfig.targets`. Reads module names only."""

from torch import nn

from core.errors import LoraFileError
from core.train_config import TargetPreset

# Names of diffusers' UNet2DConditionModel; a preset takes every module whose dotted name ends in one of its words.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
PROJECTIONS = ("proj_in", "proj_out")
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "conv")


def target_modules(unet: nn.Module, preset: TargetPreset) -> list[str]:
    """Full dotted names of a preset's modules, in the UNet's own order.

    - attention: queries, keys, values and outputs of self- and cross-attention (128 modules in SD 1.5).
    - attention_ff: plus the feed-forward layers (160).
    - all_linear: every linear layer of the blocks, their time projections included; not the embeddings before the
      blocks, which other tools cannot name.
    - with_conv: attention_ff plus the projections around each transformer and all convolutions of residual blocks and
      of down- and upsamplers.

    Args:
        unet: A diffusers UNet2DConditionModel.
        preset: As in `TrainConfig.targets`.

    Raises:
        LoraFileError: The UNet has no such module.
    """
    words = {
        "attention": ATTENTION,
        "attention_ff": ATTENTION + FEED_FORWARD,
        "all_linear": (),  # by type instead
        "with_conv": ATTENTION + FEED_FORWARD + PROJECTIONS + CONVOLUTIONS,
    }[preset]
    endings = tuple("." + word for word in words)
    names = [
        name
        for name, module in unet.named_modules()
        if name.startswith(BLOCKS) and isinstance(module, nn.Linear | nn.Conv2d)
        if (isinstance(module, nn.Linear) if preset == "all_linear" else name.endswith(endings))
    ]
    if not names:
        raise LoraFileError(f"this UNet has no modules of the preset {preset}: choose another one")
    return names
